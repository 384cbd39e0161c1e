"""ControlNet pipelines draw what stock draws, from fused ControlNets."""

import ast
import copy

import pytest
import torch
from diffusers import QwenImageMultiControlNetModel

import qwen_fast
from qwen_fast.pipelines import stock_call
from support.controlnet import STEPS, build, counted, union
from support.family import HIGH, MEMBERS, WIDE

BOTH = pytest.mark.parametrize("name", ["controlnet", "controlnet inpaint"])


def assert_drawn(pipe, name: str = "controlnet", forwards: int | None = STEPS, **others) -> None:
    """Stock's latents, from so many fused forwards of the ControlNet; None: of any number."""
    member = MEMBERS[name]
    expected = member.draw(pipe, **others)
    member.assert_same(member.draw(qwen_fast.enable(pipe, strict=True), **others), expected)
    assert forwards is None or counted(pipe) == forwards
    qwen_fast.disable(pipe)
    assert torch.equal(member.draw(pipe, **others), expected)


@BOTH
@pytest.mark.parametrize("layers", [1, 2])
def test_its_blocks_are_fused(checkpoint, name, layers):
    pipe = build(checkpoint, name, layers)
    assert_drawn(pipe, name)
    with_it, without = (MEMBERS[name].draw(pipe, controlnet_conditioning_scale=scale) for scale in (1.0, 0.0))
    assert (with_it - without).abs().max() > 0.1 * without.abs().max()  # else nothing is tested here
    assert "ControlNet (fused blocks)" in qwen_fast.report(qwen_fast.enable(pipe)).replaced


@BOTH
@pytest.mark.parametrize(
    "others",
    [
        {"controlnet_conditioning_scale": 0.4},
        {"controlnet_conditioning_scale": [0.4]},
        {"prompt": ["a red circle", "x"], "negative_prompt": ["x", "a blue square on a green ground"]},
        {"num_images_per_prompt": 2},
        {"true_cfg_scale": 1.0, "negative_prompt": None},
    ],
    ids=str,
)
def test_scales_and_batches(checkpoint, name, others):
    assert_drawn(build(checkpoint, name), name, **others)


@pytest.mark.parametrize("modulation", ["auto", "layers"])
@pytest.mark.parametrize("attention", ["auto", "diffusers"])
def test_options(checkpoint, modulation, attention):
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    expected = member.draw(pipe)
    member.assert_same(member.draw(qwen_fast.enable(pipe, modulation=modulation, attention=attention)), expected)
    assert counted(pipe) == STEPS and not qwen_fast.report(pipe).fallbacks


@pytest.mark.parametrize(
    ("others", "forwards"),
    [
        ({"control_guidance_end": 0.5}, 1),
        ({"control_guidance_start": 0.3}, 2),
        ({"control_guidance_start": [0.3], "control_guidance_end": [0.7]}, 1),
        ({"controlnet_conditioning_scale": 0.0}, 0),
    ],
    ids=str,
)
def test_no_forward_where_it_is_off(checkpoint, others, forwards):
    assert_drawn(build(checkpoint), forwards=forwards, **others)


@pytest.mark.parametrize(
    ("others", "forwards"),
    [
        ({"controlnet_conditioning_scale": [0.5, 0.8]}, 6),
        ({"controlnet_conditioning_scale": [0.0, 0.8]}, 3),
        ({"controlnet_conditioning_scale": [0.5, 0.8], "control_guidance_start": [0.3, 0.0]}, 5),
        ({"controlnet_conditioning_scale": [0.5]}, 3),  # stock leaves the second picture out
    ],
    ids=str,
)
def test_a_union_of_pictures(checkpoint, others, forwards):
    assert_drawn(union(checkpoint), forwards=forwards, control_image=[WIDE, WIDE.rotate(180)], **others)


def test_a_scale_of_each_sample(checkpoint):
    two = {"prompt": ["a red circle", "x"], "negative_prompt": ["x", "y"]}
    assert_drawn(build(checkpoint), controlnet_conditioning_scale=torch.tensor([0.3, 0.9]).view(2, 1, 1), **two)


def test_under_inference_mode(checkpoint):
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    expected = member.draw(pipe)
    with torch.inference_mode():
        member.assert_same(member.draw(qwen_fast.enable(pipe, strict=True)), expected)
    member.assert_same(member.draw(pipe), expected)
    assert counted(pipe) == 2 * STEPS


def test_a_loop_whose_call_of_the_controlnet_is_another_asks_it_itself(checkpoint, monkeypatch):
    """Its residuals are arguments of the transformer's forwards then, and the rest of the step is as ever."""
    monkeypatch.setattr(stock_call, "_control", lambda node, cond: None)
    stock_call._with_own_steps.cache_clear()
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    expected = member.draw(pipe)
    member.assert_same(member.draw(qwen_fast.enable(pipe)), expected)
    assert counted(pipe) == 0 and qwen_fast.report(pipe).calls["packed transformer"] == STEPS
    stock_call._with_own_steps.cache_clear()


@pytest.mark.parametrize(
    "change",
    [
        ("img_shapes=s", "img_shapes=s, more=1"),
        ("timestep / 1000", "timestep"),
        ("hidden_states=x", "hidden_states=y"),
        ("", ""),
    ],
)
def test_which_call_of_the_controlnet_is_known(change):
    words = "hidden_states=x, encoder_hidden_states=e, encoder_hidden_states_mask=m, img_shapes=s"
    cond = dict(word.split("=") for word in words.split(", "))
    others = "controlnet_cond=c, conditioning_scale=1.0, timestep=timestep / 1000, return_dict=False"
    source = f"controlnet_block_samples = self.controlnet({words}, {others})".replace(*change)
    found = stock_call._control(ast.parse(source).body[0], cond)
    assert (found == cond | {"controlnet_cond": "c", "conditioning_scale": "1.0"}) is (not change[0]) and (found or change[0])


def test_two_networks_are_refused_in_stocks_words(checkpoint):
    pipe = build(checkpoint)
    pipe.register_modules(controlnet=QwenImageMultiControlNetModel([pipe.controlnet, copy.deepcopy(pipe.controlnet)]))
    others = {"control_image": [WIDE, WIDE], "controlnet_conditioning_scale": [1.0, 1.0]}
    with pytest.raises(ValueError, match="only supports a single controlnet-union"):
        MEMBERS["controlnet"].draw(qwen_fast.enable(pipe), **others)


def test_other_pictures_and_prompts_in_turn(checkpoint):
    member = MEMBERS["controlnet"]
    pipes = build(checkpoint), qwen_fast.enable(build(checkpoint))
    for others in ({}, {"control_image": WIDE.rotate(180)}, {"prompt": "a blue square"}, {"control_image": HIGH}, {}):
        expected, actual = (member.draw(pipe, **others) for pipe in pipes)
        member.assert_same(actual, expected)


@BOTH
@pytest.mark.parametrize("dtype, precise", [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)], ids=str)
def test_halves_are_as_near_to_fp32_as_stocks(checkpoint, name, dtype, precise):
    member, pipe = MEMBERS[name], build(checkpoint, name, dtype=dtype)
    wide = copy.deepcopy(pipe)
    for part in wide.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float32)
    exact, expected = member.draw(wide), member.draw(pipe).float()
    actual = member.draw(qwen_fast.enable(pipe, precise_sampler=precise, strict=True)).float()
    ours, theirs = ((one - exact).square().mean().sqrt() for one in (actual, expected))
    assert 0 < theirs and ours <= 1.5 * theirs and counted(pipe) == STEPS
