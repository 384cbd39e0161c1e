"""Attention of each sequence's tokens over all of them, many sequences in one launch.

    out[i] = sum_j softmax_j(scale * query[i] . key[j]) * value[j],   i and j in the same sequence, j a key

Grid: (tiles of BLOCK_M queries; heads; sequences), so that neighbours share keys and values in L2.
"""

import contextvars
import itertools
import math

import torch
import torch.nn.functional as F

from ._library import register
from ._triton import HAS_TRITON, capability, on_device, require_triton, tl, triton
from .tuning import get_config

HEAD_DIMS = (16, 32, 64, 128)
LOG2_E = 1.4426950408889634
# Before 3.8 Triton leaves barriers behind that nobody uses, in the shared memory of the first tile of keys, where a specialised
# kernel is entered: PTX does not allow that, and a fresh barrier read as bf16 or fp16 is NaN. On an H100 with 3.6 some pictures
# of a batch were NaN now and then. Descriptors without specialised warps are a tenth slower there.
SPECIALISES = HAS_TRITON and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def fits_descriptors(*tensors: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can address the tensors: base and strides in units of 16 bytes."""
    return all(
        tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in tensors
    )


def default_config(capability: int, head_dim: int, itemsize: int, masked: bool = False, aligned: bool = True) -> dict:
    """Every entry compiles with Triton 3.6 and 3.9 without a spill, whatever the flags of the kernel.

    `masked`: with a key_mask, whose loads by pointer the compiler cannot give to another warp. `aligned`: what
    `fits_descriptors` says of query, key and value; if not, their tiles are loaded element by element.
    """
    pointers = {"DESCRIPTORS": False, "WARP_SPECIALIZE": False, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8}
    pointers["num_stages"] = 3 if head_dim >= 64 else 2
    if itemsize == 4:  # no tensor cores: "ieee" keeps fp32 products exact
        return pointers | {"BLOCK_M": 64 if head_dim == 16 else 32, "BLOCK_N": 32}
    if not aligned:
        return pointers | {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2}
    if 90 <= capability < 120:
        descriptors = pointers | {"DESCRIPTORS": True}
        if capability >= 100 or masked or not SPECIALISES:
            return descriptors
        # One warp group loads and two multiply, 64 queries each. The compiler wants to be told of 4 warps for that.
        return descriptors | {"WARP_SPECIALIZE": True, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
    if capability > 80 and head_dim == 128:  # 64 keys need more registers than there are
        return pointers | {"BLOCK_N": 32, "num_stages": 2}
    return pointers


def joint_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    max_seqlen: int,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    rows, _, head_dim = query.shape
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    row = torch.arange(rows, device=query.device)
    owns = (spans[:, :1] <= row) & (row < spans[:, 1:])  # [N, R]
    attends = (owns.T.to(compute_dtype) @ owns.to(compute_dtype)) > 0  # [R, R]
    if key_mask is not None:
        attends = attends & key_mask

    q, k, v = (x.to(compute_dtype).transpose(0, 1) for x in (query, key, value))  # [H, R, D]
    # A row that is no key may hold anything; times a weight of zero it has to give zero.
    v = v.masked_fill(~attends.any(dim=0)[:, None], 0.0)
    scores = (q @ k.mT) * (head_dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~attends, float("-inf"))
    # A row of -inf alone has no softmax; with zeros in its place it has one, and its weights become zeros again.
    has_keys = attends.any(dim=1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~has_keys, 0.0), dim=-1).masked_fill(~attends, 0.0)
    return (weights @ v).transpose(0, 1).contiguous().to(query.dtype)


@triton.jit
def _fill(out_ptr, row_stride, first, end, value, ROWS: tl.constexpr, DIM: tl.constexpr):
    """Write `value` to this program's share of the rows [first, end) of its head: tile t of T takes every T-th ROWS."""
    rows = tl.arange(0, ROWS)
    for row in range(first + tl.program_id(0) * ROWS, end, tl.num_programs(0) * ROWS):
        offsets = (row + rows).to(tl.int64)[:, None] * row_stride + tl.arange(0, DIM)[None, :]  # [ROWS, DIM]
        filled = tl.full((ROWS, DIM), value, out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, filled, mask=(row + rows < end)[:, None])


@triton.jit
def _load_tile(pointer, row, length, row_stride, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """`[BLOCK, DIM]` from `row` on; rows from `length` on are zeros."""
    rows = row + tl.arange(0, BLOCK)
    offsets = rows.to(tl.int64)[:, None] * row_stride + tl.arange(0, DIM)[None, :]  # [BLOCK, DIM]
    return tl.load(pointer + offsets, mask=(rows < length)[:, None], other=0.0)


@triton.jit(do_not_specialize=["rows"])
def _joint_attention_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    spans_ptr,
    key_mask_ptr,
    out_row,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    rows,
    scale_log2,
    HAS_KEY_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2)
    # Within the rows, whatever the spans hold.
    start = tl.minimum(tl.maximum(tl.load(spans_ptr + 2 * sequence), 0), rows)
    end = tl.minimum(tl.maximum(tl.load(spans_ptr + 2 * sequence + 1), start), rows)
    is_last = sequence + 1 == tl.num_programs(2)
    following = tl.load(spans_ptr + 2 * sequence + 2, mask=sequence + 1 < tl.num_programs(2), other=0)
    following = tl.where(is_last, rows, tl.minimum(following, rows))
    out_ptr += head * HEAD_DIM
    covered = tl.minimum(start + tl.num_programs(0) * BLOCK_M, end)
    _fill(out_ptr, out_row, covered, end, float("nan"), 16, HEAD_DIM)  # longer than max_seqlen: nobody overlooks NaN
    _fill(out_ptr, out_row, end, following, 0.0, 16, HEAD_DIM)
    _fill(out_ptr, out_row, 0, tl.where(sequence == 0, start, 0), 0.0, 16, HEAD_DIM)

    length = end - start
    first = tile * BLOCK_M
    out_ptr += start.to(tl.int64) * out_row
    query_ptr += start.to(tl.int64) * query_row + head * query_head
    key_ptr += start.to(tl.int64) * key_row + head * key_head
    value_ptr += start.to(tl.int64) * value_row + head * value_head
    if DESCRIPTORS:
        # One of each sequence, so that rows behind its end read as zeros: they may be another's, and NaN. A height of 0 is
        # no descriptor: of an empty span nothing may be loaded or stored. Of rank 2: the compiler takes the reshape of a
        # tile for its last use, and with warp specialisation frees it before the products have read it.
        height = tl.maximum(length, 1)
        first = tl.where(length > 0, first, BLOCK_M)
        key = tl.make_tensor_descriptor(key_ptr, [height, HEAD_DIM], [key_row, 1], [BLOCK_N, HEAD_DIM])
        value = tl.make_tensor_descriptor(value_ptr, [height, HEAD_DIM], [value_row, 1], [BLOCK_N, HEAD_DIM])
        query = tl.make_tensor_descriptor(query_ptr, [height, HEAD_DIM], [query_row, 1], [BLOCK_M, HEAD_DIM]).load([first, 0])
    else:
        query = _load_tile(query_ptr, first, length, query_row, BLOCK_M, HEAD_DIM)

    # Lower than any score and yet finite: in a row whose keys are all masked, -inf - -inf would be NaN.
    top = tl.full((BLOCK_M,), -1.0e30, tl.float32)  # the largest scaled score so far
    total = tl.zeros((BLOCK_M,), tl.float32)  # the sum of exp2(score - top)
    acc = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)  # that sum weighted with value
    keys = tl.arange(0, BLOCK_N)
    behind = (keys.to(tl.float32) + 0.5) * 2.0e36
    # A program without queries runs the loop zero times and goes on: warp specialisation takes no early return.
    blocks = tl.where(first < length, tl.cdiv(length, BLOCK_N), 0)
    for block in tl.range(0, blocks, warp_specialize=WARP_SPECIALIZE):
        row = block * BLOCK_N
        if DESCRIPTORS:
            key_tile = key.load([row, 0])
            value_tile = value.load([row, 0])
        else:
            key_tile = _load_tile(key_ptr, row, length, key_row, BLOCK_N, HEAD_DIM)
            value_tile = _load_tile(value_ptr, row, length, value_row, BLOCK_N, HEAD_DIM)
        scores = tl.dot(query, key_tile.T, input_precision="ieee", out_dtype=tl.float32)  # [BLOCK_M, BLOCK_N]
        if HAS_KEY_MASK or (DESCRIPTORS and not WARP_SPECIALIZE):
            is_key = keys < length - row
            if HAS_KEY_MASK:
                is_key = is_key & (tl.load(key_mask_ptr + (start + row).to(tl.int64) + keys, mask=is_key, other=0) != 0)
            scores = tl.where(is_key[None, :], scores, -float("inf"))
        else:
            # Keys behind the end, which are zeros, start at -1e36 or less: up to a sixth fewer instructions of the loop than
            # comparing takes. Not on sm_100, which would have to store them into its tensor memory first.
            scores += tl.minimum((length - row).to(tl.float32) * 2.0e36 - behind, 0.0)[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(weights, 1)
        acc = tl.dot(
            weights.to(value_tile.dtype), value_tile, acc * rescale[:, None], input_precision="ieee", out_dtype=tl.float32
        )
        top = new_top

    out = (acc / tl.where(total == 0.0, 1.0, total)[:, None]).to(out_ptr.dtype.element_ty)
    if DESCRIPTORS:
        tl.make_tensor_descriptor(out_ptr, [height, HEAD_DIM], [out_row, 1], [BLOCK_M, HEAD_DIM]).store([first, 0], out)
    else:
        query_rows = first + tl.arange(0, BLOCK_M)
        offsets = query_rows.to(tl.int64)[:, None] * out_row + tl.arange(0, HEAD_DIM)[None, :]  # [BLOCK_M, D]
        tl.store(out_ptr + offsets, out, mask=(query_rows < length)[:, None])


def launch_joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    max_seqlen: int,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    config: dict,
) -> torch.Tensor:
    rows, heads, head_dim = query.shape
    out = torch.empty((rows, heads, head_dim), dtype=query.dtype, device=query.device)
    tiles = max(1, triton.cdiv(min(max_seqlen, rows), config["BLOCK_M"]))

    def launch() -> None:
        if config["DESCRIPTORS"]:  # they are made in the kernel, in global memory that Triton asks for
            triton.set_allocator(lambda size, _alignment, _stream: query.new_empty(size, dtype=torch.int8))
        _joint_attention_kernel[(tiles, heads, spans.shape[0])](
            out,
            query,
            key,
            value,
            spans,
            key_mask,
            out.stride(0),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            rows,
            (head_dim**-0.5 if scale is None else scale) * LOG2_E,
            HAS_KEY_MASK=key_mask is not None,
            HEAD_DIM=head_dim,
            **config,
            enable_fp_fusion=True,
        )

    with on_device(query):
        # In a copy of the context, so that an allocator of the caller's stays set (Triton 3.4 keeps it in a global).
        contextvars.copy_context().run(launch)
    return out


def joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    max_seqlen: int,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of every sequence's tokens over all of its tokens, `softmax(scale * q @ k.T) @ v` per head.

    Sequences lie side by side along the rows: sequence n owns the rows [spans[n, 0], spans[n, 1]), text and image in
    whatever order. Spans are read on the device, so that a captured graph serves other lengths up to max_seqlen.

    Args:
        query (Tensor): `[R, H, D]`, bf16|fp16|fp32 (fp64 on the CPU), D adjacent, rows and heads strided as they come. On
            CUDA D is 16, 32, 64 or 128. From sm_90 on it is fastest with base and strides in units of 16 bytes.
        key (Tensor): like query.
        value (Tensor): like query; finite in rows that key_mask takes out.
        spans (Tensor): `[N, 2]` int32, contiguous, first row and end of each sequence; they ascend and do not overlap.
        max_seqlen (int): no sequence has more rows.
        key_mask (Tensor, optional): `[R]` bool, contiguous; False rows are no keys.
        scale (float, optional): greater than 0; `D ** -0.5` if None.
    Returns:
        Tensor: `[R, H, D]`, dtype of query, contiguous, never an alias. Zeros in rows of no sequence and for a query
            without any key. On CUDA, where nobody reads the spans in advance, they are cut to the rows there are, and rows
            of a sequence behind the last tile that max_seqlen allows for are NaN.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, with the offending value; on the CPU also spans that
            overlap, leave the rows or exceed max_seqlen.
        RuntimeError: CUDA tensors without Triton.
    Error: against float64 in bf16 and fp16 1.0 to 1.3 times the RMS of rounding the exact output once (bf16: 1.8e-3 of the
        output's RMS), because the softmax weights are rounded too; the same for stock's attention on the CPU.
    Traffic: 4 * R * H * D * itemsize bytes at least; 4 * H * D * sum of squared sequence lengths FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenDoubleStreamAttnProcessor2_0.__call__, from
        the concatenation of the streams to their separation.
    """
    return torch.ops.qwen_fast.joint_attention(query, key, value, spans, max_seqlen, key_mask, scale)


def _check(query, key, value, spans, max_seqlen, key_mask=None, scale=None) -> None:
    allowed = (torch.bfloat16, torch.float16, torch.float32) + ((torch.float64,) if not query.is_cuda else ())
    if query.dtype not in allowed:
        raise ValueError(f"query: dtype {query.dtype} is not supported on {query.device.type}; use one of {allowed}.")
    if query.dim() != 3 or query.numel() == 0:
        raise ValueError(f"query: shape {tuple(query.shape)}; [rows, heads, head_dim], none of them 0, is needed.")
    rows, _, head_dim = query.shape
    if query.is_cuda and head_dim not in HEAD_DIMS:
        raise ValueError(f"query: head_dim {head_dim} is not supported on CUDA; use one of {HEAD_DIMS}.")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.shape != query.shape or tensor.dtype != query.dtype:
            raise ValueError(
                f"{name}: {tuple(tensor.shape)} {tensor.dtype} differs from the query's {tuple(query.shape)} {query.dtype}."
            )
        if head_dim > 1 and tensor.stride(2) != 1:
            raise ValueError(f"{name}: stride {tensor.stride(2)} within a head; its elements have to be adjacent.")
    if spans.dim() != 2 or spans.shape[0] < 1 or spans.shape[1] != 2 or spans.dtype != torch.int32 or not spans.is_contiguous():
        raise ValueError(f"spans: got {tuple(spans.shape)} {spans.dtype}; a contiguous torch.int32 [sequences, 2] is needed.")
    if key_mask is not None and (key_mask.shape != (rows,) or key_mask.dtype != torch.bool or not key_mask.is_contiguous()):
        raise ValueError(f"key_mask: got {tuple(key_mask.shape)} {key_mask.dtype}; a contiguous torch.bool [{rows}] is needed.")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen: {max_seqlen} is negative.")
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"scale: {scale} is not a positive number.")
    for name, tensor in (("key", key), ("value", value), ("spans", spans), ("key_mask", key_mask)):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name}: on {tensor.device}, but query is on {query.device}; move it there first.")


def _joint_attention_cuda(query, key, value, spans, max_seqlen, key_mask=None, scale=None):
    _check(query, key, value, spans, max_seqlen, key_mask, scale)
    require_triton("joint_attention")
    dims = (query.shape[2], query.element_size(), key_mask is not None, fits_descriptors(query, key, value))
    config = get_config("joint_attention", dims, query.device, default_config)
    if config["WARP_SPECIALIZE"] and not SPECIALISES:  # measured, and yet not right
        config = default_config(capability(query.device), *dims)
    return launch_joint_attention(query, key, value, spans, max_seqlen, key_mask, scale, config=config)


def _joint_attention_cpu(query, key, value, spans, max_seqlen, key_mask=None, scale=None):
    _check(query, key, value, spans, max_seqlen, key_mask, scale)
    rows = query.shape[0]
    bounds = spans.flatten().tolist()
    if bounds[0] < 0 or bounds[-1] > rows or any(one > next_one for one, next_one in itertools.pairwise(bounds)):
        raise ValueError(f"spans: {spans.tolist()} do not ascend within the {rows} rows.")
    longest = max(end - start for start, end in spans.tolist())
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: {max_seqlen} is less than the longest sequence, {longest} rows.")
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [1, H, R, D]
    if bounds == [0, rows] and key_mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(0).transpose(0, 1).contiguous()
    out = torch.zeros(query.shape, dtype=query.dtype)
    for start, end in spans.tolist():
        own = slice(start, end)
        keys = own if key_mask is None else start + key_mask[own].nonzero()[:, 0]
        if start < end and (key_mask is None or keys.numel()):
            attended = F.scaled_dot_product_attention(q[:, :, own], k[:, :, keys], v[:, :, keys], scale=scale)
            out[own] = attended.squeeze(0).transpose(0, 1)
    return out


def _joint_attention_fake(query, key, value, spans, max_seqlen, key_mask=None, scale=None):
    _check(query, key, value, spans, max_seqlen, key_mask, scale)
    return torch.empty_like(query, memory_format=torch.contiguous_format)


register(
    "joint_attention(Tensor query, Tensor key, Tensor value, Tensor spans, SymInt max_seqlen, Tensor? key_mask=None, "
    "float? scale=None) -> Tensor",
    cuda=_joint_attention_cuda,
    cpu=_joint_attention_cpu,
    fake=_joint_attention_fake,
)
