"""Small transformers of unit gain, inputs for them, and what stock computes inside: what a modulation table must hold."""

import inspect

import peft
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.hooks import group_offloading

from qwen_fast.common import placement
from qwen_fast.common.options import Options
from qwen_fast.common.state import State
from qwen_fast.schedule import Schedule
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG
from qwen_fast.testing import initialize
from qwen_fast.transformer.attach import attach, detach
from qwen_fast.transformer.call import accelerated

# Older versions of diffusers ask torch for its accelerator when a group is made: their group offload fails on a CPU.
needs_group_offload = pytest.mark.skipif(
    "current_accelerator().type" in inspect.getsource(group_offloading) and torch.accelerator.current_accelerator() is None,
    reason="group offload of this diffusers needs an accelerator",
)

SIZES = {"in_channels": 16, "out_channels": 4, "num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 24}
SIZES |= {"attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)}
LAYERS, WIDTH = 2, 64
BYTES = LAYERS * 2 * (6 * WIDTH * WIDTH + 6 * WIDTH) * 4  # of the modulation weights in fp32
_LORA = {"r": 4, "lora_alpha": 4, "target_modules": ["img_mod.1", "txt_mod.1"], "init_lora_weights": False}


def transformer(dtype: torch.dtype = torch.float32, seed: int = 0, **config) -> QwenImageTransformer2DModel:
    """A small stock transformer with weights that make every part of it count."""
    model = QwenImageTransformer2DModel(**(SIZES | config))
    with torch.no_grad():
        initialize(model, "transformer", seed)
    return torch.nn.Module.to(model.eval(), dtype)


def build(dtype=torch.float32, **config) -> QwenImageTransformer2DModel:
    """The one whose modulations are compared, of `LAYERS` layers."""
    return transformer(dtype, **({"num_layers": LAYERS, "joint_attention_dim": 32} | config))


def timesteps(dtype=torch.float32, steps: int = 3, image_seq_len: int = 24) -> torch.Tensor:
    """`[T]`, what stock's forward gets."""
    schedule = Schedule.from_config(QWEN_IMAGE_SCHEDULER_CONFIG, steps, image_seq_len=image_seq_len)
    return schedule.model_timesteps(dtype)


def with_lora(transformer, seed: int = 3, name: str = "style", **changes):
    """`transformer` with an adapter that changes its modulations."""
    torch.manual_seed(seed)
    transformer.add_adapter(peft.LoraConfig(**_LORA | changes), adapter_name=name)
    return transformer


@torch.no_grad()
def stock_values(transformer, model_timesteps: torch.Tensor, device="cpu", **arguments) -> dict[str, torch.Tensor]:
    """What stock's modules give in one forward of batch 1 a step: `[T, M, features]` by module name."""
    found: dict[str, list[torch.Tensor]] = {}
    modules = dict(transformer.named_modules())
    names = names_of(transformer)
    hooks = [
        modules[name].register_forward_hook(lambda m, i, out, name=name: found.setdefault(name, []).append(out.clone()))
        for name in names
    ]
    generator, dtype = torch.Generator().manual_seed(1), model_timesteps.dtype
    hidden_states = torch.randn(1, 24, 16, generator=generator).to(device, dtype)
    text = torch.randn(1, 5, 32, generator=generator).to(device, dtype)
    for t in model_timesteps.to(device):
        transformer(hidden_states, text, timestep=t.expand(1), img_shapes=[[(1, 2, 4), (1, 4, 4)]], **arguments)
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(values) for name, values in found.items()}


def rows_of(table) -> list[torch.Tensor]:
    """A table's values in the order of `names_of`: those of each module, `[T(+1), features]`."""
    modules = (table.values.shape[1] - 3 * table.width) // (6 * table.width)
    pieces = table.values.split([6 * table.width] * modules + [2 * table.width, table.width], dim=1)
    return [pieces[-1], *pieces[:-1]]


def names_of(transformer) -> list[str]:
    """Modules that a table depends on, in the order of `rows_of`."""
    blocks = range(len(transformer.transformer_blocks))
    mods = [f"transformer_blocks.{layer}.{mod}" for layer in blocks for mod in ("img_mod", "txt_mod")]
    return ["time_text_embed", *mods, "norm_out.linear"]


def assert_as_near_as_stock(table, transformer, expected, steps: int) -> None:
    """Every row is stock's up to the rounding of a product of several rows, and the row of timestep 0 likewise."""
    rows = dict(zip(names_of(transformer), rows_of(table), strict=True))
    eps = torch.finfo(table.values.dtype).eps
    for name, stocks in expected.items():
        limit = 16 * eps * stocks.abs().max()
        assert (rows[name][:steps] - stocks[:, 0]).abs().max() <= limit, name
        if table.zero_row is not None and stocks.shape[1] > 1:
            assert all((rows[name][table.zero_row] - step).abs().max() <= limit for step in stocks[:, 1]), name
    assert table.values.isfinite().all() and table.values[:, : -3 * WIDTH].std() > 0.3
    assert len({row.sum().item() for row in table.values}) == len(table.values)


def with_fused_lora(transformer):
    with_lora(transformer).fuse_lora()
    return transformer


def with_layerwise_casting(transformer):
    transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return transformer


def pretend_elsewhere(monkeypatch) -> list[torch.nn.Module]:
    """As if all weights lay on another device: copies in the place of transfers. Lists the modules called with copies."""
    tensors, calls, functional_call = placement.tensors_of, [], placement.functional_call
    monkeypatch.setattr(placement, "is_elsewhere", lambda module, device: bool(tensors(module)))
    monkeypatch.setattr(placement, "tensors_of", lambda module: {n: t.clone() for n, t in tensors(module).items()})
    monkeypatch.setattr(placement, "functional_call", lambda *a: calls.append(a[0]) or functional_call(*a))
    return calls


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


@torch.no_grad()
def run(model, device="cpu") -> torch.Tensor:
    """One stock forward."""
    generator, dtype = torch.Generator().manual_seed(1), model.img_in.weight.dtype
    hidden_states, text = (torch.randn(1, n, c, generator=generator) for n, c in ((8, 16), (5, 32)))
    inputs = [x.to(device, dtype) for x in (hidden_states, text)]
    return model(*inputs, timestep=torch.full([1], 0.7, device=device, dtype=dtype), img_shapes=[[(1, 2, 4)]]).sample


def group_offload(model, offload_type="block_level", **options):
    """diffusers' group offload of `model`, a block at a time."""
    options = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu"), "num_blocks_per_group": 1} | options
    model.enable_group_offload(offload_type=offload_type, **options)
