"""What others attached to a module: hooks of torch, accelerate and diffusers, and compilation."""

import types

from torch import nn

OURS = "_qwen_fast_forward"  # attribute that marks the forwards of our own classes


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: then it has to be called, and cannot be read around."""
    attributes = module.__dict__
    forward = attributes.get("forward")
    return bool(
        # diffusers leaves the plain bound method behind when it removes its last hook.
        (forward is not None and not is_own_forward(forward, module))
        or attributes.get("_compiled_call_impl") is not None
        or attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether `module` is nothing but `x @ weight.T + bias` over plain parameters right now.

    A LoRA layer of PEFT keeps the base weight under `.weight`, quantised layers keep codes there, torchao and tensor
    parallelism put tensor subclasses into a plain nn.Linear: all these are called, never read.
    """
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not is_hooked(module)


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
