"""Prompts with pictures: what the encoder gave for the same tokens and patches is kept, and nothing else is."""

import diffusers
import pytest
import torch

import qwen_fast
from qwen_fast.text.pictures import with_kept_outputs
from support.family import HIGH, MEMBERS, WIDE, small_references

WITH_PICTURES = ["edit", "edit plus", "edit inpaint", "layered"]


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


def asked(pipe) -> int:
    return qwen_fast.report(pipe).calls.get("text encoder with pictures", 0)


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_the_second_call_asks_nothing(checkpoint, name):
    member = MEMBERS[name]
    assert with_kept_outputs(member.cls) is not None
    pipe = member.pipe(checkpoint)
    expected = member.draw(pipe)
    qwen_fast.enable(pipe)
    for _ in range(2):
        member.assert_same(member.draw(pipe), expected)
    assert asked(pipe) == 2 and qwen_fast.report(pipe).prompt_cache["hits"] == 2
    member.draw(pipe, prompt="another")
    assert asked(pipe) == 3


def other_picture(pipe, arguments):
    arguments["image"] = [WIDE.rotate(180), HIGH]


def other_vision_weight(pipe, arguments):
    pipe.text_encoder.model.visual.blocks[0].mlp.down_proj.weight.data.mul_(1.5)


def other_language_weight(pipe, arguments):
    pipe.text_encoder.model.language_model.norm.weight.data.mul_(1.5)


def other_template(pipe, arguments):
    pipe.prompt_template_encode = pipe.prompt_template_encode.replace("Describe", "Tell")


def a_hook(pipe, arguments):
    pipe.text_encoder.model.visual.register_forward_hook(lambda m, a, output: None)


@pytest.mark.parametrize("change", [other_picture, other_vision_weight, other_language_weight, other_template, a_hook])
def test_what_changes_the_output_is_never_met_by_what_was_kept(checkpoint, change):
    member = MEMBERS["edit plus"]
    pipes = member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint))
    for pipe in pipes:
        member.draw(pipe)
    drawn = []
    for pipe in pipes:
        arguments = {}
        change(pipe, arguments)
        drawn.append(member.draw(pipe, **arguments))
    member.assert_same(drawn[1], drawn[0])
    assert asked(pipes[1]) == 4


def test_a_replaced_method_is_called(checkpoint, monkeypatch):
    member = MEMBERS["edit"]
    pipe = qwen_fast.enable(member.pipe(checkpoint))
    stock = diffusers.QwenImageEditPipeline._get_qwen_prompt_embeds
    seen = []

    def counted(self, *args, **kwargs):
        seen.append(1)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(diffusers.QwenImageEditPipeline, "_get_qwen_prompt_embeds", counted)
    for _ in range(2):
        member.draw(pipe)
    reasons = qwen_fast.report(pipe).fallbacks
    assert len(seen) == 4 and "QwenImageEditPipeline._get_qwen_prompt_embeds: not diffusers' or transformers' own" in reasons


@pytest.mark.parametrize("name", ["text", "edit"])
def test_a_hook_on_the_head_is_called_each_time(checkpoint, name):
    member = MEMBERS[name]
    pipe, seen = member.pipe(checkpoint), []
    pipe.text_encoder.lm_head.register_forward_hook(lambda *_: seen.append(1))
    expected = member.draw(pipe)
    qwen_fast.enable(pipe)
    for _ in range(2):
        member.assert_same(member.draw(pipe), expected)
    assert len(seen) == 6 and "lm_head" in str(qwen_fast.report(pipe).fallbacks)


@pytest.mark.parametrize("mode", ["offload", "free"])
def test_an_encoder_that_rests(checkpoint, mode, caplog):
    member = MEMBERS["edit"]
    pipe = member.pipe(checkpoint)
    expected = member.draw(pipe)
    qwen_fast.enable(pipe, text_encoder_mode=mode)
    for _ in range(2):
        member.assert_same(member.draw(pipe), expected)
    assert pipe.text_encoder is not None and asked(pipe) == 2
    qwen_fast.disable(pipe)
    assert torch.equal(member.draw(pipe), expected)


def test_other_processes_find_it_on_disk(checkpoint, tmp_path):
    member = MEMBERS["edit"]
    first, second = (qwen_fast.enable(member.pipe(checkpoint), prompt_cache=tmp_path) for _ in range(2))
    assert torch.equal(member.draw(first), member.draw(second))
    assert asked(first) == 2 and asked(second) == 0
