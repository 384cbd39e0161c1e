"""What the arguments of a launch tell: the dimensions that its configuration depends on, the bytes it moves, its FLOPs."""

import importlib
from collections.abc import Callable

import torch


def _linear_dimensions(x, weight, *_):
    return importlib.import_module("qwen_fast_kernels._matmul").dimensions(x, weight)


def _gelu_dimensions(x, weight, bias, low=None, up=None):
    return *_linear_dimensions(x, weight), low is not None


def _attention_dimensions(query, key, value, *rest):
    fits = importlib.import_module("qwen_fast_kernels.joint_attention").fits_descriptors(query, key, value)
    return query.shape[2], query.element_size(), rest[2] is not None, fits


# What an op's default_config takes after the capability, from the arguments of its launch.
DIMENSIONS: dict[str, Callable[..., tuple]] = {
    **dict.fromkeys(
        ("ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm", "rms_norm_silu"),
        lambda x, *_: (x.shape[1], x.element_size()),
    ),
    "qk_norm_rope": lambda query, *_: (*query.shape[1:], query.element_size()),
    "joint_attention": _attention_dimensions,
    "linear_gelu": _gelu_dimensions,
    "linear_gated_residual": _linear_dimensions,
}


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _rows_op(tokens: int, tables: int, flops: int) -> Callable[..., tuple[int, int]]:
    """Passes over `[R, C]`, modulation tables of which a row per stream is read, and FLOPs per element."""

    def traffic(x, *_):
        return (tokens * x.shape[0] + 2 * tables) * x.shape[1] * x.element_size(), flops * x.numel()

    return traffic


def _gated_norm(residual, *rest):
    moved, flops = _rows_op(4, 3, 11)(residual)
    txt_rows, added = rest[5], rest[-1]
    return moved + (0 if added is None else (len(residual) - txt_rows) * added.shape[1] * added.element_size()), flops


def _normed_heads(query, key, *rest):
    rope, text, places = rest[4], *rest[8:]
    return 2 * _bytes(query, key, text[2]) + _bytes(rope, places), 14 * query.numel()


def _attention(query, key, value, spans, *_):
    lengths = torch.diff(spans)[:, 0].tolist()
    return 2 * _bytes(query) + _bytes(key, value), 4 * sum(length**2 for length in lengths) * query[0].numel()


def _matmul(x, weight, bias):
    rows, n = x.shape[0], weight.shape[0]
    return _bytes(x, weight) + (rows * n + n) * x.element_size(), 2 * x.shape[0] * weight.numel()


def _matmul_gelu(x, weight, bias, low=None, up=None):
    moved, flops = _matmul(x, weight, bias)
    return (moved, flops) if low is None else (moved + _bytes(low, up), flops + 2 * low.numel() * weight.shape[0])


def _matmul_gated(x, weight, bias, residual, *_):
    moved, flops = _matmul(x, weight, bias)
    return moved + _bytes(residual) + 2 * weight.shape[0] * x.element_size(), flops


def _rms_norm_silu(x, gamma, x_bias, residual, *_):
    passes = 4 if isinstance(residual, torch.Tensor) else 2  # `silu` has that place in the overload without a residual
    return passes * x.numel() * x.element_size(), 10 * x.numel()


# Bytes and FLOPs, as the operators' docstrings declare them.
TRAFFIC: dict[str, Callable[..., tuple[int, int]]] = {
    "flow_match_schedule": lambda steps, sigmas, *_: (4 * (2 * steps + 1) + _bytes(sigmas), 8 * steps),
    "euler_step": lambda latents, *_: (3 * _bytes(latents), 2 * latents.numel()),
    "cfg_euler_step": lambda latents, *_: (4 * _bytes(latents), 12 * latents.numel()),
    "ada_layer_norm": _rows_op(2, 2, 9),
    "gated_residual": _rows_op(3, 1, 2),
    "gated_residual_ada_layer_norm": _gated_norm,
    "qk_norm_rope": _normed_heads,
    "joint_attention": _attention,
    "linear_gelu": _matmul_gelu,
    "linear_gated_residual": _matmul_gated,
    "rms_norm_silu": _rms_norm_silu,
}
