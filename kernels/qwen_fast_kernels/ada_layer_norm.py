"""LayerNorm without weights, scaled and shifted by each token's row of two modulation tables.

    normed = (x - mean(x)) / sqrt(var(x) + eps) * (1 + scale[t, stream]) + shift[t, stream]
    t = token_rows[token] where that is not negative, else step_index

Grid: one program per BLOCK_ROWS tokens of one stream.
"""

import torch
import torch.nn.functional as F

from ._launch import launch
from ._library import register
from ._modulation import VARYING, table_row, table_strides
from ._row_norm import (
    ada_layer_norm_of_stretches,
    check_row_op,
    layer_norm,
    load_modulation,
    load_tokens,
    per_token,
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


def ada_layer_norm_reference(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    shift, scale = (per_token(table, step_index, txt_rows, token_rows, len(x)).to(compute_dtype) for table in (shift, scale))
    normed = F.layer_norm(x.to(compute_dtype), x.shape[-1:], eps=eps)
    return (normed * (1 + scale) + shift).to(x.dtype)


@triton.jit(do_not_specialize=VARYING)
def _ada_layer_norm_kernel(
    out_ptr,
    x_ptr,
    shift_ptr,
    scale_ptr,
    step_index_ptr,
    token_rows_ptr,
    rows,
    txt_rows,
    conditions,
    eps,
    x_stride,
    shift_stride,
    shift_text,
    scale_stride,
    scale_text,
    HAS_TOKEN_ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    own_row, end, is_text = rows_of_program(rows, txt_rows, BLOCK_ROWS)
    row = tl.minimum(own_row, end - 1)
    t = table_row(row, step_index_ptr, token_rows_ptr, HAS_TOKEN_ROWS) + tl.zeros_like(row)
    x = load_tokens(x_ptr, row, x_stride, CHANNELS, BLOCK_CHANNELS)
    shift = load_modulation(shift_ptr, t, conditions, shift_stride, shift_text, is_text, CHANNELS, BLOCK_CHANNELS)
    scale = load_modulation(scale_ptr, t, conditions, scale_stride, scale_text, is_text, CHANNELS, BLOCK_CHANNELS)
    normed = scale_and_shift(layer_norm(x, eps, CHANNELS, BLOCK_CHANNELS), scale, shift)
    store_tokens(out_ptr, normed, own_row, end, CHANNELS, BLOCK_CHANNELS)


def launch_ada_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    config: dict,
) -> torch.Tensor:
    rows, channels = x.shape
    out = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    if rows:
        launch(
            _ada_layer_norm_kernel,
            row_grid(rows, txt_rows, config),
            (out, x, shift, scale, step_index, step_index if token_rows is None else token_rows),
            (rows, txt_rows, shift.shape[0], eps),
            (x.stride(0), *table_strides(shift), *table_strides(scale)),
            HAS_TOKEN_ROWS=token_rows is not None,
            CHANNELS=channels,
            **config,
            enable_fp_fusion=True,
        )
    return out


def ada_layer_norm(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """LayerNorm without weights and modulation of it, `LN(x) * (1 + scale) + shift`, rounded once.

    Args:
        x (Tensor): `[R, C]` bf16|fp16|fp32 (fp64 on the CPU), adjacent channels, any stride between tokens. The text tokens
            of all sequences first, then the image tokens.
        shift (Tensor): `[T, 1 or 2 streams, C]`, image first, then text; any of those dtypes, adjacent channels.
        scale (Tensor): as `shift`, with the same T.
        step_index (Tensor): `[1]` int32|int64 in [0, T), read on the device: the table row of every token.
        txt_rows (int): how many of the R tokens are text.
        token_rows (Tensor): `[R]` int32, contiguous, or None. An entry that is not negative takes `step_index`'s place for
            that token: the sample's row of a batch, or the row of timestep 0 for the condition images of an edit model.
        eps (float): added to the variance.
    Returns:
        Tensor: `[R, C]`, dtype of `x`, contiguous, never an alias. On CUDA a token whose row is not in the table is NaN.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, with the offending value; on the CPU also a table
            row outside [0, T).
        RuntimeError: CUDA tensors without Triton.
    Error: fp32 inside and one rounding, where stock rounds four times in the dtype of `x`.
    Traffic: 2 * R * C * itemsize bytes of tokens, and the table rows in use; about 9 * R * C FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenImageTransformerBlock._modulate after
        img_norm1 | txt_norm1 | img_norm2 | txt_norm2; models/normalization.py, AdaLayerNormContinuous.forward (norm_out).
    """
    return torch.ops.qwen_fast.ada_layer_norm(x, shift, scale, step_index, txt_rows, token_rows, eps)


def default_config(capability: int, channels: int, itemsize: int) -> dict:
    """The launch configuration for rows of `channels` elements of `itemsize` bytes."""
    return row_config(channels, itemsize)


def _check(x, shift, scale, step_index, txt_rows, token_rows) -> None:
    check_row_op({"x": x}, {"shift": shift, "scale": scale}, step_index, txt_rows, token_rows)


def _ada_layer_norm_cuda(x, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6):
    _check(x, shift, scale, step_index, txt_rows, token_rows)
    require_triton("ada_layer_norm")
    config = get_config("ada_layer_norm", (x.shape[1], x.element_size()), x.device, default_config)
    return launch_ada_layer_norm(x, shift, scale, step_index, txt_rows, token_rows, eps, config=config)


def _ada_layer_norm_cpu(x, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6):
    _check(x, shift, scale, step_index, txt_rows, token_rows)
    parts = stretches(len(x), len(shift), step_index, txt_rows, token_rows)
    if not parts or too_many(parts, len(x)):
        return ada_layer_norm_reference(x, shift, scale, step_index, txt_rows, token_rows, eps)
    return ada_layer_norm_of_stretches(x, shift, scale, parts, eps)


def _ada_layer_norm_fake(x, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6):
    _check(x, shift, scale, step_index, txt_rows, token_rows)
    return x.new_empty(x.shape)


register(
    "ada_layer_norm(Tensor x, Tensor shift, Tensor scale, Tensor step_index, SymInt txt_rows=0, Tensor? token_rows=None, "
    "float eps=1e-6) -> Tensor",
    cuda=_ada_layer_norm_cuda,
    cpu=_ada_layer_norm_cpu,
    fake=_ada_layer_norm_fake,
    by_torch=ada_layer_norm_reference,
)
