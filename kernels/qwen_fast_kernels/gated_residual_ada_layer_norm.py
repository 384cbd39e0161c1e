"""A gated branch added to the residual stream, and the modulated LayerNorm of the sum for the next branch.

    y      = residual + gate[t, stream] * branch,   clipped to +-65504 if asked for, rounded
             an image token also gets its row of what a ControlNet adds, behind the clipping
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
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    compute_dtype = torch.promote_types(residual.dtype, torch.float32)
    gate, shift, scale = (
        per_token(table, step_index, txt_rows, token_rows, len(residual)).to(compute_dtype) for table in (gate, shift, scale)
    )
    y = residual.to(compute_dtype) + gate * branch.to(compute_dtype)
    y = y.clip(-LARGEST_FP16, LARGEST_FP16) if clip else y
    if added is not None:
        image = y[txt_rows:].unflatten(0, (-1, len(added))) + added.to(compute_dtype)
        y = torch.cat([y[:txt_rows], image.flatten(0, 1)])
    y = y.to(residual.dtype)
    normed = F.layer_norm(y.to(compute_dtype), y.shape[-1:], eps=eps)
    return y, (normed * (1 + scale) + shift).to(residual.dtype)


@triton.jit
def _add_to_image(chunks, added_ptr, row, added_rows, stride, CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Chunks with the rows of `added` for image rows, counted from the first one; text rows are below 0. Both predictions and
    several blocks read the same rows of `added`: they may stay in the caches."""
    out = ()
    offset = (row % added_rows) * stride  # [BLOCK_ROWS]
    for i in tl.static_range(len(chunks)):
        channel = i * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS).to(tl.int64)
        pointers = added_ptr + (offset[:, None] + channel[None, :])  # [BLOCK_ROWS, BLOCK_CHANNELS]
        mask = (row >= 0)[:, None] & (channel < CHANNELS)[None, :]
        out = out + (chunks[i] + tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    return out


@triton.jit(do_not_specialize=(*VARYING, "added_rows"))
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
    added_ptr,
    rows,
    txt_rows,
    conditions,
    added_rows,
    eps,
    residual_stride,
    branch_stride,
    gate_stride,
    gate_text,
    shift_stride,
    shift_text,
    scale_stride,
    scale_text,
    added_stride,
    HAS_TOKEN_ROWS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
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
    y = add_gated(residual, gate, branch, LIMIT)
    if HAS_ADDED:
        y = _add_to_image(y, added_ptr, row - txt_rows, added_rows, added_stride, CHANNELS, BLOCK_CHANNELS)
    y = round_to(y, y_ptr.dtype.element_ty)
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
    added: torch.Tensor | None = None,
    *,
    config: dict,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, channels = residual.shape
    y = torch.empty(rows, channels, dtype=residual.dtype, device=residual.device)
    normed = torch.empty(rows, channels, dtype=residual.dtype, device=residual.device)
    if rows:
        own = step_index if token_rows is None else token_rows
        more = residual if added is None else added
        strides = residual.stride(0), branch.stride(0), *table_strides(gate), *table_strides(shift), *table_strides(scale)
        launch(
            _gated_residual_ada_layer_norm_kernel,
            row_grid(rows, txt_rows, config),
            (y, normed, residual, branch, gate, shift, scale, step_index, own, more),
            (rows, txt_rows, gate.shape[0], more.shape[0], eps),
            (*strides, more.stride(0)),
            HAS_TOKEN_ROWS=token_rows is not None,
            HAS_ADDED=added is not None,
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
    added: torch.Tensor | None = None,
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
        added (Tensor): `[A, C]` in the dtype of `residual`, adjacent channels, or None: a ControlNet's residual, which image
            token i gets in row i % A on top of the clipped sum. A divides the number of image tokens.
    Returns:
        tuple[Tensor, Tensor]: the residual stream `y` and `normed`, both `[R, C]` in the dtype of `residual`, contiguous,
            never an alias. On CUDA a token whose row is not in the tables is NaN in both.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, with the offending value; on the CPU also a table
            row outside [0, T).
        RuntimeError: CUDA tensors without Triton.
    Error: fp32 inside, one rounding each, where stock rounds twice and four times. On the CPU a wider gate is rounded too.
    Traffic: 4 * R * C * itemsize bytes of tokens, those of `added` for each image token, and the table rows in use; about
        11 * R * C FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenImageTransformerBlock.forward.
    """
    return torch.ops.qwen_fast.gated_residual_ada_layer_norm(
        residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, eps, clip, added
    )


def default_config(capability: int, channels: int, itemsize: int) -> dict:
    """The launch configuration for rows of `channels` elements of `itemsize` bytes."""
    return row_config(channels, itemsize)


def _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, added) -> None:
    tables = {"gate": gate, "shift": shift, "scale": scale}
    check_row_op({"residual": residual, "branch": branch}, tables, step_index, txt_rows, token_rows)
    if added is None:
        return
    channels, image = residual.shape[1], len(residual) - txt_rows
    if added.dim() != 2 or added.shape[1] != channels or added.dtype != residual.dtype:
        found = f"{tuple(added.shape)} {added.dtype}"
        raise ValueError(f"added: got {found}; [A, {channels}] in the residual's {residual.dtype} is needed.")
    if added.device != residual.device:
        raise ValueError(f"added: on {added.device}, but residual is on {residual.device}; move it there first.")
    if len(added) < 1 or image % len(added):
        raise ValueError(f"added: {len(added)} rows for {image} image tokens; their number has to be a multiple of it.")
    if channels > 1 and added.stride(1) != 1:
        raise ValueError(f"added: stride {added.stride(1)} between channels; they have to be adjacent.")


def _gated_residual_ada_layer_norm_cuda(
    residual, branch, gate, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6, clip=False, added=None
):
    _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, added)
    require_triton("gated_residual_ada_layer_norm")
    config = get_config(
        "gated_residual_ada_layer_norm", (residual.shape[1], residual.element_size()), residual.device, default_config
    )
    return launch_gated_residual_ada_layer_norm(
        residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, eps, clip, added, config=config
    )


def _gated_residual_ada_layer_norm_cpu(
    residual, branch, gate, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6, clip=False, added=None
):
    _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, added)
    parts = stretches(len(residual), len(gate), step_index, txt_rows, token_rows)
    if not parts or too_many(parts, len(residual)):
        return gated_residual_ada_layer_norm_reference(
            residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, eps, clip, added
        )
    y = gated_residual_of_stretches(residual, branch, gate, parts, clip)
    if added is not None:
        y[txt_rows:].unflatten(0, (-1, len(added))).add_(added)
    return y, ada_layer_norm_of_stretches(y, shift, scale, parts, eps)


def _gated_residual_ada_layer_norm_fake(
    residual, branch, gate, shift, scale, step_index, txt_rows=0, token_rows=None, eps=1e-6, clip=False, added=None
):
    _check(residual, branch, gate, shift, scale, step_index, txt_rows, token_rows, added)
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


register(
    "gated_residual_ada_layer_norm(Tensor residual, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
    "Tensor step_index, SymInt txt_rows=0, Tensor? token_rows=None, float eps=1e-6, bool clip=False, "
    "Tensor? added=None) -> (Tensor, Tensor)",
    cuda=_gated_residual_ada_layer_norm_cuda,
    cpu=_gated_residual_ada_layer_norm_cpu,
    fake=_gated_residual_ada_layer_norm_fake,
    by_torch=gated_residual_ada_layer_norm_reference,
)
