"""`check_nan`: the first step after which latents were not finite is named, for each picture; and what latents may be given."""

import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import draw, stock
from qwen_fast.denoise.watch import FiniteCheck
from support.pipelines import GUIDED

PROMPT = {"prompt": ["a red circle", "a cat"]}


def spoil(pipe, forward: int, picture: int):
    """The transformer's prediction for one picture becomes NaN in its n-th forward."""
    made = []

    def hook(module, args, output):
        made.append(None)
        if len(made) == forward:
            output[0][picture] = float("nan")

    return pipe.transformer.register_forward_hook(hook)


@pytest.mark.parametrize("step", [0, 2])
def test_the_step_and_the_picture_are_named(checkpoint, step, caplog):
    pipe = qwen_fast.enable(stock(checkpoint), check_nan=True, modulation="layers")
    handle = spoil(pipe, step + 1, picture=1)
    pictures = draw(pipe, **PROMPT, **(GUIDED | {"negative_prompt": None, "true_cfg_scale": 1.0}))
    handle.remove()
    timesteps = pipe.scheduler.timesteps.tolist()
    found = [i for i in range(4) if f"after step {i} of 0 to 3 (timestep {timesteps[i]:g})" in caplog.text]
    assert found == [step]
    assert "picture 1" in caplog.text and "picture 0" not in caplog.text
    assert pictures[0].isfinite().all() and pictures[1].isnan().any(), "what was computed is not lost"
    assert f"not finite after step {step}" in str(qwen_fast.report(pipe))


def test_a_clean_call_says_nothing_and_forgets_the_last(checkpoint, caplog):
    pipe = qwen_fast.enable(stock(checkpoint), check_nan=True)
    expected = draw(qwen_fast.enable(stock(checkpoint)), **PROMPT, **GUIDED)
    noise = torch.zeros_like(expected)
    noise[0, 3, 5] = float("inf")
    draw(pipe, latents=noise, **PROMPT, **GUIDED)
    assert "picture 0 are not finite before the first step" in caplog.text
    caplog.clear()
    assert torch.equal(draw(pipe, **PROMPT, **GUIDED), expected)
    assert not caplog.text and "last call: all finite" in str(qwen_fast.report(pipe))


def test_nothing_is_looked_at_unless_asked_for(checkpoint, monkeypatch):
    monkeypatch.setattr(FiniteCheck, "__init__", lambda *_: pytest.fail("looked"))
    pipe = qwen_fast.enable(stock(checkpoint))
    draw(pipe, prompt="a cat", **GUIDED)
    assert "NaN" not in str(qwen_fast.report(pipe))


def test_it_waits_for_nothing():
    """Until it is asked, no value leaves the device: on meta tensors there is none."""
    check = FiniteCheck(torch.zeros(2, 3, 4, device="meta"), torch.zeros(5))
    for step in range(5):
        check.look(step, torch.zeros(2, 3, 4, device="meta"))


def test_options_are_checked(checkpoint):
    with pytest.raises(ValueError, match="`check_nan` is 'yes'; use one of True, False"):
        qwen_fast.enable(stock(checkpoint), check_nan="yes")


@pytest.mark.parametrize("shape", [(1, 16, 2, 8, 12), (1, 24, 60), (24, 64)], ids=["frames", "channels", "no batch"])
def test_latents_of_a_wrong_shape_are_named(checkpoint, shape, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint))
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=r"`latents` has shape .*; \[batch, tokens, 64 channels\] is needed"):
        draw(pipe, prompt="a cat", latents=torch.zeros(shape), **GUIDED)
