"""A linear layer and the tanh form of GELU behind it.

    z = x @ weight.T + bias,   out = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 * z**3)))

Grid: one program per tile of the output, or one per multiprocessor that takes several tiles.
"""

import torch
import torch.nn.functional as F

from ._library import register
from ._matmul import check_linear, column_parts, dimensions, launch_tiles, tile_config, tile_position, tile_product
from ._triton import require_triton, tl, triton
from .tuning import get_config


def default_config(capability: int, rows: int, n: int, k: int, itemsize: int, aligned: bool = True) -> dict:
    """Launch configuration. BACKEND is "cublaslt" or "triton"; the library until a measurement on a GPU says otherwise."""
    return tile_config(capability, rows, n, k, itemsize, aligned) | {"BACKEND": "cublaslt"}


def linear_gelu_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    product = F.linear(x.to(compute_dtype), weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype))
    return F.gelu(product, approximate="tanh").to(x.dtype)


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
    HAS_BIAS: tl.constexpr,
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
        for part in tl.static_range(PARTS):
            column = tile_n.to(tl.int64) * BLOCK_N + part * width + tl.arange(0, width)
            z = parts[part]
            if HAS_BIAS:
                z += tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
            # (1 + tanh(u)) / 2 = sigmoid(2 u), which stays finite for any u and keeps its digits where tanh is near -1.
            gelu = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
            mask = (row < rows)[:, None] & (column < n)[None, :]
            tl.store(out_ptr + row[:, None] * n + column[None, :], gelu.to(out_ptr.dtype.element_ty), mask=mask)


def launch_linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, config: dict) -> torch.Tensor:
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    launch_tiles(_linear_gelu_kernel, out, x, weight, bias, config=config, HAS_BIAS=bias is not None)
    return out


def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A linear layer with tanh GELU, `gelu_tanh(x @ weight.T + bias)`.

    Products are summed in fp32. On CUDA cuBLASLt adds the bias and applies GELU before it rounds, once; without a bias,
    and where R, K or N is 1, it has no such epilogue and the product is rounded before GELU as in stock. The CPU rounds
    there as well, and so does fp32 on CUDA, since the epilogue's GELU is approximate. The Triton kernel
    (`default_config`'s BACKEND) always rounds once.

    Args:
        x (Tensor): `[R, K]` bf16|fp16|fp32 (fp64 on the CPU), any stride between rows, adjacent channels.
        weight (Tensor): `[N, K]` as in nn.Linear, dtype of `x`, any stride between rows, adjacent channels.
        bias (Tensor): `[N]` contiguous, dtype of `x`; or None.
    Returns:
        Tensor: `[R, N]`, dtype of `x`, contiguous, never an alias.
    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit, with the offending value.
        RuntimeError: CUDA tensors without Triton where the configuration asks for it.
    Error: the Triton kernel within twice the error of one rounding of the exact result, and of fp32 sums over K.
    Traffic: (R * K + N * K + N + R * N) * itemsize bytes; 2 * R * N * K FLOPs.
    Source: diffusers 0.42.1, models/activations.py, GELU(approximate="tanh"), the first layer of a block's FeedForward.
    """
    return torch.ops.qwen_fast.linear_gelu(x, weight, bias)


def _linear_gelu_cuda(x, weight, bias):
    check_linear(x, weight, bias)
    config = get_config("linear_gelu", dimensions(x, weight), x.device, default_config)
    if config["BACKEND"] == "cublaslt":
        return _linear_gelu_cublaslt(x, weight, bias)
    require_triton("linear_gelu")
    return launch_linear_gelu(x, weight, bias, config=config)


def _linear_gelu_cublaslt(x, weight, bias):
    if bias is None or x.dtype == torch.float32:  # the epilogue's tanh is approximate: 5e-6 of error in fp32 (H100)
        return _linear_then_gelu(x, weight, bias)
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)  # tanh on CUDA, erf on the CPU


def _linear_then_gelu(x, weight, bias):
    return torch.ops.aten.gelu_(F.linear(x, weight, bias), approximate="tanh")


def _linear_gelu_cpu(x, weight, bias):
    check_linear(x, weight, bias)
    return _linear_then_gelu(x, weight, bias)


def _linear_gelu_fake(x, weight, bias):
    check_linear(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


register(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    cuda=_linear_gelu_cuda,
    cpu=_linear_gelu_cpu,
    fake=_linear_gelu_fake,
    by_torch=_linear_then_gelu,
)
