"""What the tests of linear_gelu and linear_gated_residual share: shapes, tiles, layouts, arguments that must be refused."""

import contextlib
import functools
from unittest import mock

import numpy as np
import pytest
import torch

from qwen_fast_kernels._matmul import tile
from support.canaries import between_canaries

DTYPES = [torch.bfloat16, torch.float16, torch.float32]

# R, K, N: one row, several tiles on every axis, a tail on every axis, one element less and more than a tile.
SHAPES = [(1, 64, 64), (77, 64, 72), (33, 80, 40), (31, 32, 33)]
# Rows that no descriptor can address, and fewer channels than a tile.
ODD_SHAPES = [(5, 37, 7), (1, 1, 1), (33, 7, 31), (3, 33, 65)]
MODEL = (5, 3072, 40)  # its real K, few rows and columns

POINTERS = tile(32, 32, 32, 2, 4, 2)
DESCRIPTORS = tile(32, 32, 32, 4, 4, 2, True)


def by_pointers(launch):
    return between_canaries(launch, config=POINTERS)


def by_descriptors(launch):
    """The persistent launch: in the interpreter two programs, each of which takes several tiles."""
    return between_canaries(launch, config=DESCRIPTORS)


def implementations(launch, op) -> list:
    return [
        pytest.param(by_pointers(launch), id="pointers", marks=pytest.mark.triton),
        pytest.param(by_descriptors(launch), id="descriptors", marks=pytest.mark.triton),
        pytest.param(op, id="op"),
    ]


def any_strides(launch, op) -> list:
    """The implementations that take rows of any alignment."""
    return [implementation for implementation in implementations(launch, op) if implementation.id != "descriptors"]


@functools.cache
def layer(shape: tuple, dtype: torch.dtype, device: torch.device, magnitude: float = 1.0) -> tuple[torch.Tensor, ...]:
    """x, weight and bias of that (R, K, N); the product has about the given magnitude."""
    rows, k, n = shape
    generator = torch.Generator().manual_seed(rows + 7 * k + 31 * n)
    x, weight, bias = (torch.randn(*size, generator=generator) for size in ((rows, k), (n, k), (n,)))
    values = (x * magnitude**0.5, weight * (magnitude / k) ** 0.5, bias * magnitude)
    return tuple(value.to(device=device, dtype=dtype) for value in values)


def in_rows(tensor: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    """The same matrix as columns of a wider one, of which the other columns are NaN."""
    wide = tensor.new_full((tensor.shape[0], before + tensor.shape[1] + behind), float("nan"))
    view = wide[:, before : before + tensor.shape[1]]
    return view.copy_(tensor)


@contextlib.contextmanager
def reads_only(*tensors: torch.Tensor | None):
    """Inside, an interpreted kernel may load from the elements of these contiguous tensors and from nowhere else."""
    from triton.runtime.interpreter import InterpreterBuilder

    ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t is not None]
    load, reads = InterpreterBuilder.create_masked_load, []

    def checked(self, pointers, mask, *rest, **options):
        taken = np.asarray(mask.data).astype(bool)  # Triton 3.6 has an array where 3.9 has a handle
        addresses = np.broadcast_to(pointers.data, taken.shape)[taken]
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in ranges:
            inside |= (addresses >= begin) & (addresses < end)
        assert inside.all(), f"{(~inside).sum()} of {inside.size} elements are read outside the inputs"
        reads.append(inside.size)
        return load(self, pointers, mask, *rest, **options)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", checked):
        yield
    assert sum(reads), "no load was seen"


@contextlib.contextmanager
def sums_in_sequence():
    """Inside, an interpreted fp32 product adds its terms as a GPU's does, one fused multiply-add after the other; numpy's sums
    pairwise, which is nearer to exact."""
    from triton.runtime.interpreter import InterpreterBuilder

    def dot(self, a, b, accumulator, *_):
        total = accumulator.data
        for column, row in zip(a.data.T, b.data, strict=True):
            total = (np.multiply.outer(column.astype(np.float64), row.astype(np.float64)) + total).astype(np.float32)
        return type(accumulator)(total, accumulator.dtype.scalar)

    with mock.patch.object(InterpreterBuilder, "create_dot", dot):
        yield


# Arguments beside x [4, 16], weight [8, 16] and bias [8] in fp32.
BAD_LINEAR = {
    "vector x": ("x", torch.zeros(16), r"x: shape \(16,\)"),
    "no rows": ("x", torch.zeros(0, 16), r"x: shape \(0, 16\)"),
    "integer x": ("x", torch.zeros(4, 16, dtype=torch.int32), r"x: dtype torch.int32"),
    "fp8 x": ("x", torch.zeros(4, 16).to(torch.float8_e4m3fn), r"x: dtype torch.float8"),
    "transposed x": ("x", torch.zeros(16, 4).t(), r"x: stride 4"),
    "weight of another K": ("weight", torch.zeros(8, 15), r"weight: shape \(8, 15\)"),
    "transposed weight": ("weight", torch.zeros(16, 8).t(), r"weight: stride 8"),
    "no columns": ("weight", torch.zeros(0, 16), r"weight: shape \(0, 16\)"),
    "vector weight": ("weight", torch.zeros(16), r"weight: shape \(16,\)"),
    "bf16 weight": ("weight", torch.zeros(8, 16, dtype=torch.bfloat16), r"weight: dtype torch.bfloat16"),
    "weight elsewhere": ("weight", torch.zeros(8, 16, device="meta"), r"weight: on meta"),
    "short bias": ("bias", torch.zeros(7), r"bias: shape \(7,\)"),
    "bias that would broadcast": ("bias", torch.zeros(1, 8), r"bias: shape \(1, 8\)"),
    "strided bias": ("bias", torch.zeros(16)[::2], r"bias: .*contiguous"),
    "fp16 bias": ("bias", torch.zeros(8, dtype=torch.float16), r"bias: dtype torch.float16"),
    "bias elsewhere": ("bias", torch.zeros(8, device="meta"), r"bias: on meta"),
}
