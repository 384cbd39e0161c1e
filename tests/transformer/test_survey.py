"""What of a transformer is stock's own: seen before a call, and again after code of the user's has run."""

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from torch import nn

from qwen_fast.transformer.plan import FUSED
from qwen_fast.transformer.survey import survey
from support.small_transformer import build, with_lora


def write(transformer):
    with torch.no_grad():
        transformer.transformer_blocks[1].txt_mod[1].weight.mul_(0.5)


CHANGES = {
    "a LoRA": with_lora,
    "written": write,
    "replaced": lambda t: setattr(t.norm_out.linear, "weight", nn.Parameter(t.norm_out.linear.weight.detach() * 2)),
    "moved": lambda t: setattr(t.proj_out.weight, "data", torch.zeros_like(t.proj_out.weight)),
    "hooked": lambda t: t.transformer_blocks[0].img_mod[1].register_forward_hook(lambda m, i, out: out * 2),
    "other scale": lambda t: t.set_adapters(["first"], [0.3]),
    "switched off": lambda t: t.disable_adapters(),
    "another layer": lambda t: setattr(t, "proj_out", nn.Linear(8, 8)),
    "another processor": lambda t: t.transformer_blocks[0].attn.set_processor(Processor()),
    "another norm": lambda t: setattr(t.transformer_blocks[0].img_norm1, "eps", 1e-3),
    "a cache": lambda t: t.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1)),
}


class Processor(transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):
    pass


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_nothing_else_is(change):
    transformer = with_lora(build(), 5, "first")
    first = survey(transformer)
    assert survey(transformer, first) is first
    CHANGES[change](transformer)
    second = survey(transformer, first)
    assert second is not first and survey(transformer, second) is second


def test_a_model_of_stocks_is_ours_throughout():
    transformer = build()
    found = survey(transformer)
    assert found.rows and not found.foreign and not found.blocks and not found.touched
    assert all(found.plan(block) is FUSED for block in transformer.transformer_blocks)
    assert (found.whole, found.model, found.stock, found.rotary, found.modulation, found.norm_out) == (None,) * 6


def forward_of_ones_own(transformer):
    transformer.forward = lambda *args, **kwargs: None


def hook_on(path):
    return lambda transformer: transformer.get_submodule(path).register_forward_hook(lambda *_: None)


# What is done, and what of the survey tells it: the level that is called in stock's way, and nothing above it.
LEVELS = {
    "the transformer's forward": (forward_of_ones_own, "model"),
    "a hook on the transformer": (lambda t: t.register_forward_pre_hook(lambda *_: None), "model"),
    "a hook on a block": (hook_on("transformer_blocks.1"), "called"),
    "a hook on attention": (hook_on("transformer_blocks.1.attn"), "attention"),
    "a hook on a query norm": (hook_on("transformer_blocks.1.attn.norm_q"), "attention"),
    "a hook on a layer norm": (hook_on("transformer_blocks.1.img_norm1"), "stock"),
    "a hook on a feed-forward": (hook_on("transformer_blocks.1.img_mlp"), "mlps"),
    "a hook on the rotary embedding": (hook_on("pos_embed"), "rotary"),
    "a hook on the output norm": (hook_on("norm_out"), "norm_out"),
    "a hook on a projection": (hook_on("transformer_blocks.1.attn.to_q"), None),
}


@pytest.mark.parametrize("name", LEVELS)
def test_only_the_level_that_was_changed_is_called(name):
    change, level = LEVELS[name]
    transformer = build()
    change(transformer)
    found = survey(transformer)
    assert len(found.foreign) == 1 and not found.rows and found.whole is None
    untouched, block = (found.plan(block) for block in list(transformer.transformer_blocks)[:2])
    assert untouched is FUSED
    told = {"model": found.model, "rotary": found.rotary, "norm_out": found.norm_out}
    told |= {"called": block.called, "attention": block.attention, "stock": block.stock, "mlps": block.mlps[0]}
    assert {key for key, reason in told.items() if reason is not None} == ({level} - {None})


@pytest.mark.parametrize("known", ["layerwise casting", "a cache", "a LoRA"])
def test_what_is_known_is_not_called_foreign(known):
    transformer = build()
    if known == "layerwise casting":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    elif known == "a cache":
        transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    else:
        with_lora(transformer)
    assert not survey(transformer).foreign
