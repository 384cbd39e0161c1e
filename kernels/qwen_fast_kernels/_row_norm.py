"""What the operators on modulated token rows share: tiles of whole rows, LayerNorm of a tile, and the same on a CPU.

A program owns whole rows `[C]` and keeps them in registers, so that mean and centred variance take no second read. It
keeps a row as a tuple of chunks of BLOCK_CHANNELS channels: one block of the next power of two would hold 4096 places
for 3072 channels, and the idle quarter would be computed too (624 instructions a warp instead of 432 on sm_90).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ._library import FLOATS, FLOATS_OF_CPU
from ._modulation import check_indices, check_modulation, rows_of
from ._triton import tl, triton

LARGEST_FP16 = 65504.0  # where stock clips the residual stream


def row_config(channels: int, itemsize: int) -> dict:
    """Tiles of whole rows in 16-byte loads. Bandwidth alone decides, so every architecture takes the same.

    A row of 3072 channels in bf16 is three vectors of 8 for each of 128 threads. At 64 to 78 registers 6 to 8 such
    programs share a multiprocessor with 48 to 72 KiB of reads in flight; 25 KiB hide 700 ns at the 4.8 TB/s of an H200.
    A thread gets 4 vectors of a row at most before a program gets more warps; rows below 4 KiB share a program.
    """
    vector = 16 // itemsize
    block_channels = min(1 << (channels - 1).bit_length(), 128 * vector)
    chunks = -(-channels // block_channels)
    doublings = min(max((chunks - 1).bit_length() - 2, 0), 2)
    return {
        "BLOCK_ROWS": min(max(256 * vector // (chunks * block_channels), 1), 16),
        "BLOCK_CHANNELS": block_channels << doublings,
        "num_warps": 4 << doublings,
    }


def row_grid(rows: int, txt_rows: int, config: dict) -> tuple[int]:
    """No program has rows of both streams, so that most load one row of each modulation table."""
    block = config["BLOCK_ROWS"]
    return (-(-txt_rows // block) + -(-(rows - txt_rows) // block),)


@triton.jit
def rows_of_program(rows, txt_rows, BLOCK_ROWS: tl.constexpr):
    """This program's token rows (int64, `[BLOCK_ROWS]`), the end of the stream they belong to, and whether it is the text.

    Rows from that end on are not the program's; loads repeat the last row in their place, stores leave them out.
    """
    program = tl.program_id(0).to(tl.int64)
    txt_programs = tl.cdiv(txt_rows, BLOCK_ROWS)
    is_text = program < txt_programs
    first = tl.where(is_text, program * BLOCK_ROWS, txt_rows + (program - txt_programs) * BLOCK_ROWS)
    end = tl.where(is_text, txt_rows, rows)
    return first + tl.arange(0, BLOCK_ROWS), end, is_text


@triton.jit
def load_tokens(tensor_ptr, row, stride, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Rows of a token tensor as fp32 chunks. They are read once, so they may leave the caches first."""
    chunks = ()
    for start in tl.static_range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        pointers = tensor_ptr + ((row * stride)[:, None] + channel[None, :])  # [BLOCK_ROWS, BLOCK_CHANNELS]
        if start + BLOCK_CHANNELS <= CHANNELS:
            chunk = tl.load(pointers, eviction_policy="evict_first")
        else:
            chunk = tl.load(pointers, mask=(channel < CHANNELS)[None, :], eviction_policy="evict_first")
        chunks = chunks + (chunk.to(tl.float32),)
    return chunks


