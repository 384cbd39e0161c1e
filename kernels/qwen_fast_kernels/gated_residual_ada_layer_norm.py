"""A gated branch added to the residual stream, and the modulated LayerNorm of the sum for the next branch.

    y      = residual + gate[t, stream] * branch,   clipped to +-65504 if asked for, rounded
    normed = (y - mean(y)) / sqrt(var(y) + eps) * (1 + scale[t, stream]) + shift[t, stream]
    t = token_rows[token] where that is not negative, else step_index

Grid: one program per BLOCK_ROWS tokens of one stream.
"""

import torch
import torch.nn.functional as F

from ._launch import launch
from ._library import register
from ._modulation import VARYING, table_row, table_strides
from ._row_norm import (
    LARGEST_FP16,
    ada_layer_norm_of_stretches,
    add_gated,
    check_row_op,
    gated_residual_of_stretches,
    layer_norm,
    load_modulation,
    load_tokens,
    per_token,
    round_to,
    row_config,
    row_grid,
    rows_of_program,
    scale_and_shift,
    store_tokens,
    stretches,
    too_many,
)
from ._triton import require_triton, tl, triton
from .tuning import get_config


def gated_residual_ada_layer_norm_reference(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    eps: float = 1e-6,
    clip: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    compute_dtype = torch.promote_types(residual.dtype, torch.float32)
    gate, shift, scale = (
        per_token(table, step_index, txt_rows, token_rows, len(residual)).to(compute_dtype) for table in (gate, shift, scale)
    )
    y = residual.to(compute_dtype) + gate * branch.to(compute_dtype)
    y = (y.clip(-LARGEST_FP16, LARGEST_FP16) if clip else y).to(residual.dtype)
    normed = F.layer_norm(y.to(compute_dtype), y.shape[-1:], eps=eps)
    return y, (normed * (1 + scale) + shift).to(residual.dtype)


@triton.jit(do_not_specialize=VARYING)
def _gated_residual_ada_layer_norm_kernel(
    y_ptr,
    normed_ptr,
    residual_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    step_index_ptr,
    token_rows_ptr,
    rows,
    txt_rows,
    conditions,
    eps,
    residual_stride,
    branch_stride,
    gate_stride,
    gate_text,
    shift_stride,
    shift_text,
    scale_stride,
    scale_text,
    HAS_TOKEN_ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    own_row, end, is_text = rows_of_program(rows, txt_rows, BLOCK_ROWS)
    row = tl.minimum(own_row, end - 1)
    t = table_row(row, step_index_ptr, token_rows_ptr, HAS_TOKEN_ROWS) + tl.zeros_like(row)
    residual = load_tokens(residual_ptr, row, residual_stride, CHANNELS, BLOCK_CHANNELS)
    branch = load_tokens(branch_ptr, row, branch_stride, CHANNELS, BLOCK_CHANNELS)
    gate = load_modulation(gate_ptr, t, conditions, gate_stride, gate_text, is_text, CHANNELS, BLOCK_CHANNELS)
    shift = load_modulation(shift_ptr, t, conditions, shift_stride, shift_text, is_text, CHANNELS, BLOCK_CHANNELS)
    scale = load_modulation(scale_ptr, t, conditions, scale_stride, scale_text, is_text, CHANNELS, BLOCK_CHANNELS)
    # Stock normalises the residual stream as it is stored, so the sum is rounded first.
    y = round_to(add_gated(residual, gate, branch, LIMIT), y_ptr.dtype.element_ty)
    store_tokens(y_ptr, y, own_row, end, CHANNELS, BLOCK_CHANNELS)
    normed = scale_and_shift(layer_norm(y, eps, CHANNELS, BLOCK_CHANNELS), scale, shift)
    store_tokens(normed_ptr, normed, own_row, end, CHANNELS, BLOCK_CHANNELS)


def launch_gated_residual_ada_layer_norm(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    eps: float = 1e-6,
    clip: bool = False,
    *,
    config: dict,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, channels = residual.shape
    y = torch.empty(rows, channels, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(rows, channels, dtype=residual.dtype, device=residual.device)
    if rows:
        own = step_index if token_rows is None else token_rows
        launch(
            _gated_residual_ada_layer_norm_kernel,
            row_grid(rows, txt_rows, config),
            (y, normed, residual, branch, gate, shift, scale, step_index, own),
            (rows, txt_rows, gate.shape[0], eps),
            (residual.stride(0), branch.stride(0), *table_strides(gate), *table_strides(shift), *table_strides(scale)),
            HAS_TOKEN_ROWS=token_rows is not None,
            LIMIT=LARGEST_FP16 if clip else None,
            CHANNELS=channels,
            **config,
            enable_fp_fusion=True,
        )
    return y, normed


def gated_residual_ada_layer_norm(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    eps: float = 1e-6,
    clip: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A gated branch added to the residual stream, and the modulated LayerNorm of the rounded sum, in one pass.

    Args:
        residual (Tensor): `[R, C]` bf16|fp16|fp32 (fp64 on the CPU), adjacent channels, any stride between tokens. The text
            tokens of all sequences first, then the image tokens.
        branch (Tensor): shape and dtype of `residual`; what attention or MLP made of it. Adjacent channels.
        gate (Tensor): `[T, 1 or 2 streams, C]`, image first, then text; any of those dtypes, adjacent channels.
        shift (Tensor): as `gate`, with the same T; of the LayerNorm.
        scale (Tensor): as `gate`, with the same T; of the LayerNorm.
        step_index (Tensor): `[1]` int32|int64 in [0, T), read on the device: the table row of every token.
        txt_rows (int): how many of the R tokens are text.
        token_rows (Tensor): `[R]` int32, contiguous, or None. An entry that is not negative takes `step_index`'s place for
            that token: the sample's row of a batch, or the row of timestep 0 for the condition images of an edit model.
        eps (float): added to the variance.
        clip (bool): clip the sum to +-65504, as stock does after each block in fp16: infinities too, NaN stays NaN.
    Returns:
        tuple[Tensor, Tensor]: the residual stream `y` and `normed`, both `[R, C]` in the dtype of `residual`, contiguous,
            never an alias. On CUDA a token whose row is not in the tables is NaN in both.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, with the offending value; on the CPU also a table
            row outside [0, T).
        RuntimeError: CUDA tensors without Triton.
    Error: fp32 inside, one rounding each, where stock rounds twice and four times. On the CPU a wider gate is rounded too.
    Traffic: 4 * R * C * itemsize bytes of tokens, and the table rows in use; about 11 * R * C FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenImageTransformerBlock.forward.
    """
    return torch.ops.qwen_fast.gated_residual_ada_layer_norm(
        residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, eps, clip
    )


def default_config(capability: int, channels: int, itemsize: int) -> dict:
    """The launch configuration for rows of `channels` elements of `itemsize` bytes."""
    return row_config(channels, itemsize)


def _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows) -> None:
    tables = {"gate": gate, "shift": shift, "scale": scale}
    check_row_op({"residual": residual, "branch": branch}, tables, step_index, txt_rows, token_rows)


def _gated_residual_ada_layer_norm_cuda(
    residual, branch, gate, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6, clip=False
):
    _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows)
    require_triton("gated_residual_ada_layer_norm")
    config = get_config(
        "gated_residual_ada_layer_norm", (residual.shape[1], residual.element_size()), residual.device, default_config
    )
    return launch_gated_residual_ada_layer_norm(
        residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, eps, clip, config=config
    )


def _gated_residual_ada_layer_norm_cpu(
    residual, branch, gate, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6, clip=False
):
    _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows)
    parts = stretches(len(residual), len(gate), step_index, txt_rows, token_rows)
    if not parts or too_many(parts, len(residual)):
        return gated_residual_ada_layer_norm_reference(
            residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, eps, clip
        )
    y = gated_residual_of_stretches(residual, branch, gate, parts, clip)
    return y, ada_layer_norm_of_stretches(y, shift, scale, parts, eps)


def _gated_residual_ada_layer_norm_fake(
    residual, branch, gate, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6, clip=False
):
    _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows)
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


register(
    "gated_residual_ada_layer_norm(Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
    "Tensor step_index, SymInt txt_rows=0, Tensor? token_rows=None, float eps=1e-6, bool clip=False) -> (Tensor, Tensor)",
    cuda=_gated_residual_ada_layer_norm_cuda,
    cpu=_gated_residual_ada_layer_norm_cpu,
    fake=_gated_residual_ada_layer_norm_fake,
    by_torch=gated_residual_ada_layer_norm_reference,
)
