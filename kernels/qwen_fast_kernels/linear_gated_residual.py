"""A linear layer, gated and added to the residual stream.

    out = residual + gate[i, stream] * (x @ weight.T + bias),   i = the token's own table row or step_index

Grid: one program per tile of the output, or one per multiprocessor that takes several tiles.
"""

import torch
import torch.nn.functional as F

from ._library import register
from ._matmul import check_linear, column_parts, dimensions, launch_tiles, tile_config, tile_position, tile_product
from ._modulation import VARYING, check_indices, check_modulation, rows_of, table_row
from ._triton import require_triton, tl, triton
from .tuning import get_config

LARGEST = 65504.0  # finite number of fp16; stock clips there


def default_config(capability: int, rows: int, n: int, k: int, itemsize: int, aligned: bool = True) -> dict:
    """Launch configuration; no row of it was measured."""
    return tile_config(capability, rows, n, k, itemsize, aligned)


def linear_gated_residual_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    clip: bool = False,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    branch = F.linear(x.to(compute_dtype), weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
    text, image = rows_of(gate.to(compute_dtype), step_index, txt_rows, token_rows, x.shape[0])
    gated = torch.cat([text * branch[:txt_rows], image * branch[txt_rows:]])
    out = residual.to(compute_dtype) + gated
    return (out.clamp(-LARGEST, LARGEST) if clip else out).to(x.dtype)


@triton.jit(do_not_specialize=VARYING)
def _linear_gated_residual_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    x_stride,
    weight_stride,
    rows,
    n,
    k,
    bias_ptr,
    residual_ptr,
    residual_stride,
    gate_ptr,
    gate_stride,
    text_offset,
    conditions,
    step_index_ptr,
    token_rows_ptr,
    txt_rows,
    HAS_BIAS: tl.constexpr,
    HAS_TOKEN_ROWS: tl.constexpr,
    CLIP: tl.constexpr,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(n, BLOCK_N)
    width: tl.constexpr = BLOCK_N // PARTS
    # Flattened, the loads of the next tile overlap with the epilogue of this one.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = tile_position(tile, rows, n, BLOCK_M, BLOCK_N, GROUP_M)
        product = tile_product(
            x_ptr, weight_ptr, x_stride, weight_stride, tile_m, tile_n, rows, n, k,
            EVEN_K, DESCRIPTORS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        parts = column_parts(product, BLOCK_M, BLOCK_N, PARTS)
        row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        is_text = row < txt_rows
        # A row outside the table must not be read: it makes the tokens NaN, which nobody overlooks.
        index = table_row(tl.minimum(row, rows - 1), step_index_ptr, token_rows_ptr, HAS_TOKEN_ROWS)  # [BLOCK_M] or one
        known = (index >= 0) & (index < conditions)
        for part in tl.static_range(PARTS):
            column = tile_n.to(tl.int64) * BLOCK_N + part * width + tl.arange(0, width)
            inside = column < n
            branch = parts[part]
            if HAS_BIAS:
                branch += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if HAS_TOKEN_ROWS:
                gate_rows = index * gate_stride + tl.where(is_text, text_offset, 0)
                gate_offsets = gate_rows[:, None] + column[None, :]
                mask = known[:, None] & inside[None, :]
                gate = tl.load(gate_ptr + gate_offsets, mask=mask, other=float("nan")).to(tl.float32)
            else:
                mask = column < tl.where(known, n, 0)
                gate_row = gate_ptr + index * gate_stride
                image = tl.load(gate_row + column, mask=mask, other=float("nan")).to(tl.float32)
                text = tl.load(gate_row + (column + text_offset), mask=mask, other=float("nan")).to(tl.float32)
                gate = tl.where(is_text[:, None], text[None, :], image[None, :])
            mask = (row < rows)[:, None] & inside[None, :]
            residual = tl.load(residual_ptr + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)
            out = residual.to(tl.float32) + gate * branch
            if CLIP:  # comparisons with NaN are false: it stays
                out = tl.where(out > 65504.0, 65504.0, out)
                out = tl.where(out < -65504.0, -65504.0, out)
            tl.store(out_ptr + row[:, None] * n + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def launch_linear_gated_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    clip: bool = False,
    *,
    config: dict,
) -> torch.Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch_tiles(
        _linear_gated_residual_kernel,
        out,
        x,
        weight,
        bias,
        residual,
        residual.stride(0),
        gate,
        gate.stride(0),
        (gate.shape[1] - 1) * gate.stride(1),
        gate.shape[0],
        step_index,
        token_rows,
        txt_rows,
        config=config,
        HAS_BIAS=bias is not None,
        HAS_TOKEN_ROWS=token_rows is not None,
        CLIP=clip,
    )
    return out


def linear_gated_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    gate: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    clip: bool = False,
) -> torch.Tensor:
    """A linear layer, gated and added to the residual stream, `residual + gate * (x @ weight.T + bias)`.

    Products are summed in fp32 and the result is rounded once; the CPU rounds the linear layer's output as stock does.

    Args:
        x (Tensor): `[R, K]` bf16|fp16|fp32 (fp64 on the CPU), any stride between rows, adjacent channels. Text rows of all
            sequences first, then image rows.
        weight (Tensor): `[N, K]` as in nn.Linear, dtype of `x`, any stride between rows, adjacent channels.
        bias (Tensor): `[N]` contiguous, dtype of `x`; or None.
        residual (Tensor): `[R, N]`, dtype of `x`, any stride between rows, adjacent channels.
        gate (Tensor): `[T, streams, N]`, a floating-point table of T conditions for one or two streams (image first, text
            last), any strides but adjacent channels.
        step_index (Tensor): `[1]` int32|int64 in [0, T), read on the device.
        txt_rows (int): how many of the rows are text.
        token_rows (Tensor): `[R]` int32 contiguous, the table row of each token where that is not negative; or None.
        clip (bool): clamp the result to +-65504, as stock does with fp16; NaN stays NaN.
    Returns:
        Tensor: `[R, N]`, dtype of `x`, contiguous, never an alias. On CUDA a token whose table row is outside [0, T) is NaN.
    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit, with the offending value; on the CPU also table
            rows outside [0, T).
        RuntimeError: CUDA tensors without Triton.
    Error: the Triton kernel within twice the error of one rounding of the exact result, and of fp32 sums over K.
    Traffic: (R * K + N * K + 2 * R * N + 3 * N) * itemsize bytes; 2 * R * N * K FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenImageTransformerBlock.forward: the output
        projections of attention and FeedForward with the gated sums behind them.
    """
    return torch.ops.qwen_fast.linear_gated_residual(x, weight, bias, residual, gate, step_index, txt_rows, token_rows, clip)


def _check(x, weight, bias, residual, gate, step_index, txt_rows, token_rows) -> None:
    check_linear(x, weight, bias)
    shape = (x.shape[0], weight.shape[0])
    if residual.shape != shape:
        raise ValueError(f"residual: shape {tuple(residual.shape)}; {shape} is needed for this x and weight.")
    if shape[1] > 1 and residual.stride(1) != 1:
        raise ValueError(f"residual: stride {residual.stride(1)} between channels; they have to be adjacent.")
    if residual.dtype != x.dtype:
        raise ValueError(f"residual: dtype {residual.dtype} is not x's {x.dtype}; cast it first.")
    if residual.device != x.device:
        raise ValueError(f"residual: on {residual.device}, but x is on {x.device}; move it there first.")
    check_modulation(*shape, {"gate": gate}, step_index, txt_rows, token_rows, x.device)


def _linear_gated_residual_cuda(x, weight, bias, residual, gate, step_index, txt_rows=0, token_rows=None, clip=False):
    _check(x, weight, bias, residual, gate, step_index, txt_rows, token_rows)
    require_triton("linear_gated_residual")
    config = get_config("linear_gated_residual", dimensions(x, weight), x.device, default_config)
    return launch_linear_gated_residual(x, weight, bias, residual, gate, step_index, txt_rows, token_rows, clip, config=config)


def _linear_gated_residual_cpu(x, weight, bias, residual, gate, step_index, txt_rows=0, token_rows=None, clip=False):
    _check(x, weight, bias, residual, gate, step_index, txt_rows, token_rows)
    check_indices(gate.shape[0], step_index, token_rows)
    out = F.linear(x, weight, bias)
    for stream, begin, end in ((-1, 0, txt_rows), (0, txt_rows, x.shape[0])):
        if begin < end:
            if token_rows is None:
                gates = gate[int(step_index), stream]
            else:
                own = token_rows[begin:end]
                gates = gate[:, stream].index_select(0, torch.where(own >= 0, own, step_index))
            part = out[begin:end]
            torch.addcmul(residual[begin:end], gates, part, out=part)  # one pass, rounded once, where stock makes two
    return out.clamp_(-LARGEST, LARGEST) if clip else out


def _linear_gated_residual_fake(x, weight, bias, residual, gate, step_index, txt_rows=0, token_rows=None, clip=False):
    _check(x, weight, bias, residual, gate, step_index, txt_rows, token_rows)
    return x.new_empty((x.shape[0], weight.shape[0]))


register(
    "linear_gated_residual(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor gate, Tensor step_index, "
    "int txt_rows=0, Tensor? token_rows=None, bool clip=False) -> Tensor",
    cuda=_linear_gated_residual_cuda,
    cpu=_linear_gated_residual_cpu,
    fake=_linear_gated_residual_fake,
    by_torch=linear_gated_residual_reference,
)