@triton.jit
def load_modulation(
    table_ptr, table_rows, conditions, stride, text_offset, is_text, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Each token's row of a modulation table as chunks. A row outside the table is not read: it is NaN, which shows."""
    offset = table_rows * stride + tl.where(is_text, text_offset, 0)  # [BLOCK_ROWS]
    inside = (table_rows >= 0) & (table_rows < conditions)
    chunks = ()
    for start in tl.static_range(0, CHANNELS, BLOCK_CHANNELS):
        channel = start + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        mask = inside[:, None]
        if start + BLOCK_CHANNELS > CHANNELS:
            mask = mask & (channel < CHANNELS)[None, :]
        pointers = table_ptr + (offset[:, None] + channel[None, :])  # [BLOCK_ROWS, BLOCK_CHANNELS]
        chunks = chunks + (tl.load(pointers, mask=mask, other=float("nan")).to(tl.float32),)
    return chunks


@triton.jit
def within(chunk, start, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The chunk that begins at channel `start`, with zeros beyond the last channel."""
    if start + BLOCK_CHANNELS > CHANNELS:
        channel = start + tl.arange(0, BLOCK_CHANNELS)
        chunk = tl.where((channel < CHANNELS)[None, :], chunk, 0.0)
    return chunk


@triton.jit
def layer_norm(chunks, eps, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """LayerNorm without weights, whatever the chunks hold beyond the last channel."""
    total = tl.zeros_like(chunks[0])
    for i in tl.static_range(len(chunks)):
        total += within(chunks[i], i * BLOCK_CHANNELS, CHANNELS, BLOCK_CHANNELS)
    total = tl.sum(total, axis=1)  # [BLOCK_ROWS]
    # Not a product with 1 / CHANNELS: the mean of equal channels has to be that channel, or eps magnifies the difference.
    mean = tl.div_rn(total, tl.full(total.shape, CHANNELS, tl.float32))
    centred = ()
    squares = tl.zeros_like(chunks[0])
    for i in tl.static_range(len(chunks)):
        difference = within(chunks[i] - mean[:, None], i * BLOCK_CHANNELS, CHANNELS, BLOCK_CHANNELS)
        squares += difference * difference
        centred = centred + (difference,)
    variance = tl.sum(squares, axis=1) * (1.0 / CHANNELS)
    factor = tl.rsqrt(variance + eps)[:, None]
    normed = ()
    for i in tl.static_range(len(chunks)):
        normed = normed + (centred[i] * factor,)
    return normed


@triton.jit
def scale_and_shift(chunks, scale, shift):
    out = ()
    for i in tl.static_range(len(chunks)):
        out = out + (chunks[i] * (1.0 + scale[i]) + shift[i],)
    return out


@triton.jit
def add_gated(residual, gate, branch, LIMIT: tl.constexpr):
    """residual + gate * branch, clipped to +-LIMIT unless that is None: by comparisons, so that NaN stays NaN."""
    out = ()
    for i in tl.static_range(len(residual)):
        y = residual[i] + gate[i] * branch[i]
        if LIMIT is not None:
            y = tl.where(y > LIMIT, LIMIT, tl.where(y < -LIMIT, -LIMIT, y))
        out = out + (y,)
    return out


@triton.jit
def round_to(chunks, dtype: tl.constexpr):
    """What the values are once they were stored in `dtype`."""
    out = ()
    for i in tl.static_range(len(chunks)):
        out = out + (chunks[i].to(dtype).to(tl.float32),)
    return out


@triton.jit
def store_tokens(out_ptr, chunks, row, end, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Chunks into rows of a contiguous token tensor."""
    for i in tl.static_range(len(chunks)):
        channel = i * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        pointers = out_ptr + ((row * CHANNELS)[:, None] + channel[None, :])
        mask = (row < end)[:, None]
        if (i + 1) * BLOCK_CHANNELS > CHANNELS:
            mask = mask & (channel < CHANNELS)[None, :]
        tl.store(pointers, chunks[i].to(out_ptr.dtype.element_ty), mask=mask)


def check_row_op(
    tokens: dict[str, torch.Tensor],
    tables: dict[str, torch.Tensor],
    step_index: torch.Tensor,
    txt_rows: int,
    token_rows: torch.Tensor | None,
) -> None:
    """Raise a ValueError that names the argument that an operator on modulated token rows cannot take."""
    (name, first), *others = tokens.items()
    shape, dtype, device = first.shape, first.dtype, first.device
    allowed = FLOATS if first.is_cuda else FLOATS_OF_CPU
    if dtype not in allowed:
        raise ValueError(f"{name}: dtype {dtype} is not supported on {device.type}; use one of {allowed}.")
    if len(shape) != 2 or shape[1] < 1:
        raise ValueError(f"{name}: shape {tuple(shape)}; [R tokens, C channels] with C >= 1 is needed.")
    rows, channels = shape
    for other_name, other in others:
        if other.shape != shape or other.dtype != dtype:
            raise ValueError(
                f"{other_name}: got {tuple(other.shape)} {other.dtype}; the {name}'s {tuple(shape)} {dtype} is needed."
            )
        if other.device != device:
            raise ValueError(f"{other_name}: on {other.device}, but {name} is on {device}; move it there first.")
    for each_name, each in tokens.items():
        if channels > 1 and each.stride()[1] != 1:
            raise ValueError(f"{each_name}: stride {each.stride(1)} between channels; they have to be adjacent.")
    for table_name, table in tables.items():
        if table.dtype not in allowed:
            raise ValueError(f"{table_name}: dtype {table.dtype} is not supported; use one of {allowed}.")
    check_modulation(rows, channels, tables, step_index, txt_rows, token_rows, device)


def per_token(
    table: torch.Tensor, step_index: torch.Tensor, txt_rows: int, token_rows: torch.Tensor | None, rows: int
) -> torch.Tensor:
    """The row of a modulation table that each of `rows` tokens takes, `[rows, C]`: for the references."""
    text, image = rows_of(table, step_index, txt_rows, token_rows, rows)
    return torch.cat([text.expand(txt_rows, -1), image.expand(rows - txt_rows, -1)])


def too_many(parts: list, rows: int) -> bool:
    """Whether a gather of each token's row is faster than a pass for each stretch.

    Measured in fp32 on one thread, they meet at 8 to 16 rows a stretch for 512 channels, and at 2 to 8 for 3072.
    """
    return len(parts) > 8 + rows // 8


class Stretch(NamedTuple):
    """Tokens one after another that take the same row of the modulation tables."""

    start: int
    stop: int
    stream: int
    table_row: int

    def modulation(self, table: torch.Tensor) -> torch.Tensor:
        return table[self.table_row, self.stream]

    def tokens(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.stop - self.start == len(rows) else rows[self.start : self.stop]


def stretches(
    rows: int, conditions: int, step_index: torch.Tensor, txt_rows: int, token_rows: torch.Tensor | None
) -> list[Stretch]:
    """All tokens as stretches, for the CPU: few of them, since the tokens of a stream of a sample take one row.

    Raises a ValueError for table rows that do not exist.
    """
    check_indices(conditions, step_index, token_rows)
    step = int(step_index)
    if token_rows is None:
        both = [Stretch(0, txt_rows, -1, step), Stretch(txt_rows, rows, 0, step)]
        return [stretch for stretch in both if stretch.start < stretch.stop]
    found, start = [], 0
    for stop, stream in ((txt_rows, -1), (rows, 0)):
        values, counts = torch.unique_consecutive(token_rows[start:stop], return_counts=True)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            found.append(Stretch(start, start + count, stream, value if value >= 0 else step))
            start += count
    return found


def ada_layer_norm_of_stretches(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, parts: list[Stretch], eps: float
) -> torch.Tensor:
    """LN(x) * (1 + scale) + shift by torch's own LayerNorm with weights: one pass where stock takes three."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)

    def normed(tokens: torch.Tensor, part: Stretch) -> torch.Tensor:
        weight, bias = part.modulation(scale).to(compute_dtype) + 1, part.modulation(shift).to(compute_dtype)
        return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)

    # torch has no LayerNorm into a given tensor. With the longest stretch's weights for every token, only the others
    # have to be copied into place.
    longest = max(parts, key=lambda part: part.stop - part.start)
    out = normed(x, longest)
    for part in parts:
        if part is not longest:
            part.tokens(out).copy_(normed(part.tokens(x), part))
    return out


def gated_residual_of_stretches(
    residual: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, parts: list[Stretch], clip: bool
) -> torch.Tensor:
    """residual + gate * branch in one pass, where stock takes two."""
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    for part in parts:
        each_gate = part.modulation(gate).to(residual.dtype)
        torch.addcmul(part.tokens(residual), part.tokens(branch), each_gate, out=part.tokens(out))
    return out.clamp_(-LARGEST_FP16, LARGEST_FP16) if clip else out
