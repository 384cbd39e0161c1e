"""What others attached to a module: hooks of torch, accelerate and diffusers, and compilation."""

import enum
import functools
import types
from typing import Any, NamedTuple

from torch import nn

OURS = "_qwen_fast_forward"  # attribute that marks the forwards of our own classes


# Hooks of diffusers that move or cast weights and leave arguments and results as they are.
_PLACING = {
    *("group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker"),
    *("layerwise_casting", "peft_autocast_disable"),
}
_CACHE_PACKAGE = "cache_dit"


class Kind(enum.Enum):
    """What something attached to a module asks of whoever would work around the module."""

    PLACES = "its weights are there only while the module is called"
    CACHES = "the module has to be called with stock's arguments, by a cache that is known"
    FOREIGN = "the module has to be called with stock's arguments, and nothing is known of what happens then"


class Attached(NamedTuple):
    """What is attached to a module: its kind, and in words."""

    kind: Kind
    words: str


def attached(module: nn.Module, *, compiled: bool = True) -> Attached | None:
    """What calling `module` does beside its class's forward, or None.

    Args:
        compiled: False: the caller knows that the module is compiled, and sees to it.
    """
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return Attached(Kind.FOREIGN, "a forward hook")
    if compiled and compiled_call(module) is not None:
        return Attached(Kind.FOREIGN, "torch.compile")
    forward = own.get("forward")
    if forward is None or is_own_forward(forward, module):  # diffusers leaves it behind when it removes its last hook
        return None
    return _of_forward(forward, module)


def compiled_call(module: nn.Module) -> Any | None:
    """What `module.compile()` has left on a module; its own call, where compilation is switched off, counts as none."""
    found = module.__dict__.get("_compiled_call_impl")
    return None if found is None or found == module._call_impl else found


def _of_forward(forward: Any, module: nn.Module) -> Attached | None:
    """What a forward does that was put on a module itself, and what lies below it."""
    if is_own_forward(forward, module):
        return None
    own, home = module.__dict__, _package(forward)
    registry = own.get("_diffusers_hook")
    if home == "diffusers" and registry is not None and registry._fn_refs:
        below = _of_forward(registry._fn_refs[0].original_forward or registry._fn_refs[0].forward, module)
        names = set(registry.hooks) - _PLACING
        strange = [hook for hook in registry.hooks.values() if not type(hook).__module__.startswith("diffusers.")]
        if strange:
            here = Attached(Kind.FOREIGN, f"a {type(strange[0]).__name__}")
        elif names:
            here = Attached(Kind.CACHES, f"diffusers' {min(names)}")
        else:
            here = Attached(Kind.PLACES, "diffusers' offloading")
    elif home == "accelerate" and "_hf_hook" in own:
        below = _of_forward(own.get("_old_forward", forward), module) if own.get("_old_forward") is not forward else None
        hooks = getattr(own["_hf_hook"], "hooks", (own["_hf_hook"],))
        if any(type(hook).__module__.partition(".")[0] != "accelerate" for hook in hooks):
            here = Attached(Kind.FOREIGN, f"a {type(own['_hf_hook']).__name__}")
        else:
            here = Attached(Kind.PLACES, "accelerate's offloading")
    elif home == _CACHE_PACKAGE:
        below = _of_forward(own["_original_forward"], module) if "_original_forward" in own else None
        here = Attached(Kind.CACHES, "cache-dit")
    else:
        return Attached(Kind.FOREIGN, "a forward of its own")
    return max(filter(None, (here, below)), key=lambda one: _ORDER[one.kind])


_ORDER = {kind: place for place, kind in enumerate(Kind)}


def _package(forward: Any) -> str:
    """The package whose code a forward on an instance is."""
    while isinstance(forward, functools.partial):
        forward = forward.func
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    if code is None:
        return ""
    return getattr(getattr(forward, "__func__", forward), "__globals__", {}).get("__name__", "").partition(".")[0]


def modules_below(model: nn.Module) -> list[nn.Module]:
    """`model` and all modules below it, each once."""
    found, seen = [model], {id(model)}
    for module in found:  # which grows meanwhile
        below = module.__dict__.get("_modules")
        if below is None:  # of a scripted one
            below = dict(module.named_children())
        for child in below.values() if below else ():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def hooked_below(model: nn.Module) -> bool:
    """Whether a hook of accelerate's or diffusers' is on `model` or below it."""
    for module in modules_below(model):
        own = module.__dict__
        registry = own.get("_diffusers_hook")  # which diffusers leaves behind, empty
        if "_hf_hook" in own or (registry is not None and registry.hooks):
            return True
    return False


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: then it has to be called, and cannot be read around."""
    return attached(module) is not None


def rebind_forward(module: nn.Module) -> None:
    """Make hooks that captured `module.forward` under another class call the forward of its present class."""

    def present(forward):
        return types.MethodType(type(module).forward, module) if is_own_forward(forward, module) else forward

    for name in ("forward", "_old_forward"):  # what a removed hook leaves behind, and what accelerate's hooks call
        if name in module.__dict__:
            module.__dict__[name] = present(module.__dict__[name])
    registry = module.__dict__.get("_diffusers_hook")
    for reference in getattr(registry, "_fn_refs", ()):
        reference.forward = present(reference.forward)
        reference.original_forward = present(reference.original_forward)


def is_own_forward(forward: object, module: nn.Module) -> bool:
    """Whether `forward` is the method of the module's class, or of the one that `enable` gave it for a while."""
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return False
    methods = [vars(cls).get("forward") for cls in type(module).__mro__]
    return forward.__func__ in methods or hasattr(forward.__func__, OURS)
