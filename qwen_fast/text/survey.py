"""What of a text encoder its weights do not tell: the code that a text passes through, and what its modules hold besides.

Code has to be transformers' and torch's own, or nothing is known of what it computes. Attributes are told in words that every
process finds alike.
"""

import enum
import functools
import operator
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._device import DeviceContext

from ..common.own import foreign_functions, foreign_methods, is_own_function

PACKAGES = ("transformers.", "torch.nn.", "peft.")  # whose classes are known; quantised layers show in their tensors
_FUNCTIONS = ("linear", "conv3d", "embedding", "scaled_dot_product_attention", "silu", "softmax", "rms_norm")
_TABLES = {
    "ALL_ATTENTION_FUNCTIONS": "transformers.modeling_utils",
    "ALL_MASK_ATTENTION_FUNCTIONS": "transformers.masking_utils",  # newer than the oldest transformers
}
_SCALARS = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
_OWN_TYPES = ("transformers.", "torch.", "peft.", "accelerate.", "diffusers.", "builtins")
# What torch keeps in each module, where a module came from, what is for training, and what hooks put there: that is looked at
# by itself.
_APART = (vars(nn.Module()).keys() - {"training"}) | {
    *("_is_hf_initialized", "name_or_path", "_hf_peft_config_loaded", "peft_config", "_output_capturing_hooks_installed"),
    *("gradient_checkpointing", "_gradient_checkpointing_func", "extra_repr"),
    *("forward", "_old_forward", "_hf_hook", "_diffusers_hook"),
}


def reader(own: dict[str, Any]) -> Callable[[dict[str, Any]], tuple]:
    """Reads what a module's dictionary holds beside tensors and modules; of a module of the same class it does so too."""
    names = [name for name in own if name not in _APART]
    return operator.itemgetter(*names, "training")  # of a single name it would make no tuple


class Attributes:
    """What modules hold, told so that it can be compared and kept without keeping anything of the encoder alive.

    Attributes:
        configs: the configurations met, the encoder's own first.
        tensors: those held as plain attributes.
        foreign: what was met that is neither a plain value nor of a known package, or None.
    """

    def __init__(self, config: Any):
        self.configs, self.tensors = [config], []
        self._places = {id(config): 0}
        self.foreign: str | None = None

    def told(self, values: list[Any]) -> list[Any]:
        return [value if type(value) in _SCALARS else self._told(value) for value in values]

    def _told(self, value: Any) -> str:
        kind = type(value)
        if isinstance(value, transformers.PretrainedConfig):
            if id(value) not in self._places:
                self._places[id(value)] = len(self.configs)
                self.configs.append(value)
            return f"config {self._places[id(value)]}"
        if kind in (torch.Tensor, nn.Parameter):
            self.tensors.append(value)
            return "tensor"
        if kind in (set, frozenset):
            return str(sorted(map(repr, value)))
        if kind in (list, tuple, dict) or isinstance(value, enum.Enum):
            return repr(value)
        named = value if isinstance(value, types.FunctionType | types.MethodType) else kind
        name = f"{named.__module__}.{named.__qualname__}"
        if not name.startswith(_OWN_TYPES):
            self.foreign = self.foreign or f"{name} is an attribute of one of its modules"
        return name


def foreign_code(encoder: nn.Module, kinds: Iterable[type], implementations: Iterable[str]) -> tuple[str | None, list[str]]:
    """Why the code that a text passes through is not known, or None; and the functions that it finds in transformers' tables.

    Args:
        encoder: the text encoder; classes and functions of its module are asked about.
        kinds: classes of the modules that a text passes through.
        implementations: of attention.
    """
    looked_up: list[str] = []
    return next(_foreign_code(encoder, kinds, implementations, looked_up), None), looked_up


def _foreign_code(
    encoder: nn.Module, kinds: Iterable[type], implementations: Iterable[str], looked_up: list[str]
) -> Iterator[str]:
    for part in (encoder, encoder.model):
        if not _methods(type(part)).isdisjoint(vars(part)):
            names = ", ".join(_methods(type(part)) & vars(part).keys())
            yield f"{names} of its {type(part).__name__} was replaced"
    found = []
    for kind in (type(encoder.model), *kinds):
        if kind.__module__.startswith(PACKAGES):
            found += foreign_methods(kind, ("forward",)) + foreign_methods(kind, _methods(kind))
        elif not _is_installed(kind.__module__):
            yield f"{kind.__qualname__} is a class of {kind.__module__}, whose code may change"
    homes = {type(encoder).__module__}
    for table, module in _TABLES.items():
        entries = vars(sys.modules.get(module, types)).get(table, {})
        for implementation in implementations:
            entry = entries.get(implementation)
            if entry is None:
                continue  # eager attention is a function of the encoder's module
            name = getattr(entry, "__name__", "")
            if not is_own_function(entry, "transformers", name):
                found.append(f"{table}[{implementation!r}]")
            else:
                looked_up.append(f"{entry.__module__}.{name}")
                homes.add(entry.__module__)
    for home in homes:
        found += foreign_functions(sys.modules[home], _functions(home))
    found += foreign_functions(F, _FUNCTIONS)
    if found:
        yield f"{found[0]} was replaced"
    modes = [
        torch.overrides._get_current_function_mode_stack(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    ]
    # A default device is a mode too, and changes nothing for tensors that are there.
    for mode in (type(mode).__name__ for stack in modes for mode in stack if type(mode) is not DeviceContext):
        yield f"the mode {mode} is on"


@functools.lru_cache(maxsize=64)
def _is_installed(module: str) -> bool:
    """Whether it is of an installed package, such as those that quantise, and nobody's script or notebook."""
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return file.startswith(tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib")))


@functools.lru_cache(maxsize=64)
def _methods(kind: type) -> frozenset[str]:
    """Names of the methods that its own file gives it, but for `forward`, and of those that lead there."""
    bases = [
        base for base in kind.__mro__ if base.__module__ == kind.__module__ and base.__module__.startswith("transformers.")
    ]
    functions = types.FunctionType, staticmethod, classmethod
    own = {name for base in bases for name, value in vars(base).items() if isinstance(value, functions)}
    return frozenset(own - {"__init__", "forward"} | {"__call__", "_call_impl"})


@functools.lru_cache(maxsize=64)
def _functions(module: str) -> tuple[str, ...]:
    """Names of the functions that a module has, or of what took their place, but for Python's and torch's."""
    held = vars(sys.modules[module])
    return tuple(
        name
        for name, value in held.items()
        if callable(value) and not isinstance(value, type) and not _is_only_imported(value) and not name.startswith("__")
    )


def _is_only_imported(value: Any) -> bool:
    """Whether it is the standard library's, such as `dataclass`, or torch's own, or no function but a word for types."""
    if type(value).__module__ == "typing":
        return True
    module = getattr(value, "__module__", None) or ""
    known = module in sys.stdlib_module_names or module.startswith("torch.")
    return known and getattr(sys.modules.get(module), getattr(value, "__name__", ""), None) is value
