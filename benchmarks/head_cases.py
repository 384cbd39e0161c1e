"""Bytes and FLOPs of qk_norm_rope, for benchmarks/cases.py."""


def qk_norm_rope_traffic(query, key, *rest) -> tuple[int, int]:
    moved = 2 * rest[8][2].nbytes + rest[9].nbytes if len(rest) > 7 else 0  # the value's text rows, and the places
    return 2 * (query.nbytes + key.nbytes) + rest[4].nbytes + moved, 14 * query.numel()
