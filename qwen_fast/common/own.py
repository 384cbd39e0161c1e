"""Will diffusers' and torch's own code run? People replace methods of classes, modules' functions and attributes of objects.

What is not known to be stock's own has to be called as it is, so the driver asks here before it goes around a function. A
function is its package's own if its code, and that of everything it wraps, lies in that package's files and it bears the name
that it was defined by. So a replacement is seen whenever it was made, before qwen_fast was imported too.

    foreign_methods(diffusers.QwenImageTransformer2DModel, ("forward",))  # [] or ["QwenImageTransformer2DModel.forward"]
    foreign_on(pipe.scheduler, ("step", "set_timesteps"))  # what the object itself has in its class's place
    foreign_functions(pipeline_qwenimage, ("calculate_shift",))
"""

import contextlib
import functools
import os
import sys
import types
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as modules
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

_PACKAGES = ("diffusers", "torch", "transformers", "accelerate", "peft", "huggingface_hub")
_OURS = "qwen_fast"
_OUR_ROOT = str(Path(__file__).parents[1]) + os.sep
# Decorators that leave what a function computes as it is: torch.no_grad, contextmanager, the check of a hub id's spelling.
_NEUTRAL = tuple(
    os.path.join(*parts) for parts in (("torch", "utils", "_contextlib.py"), ("huggingface_hub", "utils", "_validators.py"))
)
_CONTEXTLIB = contextlib.contextmanager.__code__.co_filename
# torch's functions that stock's modules call by name: built-in ones, and those written in Python.
_BUILTIN = {"linear": torch._C._nn.linear, "gelu": torch._C._nn.gelu}
_IN_PYTHON = ("silu", "layer_norm")
# Functions that older packages define by another name: transformers before 5.
_RENAMED = {"sdpa_mask": ("sdpa_mask_recent_torch", "sdpa_mask_older_torch")}
_UNNAMED = "apply_forward_hook.<locals>.wrapper"  # diffusers' decorator, which in 0.38 does not say what it wraps
_ALIASES = {("Module", "__call__"): "Module._wrapped_call_impl", ("Module", "forward"): "_forward_unimplemented"}


class _Origin(NamedTuple):
    """Where a function and all that it wraps come from: packages, without neutral decorators, and the innermost's name."""

    packages: frozenset[str]
    qualname: str


# By function, weakly: a closure that a user put in for a while may hold a whole pipeline.
_ORIGINS: "weakref.WeakKeyDictionary[Any, _Origin | None]" = weakref.WeakKeyDictionary()


def foreign_methods(cls: type, names: Iterable[str]) -> list[str]:
    """Those of `names` that `cls` does not have as the package of its class defined them, as "Class.method".

    Of classes of qwen_fast both are asked about: their own method, and the one of stock's that it may call. A name that no
    class has is left out: versions of diffusers differ in their helpers.
    """
    return [f"{cls.__name__}.{name}" for name in names if not _is_own_method(cls, name)]


def foreign_on(instance: Any, names: Iterable[str]) -> list[str]:
    """Those of `names` that stand on `instance` itself, in its class's place, and are no method of that class, as "Class.name".

    A method of its class that is bound to the same object does not count: hooks that were removed leave it behind.
    """
    held = vars(instance)
    return [
        f"{type(instance).__name__}.{name}" for name in names if name in held and not _is_own_bound(held[name], instance, name)
    ]


def foreign_forward(module: Any) -> list[str]:
    """The forward that somebody put on a torch module itself; those of accelerate's and diffusers' hooks do not count."""
    if "forward" not in vars(module) or {"_hf_hook", "_diffusers_hook"} & vars(module).keys():
        return []
    return foreign_on(module, ("forward",))


def foreign_functions(module: types.ModuleType, names: Iterable[str]) -> list[str]:
    """Those of `names` that are not a function of the package of `module` by that name, as "module.function"."""
    found, package = [], module.__name__.partition(".")[0]
    for name in names:
        function = vars(module).get(name)
        if function is not None and not is_own_function(function, package, name):
            found.append(f"{module.__name__.rpartition('.')[2]}.{name}")
    return found


