"""What the tests of qk_norm_rope share: dtypes, shapes, layouts, cases of joint rows."""

import functools
from dataclasses import dataclass, replace

import pytest
import torch

from budget import assert_bit_equal
from qwen_fast_kernels.qk_norm_rope import (
    _qk_norm_rope_kernel,
    default_config,
    launch_qk_norm_rope,
    qk_norm_rope,
    qk_norm_rope_reference,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rows, heads, head_dim, text rows: one of each, primes, no text, only text, Qwen-Image's heads, two blocks of heads.
SHAPES = [(1, 1, 128, 0), (7, 2, 128, 3), (13, 3, 64, 13), (77, 2, 32, 20), (5, 8, 64, 0), (3, 24, 128, 1)]
SHAPES += [(3, 37, 16, 2), (2, 1, 8, 1), (2, 2, 256, 1)]


def launch(query, key, *rest) -> None:
    launch_qk_norm_rope(query, key, *rest, config=default_config(90, *query.shape[1:], query.element_size()))


LAYOUTS = ["head-major", "padded rows", "odd rows", "padded heads", "odd offset", "interleaved"]
IMPLEMENTATIONS = [pytest.param(launch, id="launcher", marks=pytest.mark.triton), pytest.param(qk_norm_rope, id="op")]
ARGUMENTS = ("query", "key", "norm_q", "norm_k", "norm_added_q", "norm_added_k", "rope", "txt_rows", "eps")


@dataclass
class Case:
    """One buffer `[3, R, H * D]` of query, key and value, and the rest of the arguments."""

    qkv: torch.Tensor
    heads: int
    weights: tuple[torch.Tensor, ...]
    rope: torch.Tensor
    txt_rows: int
    eps: float = 1e-6

    query = property(lambda self: self.qkv[0].unflatten(-1, (self.heads, -1)))
    key = property(lambda self: self.qkv[1].unflatten(-1, (self.heads, -1)))
    rest = property(lambda self: (*self.weights, self.rope, self.txt_rows, self.eps))

    def clone(self) -> "Case":
        return replace(self, qkv=self.qkv.clone())

    def run(self, run) -> tuple[torch.Tensor, torch.Tensor]:
        """What `run` makes of a copy of the buffer, whose value part has to stay."""
        own = self.clone()
        run(own.query, own.key, *own.rest)
        assert_bit_equal(own.qkv[2], self.qkv[2])
        return own.query, own.key

    def reference(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = dtype or self.qkv.dtype
        return qk_norm_rope_reference(self.query.to(dtype), self.key.to(dtype), *self.rest)

    def stock(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and image through stock's modules apart, as in its attention processor, then joined."""
        from diffusers.models.normalization import RMSNorm
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        def apart(x: torch.Tensor, rows: slice, weight: torch.Tensor) -> torch.Tensor:
            norm = RMSNorm(weight.numel(), eps=self.eps)
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
            freqs = torch.view_as_complex(self.rope[rows].unflatten(-1, (-1, 2)))
            return apply_rotary_emb_qwen(norm(x[None, rows]), freqs, use_real=False)[0]

        text, image = slice(None, self.txt_rows), slice(self.txt_rows, None)
        norm_q, norm_k, norm_added_q, norm_added_k = self.weights
        query = torch.cat([apart(self.query, text, norm_added_q), apart(self.query, image, norm_q)])
        return query, torch.cat([apart(self.key, text, norm_added_k), apart(self.key, image, norm_k)])


def random_case(shape, dtype, device, weight_dtype=None, magnitude=1.0, eps=1e-6) -> Case:
    """Rows of very different size, four distinct weights, and a distinct angle for every token and pair of channels."""
    rows, heads, head_dim, txt_rows = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    qkv = magnitude * normal(3, rows, heads * head_dim) * torch.exp(normal(3, rows, 1))
    weights = tuple((1 + 0.5 * normal(head_dim)).to(device, weight_dtype or dtype) for _ in range(4))
    angles = 3 * normal(rows, head_dim // 2)
    rope = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return Case(qkv.to(device, dtype), heads, weights, rope.to(device, torch.float32), txt_rows, eps)


@functools.cache
def cached_case(*args) -> Case:
    """Not to be written to: `run` copies."""
    return random_case(*args)


def assert_pairs_equal(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_bit_equal(one, other)


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of `[R, H, D]` with other strides; what lies between is NaN."""
    rows, heads, head_dim = x.shape

    def nan(*size: int) -> torch.Tensor:
        return torch.full(size, float("nan"), dtype=x.dtype, device=x.device)

    views = {
        "head-major": lambda: nan(heads, rows, head_dim).transpose(0, 1),
        "padded rows": lambda: nan(rows, heads * head_dim + 24)[:, :-24].view(x.shape),
        "odd rows": lambda: nan(rows, heads * head_dim + 3)[:, :-3].view(x.shape),
        "padded heads": lambda: nan(rows, heads, head_dim + 8)[..., :head_dim],
        "odd offset": lambda: nan(x.numel() + 3)[3:].view(x.shape),
        "interleaved": lambda: nan(rows, heads, 3, head_dim)[:, :, 1],
    }
    return views[layout]().copy_(x)


def nan_in_storage(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).isnan()


def run_kernel(tensors, case: Case, rope, rows: int, txt_rows: int, strides: tuple, text: tuple | None = None) -> None:
    """One program, which the interpreter takes for a far one; `text` is (value, text, places)."""
    numbers = (rows, txt_rows, case.eps, case.heads, *strides, *(0,) * (9 - len(strides)))
    others, config = text or (*tensors, rope), default_config(90, case.heads, 128, 4)
    _qk_norm_rope_kernel[(1,)](*tensors, *case.weights, rope, *others, *numbers, 128, text is not None, **config)
