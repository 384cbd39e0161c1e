"""A small transformer of unit gain, and what stock diffusers computes inside it: the values a modulation table must hold."""

import inspect

import peft
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.hooks import group_offloading

from qwen_fast.common import placement
from qwen_fast.schedule import Schedule
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG
from qwen_fast.testing import initialize

# Older versions of diffusers ask torch for its accelerator when a group is made: their group offload fails on a CPU.
needs_group_offload = pytest.mark.skipif(
    "current_accelerator().type" in inspect.getsource(group_offloading) and torch.accelerator.current_accelerator() is None,
    reason="group offload of this diffusers needs an accelerator",
)

LAYERS, WIDTH = 2, 64
_LORA = {"r": 4, "lora_alpha": 4, "target_modules": ["img_mod.1", "txt_mod.1"], "init_lora_weights": False}


def build(dtype=torch.float32, seed: int = 0, **config) -> QwenImageTransformer2DModel:
    """A small transformer whose every layer matters."""
    sizes = {"num_layers": LAYERS, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)}
    transformer = QwenImageTransformer2DModel(in_channels=16, out_channels=4, joint_attention_dim=32, **(sizes | config))
    initialize(transformer, "transformer", seed)
    return torch.nn.Module.to(transformer.eval(), dtype)


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
