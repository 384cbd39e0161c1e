"""What the tests of qk_norm_rope share: dtypes, shapes, layouts, cases."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels.qk_norm_rope import default_config, launch_qk_norm_rope, qk_norm_rope, qk_norm_rope_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rows, heads, head_dim, text rows: one of each, primes, no text, only text, Qwen-Image's heads, two blocks of heads.
SHAPES = [(1, 1, 128, 0), (7, 2, 128, 3), (13, 3, 64, 13), (77, 2, 32, 20), (5, 8, 64, 0), (3, 24, 128, 1)]
SHAPES += [(3, 37, 16, 2), (2, 1, 8, 1), (2, 2, 256, 1)]


def launch(query, key, *rest) -> None:
    launch_qk_norm_rope(query, key, *rest, config=default_config(90, *query.shape[1:], query.element_size()))


LAYOUTS = ["head-major", "padded rows", "odd rows", "padded heads", "odd offset", "interleaved"]
IMPLEMENTATIONS = [pytest.param(launch, id="launcher", marks=pytest.mark.triton), pytest.param(qk_norm_rope, id="op")]
WEIGHTS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
ARGUMENTS = ("query", "key", *WEIGHTS, "rope", "txt_rows", "eps", "value", "text", "places")


@dataclass
class Case:
    """Query, key and value of the joint rows, `[3, R, H, D]`, where those rows lie, and the rest of the arguments."""

    joint: torch.Tensor
    weights: tuple[torch.Tensor, ...]
    rope: torch.Tensor
    txt_rows: int
    eps: float
    places: torch.Tensor

    text = property(lambda self: self.joint[:, : self.txt_rows])

    def at(self, places: list[int]) -> "Case":
        return replace(self, places=torch.tensor(places, dtype=torch.int32, device=self.joint.device))

    def buffers(self) -> torch.Tensor:
        """`[3, R, H, D]` with the image rows where they belong; the text rows are NaN."""
        buffers, image = torch.full_like(self.joint, float("nan")), self.places[self.txt_rows :].long()
        buffers[:, image] = self.joint[:, self.txt_rows :]
        return buffers

    def arguments(self, buffers, text: torch.Tensor | None = None) -> tuple:
        query, key, value = buffers
        text = self.text if text is None else text
        return query, key, *self.weights, self.rope, self.txt_rows, self.eps, value, text, self.places

    def run(self, run: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        buffers = self.buffers()
        run(*self.arguments(buffers))
        return self.results(buffers)

    def results(self, buffers) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key in the order of joint rows; the value's text rows have to be there, its others as they were."""
        query, key, value = (buffer[self.places.long()] for buffer in buffers)
        assert_bit_equal(value, self.joint[2])
        return query, key

    def reference(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        own = replace(self, joint=self.joint.to(dtype or self.joint.dtype))
        return own.results(qk_norm_rope_reference(*own.arguments(own.buffers())))

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
        query, key, _ = self.joint
        norm_q, norm_k, norm_added_q, norm_added_k = self.weights
        return (
            torch.cat([apart(query, text, norm_added_q), apart(query, image, norm_q)]),
            torch.cat([apart(key, text, norm_added_k), apart(key, image, norm_k)]),
        )

    def check(self, actual) -> None:
        """Within the budget."""
        for ours, reference, oracle in zip(actual, self.reference(), self.reference(torch.float64), strict=True):
            assert_within_budget(ours, reference, oracle)

    def check_aligned_otherwise(self, actual, aligned) -> None:
        """The same bits as from aligned rows where kernels are interpreted. For rows that are aligned otherwise a GPU's
        compiler contracts other products and sums: measured on an H100 in fp32, 287 of 960 elements differ by up to 2e-7."""
        if self.joint.is_cuda:
            self.check(actual)
        else:
            assert_pairs_equal(actual, aligned)


def random_case(shape, dtype, device, weight_dtype=None, magnitude=1.0, eps=1e-6) -> Case:
    """Rows of very different size at random places, four distinct weights, and a distinct angle for every token and pair of
    channels."""
    rows, heads, head_dim, txt_rows = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    joint = magnitude * normal(3, rows, heads, head_dim) * torch.exp(normal(3, rows, 1, 1))
    weights = tuple((1 + 0.5 * normal(head_dim)).to(device, weight_dtype or dtype) for _ in range(4))
    angles = 3 * normal(rows, head_dim // 2)
    rope = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    places = torch.randperm(rows, generator=generator).to(device, torch.int32)
    return Case(joint.to(device, dtype), weights, rope.to(device, torch.float32), txt_rows, eps, places)


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