def process_reason() -> str | None:
    """Why no module at all may be gone around: what somebody did to torch itself, in words, or None."""
    if modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return "hooks on all modules (register_module_forward_hook)"
    changed = foreign_methods(nn.Module, ("__call__", "_call_impl"))
    changed += [f"torch.nn.functional.{name}" for name, own in _BUILTIN.items() if getattr(F, name) is not own]
    changed += [f"torch.nn.{name}" for name in foreign_functions(F, _IN_PYTHON)]
    if changed:
        return f"{changed[0]} was replaced"
    # A dispatch mode is none: it looks on at the operators that run, ours too.
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return next((f"a {type(mode).__name__}" for mode in modes if type(mode) is not DeviceContext), None)


def is_own_function(function: Any, package: str, name: str) -> bool:
    """Whether it is what `package` defined as a function called `name`."""
    if isinstance(function, types.BuiltinFunctionType):
        return function.__name__ == name and (function.__module__ or package).partition(".")[0] == package
    origin = _origin(function)
    return origin is not None and origin.qualname in (name, *_RENAMED.get(name, ())) and origin.packages <= {package, _OURS}


def _is_own_method(cls: type, name: str) -> bool:
    for base in cls.__mro__:
        if name in base.__dict__:
            origin = _origin(_function(base.__dict__[name]))
            if origin is None or not _belongs(origin, base, name):
                return False
            if _OURS not in origin.packages:
                return True  # else what it calls with `super()` is asked about too
    return True


def _is_own_bound(value: Any, instance: Any, name: str) -> bool:
    while isinstance(value, types.FunctionType) and _package(value.__code__.co_filename) == _OURS:
        value = getattr(value, "__wrapped__", None)  # such as the covers of `stages.staged`
    if not isinstance(value, types.MethodType) or value.__self__ is not instance:
        return False
    origin = _origin(value.__func__)
    # Another method's function under this name is none of the class's own either.
    return origin is not None and any(_belongs(origin, base, name) for base in type(instance).__mro__)


def _belongs(origin: _Origin, base: type, name: str) -> bool:
    """Whether a function that comes from `origin` is what the package of `base` defined as `base.name`."""
    package = base.__module__.partition(".")[0]
    if _OURS not in origin.packages and (package not in _PACKAGES or origin.packages != {package}):
        return False
    return origin.qualname == _ALIASES.get((base.__qualname__, name), f"{base.__qualname__}.{name}")


def _function(attribute: Any) -> Any:
    """The function behind what a class holds in its dictionary."""
    if isinstance(attribute, property):
        return attribute.fget
    if isinstance(attribute, (staticmethod, classmethod)):
        return attribute.__func__
    return attribute


def _origin(function: Any) -> _Origin | None:
    """Where a plain function comes from; None for anything else, for code of other files, and for what was compiled."""
    if isinstance(function, functools._lru_cache_wrapper):
        function = function.__wrapped__
    if not isinstance(function, types.FunctionType):
        return None
    try:
        return _ORIGINS[function]
    except KeyError:
        origin = _ORIGINS[function] = _read_origin(function)
        return origin


def _read_origin(function: types.FunctionType) -> _Origin | None:
    packages: set[str] = set()
    while True:
        if isinstance(function, types.MethodType):
            function = function.__func__
        if not isinstance(function, types.FunctionType):
            return None
        file, wrapped = function.__code__.co_filename, _wrapped(function)
        uncompiled = "_torchdynamo_disable" in vars(function)  # torch.compiler.disable
        neutral = wrapped is not None and (file == _CONTEXTLIB or file.endswith(_NEUTRAL) or uncompiled)
        package = _package(file)
        if not neutral and (package is None or (package == "torch" and wrapped is not None)):
            return None  # torch's other decorators change what is computed: autocast, compile
        if not neutral:
            packages.add(package)
        if wrapped is None:
            return _Origin(frozenset(packages), function.__qualname__)
        function = wrapped


def _wrapped(function: types.FunctionType) -> Any:
    """What a decorated function calls, where that is known."""
    if function.__qualname__ == _UNNAMED and _package(function.__code__.co_filename) == "diffusers":
        return function.__closure__[function.__code__.co_freevars.index("method")].cell_contents
    return function.__dict__.get("__wrapped__")


@functools.lru_cache(maxsize=1024)
def _package(file: str) -> str | None:
    """Which of the packages a source file belongs to."""
    if file.startswith(_OUR_ROOT):
        return _OURS
    for name in _PACKAGES:
        module = sys.modules.get(name)
        if module is not None and file.startswith(os.path.dirname(module.__file__ or "\0") + os.sep):
            return name
    return None
