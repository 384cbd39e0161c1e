"""A linear layer, with or without low-rank products beside it, and the tanh form of GELU behind it.

    z = x @ weight.T + bias + low @ up.T,   out = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3)))

Grid: one program per tile of the output, or one per multiprocessor that takes several tiles.
"""

import torch
import torch.nn.functional as F

from ._library import register
from ._matmul import (
    _plus_product,
    check_linear,
    column_parts,
    dimensions,
    launch_tiles,
    tile_config,
    tile_position,
    tile_product,
)
from ._triton import require_triton, tl, triton
from .tuning import get_config


def default_config(
    capability: int, rows: int, n: int, k: int, itemsize: int, aligned: bool = True, low_rank: bool = False
) -> dict:
    """Launch configuration. BACKEND is "cublaslt" or "triton"; the library until a measurement on a GPU says otherwise.

    With low-rank products, for which the library has no epilogue, it is the kernel on sm_90, but for fp32: without them it took
    9 % longer there, and by arithmetic it spares passes that take 30 %.
    """
    config = tile_config(capability, rows, n, k, itemsize, aligned)
    if low_rank and capability >= 100 and config["DESCRIPTORS"]:
        # Their sums lie in tensor memory beside the others': 256 columns of tile want 768 of 512 there.
        config["BLOCK_N"] = min(config["BLOCK_N"], 128)
    return config | {"BACKEND": "triton" if low_rank and capability == 90 and itemsize < 4 else "cublaslt"}


