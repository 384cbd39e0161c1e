"""A branch added to the residual stream through each token's row of a table of gates.

    y = residual + gate[t, stream] * branch,   clipped to +-65504 if asked for
    t = token_rows[token] where that is not negative, else step_index

Grid: one program per BLOCK_ROWS tokens of one stream.
"""

import torch

from ._launch import launch
from ._library import register
from ._modulation import VARYING, table_row, table_strides
from ._row_norm import (
    LARGEST_FP16,
    add_gated,
    check_row_op,
    gated_residual_of_stretches,
    load_modulation,
    load_tokens,
    per_token,
    row_config,
    row_grid,
    rows_of_program,
    store_tokens,
    stretches,
    too_many,
)
from ._triton import require_triton, tl, triton
from .tuning import get_config


def gated_residual_reference(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    clip: bool = False,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(residual.dtype, torch.float32)
    gate = per_token(gate, step_index, txt_rows, token_rows, len(residual)).to(compute_dtype)
    y = residual.to(compute_dtype) + gate * branch.to(compute_dtype)
    return (y.clip(-LARGEST_FP16, LARGEST_FP16) if clip else y).to(residual.dtype)


@triton.jit(do_not_specialize=VARYING)
def _gated_residual_kernel(
    y_ptr,
    residual_ptr,
    branch_ptr,
    gate_ptr,
    step_index_ptr,
    token_rows_ptr,
    rows,
    txt_rows,
    conditions,
    residual_stride,
    branch_stride,
    gate_stride,
    gate_text,
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
    y = add_gated(residual, gate, branch, LIMIT)
    store_tokens(y_ptr, y, own_row, end, CHANNELS, BLOCK_CHANNELS)


def launch_gated_residual(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    clip: bool = False,
    *,
    config: dict,
) -> torch.Tensor:
    rows, channels = residual.shape
    y = torch.empty(rows, channels, dtype=residual.dtype, device=residual.device)
    if rows:
        launch(
            _gated_residual_kernel,
            row_grid(rows, txt_rows, config),
            (y, residual, branch, gate, step_index, step_index if token_rows is None else token_rows),
            (rows, txt_rows, gate.shape[0]),
            (residual.stride(0), branch.stride(0), *table_strides(gate)),
            HAS_TOKEN_ROWS=token_rows is not None,
            LIMIT=LARGEST_FP16 if clip else None,
            CHANNELS=channels,
            **config,
            enable_fp_fusion=True,
        )
    return y


def gated_residual(
    residual: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    step_index: torch.Tensor,
    txt_rows: int = 0,
    token_rows: torch.Tensor | None = None,
    clip: bool = False,
) -> torch.Tensor:
    """A gated branch added to the residual stream, `residual + gate * branch`, rounded once.

    Args:
        residual (Tensor): `[R, C]` bf16|fp16|fp32 (fp64 on the CPU), adjacent channels, any stride between tokens. The text
            tokens of all sequences first, then the image tokens.
        branch (Tensor): shape and dtype of `residual`; what attention or MLP made of it. Adjacent channels.
        gate (Tensor): `[T, 1 or 2 streams, C]`, image first, then text; any of those dtypes, adjacent channels.
        step_index (Tensor): `[1]` int32|int64 in [0, T), read on the device: the table row of every token.
        txt_rows (int): how many of the R tokens are text.
        token_rows (Tensor): `[R]` int32, contiguous, or None. An entry that is not negative takes `step_index`'s place for
            that token: the sample's row of a batch, or the row of timestep 0 for the condition images of an edit model.
        clip (bool): clip to +-65504, as stock does after each block in fp16: infinities too, while NaN stays NaN.
    Returns:
        Tensor: `[R, C]`, dtype of `residual`, contiguous, never an alias. On CUDA a token whose row is not in the table is
            NaN.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, with the offending value; on the CPU also a table
            row outside [0, T).
        RuntimeError: CUDA tensors without Triton.
    Error: fp32 inside and one rounding, where stock rounds product and sum. On the CPU a wider gate is rounded as well.
    Traffic: 3 * R * C * itemsize bytes of tokens, and the table rows in use; 2 * R * C FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenImageTransformerBlock.forward.
    """
    return torch.ops.qwen_fast.gated_residual(residual, branch, gate, step_index, txt_rows, token_rows, clip)


def default_config(capability: int, channels: int, itemsize: int) -> dict:
    """The launch configuration for rows of `channels` elements of `itemsize` bytes."""
    return row_config(channels, itemsize)


def _check(residual, branch, gate, step_index, txt_rows, token_rows) -> None:
    check_row_op({"residual": residual, "branch": branch}, {"gate": gate}, step_index, txt_rows, token_rows)


def _gated_residual_cuda(residual, branch, gate, step_index, txt_rows=0, token_rows=None, clip=False):
    _check(residual, branch, gate, step_index, txt_rows, token_rows)
    require_triton("gated_residual")
    config = get_config("gated_residual", (residual.shape[1], residual.element_size()), residual.device, default_config)
    return launch_gated_residual(residual, branch, gate, step_index, txt_rows, token_rows, clip, config=config)


def _gated_residual_cpu(residual, branch, gate, step_index, txt_rows=0, token_rows=None, clip=False):
    _check(residual, branch, gate, step_index, txt_rows, token_rows)
    parts = stretches(len(residual), len(gate), step_index, txt_rows, token_rows)
    if too_many(parts, len(residual)):
        return gated_residual_reference(residual, branch, gate, step_index, txt_rows, token_rows, clip)
    return gated_residual_of_stretches(residual, branch, gate, parts, clip)


def _gated_residual_fake(residual, branch, gate, step_index, txt_rows=0, token_rows=None, clip=False):
    _check(residual, branch, gate, step_index, txt_rows, token_rows)
    return residual.new_empty(residual.shape)


register(
    "gated_residual(Tensor residual, Tensor branch, Tensor gate, Tensor step_index, SymInt txt_rows=0, "
    "Tensor? token_rows=None, bool clip=False) -> Tensor",
    cuda=_gated_residual_cuda,
    cpu=_gated_residual_cpu,
    fake=_gated_residual_fake,
    by_torch=gated_residual_reference,
)
