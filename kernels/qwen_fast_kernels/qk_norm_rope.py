"""RMSNorm of every query and key head, then rotary embedding, and the text rows put where attention reads them, in one launch.

    n = x * rsqrt(mean(x * x) + eps) * weight,   (x[2i], x[2i+1]) = (n[2i] + j n[2i+1]) * (rope[2i] + j rope[2i+1])

In place for the image rows. The text rows are read from a buffer of their own and written to where they belong, those of the
value unchanged.

Grid: one program per token row and BLOCK_H heads, of query and key both.
"""

import torch

from ._launch import launch
from ._library import FLOATS, FLOATS_OF_CPU, register
from ._triton import require_triton, tl, triton
from .tuning import get_config

HEAD_DIMS = (8, 16, 32, 64, 128, 256)


def default_config(capability: int, heads: int, head_dim: int, itemsize: int) -> dict:
    """All heads of a token up to 32 in one program, so that it reads the row of `rope` once; the same for every GPU.

    With more threads than channels the compiler keeps everything in registers. With fewer it loads `rope` and the
    weights coalesced and spreads them through shared memory: 512 bytes and five barriers at head_dim 128.
    """
    block_h = 1
    while block_h < min(heads, 32) or block_h * head_dim < 256:  # with less, a warp cannot use 16-byte vectors
        block_h *= 2
    vectors = block_h * head_dim * itemsize // 16
    return {"BLOCK_H": block_h, "num_warps": max(1, min(8, vectors // 32))}


def qk_norm_rope_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    norm_added_q: torch.Tensor,
    norm_added_k: torch.Tensor,
    rope: torch.Tensor,
    txt_rows: int,
    eps: float,
    value: torch.Tensor,
    text: torch.Tensor,
    places: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New tensors for what the operator writes into `query`, `key` and `value`."""
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    cos, sin = rope.to(compute_dtype).unflatten(-1, (-1, 2)).unsqueeze(1).unbind(-1)  # [R, 1, D / 2]
    places = places.long()

    def normed_and_rotated(x: torch.Tensor, text_rows: torch.Tensor, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        normed = torch.cat([text_rows, x.index_select(0, places[txt_rows:])]).to(compute_dtype)
        normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
        image, text = image.to(compute_dtype), text.to(compute_dtype)
        normed = torch.cat([normed[:txt_rows] * text, normed[txt_rows:] * image])
        real, imaginary = normed.unflatten(-1, (-1, 2)).unbind(-1)
        rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
        return x.index_copy(0, places, rotated.flatten(-2).to(x.dtype))

    return (
        normed_and_rotated(query, text[0], norm_q, norm_added_q),
        normed_and_rotated(key, text[1], norm_k, norm_added_k),
        value.index_copy(0, places[:txt_rows], text[2]),
    )


@triton.jit
def _normed_and_rotated(x, weight, cos, sin, eps, BLOCK_H: tl.constexpr, D: tl.constexpr):
    x = x.to(tl.float32)  # [BLOCK_H, D]
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight.to(tl.float32)[None, :]
    real, imaginary = tl.split(tl.reshape(x, [BLOCK_H, D // 2, 2]))
    rotated = tl.join(real * cos - imaginary * sin, real * sin + imaginary * cos)
    return tl.reshape(rotated, [BLOCK_H, D])


@triton.jit(do_not_specialize=["places_ptr", "rows", "txt_rows"])
def _qk_norm_rope_kernel(
    query_ptr,
    key_ptr,
    norm_q_ptr,
    norm_k_ptr,
    norm_added_q_ptr,
    norm_added_k_ptr,
    rope_ptr,
    value_ptr,
    text_ptr,
    places_ptr,
    rows,
    txt_rows,
    eps,
    heads,
    query_row_stride,
    query_head_stride,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    text_stride,
    text_row_stride,
    text_head_stride,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]  # [BLOCK_H, 1]
    channel = tl.arange(0, D).to(tl.int64)[None, :]  # [1, D]
    is_text = row < txt_rows
    place = tl.load(places_ptr + row).to(tl.int64)
    heads = tl.where((place >= 0) & (place < rows), heads, 0)  # a place outside the buffers must not be written
    txt_heads = tl.where(is_text, heads, 0)
    mask = head < heads

    query_ptrs = query_ptr + (place * query_row_stride + head * query_head_stride + channel)  # [BLOCK_H, D]
    key_ptrs = key_ptr + (place * key_row_stride + head * key_head_stride + channel)
    weight_q_ptr = tl.where(is_text, norm_added_q_ptr, norm_q_ptr)
    weight_k_ptr = tl.where(is_text, norm_added_k_ptr, norm_k_ptr)

    # All loads before the first store: behind it nothing could be moved up, for all the compiler knows they overlap.
    text_ptrs = text_ptr + (row * text_row_stride + head * text_head_stride + channel)
    query = tl.load(tl.where(is_text, text_ptrs, query_ptrs), mask=mask, other=0.0)
    key = tl.load(tl.where(is_text, text_ptrs + text_stride, key_ptrs), mask=mask, other=0.0)
    value = tl.load(text_ptrs + 2 * text_stride, mask=head < txt_heads, other=0.0)
    rope = tl.load(rope_ptr + (row * D + tl.arange(0, D)))
    weight_q = tl.load(weight_q_ptr + tl.arange(0, D))
    weight_k = tl.load(weight_k_ptr + tl.arange(0, D))
    cos, sin = tl.split(tl.reshape(rope, [D // 2, 2]))
    cos, sin = cos[None, :], sin[None, :]  # [1, D / 2]

    dtype = query_ptr.dtype.element_ty
    value_ptrs = value_ptr + (place * value_row_stride + head * value_head_stride + channel)
    tl.store(value_ptrs, value, mask=head < txt_heads)
    query = _normed_and_rotated(query, weight_q, cos, sin, eps, BLOCK_H, D)
    tl.store(query_ptrs, query.to(dtype), mask=mask)
    key = _normed_and_rotated(key, weight_k, cos, sin, eps, BLOCK_H, D)
    tl.store(key_ptrs, key.to(dtype), mask=mask)


def launch_qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    norm_added_q: torch.Tensor,
    norm_added_k: torch.Tensor,
    rope: torch.Tensor,
    txt_rows: int,
    eps: float,
    value: torch.Tensor,
    text: torch.Tensor,
    places: torch.Tensor,
    *,
    config: dict,
) -> None:
    rows, heads, head_dim = query.shape
    launch(
        _qk_norm_rope_kernel,
        (rows, -(-heads // config["BLOCK_H"])),
        (query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, value, text, places),
        (rows, txt_rows, eps),
        (heads, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *text.stride()[:3]),
        D=head_dim,
        **config,
        enable_fp_fusion=True,
    )


def qk_norm_rope(
    query: torch.Tensor,
    key: torch.Tensor,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    norm_added_q: torch.Tensor,
    norm_added_k: torch.Tensor,
    rope: torch.Tensor,
    txt_rows: int,
    eps: float,
    value: torch.Tensor,
    text: torch.Tensor,
    places: torch.Tensor,
) -> None:
    """RMSNorm over the channels of every head, times weight, then complex rotation of channel pairs.

    Joint rows are the text rows of all sequences, then their image rows. Joint row r is row `places[r]` of `query`, `key` and
    `value`, whose rows may lie sequence by sequence. The image rows of query and key change in place, the text rows of all
    three are written from `text`, and the value's image rows stay as they are.

    Args:
        query (Tensor): `[R, H, D]`, bf16|fp16|fp32 (fp64 on the CPU), any strides with adjacent channels, for example
            `qkv[0].view(R, H, D)`; D one of 8, 16, ..., 256. Overwritten.
        key (Tensor): like `query`, its strides may differ. Overwritten; must not overlap with `query`.
        norm_q (Tensor): `[D]` weight for the query's image rows, any floating-point type, adjacent.
        norm_k (Tensor): the same for the key's image rows.
        norm_added_q (Tensor): the same for the query's text rows.
        norm_added_k (Tensor): the same for the key's text rows. All four weights share one dtype.
        rope (Tensor): `[R, D]` fp32, contiguous, of the joint rows; (2i, 2i + 1) = (cos_i, sin_i) of the token, that is
            `torch.view_as_real(freqs_cis).flatten(-2)`.
        txt_rows (int): number of text rows T, in [0, R].
        eps (float): added to the mean square.
        value (Tensor): like `query`; its text rows are overwritten. Must not overlap with the others.
        text (Tensor): `[3, T, H, D]`, dtype of `query`, any strides with adjacent channels: query, key and value of the text
            rows. Must not overlap with the three that are written.
        places (Tensor): `[R]` int32, contiguous: every row of the buffers once.
    Returns:
        None. `query`, `key` and `value` hold the result.
    Raises:
        ValueError: shapes, strides, dtypes or devices that do not fit, with the offending value; on the CPU also a place
            outside [0, R), which on CUDA is not written.
        RuntimeError: CUDA tensors without Triton.
    Error: computed in fp32 and rounded once: in bf16 RMS 1.7e-3 of the RMS against float64; stock diffusers, which rounds
        after the norm and after the weight too, 2.9e-3.
    Traffic: (4 * R + 2 * T) * H * D * itemsize + 4 * R * (D + 1) bytes; 14 * R * H * D FLOPs.
    Source: diffusers 0.42.1, models/transformers/transformer_qwenimage.py, QwenDoubleStreamAttnProcessor2_0 and
        apply_rotary_emb_qwen (use_real=False); models/normalization.py, RMSNorm.
    """
    torch.ops.qwen_fast.qk_norm_rope(
        query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, eps, value, text, places
    )


def _check(query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, value, text, places) -> None:
    shape, dtype, device = query.shape, query.dtype, query.device
    allowed = FLOATS if query.is_cuda else FLOATS_OF_CPU
    if dtype not in allowed:
        raise ValueError(f"query: dtype {dtype} is not supported on {device.type}; use one of {allowed}.")
    if len(shape) != 3 or shape[2] not in HEAD_DIMS:
        raise ValueError(f"query: shape {tuple(shape)}; [rows, heads, D] with D one of {HEAD_DIMS} is needed.")
    rows, heads, head_dim = shape
    if rows == 0 or heads == 0:
        raise ValueError(f"query: shape {tuple(shape)} holds no element; at least one row and one head are needed.")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(
                f"{name}: got {tuple(x.shape)} {x.dtype}, but query is {tuple(shape)} {dtype}; they have to agree."
            )
        row, head, channel = x.stride()
        if channel != 1:
            raise ValueError(f"{name}: stride {channel} between channels; they have to be adjacent.")
        if (rows > 1 and row == 0) or (heads > 1 and head == 0):
            raise ValueError(f"{name}: strides {tuple(x.stride())} repeat elements, which cannot be overwritten; clone it.")
    weights = {"norm_q": norm_q, "norm_k": norm_k, "norm_added_q": norm_added_q, "norm_added_k": norm_added_k}
    weight_dtype = norm_q.dtype
    for name, weight in weights.items():
        if weight.shape != (head_dim,) or not weight.is_floating_point() or not weight.is_contiguous():
            raise ValueError(
                f"{name}: got {tuple(weight.shape)} {weight.dtype} with stride {weight.stride()}; adjacent floating-point "
                f"[{head_dim}] is needed."
            )
        if weight.dtype != weight_dtype:
            raise ValueError(f"{name}: dtype {weight.dtype}, but norm_q has {weight_dtype}; the weights have to agree.")
    if rope.shape != (rows, head_dim) or rope.dtype != torch.float32 or not rope.is_contiguous():
        raise ValueError(
            f"rope: got {tuple(rope.shape)} {rope.dtype} with strides {rope.stride()}; a contiguous fp32 table "
            f"[{rows}, {head_dim}] is needed."
        )
    if not 0 <= txt_rows <= rows:
        raise ValueError(f"txt_rows: {txt_rows} is outside [0, {rows}], the number of token rows.")
    if text.shape != (3, txt_rows, heads, head_dim) or text.dtype != dtype:
        raise ValueError(f"text: got {tuple(text.shape)} {text.dtype}; {(3, txt_rows, heads, head_dim)} {dtype} is needed.")
    if text.stride()[3] != 1:
        raise ValueError(f"text: stride {text.stride(3)} between channels; they have to be adjacent.")
    if places.shape != (rows,) or places.dtype != torch.int32 or not places.is_contiguous():
        raise ValueError(f"places: got {tuple(places.shape)} {places.dtype}; a contiguous int32 [{rows}] is needed.")
    others = {"key": key, **weights, "rope": rope, "value": value, "text": text, "places": places}
    for name, tensor in others.items():
        if tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}, but query is on {device}; move it there first.")


def _qk_norm_rope_cuda(query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, eps, value, text, places):
    arguments = query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows
    _check(*arguments, value, text, places)
    require_triton("qk_norm_rope")
    config = get_config("qk_norm_rope", (*query.shape[1:], query.element_size()), query.device, default_config)
    launch_qk_norm_rope(*arguments, eps, value, text, places, config=config)


def _normed_and_rotated_cpu(x: torch.Tensor, weight: torch.Tensor, rotation: torch.Tensor, eps: float) -> None:
    """In place, with no temporary as large as `x` unless it is narrower than fp32: 0.15 to 0.5 of stock's time."""
    compute_dtype = rotation.dtype.to_real()
    is_complex_view = all(offset % 2 == 0 for offset in (x.storage_offset(), x.stride(0), x.stride(1)))
    buffer = x if x.dtype == compute_dtype and is_complex_view else x.to(compute_dtype, copy=True)
    norm = torch.linalg.vector_norm(buffer, dim=-1, keepdim=True)
    buffer.mul_(norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()).mul_(weight.to(compute_dtype))
    torch.view_as_complex(buffer.unflatten(-1, (-1, 2))).mul_(rotation)
    if buffer is not x:
        x.copy_(buffer)


def _runs(places: torch.Tensor, start: int, stop: int) -> list[tuple[slice, slice]]:
    """Joint rows from `start` to `stop` as stretches that lie together in the buffers too: of joint rows, and of places.

    Raises a ValueError for places that do not exist.
    """
    if start == stop:
        return []
    own, rows = places[start:stop], len(places)
    if not 0 <= int(own.min()) <= int(own.max()) < rows:
        raise ValueError(f"places: {int(own.min())} to {int(own.max())} are not all in [0, {rows}), the rows of query.")
    bounds = [0, *(torch.nonzero(own.diff() != 1).flatten() + 1).tolist(), stop - start]
    firsts = own[bounds[:-1]].tolist()
    return [
        (slice(start + begin, start + end), slice(first, first + end - begin))
        for begin, end, first in zip(bounds[:-1], bounds[1:], firsts, strict=True)
    ]


def _qk_norm_rope_cpu(query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, eps, value, text, places):
    _check(query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, value, text, places)
    text_runs, image_runs = _runs(places, 0, txt_rows), _runs(places, txt_rows, len(places))
    for index, x in enumerate((query, key, value)):
        for joint, place in text_runs:
            x[place] = text[index, joint]
    rope = rope.to(torch.promote_types(query.dtype, torch.float32), copy=rope.storage_offset() % 2 == 1)
    rotation = torch.view_as_complex(rope.unflatten(-1, (-1, 2))).unsqueeze(1)  # [R, 1, D / 2]
    for x, image_weight, text_weight in ((query, norm_q, norm_added_q), (key, norm_k, norm_added_k)):
        for runs, weight in ((text_runs, text_weight), (image_runs, image_weight)):
            for joint, place in runs:
                _normed_and_rotated_cpu(x[place], weight, rotation[joint], eps)


def _qk_norm_rope_torch(*arguments):
    query, key, *_, value, _text, _places = arguments
    for x, result in zip((query, key, value), qk_norm_rope_reference(*arguments), strict=True):
        x.copy_(result)


def _qk_norm_rope_fake(query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, eps, value, text, places):
    _check(query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, value, text, places)
    # Under dynamic shapes Inductor takes the storage offset of a mutated view for 0 (pytorch/pytorch#198068): key would
    # silently be written over query. As constants they are right; a program with such views is compiled per number of rows.
    for x in (query, key, value):
        int(x.storage_offset())


register(
    "qk_norm_rope(Tensor(a!) query, Tensor(b!) key, Tensor norm_q, Tensor norm_k, Tensor norm_added_q, Tensor norm_added_k, "
    "Tensor rope, int txt_rows, float eps, Tensor(c!) value, Tensor text, Tensor places) -> ()",
    cuda=_qk_norm_rope_cuda,
    cpu=_qk_norm_rope_cpu,
    fake=_qk_norm_rope_fake,
    by_torch=_qk_norm_rope_torch,
)
