"""Arguments of every operator at any size: what proofs, tests, benchmarks and the compile table launch it with.

Token rows are joint as in the operators: all text rows, then all image rows.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

STEPS = 20  # rows of the modulation tables


@dataclass(frozen=True)
class Size:
    """Rows of each sequence, and the width of the model."""

    txt: tuple[int, ...] = (30,)
    img: tuple[int, ...] = (4096,)
    heads: int = 24
    head_dim: int = 128

    @property
    def txt_rows(self) -> int:
        return sum(self.txt)

    @property
    def rows(self) -> int:
        return sum(self.txt) + sum(self.img)

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    def __str__(self) -> str:
        rows = " + ".join("/".join(map(str, lengths)) for lengths in (self.txt, self.img) if lengths)
        return f"{rows} rows, {self.heads} x {self.head_dim}"


class Maker:
    """Random tensors on a device; on a fake CUDA device only their shapes and addresses count."""

    def __init__(self, device: torch.device | str, *, fake: bool = False, seed: int = 0) -> None:
        self.device, self.fake = torch.device(device), fake
        self._generator = None if fake else torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
        """With `offset` not aligned to 16 bytes, which forbids vector loads."""
        numel = math.prod(shape)
        if self.fake:
            flat = torch.empty(numel + offset, dtype=dtype, device=self.device)
        else:
            flat = torch.randn(numel + offset, generator=self._generator, device=self.device).to(dtype)
        return flat.narrow(0, offset, numel).view(shape)

    def values(self, values: list, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        where = {"dtype": dtype, "device": self.device}
        given = torch.tensor(values, dtype=dtype)
        return torch.empty(given.shape, **where) if self.fake else given.to(self.device)

    def modulation(self, steps: int, streams: int, channels: int, dtype: torch.dtype, parts: int = 6) -> list[torch.Tensor]:
        """Tables `[T, streams, C]` that lie beside each other in one allocation, as a block's modulation does."""
        return list((self.normal(steps, streams, parts * channels, dtype=dtype) * 0.5).chunk(parts, dim=-1))


def _schedule(make, dtype, size, steps=20, own=False, arguments=(1.7, "dynamic", 0.02, 1000.0, False)):
    sigmas = make.values([1 - i / steps for i in range(steps)] if own else [], torch.float32)
    return steps, sigmas, *arguments


def _sampler(make, dtype, size, predictions, prediction_dtype=None, steps=20, shape=None, offset=0):
    shape = shape or (len(size.img), size.img[0], 64)
    dtypes = [dtype] + [prediction_dtype or dtype] * predictions
    latents = [make.normal(*shape, dtype=one, offset=offset) for one in dtypes]
    sigmas = make.values([1 - (i / steps) ** 2 for i in range(steps + 1)], torch.float32)  # curved
    return *latents, sigmas, make.values([0])


def _cfg_euler_step(make, dtype, size, **variant):
    return *_sampler(make, dtype, size, 2, **variant), make.values([3.7], torch.float32)


def _tokens(make, dtype, size, layout="rows", channels=None):
    """`[R, C]`: rows behind each other, a part of wider rows, or rows that 16-byte loads cannot take."""
    channels = channels or size.channels
    if layout == "part":
        return make.normal(size.rows, 3 * channels, dtype=dtype)[:, channels : 2 * channels]
    return make.normal(size.rows, channels, dtype=dtype, offset=3 if layout == "offset" else 0)


def _conditions(make, size, packed, clip_or_eps):
    """step_index, txt_rows, token_rows, and eps or clip."""
    # Packed sequences at different steps: the second one takes the step index.
    rows = make.values([(-1 if row % 2 else 3) for row in range(size.rows)]) if packed else None
    return make.values([2]), size.txt_rows, rows, clip_or_eps


def _ada_layer_norm(make, dtype, size, layout="rows", streams=2, packed=False):
    shift, scale = make.modulation(STEPS, streams, size.channels, dtype)[:2]
    return _tokens(make, dtype, size, layout), shift, scale, *_conditions(make, size, packed, 1e-6)


def _gated_residual(make, dtype, size, layout="rows", streams=2, packed=False, clip=False):
    gate = make.modulation(STEPS, streams, size.channels, dtype)[2]
    residual, branch = (_tokens(make, dtype, size, layout) for _ in range(2))
    return residual, branch, gate, *_conditions(make, size, packed, clip)


