"""Attention of each sequence's text and image tokens over all of them, many sequences in one launch.

    out[i] = sum_j softmax_j(scale * query[i] . key[j]) * value[j],   i and j in the same sequence, j a key

Grid: (tiles of BLOCK_M queries, text tiles first; heads; sequences), so that neighbours share keys and values in L2.
"""

import contextvars
import itertools
import math

import torch
import torch.nn.functional as F

from ._flash import (
    fill_uncovered,
    fits_descriptors,
    load_tile,
    no_scores,
    rows_descriptor,
    softmax_step,
    span_of,
    starts_of_spans,
)
from ._library import register
from ._triton import on_device, require_triton, tl, triton
from .tuning import get_config

HEAD_DIMS = (16, 32, 64, 128)
LOG2_E = 1.4426950408889634


def default_config(capability: int, head_dim: int, itemsize: int, masked: bool = False, aligned: bool = True) -> dict:
    """Every entry compiles with Triton 3.6 and 3.9 without a spill, whatever the flags of the kernel.

    `masked`: with a key_mask, whose loads by pointer the compiler cannot give to another warp. `aligned`: what
    `fits_descriptors` says of query, key and value; if not, their tiles are loaded element by element.
    """
    pointers = {"DESCRIPTORS": False, "WARP_SPECIALIZE": False, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    if itemsize == 4:  # no tensor cores: "ieee" keeps fp32 products exact
        return pointers | {"BLOCK_M": 32, "BLOCK_N": 32, "num_stages": 2}
    if not aligned:
        return pointers | {"BLOCK_M": 64, "BLOCK_N": 32, "num_stages": 2}
    if 90 <= capability < 120:
        descriptors = pointers | {"DESCRIPTORS": True}
        if capability >= 100 or masked:
            return descriptors
        # One warp group loads and two multiply, 64 queries each. The compiler wants to be told of 4 warps for that.
        return descriptors | {"WARP_SPECIALIZE": True, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2}
    return pointers if head_dim >= 64 else pointers | {"BLOCK_M": 64, "num_warps": 4}


def joint_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_txt: torch.Tensor,
    cu_seqlens_img: torch.Tensor,
    txt_rows: int,
    max_seqlen_txt: int,
    max_seqlen_img: int,
    seqused_txt: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    rows, _, head_dim = query.shape
    sequences = cu_seqlens_txt.numel() - 1
    compute_dtype = torch.promote_types(query.dtype, torch.float32)

    def sequence_of(cu_seqlens: torch.Tensor, count: int) -> torch.Tensor:
        """Sequence of each of `count` rows, `sequences` for those that belong to none."""
        row = torch.arange(count, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
        return torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)

    txt_sequence, img_sequence = sequence_of(cu_seqlens_txt, txt_rows), sequence_of(cu_seqlens_img, rows - txt_rows)
    sequence = torch.cat([txt_sequence, img_sequence])
    used = sequence < sequences
    if seqused_txt is not None:
        end = (cu_seqlens_txt[:-1] + seqused_txt).index_select(0, txt_sequence.clamp(max=sequences - 1))
        used = used & torch.cat([torch.arange(txt_rows, device=end.device) < end, torch.ones_like(used[txt_rows:])])
    is_key = used if key_mask is None else used & key_mask
    attends = (sequence[:, None] == sequence[None, :]) & used[:, None] & is_key[None, :]  # [R, R]

    q, k, v = (x.to(compute_dtype).transpose(0, 1) for x in (query, key, value))  # [H, R, D]
    scores = (q @ k.mT) * (head_dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~attends, float("-inf"))
    # A row of -inf alone has no softmax; with zeros in its place it has one, and its weights become zeros again.
    has_keys = attends.any(dim=1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~has_keys, 0.0), dim=-1).masked_fill(~attends, 0.0)
    return (weights @ v).transpose(0, 1).contiguous().to(query.dtype)