def linear_gelu_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    product = F.linear(x.to(compute_dtype), weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
    if low is not None:
        product = product + F.linear(low.to(compute_dtype), up.to(compute_dtype))
    return F.gelu(product, approximate="tanh").to(x.dtype)


@triton.jit
def _plus_low_rank(
    product,
    low_ptr,
    up_ptr,
    low_stride,
    up_stride,
    tile_m,
    tile_n,
    rows,
    n,
    ranks,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """product + low @ up.T. A `while`: a second `for` would be flattened into the loop over the tiles with the first.

    By pointers also where the large product goes by descriptors, since a row of few ranks is no multiple of 16 bytes.
    """
    # The last row again in place of those behind it, as in the main loop.
    low_rows = tl.minimum(tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1)
    up_rows = tl.minimum(tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), n - 1)
    inner = tl.arange(0, BLOCK_R)
    low_offsets = low_rows[:, None] * low_stride + inner[None, :]  # [BLOCK_M, BLOCK_R]
    up_offsets = up_rows[None, :] * up_stride + inner[:, None]  # [BLOCK_R, BLOCK_N]
    start = 0
    while start < ranks:
        # Both: zero times what lies behind a row would be NaN where that is NaN.
        inside = inner < ranks - start
        low = tl.load(low_ptr + low_offsets, mask=inside[None, :], other=0.0)
        up = tl.load(up_ptr + up_offsets, mask=inside[:, None], other=0.0)
        product = _plus_product(product, low, up)
        start += BLOCK_R
        low_ptr += BLOCK_R
        up_ptr += BLOCK_R
    return product


@triton.jit(do_not_specialize=["rows"])
def _linear_gelu_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    x_stride,
    weight_stride,
    rows,
    n,
    k,
    bias_ptr,
    low_ptr,
    up_ptr,
    low_stride,
    up_stride,
    ranks,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
        if BLOCK_R > 0:
            product = _plus_low_rank(
                product, low_ptr, up_ptr, low_stride, up_stride, tile_m, tile_n, rows, n, ranks,
                BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        parts = column_parts(product, BLOCK_M, BLOCK_N, PARTS)
        row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        for part in tl.static_range(PARTS):
            column = tile_n.to(tl.int64) * BLOCK_N + part * width + tl.arange(0, width)
            z = parts[part]
            if HAS_BIAS:
                z += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
            # (1 + tanh(u)) / 2 = sigmoid(2 u), which stays finite for any u and keeps its digits where tanh is near -1.
            gelu = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
            mask = (row < rows)[:, None] & (column < n)[None, :]
            tl.store(out_ptr + row[:, None] * n + column[None, :], gelu.to(out_ptr.dtype.element_ty), mask=mask)


def launch_linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    *,
    config: dict,
) -> torch.Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    term, block = (None,) * 5, 0
    if low is not None:
        ranks = low.shape[1]
        term = low, up, low.stride(0), up.stride(0), ranks
        block = 16 if ranks % 16 else 32  # 32 in loads of one element want more registers than there are
    launch_tiles(_linear_gelu_kernel, out, x, weight, bias, *term, config=config, HAS_BIAS=bias is not None, BLOCK_R=block)
    return out


def linear_gelu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with tanh GELU, `gelu_tanh(x @ weight.T + bias + low @ up.T)`.

    Products are summed in fp32. On CUDA cuBLASLt adds the bias and applies GELU before it rounds, once; without a bias,
    and where R, K or N is 1, it has no such epilogue and the product is rounded before GELU as in stock. The CPU rounds
    there as well, and so does fp32 on CUDA, since the epilogue's GELU is approximate. The Triton kernel
    (`default_config`'s BACKEND) always rounds once. With low-rank products bf16 and fp16 on sm_90 are the Triton kernel's;
    elsewhere bias and low-rank product are rounded before the large one is added, and their sum before GELU.

    Args:
        x (Tensor): `[R, K]` bf16|fp16|fp32 (fp64 on the CPU), any stride between rows, adjacent channels.
        weight (Tensor): `[N, K]` as in nn.Linear, dtype of `x`, any stride between rows, adjacent channels.
        bias (Tensor): `[N]` contiguous, dtype of `x`; or None.
        low (Tensor): `[R, r]`, dtype of `x`, any stride between rows, adjacent ranks: the rows times the first factor of a
            low-rank product, scaled, or those of several products side by side; or None.
        up (Tensor): `[N, r]`, their second factors, likewise; None with `low`.
    Returns:
        Tensor: `[R, N]`, dtype of `x`, contiguous, never an alias.
    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit, with the offending value.
        RuntimeError: CUDA tensors without Triton where the configuration asks for it.
    Error: the Triton kernel within twice the error of one rounding of the exact result, and of fp32 sums over K.
    Traffic: (R * K + N * K + N + R * N + (R + N) * r) * itemsize bytes; 2 * R * N * (K + r) FLOPs.
    Source: diffusers 0.42.1, models/activations.py, GELU(approximate="tanh"), the first layer of a block's FeedForward;
        peft 0.21.2, tuners/lora/layer.py, Linear.forward.
    """
    return torch.ops.qwen_fast.linear_gelu(x, weight, bias, low, up)


def _check(x, weight, bias, low, up) -> None:
    check_linear(x, weight, bias)
    if low is None and up is None:
        return
    for name, factor, rows, of in (("low", low, x.shape[0], "x"), ("up", up, weight.shape[0], "weight")):
        if factor is None:
            raise ValueError(f"{name}: None, but {'up' if name == 'low' else 'low'} is given; both or neither are needed.")
        if factor.dim() != 2 or factor.shape[0] != rows or factor.shape[1] < 1:
            raise ValueError(f"{name}: shape {tuple(factor.shape)}; [{rows}, r] with at least one rank is needed for {of}.")
        if factor.shape[1] > 1 and factor.stride(1) != 1:
            raise ValueError(f"{name}: stride {factor.stride(1)} between ranks; they have to be adjacent.")
        if factor.dtype != x.dtype:
            raise ValueError(f"{name}: dtype {factor.dtype} is not x's {x.dtype}; cast it first.")
        if factor.device != x.device:
            raise ValueError(f"{name}: on {factor.device}, but x is on {x.device}; move it there first.")
    if low.shape[1] != up.shape[1]:
        raise ValueError(f"up: {up.shape[1]} ranks, but low has {low.shape[1]}; they need the same.")


def _linear_gelu_cuda(x, weight, bias, low=None, up=None):
    _check(x, weight, bias, low, up)
    config = get_config("linear_gelu", (*dimensions(x, weight), low is not None), x.device, default_config)
    if config["BACKEND"] == "cublaslt":
        return _linear_gelu_cublaslt(x, weight, bias, low, up)
    require_triton("linear_gelu")
    return launch_linear_gelu(x, weight, bias, low, up, config=config)


def _linear_gelu_cublaslt(x, weight, bias, low=None, up=None):
    # The epilogue's tanh is approximate: 5e-6 of error in fp32 (H100).
    if bias is None or low is not None or x.dtype == torch.float32:
        return _linear_then_gelu(x, weight, bias, low, up)
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)  # tanh on CUDA, erf on the CPU


def _linear_then_gelu(x, weight, bias, low=None, up=None):
    if low is None:
        out = F.linear(x, weight, bias)
    else:  # what is small is rounded first
        out = low @ up.t() if bias is None else torch.addmm(bias, low, up.t())
        out.addmm_(x, weight.t())
    return torch.ops.aten.gelu_(out, approximate="tanh")


def _linear_gelu_cpu(x, weight, bias, low=None, up=None):
    _check(x, weight, bias, low, up)
    return _linear_then_gelu(x, weight, bias, low, up)


def _linear_gelu_fake(x, weight, bias, low=None, up=None):
    _check(x, weight, bias, low, up)
    return x.new_empty((x.shape[0], weight.shape[0]))


register(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor? low=None, Tensor? up=None) -> Tensor",
    cuda=_linear_gelu_cuda,
    cpu=_linear_gelu_cpu,
    fake=_linear_gelu_fake,
    by_torch=_linear_then_gelu,
)
