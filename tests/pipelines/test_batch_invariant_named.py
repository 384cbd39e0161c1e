"""What `batch_invariant` cannot keep is named in `report`, and raises under `strict`; what it can is not."""

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import draw, stock
from qwen_fast.denoise import packing
from qwen_fast.vae import pictures
from support.family import MASK, MEMBERS, WIDE, small_references
from support.pipelines import GUIDED

TWO = GUIDED | {"prompt": ["a red circle", "two green squares"], "negative_prompt": ["", "x"]}


def generators(count: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def enabled(checkpoint, cls: type = diffusers.QwenImagePipeline, **options: Any):
    return qwen_fast.enable(stock(checkpoint, cls=cls), batch_invariant=True, **options)


def a_hook(pipe):
    pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: None)


def a_cache(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


def a_scheduler(pipe):
    config = pipe.scheduler.config
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)


def a_step(pipe):
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)


def a_decoder(pipe):
    decode = pipe.vae.decode
    pipe.vae.decode = lambda *args, **kwargs: decode(*args, **kwargs)


def a_method(pipe):
    pipe.encode_prompt = lambda *args, encode=pipe.encode_prompt, **kwargs: encode(*args, **kwargs)


NAMED: dict[Callable, str] = {
    a_hook: "with the whole batch",
    a_cache: "with the whole batch",
    a_scheduler: "the scheduler takes the steps with the whole batch: stochastic_sampling",
    a_step: "the scheduler takes the steps with the whole batch",
    a_decoder: "decode is not diffusers' own",
    a_method: "encode_prompt is not diffusers' own",
}


@pytest.mark.parametrize("change", NAMED)
def test_what_is_called_as_in_stock(checkpoint, change):
    pipe = enabled(checkpoint)
    change(pipe)
    with pytest.raises(RuntimeError, match=r"strict=True"):
        draw(qwen_fast.enable(pipe, batch_invariant=True, strict=True), **TWO, generator=generators())
    draw(qwen_fast.enable(pipe, batch_invariant=True), **TWO, generator=generators())
    report = qwen_fast.report(pipe)
    assert any(NAMED[change] in reason for reason in report.variant), str(report)
    assert "batch_invariant: not kept: " in str(report)


@pytest.mark.parametrize("given", ["one generator", "none"])
def test_noise_of_one_stream(checkpoint, given):
    pipe = enabled(checkpoint)
    generator = torch.Generator().manual_seed(1) if given == "one generator" else None
    draw(pipe, **TWO | {"prompt": "a red circle", "negative_prompt": "x", "generator": generator})
    assert not qwen_fast.report(pipe).variant, "a picture alone has its own"
    draw(pipe, **TWO, latents=torch.randn(2, 24, 64), generator=generator)
    assert not qwen_fast.report(pipe).variant, "latents are each picture's own"
    draw(pipe, **TWO, generator=generator)
    assert list(qwen_fast.report(pipe).variant) == [
        "2 pictures draw their noise from one random stream; give a list of generators, or `latents`"
    ]
    with pytest.raises(RuntimeError, match="one random stream; give a list of generators"):
        draw(qwen_fast.enable(pipe, batch_invariant=True, strict=True), **TWO, generator=generator)


@pytest.mark.parametrize(
    ("image", "named"),
    [(WIDE, True), ([WIDE], True), ([WIDE, WIDE], False), (torch.rand(2, 3, 64, 96), False), (torch.rand(1, 3, 64, 96), True)],
)
def test_one_picture_for_several_prompts(checkpoint, image, named):
    pipe = enabled(checkpoint, diffusers.QwenImageInpaintPipeline)
    draw(pipe, **TWO, image=image, mask_image=MASK, strength=0.5, generator=generators())
    assert any("sampled by fewer than 2" in reason for reason in qwen_fast.report(pipe).variant) is named


def test_a_controlnet(checkpoint):
    member = MEMBERS["controlnet"]
    pipe = qwen_fast.enable(member.pipe(checkpoint), batch_invariant=True)
    member.draw(pipe)
    assert list(qwen_fast.report(pipe).variant) == ["the ControlNet computes the whole batch at once"]


def test_a_loop_that_is_not_known(checkpoint, monkeypatch):
    monkeypatch.setattr("qwen_fast.pipelines.call.with_own_steps", lambda stock: None)
    pipe = enabled(checkpoint)
    draw(pipe, **TWO, generator=generators())
    assert any("loop is not known" in reason for reason in qwen_fast.report(pipe).variant)


def test_a_whole_family_keeps_it(checkpoint):
    for name in ("image", "inpaint", "edit", "edit plus 2511", "edit inpaint", "layered"):
        member = MEMBERS[name]
        with small_references():
            pipe = qwen_fast.enable(member.pipe(checkpoint), batch_invariant=True, strict=True)
            member.assert_same(member.draw(pipe), member.draw(member.pipe(checkpoint)))


def test_memory_too_short_for_both_predictions(checkpoint, monkeypatch):
    pipe, expected = enabled(checkpoint), draw(stock(checkpoint), **TWO, generator=generators())
    predict, copies = type(pipe.transformer).predict, []

    def short(self, call, hidden_states, timestep, prompts, **others):
        copies.append(prompts.copies)
        if prompts.copies > 1:
            raise torch.OutOfMemoryError
        return predict(self, call, hidden_states, timestep, prompts, **others)

    monkeypatch.setattr(type(pipe.transformer), "predict", short)
    actual = draw(pipe, **TWO, generator=generators())
    assert copies == [2, *[1] * 16] and (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert list(qwen_fast.report(pipe).variant) == ["memory was too short for one forward of both predictions"]


def test_free_memory_does_not_decide(checkpoint, monkeypatch):
    """Whether both predictions of a picture share a forward."""
    monkeypatch.setattr(packing, "fits_in_memory", lambda *_: False)
    pipe = enabled(checkpoint)
    draw(pipe, **TWO, generator=generators())
    assert pipe.fast_state.calls["packed transformer"] == 8 and not pipe.fast_state.calls["transformer"]


@pytest.mark.parametrize("given", ["auto", 2**20])
def test_a_picture_in_bands(checkpoint, monkeypatch, given):
    """Bands that were asked for are the same for all; those of a memory that is short just now are named."""
    if given == "auto":
        monkeypatch.setattr(pictures, "memory_limit", lambda option, device, enough=0: 2**20 if option == "auto" else option)
    pipe = enabled(checkpoint, vae_memory=given)
    draw(pipe, **TWO | {"output_type": "pt", "height": 128}, generator=generators())
    assert pipe.fast_state.calls["vae bands"]
    assert any("memory was too short to decode" in reason for reason in qwen_fast.report(pipe).variant) is (given == "auto")


def test_options(checkpoint):
    with pytest.raises(ValueError, match=r"`batch_invariant` is 1; use one of True, False"):
        qwen_fast.enable(stock(checkpoint), batch_invariant=1)
    with pytest.raises(ValueError, match=r"`batch_invariant` is True and `vae_mode` is 'diffusers'.*use vae_mode='image'"):
        qwen_fast.enable(stock(checkpoint), batch_invariant=True, vae_mode="diffusers")
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, batch_invariant=True)
    assert pipe.fast_state.options.batch_invariant and pipe.fast_state.texts.alone
    assert "each picture by itself" in str(qwen_fast.report(pipe))
    assert not qwen_fast.enable(pipe).fast_state.texts.alone


def test_off_it_is_not_spoken_of(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint))
    a_hook(pipe)
    draw(pipe, **TWO)
    report = qwen_fast.report(pipe)
    assert report.fallbacks and not report.variant and "batch_invariant" not in str(report)
