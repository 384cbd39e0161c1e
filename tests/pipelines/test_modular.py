"""Modular pipelines draw what stock's draw, with our steps in their loops, and are diffusers' own again behind `disable`."""

import pytest
import torch

import qwen_fast
from support.modular import WORKFLOWS, assert_near, small_references

EACH = pytest.mark.parametrize("name", WORKFLOWS)


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


@EACH
def test_the_latents_are_stocks_and_all_of_it_is_fast(checkpoint, name):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint)
    expected = workflow.draw(pipe)
    qwen_fast.enable(pipe, strict=True)
    for _ in range(2):
        assert_near(workflow.draw(pipe), expected)
    report = qwen_fast.report(pipe)
    taken = report.calls["packed transformer"]
    assert taken == report.calls["cfg_euler_step"] >= 4 and report.calls["flow_match_schedule"] == 2
    assert "transformer" not in report.calls and pipe.fast_state.no_table is None and not report.fallbacks
    qwen_fast.disable(pipe)
    assert torch.equal(workflow.draw(pipe), expected)
