"""The cases of qk_norm_rope, for benchmarks/cases.py: arguments, bytes and FLOPs."""

import torch


def heads(make, dtype, size, layout, count):
    """`[R, H, D]` each; "fused": the outputs of one projection, beside each other in a row."""
    if layout == "fused":
        fused = make.normal(size.rows, 3, size.heads, size.head_dim, dtype=dtype)
        return [fused[:, index] for index in range(count)]
    offset = 3 if layout == "offset" else 0
    return [make.normal(size.rows, size.heads, size.head_dim, dtype=dtype, offset=offset) for _ in range(count)]


def qk_norm_rope(make, dtype, size, layout="fused", sequence_major=False):
    """Joint rows, or with `sequence_major` the rows of each sequence together and the text rows moved there."""
    weights = [make.normal(size.head_dim, dtype=dtype) for _ in range(4)]
    angles = make.normal(size.rows, size.head_dim // 2)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(-2)
    query, key, value = heads(make, dtype, size, layout, 3)
    if not sequence_major:
        return query, key, *weights, rope, size.txt_rows, 1e-6
    text = make.normal(3, size.txt_rows, size.heads, size.head_dim, dtype=dtype)
    return query, key, *weights, rope, size.txt_rows, 1e-6, value, text, make.values(places(size))


def places(size) -> list[int]:
    """Where each joint row lies when the rows of a sequence lie together, its text rows first."""
    text, image, start = [], [], 0
    for txt, img in zip(size.txt, size.img, strict=True):
        text += range(start, start + txt)
        image += range(start + txt, start + txt + img)
        start += txt + img
    return text + image


def qk_norm_rope_traffic(query, key, *rest) -> tuple[int, int]:
    moved = 2 * rest[8][2].nbytes + rest[9].nbytes if len(rest) > 7 else 0  # the value's text rows, and the places
    return 2 * (query.nbytes + key.nbytes) + rest[4].nbytes + moved, 14 * query.numel()
