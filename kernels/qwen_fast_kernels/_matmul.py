"""x @ weight.T tile by tile in fp32: the main loop, the order of the tiles, their shapes, and what a caller may pass.

Two main loops: by pointers (any strides and alignment) and by tensor descriptors (TMA; from sm_90, 16-byte aligned rows).
"""

import torch

from ._library import FLOATS, FLOATS_OF_CPU
from ._triton import HAS_TRITON, on_device, tl, triton

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def tile_position(tile, rows, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of a tile, counted in tiles. GROUP_M rows of tiles go together: what a wave reads stays in L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    group_size = GROUP_M * tl.cdiv(n, BLOCK_N)
    first_m = (tile // group_size) * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (tile % group_size) % height, (tile % group_size) // height


@triton.jit
def _plus_product(product, x, weight):
    """product + x @ weight."""
    if x.dtype == tl.float32:
        # One sum of K terms in sequence is off by 3e-6 to 7e-6 (H100, K of 3072 and 12288), so the terms of a block are summed
        # by themselves. As an fma, since the compiler would start from `product` again if it were a plain addition.
        block = tl.dot(x, weight, input_precision="ieee", out_dtype=tl.float32)
        product = tl.fma(block, 1.0, product)
    else:
        product = tl.dot(x, weight, product, out_dtype=tl.float32)
    return product


@triton.jit
def tile_product(
    x_ptr,
    weight_ptr,
    x_stride,
    weight_stride,
    tile_m,
    tile_n,
    rows,
    n,
    k,
    EVEN_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """fp32 `[BLOCK_M, BLOCK_N]` of x @ weight.T; rows and columns behind the last one hold arbitrary numbers."""
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DESCRIPTORS:
        for start in tl.range(0, k, BLOCK_K):
            x = x_ptr.load([tile_m * BLOCK_M, start])  # [BLOCK_M, BLOCK_K], zero outside
            weight = weight_ptr.load([tile_n * BLOCK_N, start])  # [BLOCK_N, BLOCK_K]
            product = _plus_product(product, x, weight.T)
    else:
        # The last row again in place of those behind it: no mask, and no read outside.
        x_rows = tl.minimum(tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1)
        weight_rows = tl.minimum(tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), n - 1)
        inner = tl.arange(0, BLOCK_K)
        x_offsets = x_rows[:, None] * x_stride + inner[None, :]  # [BLOCK_M, BLOCK_K]
        weight_offsets = weight_rows[None, :] * weight_stride + inner[:, None]  # [BLOCK_K, BLOCK_N]
        for start in tl.range(0, k, BLOCK_K):
            if EVEN_K:
                x = tl.load(x_ptr + (x_offsets + start))
                weight = tl.load(weight_ptr + (weight_offsets + start))
            else:
                # Both: zero times what lies behind a row would be NaN where that is NaN.
                inside = inner < k - start
                x = tl.load(x_ptr + (x_offsets + start), mask=inside[None, :], other=0.0)
                weight = tl.load(weight_ptr + (weight_offsets + start), mask=inside[:, None], other=0.0)
            product = _plus_product(product, x, weight)
    return product


@triton.jit
def column_parts(product, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """A tile as a tuple of PARTS (1, 2 or 4) tiles side by side: an epilogue on one of them needs few registers."""
    if PARTS == 1:
        parts = (product,)
    else:
        left, right = product.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        if PARTS == 2:
            parts = (left, right)
        else:
            first, second = left.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
            third, fourth = right.reshape(BLOCK_M, 2, BLOCK_N // 4).permute(0, 2, 1).split()
            parts = (first, second, third, fourth)
    return parts


def launch_tiles(kernel, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *epilogue, config: dict, **flags) -> None:
    """Launch `kernel(out, x, weight, x_stride, weight_stride, rows, n, k, *epilogue)` over the tiles of `out`."""
    (rows, k), n = x.shape, weight.shape[0]
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    programs = triton.cdiv(rows, block_m) * triton.cdiv(n, block_n)
    if config["PERSISTENT"]:
        programs = min(programs, multiprocessors(x.device))
    operands = x, weight
    if config["DESCRIPTORS"]:
        operands = TensorDescriptor.from_tensor(x, [block_m, block_k]), TensorDescriptor.from_tensor(weight, [block_n, block_k])
    with on_device(x):
        kernel[(programs,)](
            out,
            *operands,
            x.stride(0),
            weight.stride(0),
            rows,
            n,
            k,
            *epilogue,
            **flags,
            EVEN_K=k % block_k == 0,
            **{name: value for name, value in config.items() if name != "BACKEND"},
            enable_fp_fusion=True,
        )


def multiprocessors(device: torch.device) -> int:
    """Programs of a persistent launch; two in the interpreter, so that a program takes several tiles there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def tile(m: int, n: int, k: int, parts: int, warps: int, stages: int, descriptors: bool = False) -> dict:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": 8,
        "PARTS": parts,
        "DESCRIPTORS": descriptors,
        "PERSISTENT": descriptors,
        "num_warps": warps,
        "num_stages": stages,
    }


# Capability -> tiles from the largest to the smallest. No row of them was measured: chosen for the tensor core's own shape,
# for the shared memory of the architecture (163, 99 or 227 KiB) and for registers without a spill.
_SMALL_SHARED = (tile(128, 128, 64, 4, 8, 3), tile(64, 128, 64, 2, 4, 3))
_BIG_SHARED = (tile(128, 256, 32, 4, 8, 4), tile(128, 128, 64, 4, 8, 4), tile(64, 128, 64, 2, 4, 4))
_DESCRIBED = (tile(128, 256, 64, 4, 8, 4, True), tile(128, 128, 64, 4, 8, 4, True), tile(64, 128, 64, 4, 4, 4, True))
_TILES = {80: _BIG_SHARED, 86: _SMALL_SHARED, 89: _SMALL_SHARED, 90: _DESCRIBED, 100: _DESCRIBED, 120: _SMALL_SHARED}
_DESCRIBING = (90, 100)  # sm_120 has TMA too, but no shared memory for the tiles that it pays for
_WAVE = 128  # programs; about the multiprocessors of the larger cards


def tile_config(capability: int, rows: int, n: int, k: int, itemsize: int, aligned: bool = True) -> dict:
    """Tile and launch options for `[rows, k] @ [n, k].T` on the largest known architecture not above `capability`."""
    arch = max((known for known in _TILES if known <= capability), default=80)
    narrow = not aligned or (k % 64 != 0 and arch not in _DESCRIBING)  # such loads want registers
    if itemsize > 2:  # fp32 products are exact and know no tensor cores
        return tile(32, 64, 16, 1, 4, 2) if narrow or k % 64 else tile(64, 64, 32, 4, 4, 2)
    if narrow:
        return tile(64, 64, 32, 4, 4, 2)
    if rows <= 64:  # a few tokens: the weight streams past them once, so many narrow columns of tiles
        described = arch in _DESCRIBING
        height = 64 if described or rows > 32 else 16 if rows <= 16 else 32  # HGMMA has 64 rows
        return tile(height, 64 if n > 64 * _WAVE else 32, 128, 1, 4, 4, described)
    for shape in _TILES[arch]:
        if -(-rows // shape["BLOCK_M"]) * -(-n // shape["BLOCK_N"]) >= _WAVE:
            return dict(shape)
    return dict(_TILES[arch][-1])


def dimensions(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, int, int, bool]:
    """What `default_config` wants after the capability: rows, n, k, itemsize, and whether TMA can read both."""
    (rows, k), n, itemsize = x.shape, weight.shape[0], x.element_size()
    x_stride, weight_stride = x.stride(0), weight.stride(0)
    misaligned = (x.data_ptr() | weight.data_ptr() | x_stride * itemsize | weight_stride * itemsize) % 16
    return rows, n, k, itemsize, not misaligned and x_stride >= k and weight_stride >= k


def check_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise a ValueError that names the argument that does not fit `x @ weight.T + bias`."""
    dtype, device = x.dtype, x.device
    allowed = FLOATS if x.is_cuda else FLOATS_OF_CPU
    if dtype not in allowed:
        raise ValueError(f"x: dtype {dtype} is not supported on {device.type}; use one of {allowed}.")
    if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] < 1:
        raise ValueError(f"x: shape {tuple(x.shape)}; [R, K] with at least one row and one channel is needed.")
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != channels:
        raise ValueError(f"weight: shape {tuple(weight.shape)}; [N, {channels}] is needed for x {tuple(x.shape)}.")
    if channels > 1 and (x.stride(1) != 1 or weight.stride(1) != 1):
        name, stride = ("x", x.stride(1)) if x.stride(1) != 1 else ("weight", weight.stride(1))
        raise ValueError(f"{name}: stride {stride} between channels; they have to be adjacent.")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        raise ValueError(f"bias: shape {tuple(bias.shape)}, strides {bias.stride()}; contiguous [{weight.shape[0]}] is needed.")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != dtype:
            raise ValueError(f"{name}: dtype {tensor.dtype} is not x's {dtype}; cast it first.")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, but x is on {device}; move it there first.")
