"""Graphs of the other pipelines' steps: references lie in the graph's buffers, what is new at each step forbids one."""

import pytest
import torch

import qwen_fast
from support.family import HIGH, MEMBERS, WIDE, small_references

CAPTURED = [name for name in MEMBERS if "controlnet" not in name]


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


@pytest.mark.parametrize("name", CAPTURED)
def test_the_picture_is_stocks_and_the_same_in_each_call(checkpoint, captures, name):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    expected = {seed: member.draw(pipe, seed) for seed in (7, 8)}
    qwen_fast.enable(pipe, cuda_graph=True)
    drawn = [member.draw(pipe, seed) for seed in (7, 7, 8, 7)]
    for seed, one in zip((7, 7, 8, 7), drawn, strict=True):
        member.assert_same(one, expected[seed])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[3])
    assert len(captures) == 1 and pipe.fast_state.graph is None


def test_other_references_are_loaded(checkpoint, captures):
    member = MEMBERS["edit plus 2511"]
    pipes = member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint), cuda_graph=True)
    for pictures in ([WIDE, HIGH], [WIDE.rotate(180), HIGH], [WIDE, HIGH.rotate(180)]):
        expected, actual = (member.draw(pipe, image=pictures) for pipe in pipes)
        member.assert_same(actual, expected)
    assert len(captures) == 1


def test_a_controlnet_forbids_one(checkpoint, captures):
    member = MEMBERS["controlnet"]
    pipe = qwen_fast.enable(member.pipe(checkpoint), cuda_graph=True)
    member.draw(pipe)
    assert not captures and "ControlNet" in pipe.fast_state.graph
