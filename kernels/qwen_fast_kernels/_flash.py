"""The pieces of flash attention over packed sequences: spans of rows, tiles of keys, the softmax step, rows left over.

A span is a run of adjacent token rows that belong to one sequence.
"""

import itertools

import torch

from ._triton import HAS_TRITON, tl, triton

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


def fits_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether a `rows_descriptor` can address the tensors: heads side by side, base and row stride in units of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0
        and tensor.stride(1) == tensor.shape[2]
        and tensor.stride(0) > 0
        and tensor.stride(0) * tensor.element_size() % 16 == 0
        for tensor in tensors
    )


def rows_descriptor(tensor: torch.Tensor, block: int) -> "TensorDescriptor":
    """Descriptor of `[R, H, D]` in tiles of `block` rows of one head; rows behind the last read as zeros.

    Of rank 2, `[R, H * D]`: a tile of rank 3 would have to be reshaped, and the compiler takes the reshape for the tile's
    last use. With warp specialisation it then frees the tile before the products have read it.
    """
    rows, heads, dim = tensor.shape
    return TensorDescriptor(tensor, [rows, heads * dim], [tensor.stride(0), 1], [block, dim])


def starts_of_spans(name: str, cu_seqlens: torch.Tensor, rows: int, max_seqlen: int) -> list[int]:
    """cu_seqlens as a list; a ValueError that names it if its spans leave the rows or are longer than max_seqlen."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] > rows or any(start > end for start, end in itertools.pairwise(starts)):
        raise ValueError(f"{name}: {starts} does not rise from 0 to at most {rows}, the rows of its stream.")
    longest = max(end - start for start, end in itertools.pairwise(starts))
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen_{name[-3:]}: {max_seqlen} is less than the longest sequence, {longest} rows.")
    return starts


@triton.jit
def span_of(cu_seqlens_ptr, sequence, first_row, end_row):
    """First row and length of a sequence's span: within [first_row, end_row], whatever cu_seqlens holds."""
    rows = end_row - first_row
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), start), rows)
    return first_row + start, end - start


@triton.jit
def load_tile(
    source, row, left, head, row_stride, head_stride, BLOCK: tl.constexpr, DIM: tl.constexpr, DESCRIPTOR: tl.constexpr
):
    """`[BLOCK, DIM]` from `row` on, of a pointer or of a `rows_descriptor`.

    By a pointer, rows from `left` on are zeros. By a descriptor they are what the tensor holds there.
    """
    if DESCRIPTOR:
        tile = source.load([row, head.to(tl.int32) * DIM])
    else:
        rows = tl.arange(0, BLOCK)
        offsets = rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, DIM)[None, :]  # [BLOCK, DIM]
        start = row.to(tl.int64) * row_stride + head * head_stride
        tile = tl.load(source + start + offsets, mask=(rows < left)[:, None], other=0.0)
    return tile


@triton.jit
def no_scores(BLOCK_M: tl.constexpr, DIM: tl.constexpr):
    """acc, total and top of the running softmax before its first step."""
    # Lower than any score and yet finite: in a row whose keys are all masked, -inf - -inf would be NaN.
    top = tl.full((BLOCK_M,), -1.0e30, tl.float32)
    return tl.zeros((BLOCK_M, DIM), tl.float32), tl.zeros((BLOCK_M,), tl.float32), top


@triton.jit
def softmax_step(acc, total, top, scores, value, scale_log2):
    """Take a tile of `scores` [BLOCK_M, BLOCK_N] (-inf: no key) and of `value` [BLOCK_N, D] into the running softmax.

    `top` is the largest scaled score so far, `total` the sum of exp2(score - top), `acc` that sum weighted with value.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])  # [BLOCK_M, BLOCK_N]
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(weights, 1)
    acc = acc * rescale[:, None]
    acc = tl.dot(weights.to(value.dtype), value, acc, input_precision="ieee", out_dtype=tl.float32)
    return acc, total, new_top


@triton.jit
def fill_uncovered(out_ptr, row_stride, start, length, covered, end, part, parts, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Write part `part` of `parts` of the rows before `end` that no tile of queries writes.

    NaN where a sequence is longer than the `covered` rows, which nobody overlooks; zeros behind its end.
    """
    end_of_sequence = start + length
    rows = tl.arange(0, ROWS)
    for row in range(start + tl.minimum(length, covered) + part * ROWS, end, parts * ROWS):
        value = tl.where(row + rows < end_of_sequence, float("nan"), 0.0).to(out_ptr.dtype.element_ty)
        offsets = (row + rows).to(tl.int64)[:, None] * row_stride + tl.arange(0, DIM)[None, :]  # [ROWS, DIM]
        tl.store(out_ptr + offsets, tl.broadcast_to(value[:, None], (ROWS, DIM)), mask=(row + rows < end)[:, None])
