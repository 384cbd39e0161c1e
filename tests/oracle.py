"""Stock's transformer in true float64, and small transformers to compare with it."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_qwenimage

from qwen_fast.common.options import Options
from qwen_fast.common.state import State
from qwen_fast.testing import initialize
from qwen_fast.transformer.attach import attach, detach
from qwen_fast.transformer.call import accelerated

SIZES = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 24}
HEAD_SIZES = {"attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)}


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what stock computes in fp32 whatever the model's dtype is computed in float64: rotation and RMS."""

    def rotate(x, freqs_cis, use_real=True, use_real_unbind_dim=-1):
        assert not use_real
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis.to(torch.complex128).unsqueeze(1)).flatten(3).to(x.dtype)

    def normalize(self, hidden_states):
        variance = hidden_states.double().square().mean(-1, keepdim=True)
        return (hidden_states.double() * torch.rsqrt(variance + self.eps) * self.weight.double()).to(hidden_states.dtype)

    with (
        mock.patch.object(transformer_qwenimage, "apply_rotary_emb_qwen", rotate),
        mock.patch.object(RMSNorm, "forward", normalize),
    ):
        yield


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> QwenImageTransformer2DModel:
    """A small stock transformer with weights that make every part of it count."""
    model = QwenImageTransformer2DModel(**(SIZES | HEAD_SIZES | config))
    with torch.no_grad():
        initialize(model, "transformer", seed)
    return model.to(dtype).eval()


def inputs(
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 1,
    tokens: int = 7,
    shapes: list | None = None,
    seed: int = 0,
    in_channels: int = SIZES["in_channels"],
    joint_attention_dim: int = SIZES["joint_attention_dim"],
    **others,
) -> dict:
    """Keyword arguments of a forward; `others` are added or take the place of what is here."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or [[(1, 4, 6)]] * batch
    length = sum(frames * height * width for frames, height, width in shapes[0])
    return {
        "hidden_states": torch.randn(batch, length, in_channels, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, tokens, joint_attention_dim, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 0.63, dtype=dtype),
        "img_shapes": shapes,
        "return_dict": False,
    } | others


@torch.no_grad()
def fused(model: torch.nn.Module, arguments: dict, state: State | None = None) -> torch.Tensor:
    """The prediction of the fused forward, attached for this one call; asserts that it ran, and nothing of stock."""
    state = state or State(Options(modulation="layers"))
    reason = attach(model, state)
    assert reason is None, reason
    try:
        with accelerated(model, state):
            output = model(**arguments)[0]
    finally:
        detach(model, state)
    assert state.calls["transformer"] == 1 and not state.fallbacks, (state.calls, state.fallbacks)
    return output
