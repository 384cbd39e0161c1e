"""RMS norm of a picture's pixels and SiLU of it, behind what a convolution leaves to do: its bias, and the residual.

    y = x + x_bias + residual                                   (where they are given; y then takes the residual's place)
    out = silu(y / max(|y|, 1e-12) * sqrt(C) * gamma)

Grid: one program per BLOCK_ROWS pixels.
"""

import math

import torch
import torch.nn.functional as F

from ._launch import launch
from ._library import FLOATS, FLOATS_OF_CPU, register
from ._row_norm import load_tokens, round_to, row_grid, store_tokens, within
from ._triton import require_triton, tl, triton
from .tuning import get_config

SMALLEST_NORM = 1e-12  # of torch.nn.functional.normalize
# Elements that a CPU works on at a time: 512 KiB in fp32 stay in a core's second-level cache from pass to pass.
CPU_BLOCK = 1 << 17


def rms_norm_silu_reference(
    x: torch.Tensor,
    gamma: torch.Tensor,
    x_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute_dtype)
    if x_bias is not None:
        y = y + x_bias.to(compute_dtype)
    if residual is not None:
        residual.copy_(y + residual.to(compute_dtype))
        y = residual.to(compute_dtype)
    normed = F.normalize(y, dim=-1, eps=SMALLEST_NORM) * math.sqrt(x.shape[-1]) * gamma.to(compute_dtype)
    return (F.silu(normed) if silu else normed).to(x.dtype)


@triton.jit
def _plus(chunks, others):
    out = ()
    for i in tl.static_range(len(chunks)):
        out = out + (chunks[i] + others[i],)
    return out


