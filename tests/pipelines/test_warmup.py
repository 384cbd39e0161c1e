"""warmup(): what it leaves to the calls behind it, what it says, and what it refuses."""

import logging

import diffusers
import numpy as np
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import stock
from qwen_fast.testing.family import build_pipeline

CALL = {"negative_prompt": "x", "true_cfg_scale": 3.0, "height": 64, "width": 96, "num_inference_steps": 4}


@pytest.fixture
def pipe(checkpoint):
    return qwen_fast.enable(stock(checkpoint))


def picture(pipe) -> np.ndarray:
    return np.asarray(pipe("a red circle", generator=torch.Generator().manual_seed(0), **CALL).images[0])


def test_it_says_what_each_size_took_and_changes_nothing(pipe, caplog):
    before, state = picture(pipe), torch.get_rng_state()
    with caplog.at_level(logging.INFO, logger="qwen_fast"):
        found = qwen_fast.warmup(
            pipe, [(96, 64), (64, 64)], prompt="two green squares", true_cfg_scale=3.0, negative_prompt="x"
        )
    assert [one[:2] for one in found] == [(96, 64), (64, 64)] and all(min(one[2:]) > 0 for one in found)
    assert "warm-up, 96x64: the first call took" in caplog.text and "64x64" in caplog.text
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(picture(pipe), before)
    assert qwen_fast.report(pipe).calls["cfg_euler_step"] == 2 * 4 + 2 * 3 * 2


def test_the_graph_is_captured_before_the_first_request(checkpoint, emulated_cuda):
    pipe = stock(checkpoint).to("cuda")
    qwen_fast.enable(pipe, cuda_graph=True)
    qwen_fast.warmup(pipe, [(96, 64)], true_cfg_scale=3.0, negative_prompt="x")
    assert qwen_fast.report(pipe).calls["graph captures"] == 1
    picture(pipe)
    assert qwen_fast.report(pipe).calls["graph captures"] == 1 and not qwen_fast.report(pipe).fallbacks


def test_the_progress_bar_stays_as_it_was(checkpoint):
    pipe = qwen_fast.enable(diffusers.QwenImagePipeline.from_pretrained(checkpoint))
    pipe.set_progress_bar_config(desc="mine")
    qwen_fast.warmup(pipe, [(64, 64)])
    assert pipe._progress_bar_config == {"desc": "mine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "`sizes` is empty"),
        ({"sizes": [(100, 64)]}, r"`sizes` holds \(100, 64\); \(width, height\) in multiples of 16"),
        ({"sizes": [64]}, "`sizes` holds 64"),
        ({"sizes": [(64, 64)], "steps": 1}, "`steps` is 1; a whole number of at least 2"),
        ({"sizes": [(64, 64)], "height": 64}, "`height` is given"),
    ],
)
def test_refusals(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        qwen_fast.warmup(pipe, **arguments)
    assert not qwen_fast.report(pipe).calls


def test_what_cannot_be_warmed_up_is_named(checkpoint, pipe):
    with pytest.raises(ValueError, match="`pipe` is a QwenImagePipeline that is not enabled"):
        qwen_fast.warmup(qwen_fast.disable(pipe), [(64, 64)])
    layered = qwen_fast.enable(build_pipeline(diffusers.QwenImageLayeredPipeline, checkpoint))
    with pytest.raises(ValueError, match="which takes no size"):
        qwen_fast.warmup(layered, [(64, 64)])


def test_a_text_encoder_that_goes_is_not_lost_to_the_warm_up(pipe):
    qwen_fast.enable(pipe, text_encoder_mode="free")
    with pytest.raises(ValueError, match="`text_encoder_mode` is 'free'"):
        qwen_fast.warmup(pipe, [(64, 64)])
    assert pipe.text_encoder is not None