@triton.jit
def _joint_attention_kernel(
    out_ptr,
    query_ptr,
    key,  # pointers, or descriptors of [R, H, D]
    value,
    cu_seqlens_txt_ptr,
    cu_seqlens_img_ptr,
    seqused_txt_ptr,
    key_mask_ptr,
    out_row,
    query_row,
    query_head,
    key_row,
    key_head,
    value_row,
    value_head,
    txt_rows,
    rows,
    max_seqlen_txt,
    max_seqlen_img,
    scale_log2,
    HAS_SEQUSED: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    sequence = tl.program_id(2).to(tl.int64)
    txt_start, txt_length = span_of(cu_seqlens_txt_ptr, sequence, 0, txt_rows)
    img_start, img_length = span_of(cu_seqlens_img_ptr, sequence, txt_rows, rows)
    txt_keys = txt_length
    if HAS_SEQUSED:
        txt_keys = tl.minimum(tl.maximum(tl.load(seqused_txt_ptr + sequence), 0), txt_length)

    out_ptr += head * HEAD_DIM
    tiles = tl.num_programs(0)
    is_last = sequence + 1 == tl.num_programs(2)
    txt_end = tl.where(is_last, txt_rows, txt_start + txt_length)
    img_end = tl.where(is_last, rows, img_start + img_length)
    txt_tiles = tl.cdiv(max_seqlen_txt, BLOCK_M)
    img_tiles = tl.cdiv(max_seqlen_img, BLOCK_M)
    fill_uncovered(out_ptr, out_row, txt_start, txt_length, txt_tiles * BLOCK_M, txt_end, tile, tiles, 16, HEAD_DIM)
    fill_uncovered(out_ptr, out_row, img_start, img_length, img_tiles * BLOCK_M, img_end, tile, tiles, 16, HEAD_DIM)

    is_txt = tile < txt_tiles
    start = tl.where(is_txt, txt_start, img_start)
    length = tl.where(is_txt, txt_length, img_length)
    used = tl.where(is_txt, txt_keys, img_length)
    first = (tl.where(is_txt, tile, tile - txt_tiles) * BLOCK_M).to(tl.int32)
    query_rows = first + tl.arange(0, BLOCK_M)
    if WARP_SPECIALIZE:
        # Only with these two made here, of rank 2, does the compiler split their rows over two warp groups. A height of 0
        # is no descriptor: of an empty span nothing may be loaded or stored.
        load_from = tl.where(length > 0, first, BLOCK_M)
        height = tl.maximum(length, 1)
        query = tl.make_tensor_descriptor(
            query_ptr + start.to(tl.int64) * query_row + head * query_head,
            shape=[height, HEAD_DIM],
            strides=[query_row, 1],
            block_shape=[BLOCK_M, HEAD_DIM],
        ).load([load_from, 0])
    else:
        query = load_tile(query_ptr, start + first, used - first, head, query_row, query_head, BLOCK_M, HEAD_DIM, False)

    # The blocks of text keys, then those of image keys, in one loop. A program without queries runs it zero times and
    # goes on: warp specialisation takes no early return.
    txt_blocks = tl.cdiv(txt_keys, BLOCK_N)
    blocks = tl.where(first < used, txt_blocks + tl.cdiv(img_length, BLOCK_N), 0)
    img_base = img_start - txt_blocks * BLOCK_N
    keys = tl.arange(0, BLOCK_N)
    acc, total, top = no_scores(BLOCK_M, HEAD_DIM)
    for block in tl.range(0, blocks, warp_specialize=WARP_SPECIALIZE):
        in_txt = block < txt_blocks
        row = tl.where(in_txt, txt_start, img_base) + block * BLOCK_N
        left = tl.where(in_txt, txt_start + txt_keys, img_start + img_length) - row
        key_tile = load_tile(key, row, left, head, key_row, key_head, BLOCK_N, HEAD_DIM, DESCRIPTORS)
        value_tile = load_tile(value, row, left, head, value_row, value_head, BLOCK_N, HEAD_DIM, DESCRIPTORS)
        is_key = keys < left
        if HAS_KEY_MASK:
            is_key = is_key & (tl.load(key_mask_ptr + (row.to(tl.int64) + keys), mask=is_key, other=0) != 0)
        scores = tl.dot(query, key_tile.T, input_precision="ieee", out_dtype=tl.float32)
        scores = tl.where(is_key[None, :], scores, -float("inf"))
        acc, total, top = softmax_step(acc, total, top, scores, value_tile, scale_log2)

    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = tl.where((query_rows < used)[:, None], out, 0.0).to(out_ptr.dtype.element_ty)
    if WARP_SPECIALIZE:
        tl.make_tensor_descriptor(
            out_ptr + start.to(tl.int64) * out_row,
            shape=[height, HEAD_DIM],
            strides=[out_row, 1],
            block_shape=[BLOCK_M, HEAD_DIM],
        ).store([load_from, 0], out)
    else:
        offsets = (start.to(tl.int64) + query_rows)[:, None] * out_row + tl.arange(0, HEAD_DIM)[None, :]  # [BLOCK_M, D]
        tl.store(out_ptr + offsets, out, mask=(query_rows < length)[:, None])


def launch_joint_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_txt: torch.Tensor,
    cu_seqlens_img: torch.Tensor,
    txt_rows: int,
    max_seqlen_txt: int,
    max_seqlen_img: int,
    seqused_txt: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    *,
    config: dict,
) -> torch.Tensor:
    rows, heads, head_dim = query.shape
    out = torch.empty((rows, heads, head_dim), dtype=query.dtype, device=query.device)
    max_seqlen_txt, max_seqlen_img = min(max_seqlen_txt, txt_rows), min(max_seqlen_img, rows - txt_rows)
    tiles = triton.cdiv(max_seqlen_txt, config["BLOCK_M"]) + triton.cdiv(max_seqlen_img, config["BLOCK_M"])
    sources = key, value
    if config["DESCRIPTORS"]:
        sources = rows_descriptor(key, config["BLOCK_N"]), rows_descriptor(value, config["BLOCK_N"])

    def launch() -> None:
        if config["WARP_SPECIALIZE"]:  # descriptors made in the kernel live in global memory that Triton asks for
            triton.set_allocator(lambda size, _alignment, _stream: query.new_empty(size, dtype=torch.int8))
        _joint_attention_kernel[(max(tiles, 1), heads, cu_seqlens_txt.numel() - 1)](
            out,
            query,
            *sources,
            cu_seqlens_txt,
            cu_seqlens_img,
            seqused_txt,
            key_mask,
            out.stride(0),
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            txt_rows,
            rows,
            max_seqlen_txt,
            max_seqlen_img,
            (head_dim**-0.5 if scale is None else scale) * LOG2_E,
            HAS_SEQUSED=seqused_txt is not None,
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
    cu_seqlens_txt: torch.Tensor,
    cu_seqlens_img: torch.Tensor,
    txt_rows: int,
    max_seqlen_txt: int,
    max_seqlen_img: int,
    seqused_txt: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of every sequence's text and image tokens over all of its tokens, `softmax(scale * q @ k.T) @ v` per head.

    Token rows are joint: the text rows of all sequences, sequence after sequence, then their image rows. Sequence n owns
    the text rows [cu_seqlens_txt[n], cu_seqlens_txt[n + 1]) and the image rows txt_rows + [cu_seqlens_img[n], ...[n + 1]).
    Lengths are read on the device, so that a captured graph serves other lengths up to max_seqlen_*.

    Args:
        query (Tensor): `[R, H, D]`, bf16|fp16|fp32 (fp64 on the CPU), D adjacent, rows and heads strided as they come. On
            CUDA D is 16, 32, 64 or 128. From sm_90 on it is fastest with base and strides in units of 16 bytes.
        key (Tensor): like query.
        value (Tensor): like query; finite also in rows that are no keys.
        cu_seqlens_txt (Tensor): `[N + 1]` int32, contiguous, first text row of each sequence, then the end; starts at 0.
        cu_seqlens_img (Tensor): the same for image rows, counted from txt_rows.
        txt_rows (int): text rows of all sequences; the rest of the R rows are image rows.
        max_seqlen_txt (int): no sequence has more text rows.
        max_seqlen_img (int): no sequence has more image rows.
        seqused_txt (Tensor, optional): `[N]` int32: text rows of a sequence beyond it are padding, and no keys.
        key_mask (Tensor, optional): `[R]` bool, contiguous; False rows are no keys.
        scale (float, optional): greater than 0; `D ** -0.5` if None.
    Returns:
        Tensor: `[R, H, D]`, dtype of query, contiguous, never an alias. Zeros in padding rows, in rows of no sequence, and
            for a query without any key. On CUDA, where nobody reads the lengths in advance, they are cut to the rows there
            are, and rows behind the last tile that max_seqlen_* allows for are NaN.
    Raises:
        ValueError: shapes, dtypes, strides or devices that do not fit, with the offending value; on the CPU also lengths
            that do not fit the rows or exceed max_seqlen_*.
        RuntimeError: CUDA tensors without Triton.
    Error: against float64 in bf16 and fp16 1.0 to 1.3 times the RMS of rounding the exact output once (bf16: 1.8e-3 of the
        output's RMS), because the softmax weights are rounded too; the same for stock's attention on the CPU.
    Traffic: 4 * R * H * D * itemsize bytes at least; 4 * H * D * sum of squared sequence lengths FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenDoubleStreamAttnProcessor2_0.__call__, from
        the concatenation of the streams to their separation.
    """
    spans = (cu_seqlens_txt, cu_seqlens_img, txt_rows, max_seqlen_txt, max_seqlen_img)
    return torch.ops.qwen_fast.joint_attention(query, key, value, *spans, seqused_txt, key_mask, scale)


def _check(query, key, value, cu_txt, cu_img, txt_rows, max_txt, max_img, seqused_txt, key_mask, scale) -> None:
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
    if not 0 <= txt_rows <= rows:
        raise ValueError(f"txt_rows: {txt_rows} is outside [0, {rows}], the number of token rows.")
    needed = {
        "cu_seqlens_txt": (cu_txt, torch.int32, max(cu_txt.numel(), 2)),
        "cu_seqlens_img": (cu_img, torch.int32, cu_txt.numel()),
        "seqused_txt": (seqused_txt, torch.int32, cu_txt.numel() - 1),
        "key_mask": (key_mask, torch.bool, rows),
    }
    for name, (tensor, dtype, length) in needed.items():
        if tensor is not None and (tensor.shape != (length,) or tensor.dtype != dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name}: got {tuple(tensor.shape)} {tensor.dtype}; a contiguous {dtype} [{length}] is needed.")
    for name, length in (("max_seqlen_txt", max_txt), ("max_seqlen_img", max_img)):
        if length < 0:
            raise ValueError(f"{name}: {length} is negative.")
    if scale is not None and not 0.0 < scale < math.inf:
        raise ValueError(f"scale: {scale} is not a positive number.")
    for name, tensor in (("key", key), ("value", value), *((name, tensor) for name, (tensor, _, _) in needed.items())):
        if tensor is not None and tensor.device != query.device:
            raise ValueError(f"{name}: on {tensor.device}, but query is on {query.device}; move it there first.")


def _joint_attention_cuda(
    query, key, value, cu_txt, cu_img, txt_rows, max_txt, max_img, seqused_txt=None, key_mask=None, scale=None
):
    arguments = (query, key, value, cu_txt, cu_img, txt_rows, max_txt, max_img, seqused_txt, key_mask, scale)
    _check(*arguments)
    require_triton("joint_attention")
    dims = (query.shape[2], query.element_size(), key_mask is not None, fits_descriptors(query, key, value))
    config = get_config("joint_attention", dims, query.device, default_config)
    return launch_joint_attention(*arguments, config=config)


def _joint_attention_cpu(
    query, key, value, cu_txt, cu_img, txt_rows, max_txt, max_img, seqused_txt=None, key_mask=None, scale=None
):
    _check(query, key, value, cu_txt, cu_img, txt_rows, max_txt, max_img, seqused_txt, key_mask, scale)
    txt = starts_of_spans("cu_seqlens_txt", cu_txt, txt_rows, max_txt)
    img = starts_of_spans("cu_seqlens_img", cu_img, query.shape[0] - txt_rows, max_img)
    lengths = [end - start for start, end in itertools.pairwise(txt)]
    used = lengths if seqused_txt is None else seqused_txt.tolist()
    for length, most in zip(used, lengths, strict=True):
        if not 0 <= length <= most:
            raise ValueError(f"seqused_txt: {used} is outside [0, length] for text lengths {lengths}.")

    heads_first = [x.transpose(0, 1).unsqueeze(0) for x in (query, key, value)]  # [1, H, R, D]
    if len(used) == 1 and used[0] == txt_rows and img[1] == query.shape[0] - txt_rows and key_mask is None:
        out = F.scaled_dot_product_attention(*heads_first, scale=scale)
        return out.squeeze(0).transpose(0, 1).contiguous()
    out = torch.zeros(query.shape, dtype=query.dtype)
    for n, length in enumerate(used):
        text, image = slice(txt[n], txt[n] + length), slice(txt_rows + img[n], txt_rows + img[n + 1])
        q, k, v = (torch.cat([x[:, :, text], x[:, :, image]], dim=2) for x in heads_first)
        if key_mask is not None:
            is_key = torch.cat([key_mask[text], key_mask[image]])
            k, v = k[:, :, is_key], v[:, :, is_key]
        if q.shape[2] and k.shape[2]:
            attended = F.scaled_dot_product_attention(q, k, v, scale=scale).squeeze(0).transpose(0, 1)
            out[text], out[image] = attended[:length], attended[length:]
    return out


def _joint_attention_fake(
    query, key, value, cu_txt, cu_img, txt_rows, max_txt, max_img, seqused_txt=None, key_mask=None, scale=None
):
    _check(query, key, value, cu_txt, cu_img, txt_rows, max_txt, max_img, seqused_txt, key_mask, scale)
    return torch.empty_like(query, memory_format=torch.contiguous_format)


register(
    "joint_attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_txt, Tensor cu_seqlens_img, "
    "SymInt txt_rows, SymInt max_seqlen_txt, SymInt max_seqlen_img, Tensor? seqused_txt=None, Tensor? key_mask=None, "
    "float? scale=None) -> Tensor",
    cuda=_joint_attention_cuda,
    cpu=_joint_attention_cpu,
    fake=_joint_attention_fake,
)