@triton.jit(do_not_specialize=["rows"])
def _rms_norm_silu_kernel(
    out_ptr,
    x_ptr,
    gamma_ptr,
    x_bias_ptr,
    residual_ptr,
    rows,
    x_stride,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    SCALE: tl.constexpr,
    SMALLEST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    own_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row = tl.minimum(own_row, rows - 1)
    only = tl.zeros([1], tl.int64)  # row of a vector
    y = load_tokens(x_ptr, row, x_stride, CHANNELS, BLOCK_CHANNELS)
    if HAS_BIAS:
        y = _plus(y, load_tokens(x_bias_ptr, only, 0, CHANNELS, BLOCK_CHANNELS))
    if HAS_RESIDUAL:
        y = _plus(y, load_tokens(residual_ptr, row, CHANNELS, CHANNELS, BLOCK_CHANNELS))
        store_tokens(residual_ptr, y, own_row, rows, CHANNELS, BLOCK_CHANNELS)
        y = round_to(y, residual_ptr.dtype.element_ty)
    squares = tl.zeros_like(y[0])
    for i in tl.static_range(len(y)):
        inside = within(y[i], i * BLOCK_CHANNELS, CHANNELS, BLOCK_CHANNELS)
        squares += inside * inside
    # The GPU's own roots and quotients are approximate. In fp32 that shows: 6.8e-8 of RMS error where stock has 5.4e-8 (H100),
    # most of it from these two, which a whole row shares.
    EXACT: tl.constexpr = out_ptr.dtype.element_ty == tl.float32
    square = tl.sum(squares, axis=1)
    norm = tl.sqrt_rn(square) if EXACT else tl.sqrt(square)  # [BLOCK_ROWS]
    norm = tl.where(norm < SMALLEST, SMALLEST, norm)  # by comparison, so that NaN stays NaN
    factor = (tl.div_rn(SCALE, norm) if EXACT else SCALE / norm)[:, None]
    gamma = load_tokens(gamma_ptr, only, 0, CHANNELS, BLOCK_CHANNELS)
    out = ()
    for i in tl.static_range(len(y)):
        normed = y[i] * factor * gamma[i]
        if SILU:
            normed = normed / (1.0 + tl.exp(-normed))
        out = out + (normed,)
    store_tokens(out_ptr, out, own_row, rows, CHANNELS, BLOCK_CHANNELS)


def launch_rms_norm_silu(
    x: torch.Tensor,
    gamma: torch.Tensor,
    x_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = True,
    *,
    config: dict,
) -> torch.Tensor:
    rows, channels = x.shape
    out = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    if rows:
        launch(
            _rms_norm_silu_kernel,
            row_grid(rows, 0, config),
            (out, x, gamma, gamma if x_bias is None else x_bias, out if residual is None else residual),
            (rows,),
            (x.stride(0),),
            HAS_BIAS=x_bias is not None,
            HAS_RESIDUAL=residual is not None,
            SILU=silu,
            SCALE=math.sqrt(channels),
            SMALLEST=SMALLEST_NORM,
            CHANNELS=channels,
            **config,
            enable_fp_fusion=True,
        )
    return out


def rms_norm_silu(
    x: torch.Tensor,
    gamma: torch.Tensor,
    x_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """RMS norm and SiLU of a picture's pixels, with the addition before it, rounded once (twice with a residual).

    Args:
        x (Tensor): `[R pixels, C]` bf16|fp16|fp32 (fp64 on the CPU): a channels-last picture. Adjacent channels, any stride
            between pixels.
        gamma (Tensor): `[C]`, dtype of `x`, contiguous: the norm's weight.
        x_bias (Tensor): `[C]`, dtype of `x`, contiguous, or None: added to `x` first, the bias of the convolution that made
            it without.
        residual (Tensor): `[R, C]`, dtype of `x`, contiguous, or None. Changed in place: `x` and `x_bias` are added to it,
            and the norm is that of the sum as stored.
        silu (bool): False: the norm alone, as before the attention.
    Returns:
        Tensor: `[R, C]`, dtype of `x`, contiguous, never an alias. A pixel of zeros stays zero.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, with the offending value.
        RuntimeError: CUDA tensors without Triton.
    Error: fp32 inside and one rounding, where stock rounds the normalised pixel, two products and the SiLU each.
    Traffic: 2 * R * C * itemsize bytes, 4 * R * C * itemsize with a residual; about 10 * R * C FLOPs.
    Source: diffusers 0.42.1, models/autoencoders/autoencoder_kl_qwenimage.py, QwenImageRMS_norm.forward and the
        nonlinearity behind it; QwenImageResidualBlock.forward's addition of its input.
    """
    if residual is None:
        return torch.ops.qwen_fast.rms_norm_silu(x, gamma, x_bias, silu)
    return torch.ops.qwen_fast.rms_norm_silu.residual(x, gamma, x_bias, residual, silu)


def default_config(capability: int, channels: int, itemsize: int) -> dict:
    """A thread takes one 16-byte vector of each of at most five chunks of a row.

    The VAEs' widths are three or nine times a power of two: three and five chunks, of which the last but one in five leaves
    nothing idle. One chunk of the next power of two would compute a quarter or more for nothing, and add up the squares
    through shared memory (sm_90, bf16: 106 instructions of a warp a pixel at 96 channels, 64 so). At 48 and 70 registers 5
    and 3 such programs share a multiprocessor with 60 KiB of reads in flight.
    """
    vector = 16 // itemsize
    block_channels = max(vector, 1 << (-(-channels // 5) - 1).bit_length())
    return {"BLOCK_ROWS": max(256 * vector // block_channels, 1), "BLOCK_CHANNELS": block_channels, "num_warps": 8}


def _check(x, gamma, x_bias, residual) -> None:
    allowed = FLOATS if x.is_cuda else FLOATS_OF_CPU
    if x.dtype not in allowed:
        raise ValueError(f"x: dtype {x.dtype} is not supported on {x.device.type}; use one of {allowed}.")
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x: shape {tuple(x.shape)}; [R pixels, C channels] with C >= 1 is needed.")
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"x: stride {x.stride(1)} between channels; they have to be adjacent.")
    for name, other, shape in (
        ("gamma", gamma, x.shape[1:]),
        ("x_bias", x_bias, x.shape[1:]),
        ("residual", residual, x.shape),
    ):
        if other is None:
            continue
        if other.shape != shape or other.dtype != x.dtype:
            raise ValueError(f"{name}: got {tuple(other.shape)} {other.dtype}; {tuple(shape)} {x.dtype} is needed.")
        if other.device != x.device:
            raise ValueError(f"{name}: on {other.device}, but x is on {x.device}; move it there first.")
        if not other.is_contiguous():
            raise ValueError(f"{name}: strides {other.stride()}; it has to be contiguous.")


def _rms_norm_silu_cuda(x, gamma, x_bias, residual, silu=True):
    _check(x, gamma, x_bias, residual)
    require_triton("rms_norm_silu")
    config = get_config("rms_norm_silu", (x.shape[1], x.element_size()), x.device, default_config)
    return launch_rms_norm_silu(x, gamma, x_bias, residual, silu, config=config)


def _rms_norm_silu_cpu(x, gamma, x_bias, residual, silu=True):
    """The reference's formula in as few passes as torch has, over blocks that stay in the cache."""
    _check(x, gamma, x_bias, residual)
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weight = gamma.to(compute_dtype) * math.sqrt(x.shape[1])
    rows = max(CPU_BLOCK // x.shape[1], 1)
    for start in range(0, len(x), rows):
        y, place = x[start : start + rows].to(compute_dtype), out[start : start + rows]
        if x_bias is not None:
            y = y + x_bias
        if residual is not None:
            own = residual[start : start + rows]
            y = own.copy_(y + own).to(compute_dtype)
        norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True).clamp_min_(SMALLEST_NORM)
        # Halves are worked on in fp32, and rounded where they are copied.
        normed = torch.div(y, norm, out=place if compute_dtype == x.dtype else None).mul_(weight)
        if silu:
            F.silu(normed, inplace=True)
        if compute_dtype != x.dtype:
            place.copy_(normed)
    return out


def _rms_norm_silu_fake(x, gamma, x_bias, residual, silu=True):
    _check(x, gamma, x_bias, residual)
    return x.new_empty(x.shape)


def _without_residual(function):
    return lambda x, gamma, x_bias=None, silu=True: function(x, gamma, x_bias, None, silu)


# Two overloads: Inductor cannot lower one whose changed argument is optional and left out (torch 2.13).
register(
    "rms_norm_silu(Tensor x, Tensor gamma, Tensor? x_bias=None, bool silu=True) -> Tensor",
    cuda=_without_residual(_rms_norm_silu_cuda),
    cpu=_without_residual(_rms_norm_silu_cpu),
    fake=_without_residual(_rms_norm_silu_fake),
    by_torch=_without_residual(rms_norm_silu_reference),
)
register(
    "rms_norm_silu.residual(Tensor x, Tensor gamma, Tensor? x_bias, Tensor(a!) residual, bool silu=True) -> Tensor",
    cuda=_rms_norm_silu_cuda,
    cpu=_rms_norm_silu_cpu,
    fake=_rms_norm_silu_fake,
    by_torch=rms_norm_silu_reference,
)
