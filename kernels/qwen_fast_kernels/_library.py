"""The operators of `torch.ops.qwen_fast`, the only registry: the dtypes that they take, and what replaces a wrong kernel."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FLOATS_OF_CPU = (*FLOATS, torch.float64)

_LIBRARY = torch.library.Library("qwen_fast", "DEF")


class _Operator(NamedTuple):
    kernel: Callable[..., Any]
    by_torch: Callable[..., Any] | None


_OPERATORS: dict[str, _Operator] = {}  # by name, with its overload
# Where torch's operators run instead: device and dtype of a call's first tensor; and the registrations that see to it.
_REPLACED: dict[str, set[tuple[torch.device, torch.dtype]]] = {}
_REPLACEMENTS: dict[str, torch.library.Library] = {}


def register(
    schema: str,
    *,
    cuda: Callable[..., Any],
    cpu: Callable[..., Any],
    fake: Callable[..., Any],
    by_torch: Callable[..., Any] | None = None,
) -> None:
    """Define the operator `schema` with its kernels and its shape function.

    `Library.define` and not `torch.library.custom_op`: a call costs 2 us more than the bare function, not 9 (measured on
    a CPU, hot; several times that between a model's forwards, when nothing of it is in the caches).

    `by_torch` computes the same with torch's operators alone and without waiting for the device; see `replace_kernel`.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, cuda, "CUDA")
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"qwen_fast::{name}", fake, lib=_LIBRARY)
    _OPERATORS[name] = _Operator(cuda, by_torch)


def replace_kernel(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """From now on torch's operators compute `op` on this device in this dtype, in this process; False: it has none for that.

    The driver calls this for a kernel that did not prove itself, and says so. The registry gets another kernel then, so that
    an operator whose kernel is right pays nothing for the question. All its flags are replaced together: a device on which
    one of them comes out wrong is not one to trust with the others.
    """
    names = [name for name in _OPERATORS if name.split(".")[0] == op and _OPERATORS[name].by_torch is not None]
    for name in names:
        if name not in _REPLACED:
            _REPLACED[name] = set()
            library = _REPLACEMENTS[name] = torch.library.Library("qwen_fast", "IMPL")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that a kernel is overridden is the point
                library.impl(name, _choosing(name), device.type.upper(), allow_override=True)
        _REPLACED[name].add((device, dtype))
    return bool(names)


def restore_kernels() -> None:
    """Take all replacements out again."""
    for library in _REPLACEMENTS.values():
        library._destroy()
    _REPLACEMENTS.clear()
    _REPLACED.clear()


def is_replaced(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's operators compute `op` there: whoever launches its kernel without the registry has to ask."""
    return any((device, dtype) in places for name, places in _REPLACED.items() if name.split(".")[0] == op)


def _choosing(name: str) -> Callable[..., Any]:
    operator, places = _OPERATORS[name], _REPLACED[name]

    def choose(*args: Any, **kwargs: Any) -> Any:
        first = next(argument for argument in args if isinstance(argument, torch.Tensor))
        function = operator.by_torch if (first.device, first.dtype) in places else operator.kernel
        return function(*args, **kwargs)

    return choose