def _gated_residual_ada_layer_norm(make, dtype, size, layout="rows", streams=2, packed=False, clip=False, added=False):
    shift, scale, gate = make.modulation(STEPS, streams, size.channels, dtype)[:3]
    residual, branch = (_tokens(make, dtype, size, layout) for _ in range(2))
    # Sequences of one length get the same rows, as both predictions of a step do.
    image = size.img[0] if len(set(size.img)) == 1 else sum(size.img)
    more = make.normal(image, size.channels, dtype=dtype) if added else None
    return residual, branch, gate, shift, scale, *_conditions(make, size, packed, 1e-6), clip, more


def _heads(make, dtype, size, layout, count):
    """`[R, H, D]` each; "fused": the outputs of one projection, beside each other in a row."""
    if layout == "fused":
        fused = make.normal(size.rows, 3, size.heads, size.head_dim, dtype=dtype)
        return [fused[:, index] for index in range(count)]
    offset = 3 if layout == "offset" else 0
    return [make.normal(size.rows, size.heads, size.head_dim, dtype=dtype, offset=offset) for _ in range(count)]


def _places(size: Size) -> list[int]:
    """Where each joint row lies when the rows of a sequence lie together, its text rows first."""
    text, image, start = [], [], 0
    for txt, img in zip(size.txt, size.img, strict=True):
        text += range(start, start + txt)
        image += range(start + txt, start + txt + img)
        start += txt + img
    return text + image


def _qk_norm_rope(make, dtype, size, layout="fused"):
    """The rows of each sequence together, and the text rows moved there."""
    weights = [make.normal(size.head_dim, dtype=dtype) for _ in range(4)]
    angles = make.normal(size.rows, size.head_dim // 2)
    rope = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(-2)
    query, key, value = _heads(make, dtype, size, layout, 3)
    offset = 3 if layout == "offset" else 0
    text = make.normal(3, size.txt_rows, size.heads, size.head_dim, dtype=dtype, offset=offset)
    return query, key, *weights, rope, size.txt_rows, 1e-6, value, text, make.values(_places(size))


def _joint_attention(make, dtype, size, layout="fused", masked=False):
    lengths = [text + image for text, image in zip(size.txt, size.img, strict=True)]
    spans = make.values([list(span) for span in itertools.pairwise([0, *itertools.accumulate(lengths)])])
    mask = make.values([row % 7 != 3 for row in range(size.rows)], torch.bool) if masked else None
    return *_heads(make, dtype, size, layout, 3), spans, max(lengths), mask, None


def _linear(make, dtype, size, n, k, bias=True, layout="rows"):
    weight = make.normal(n, k, dtype=dtype) * k**-0.5
    return _tokens(make, dtype, size, layout, k), weight, make.normal(n, dtype=dtype) if bias else None


def _linear_gelu(make, dtype, size, expansion=4, ranks=0, **variant):
    """With `ranks`, of low-rank products beside it as large as the linear layer's own."""
    x, weight, bias = _linear(make, dtype, size, expansion * size.channels, size.channels, **variant)
    if not ranks:
        return x, weight, bias
    low, up = (make.normal(tensor.shape[0], ranks, dtype=dtype) for tensor in (x, weight))
    return x, weight, bias, low, up * ranks**-0.5


def _linear_gated_residual(make, dtype, size, expansion=4, streams=2, packed=False, clip=False, **variant):
    """The MLP's second layer, or with `expansion` 1 the projection behind the attention."""
    gate = make.modulation(STEPS, streams, size.channels, dtype)[2]
    linear = _linear(make, dtype, size, size.channels, expansion * size.channels, **variant)
    return *linear, _tokens(make, dtype, size), gate, *_conditions(make, size, packed, clip)


def _rms_norm_silu(make, dtype, size, bias=False, residual=False, silu=True, offset=0) -> tuple:
    shape = size.rows, size.channels
    gamma, x_bias = (make.normal(size.channels, dtype=dtype) for _ in range(2))
    return (
        make.normal(*shape, dtype=dtype, offset=offset),
        gamma,
        x_bias if bias else None,
        make.normal(*shape, dtype=dtype) if residual else None,
        silu,
    )


ARGUMENTS: dict[str, Callable[..., tuple]] = {
    "flow_match_schedule": _schedule,
    "euler_step": functools.partial(_sampler, predictions=1),
    "cfg_euler_step": _cfg_euler_step,
    "ada_layer_norm": _ada_layer_norm,
    "gated_residual": _gated_residual,
    "gated_residual_ada_layer_norm": _gated_residual_ada_layer_norm,
    "qk_norm_rope": _qk_norm_rope,
    "joint_attention": _joint_attention,
    "linear_gelu": _linear_gelu,
    "linear_gated_residual": _linear_gated_residual,
    "rms_norm_silu": _rms_norm_silu,
}
