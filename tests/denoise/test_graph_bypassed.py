"""What keeps a call's steps out of a CUDA graph, and that it is said."""

import diffusers
import pytest

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.denoise import graph
from qwen_fast.transformer.call import ATTACHED
from support.pipelines import GUIDED, SMALL

PROMPT = {"prompt": "a red circle"}


def forbid_cache(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


def forbid_hook(pipe):
    pipe.transformer.register_forward_pre_hook(lambda module, args: None)


def forbid_processor(pipe):
    class Own(diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):
        pass

    pipe.transformer.transformer_blocks[0].attn.set_processor(Own())


def forbid_option(pipe):
    qwen_fast.enable(pipe, cuda_graph=False)


def forbid_backend(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor._attention_backend = "native"


def forbid_hook_on_a_layer(pipe):
    pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: None)


def forbid_diffusers_attention(pipe):
    qwen_fast.enable(pipe, cuda_graph=True, attention="diffusers")


REASONS = {
    forbid_hook_on_a_layer: "hooks, caches",
    forbid_diffusers_attention: "attention='diffusers'",
    forbid_cache: "hooks, caches",
    forbid_hook: "hooks, caches",
    forbid_processor: "custom attention processors",
    forbid_option: "cuda_graph=False",
    forbid_backend: "an attention backend",
}


@pytest.mark.parametrize("forbid", REASONS)
def test_bypassed_and_said_so(pair, captures, forbid):
    for _ in range(2):
        draw(pair[1], **PROMPT, **GUIDED)
    forbid(pair[1])
    actual = draw(pair[1], **PROMPT, **GUIDED)
    assert_same_latents(actual, draw(pair[0], **PROMPT, **GUIDED))
    assert captures == [3], "a graph was replayed"
    assert REASONS[forbid] in pair[1].fast_state.graph and REASONS[forbid] in str(qwen_fast.report(pair[1]))


def test_memory_too_short_for_one_forward(pair, captures, monkeypatch):
    monkeypatch.setattr("qwen_fast.denoise.packing.fits_in_memory", lambda *_: False)
    assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), draw(pair[0], **PROMPT, **GUIDED))
    assert not captures and "memory is too short" in pair[1].fast_state.graph


@pytest.mark.parametrize(
    ("height", "guided", "captured"), [(1536, {}, True), (1552, {}, False), (768, GUIDED, True), (784, GUIDED, False)]
)
def test_auto_decides_by_the_image_tokens_of_a_step(checkpoint, captures, monkeypatch, height, guided, captured):
    pipe = qwen_fast.enable(stock(checkpoint))
    monkeypatch.setattr(graph.StepGraph, "run", lambda self, index, row, latents: latents)
    monkeypatch.setattr("qwen_fast.denoise.denoiser.Denoiser.predict", lambda self, step: (step.latents,) * len(step.forwards))
    draw(pipe, **PROMPT, **(SMALL | guided | {"height": height, "width": 512, "num_inference_steps": 2}))
    assert bool(pipe.transformer.__dict__[ATTACHED].graphs) is captured and (pipe.fast_state.graph is None) is captured


@pytest.mark.parametrize("attention", ["flash", "diffusers"])
def test_an_attention_that_was_named_is_not_replaced_in_a_graph(checkpoint, captures, attention):
    pipe = qwen_fast.enable(stock(checkpoint), attention=attention, cuda_graph=True)
    draw(pipe, **PROMPT, **SMALL)
    assert not captures and f"attention='{attention}' cannot read" in pipe.fast_state.graph


def test_without_a_gpu_nothing_is_captured(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint), cuda_graph=True)
    draw(pipe, **PROMPT, **SMALL)
    assert pipe.fast_state.graph == "the device is cpu"
