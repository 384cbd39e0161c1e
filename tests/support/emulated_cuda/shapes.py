"""Results whose last digits depend on the sizes of what goes in, as a GPU's do: its libraries choose kernels by shape.

More than any one library does it: every product, convolution, attention and reduction, and every operator of ours, is off by a
number of roundings that all sizes of its inputs decide. What computes by elements, or only moves values, is the same for all.
"""

import functools
import zlib
from collections.abc import Callable
from typing import Any

import torch

from support.emulated_cuda.arguments import tensors_in
from support.emulated_cuda.operators import PRODUCTS

_ROUNDINGS = 251  # of fp32, so that two sizes hardly ever look the same
_OTHERS = ("convolution", "scaled_dot_product_attention", "_softmax", "native_batch_norm", "mean", "sum")
_OTHERS += (
    "linalg_vector_norm",
    "var",
    "var_mean",
    "cumsum",
    "mv",
    "addmv",
    "dot",
)  # torch takes layer and group norms apart for this device
SHAPED = {*PRODUCTS, *(f"aten::{name}" for name in _OTHERS)}


def shaped(name: str) -> bool:
    """Whether a kernel is chosen by shape for this operator."""
    return name.split(".")[0] in SHAPED or name.startswith("qwen_fast::")


def by_shape(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, its floating-point results off by what the sizes of its arguments say."""

    @functools.wraps(compute)
    def computed(*args: Any, **kwargs: Any) -> Any:
        sizes = [tuple(tensor.shape) for tensor in tensors_in((args, kwargs))]
        roundings = 1 + zlib.crc32(repr(sizes).encode()) % _ROUNDINGS
        found = compute(*args, **kwargs)
        for value in tensors_in(found):
            if value.dtype.is_floating_point:
                value.mul_(1 + roundings * torch.finfo(value.dtype).eps)
        return found

    return computed
