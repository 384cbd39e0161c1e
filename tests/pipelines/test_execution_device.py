"""Where a call computes, and what its end resets: stock asks all modules for hooks, ours only where there are any."""

import types

import accelerate
import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import qwen_fast
from benchmarks.shared.stock import draw, stock
from support.pipelines import GUIDED

META = torch.device("meta")


def sequential_offload(pipe, patch):
    """As accelerate's hooks leave it: one on the whole, which names no device, and one below."""
    for module, device in ((pipe.vae, None), (pipe.vae.encoder, "meta")):
        hook = accelerate.hooks.ModelHook()
        hook.execution_device = device
        accelerate.hooks.add_hook_to_module(module, hook)


def group_offload(pipe, patch):
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer.transformer_blocks[1].attn)
    registry.hooks["group_offloading"] = types.SimpleNamespace(config=types.SimpleNamespace(onload_device=META))


def group_offload_of_the_vae(pipe, patch):
    registry = HookRegistry.check_if_exists_or_initialize(pipe.vae)
    registry.hooks["group_offloading"] = types.SimpleNamespace(config=types.SimpleNamespace(onload_device=META))


def replaced(pipe, patch):
    patch.setattr(diffusers.DiffusionPipeline, "_execution_device", property(lambda self: META))


def replaced_by_a_value(pipe, patch):
    patch.setattr(diffusers.QwenImagePipeline, "_execution_device", META, raising=False)


def moved(pipe, patch):
    pipe.text_encoder.to("meta")


CHANGES = (sequential_offload, group_offload, group_offload_of_the_vae, replaced, replaced_by_a_value, moved)


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_it_is_where_stock_computes(checkpoint, monkeypatch, change):
    pipes = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    for pipe in pipes:
        if change is not None:
            change(pipe, monkeypatch)
    expected = pipes[0]._execution_device
    assert pipes[1]._execution_device == expected and (expected == META) == (change in CHANGES)
    qwen_fast.disable(pipes[1])
    assert pipes[1]._execution_device == expected


class Remembers(ModelHook):
    _is_stateful = True

    def __init__(self):
        super().__init__()
        self.resets = 0

    def reset_state(self, module):
        self.resets += 1
        return module


@pytest.mark.parametrize("where", ["", "transformer_blocks.1.attn"])
def test_hooks_with_a_memory_lose_it_at_the_end_of_a_call(checkpoint, where):
    pipe = qwen_fast.enable(stock(checkpoint))
    draw(pipe, prompt="a red circle", **GUIDED)  # after which stock leaves an empty registry behind
    hook = Remembers()
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.get_submodule(where)).register_hook(hook, "remembers")
    draw(pipe, prompt="a red circle", **GUIDED)
    assert hook.resets == 1


def test_a_replaced_reset_is_called(checkpoint, monkeypatch):
    pipe, called = qwen_fast.enable(stock(checkpoint)), []

    def replacement(self, recurse=True):
        called.append(self)

    monkeypatch.setattr(diffusers.models.cache_utils.CacheMixin, "_reset_stateful_cache", replacement)
    draw(pipe, prompt="a red circle", **GUIDED)
    assert called == [pipe.transformer]
