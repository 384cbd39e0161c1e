"""Stock's transformer in true float64, and small transformers to compare with it."""

import torch
from diffusers import QwenImageTransformer2DModel

from qwen_fast.common.state import State
from qwen_fast.testing import initialize
from qwen_fast.transformer.attach import attach, detach
from qwen_fast.transformer.call import accelerated

SIZES = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 24}
HEAD_SIZES = {"attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)}


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
    state = state or State(modulation="layers")
    reason = attach(model, state)
    assert reason is None, reason
    try:
        with accelerated(model, state):
            output = model(**arguments)[0]
    finally:
        detach(model, state)
    assert state.calls["transformer"] == 1 and not state.fallbacks, (state.calls, state.fallbacks)
    return output
