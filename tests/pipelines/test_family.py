"""Every pipeline of diffusers 0.42 that is called Qwen-Image draws what stock draws, with all that makes it fast."""

import copy

import diffusers
import pytest
import torch
from diffusers import QwenImageMultiControlNetModel

import qwen_fast
from qwen_fast.common.family import FAMILY, MODULAR
from qwen_fast.pipelines.family import ACCELERATED
from qwen_fast.pipelines.stock_call import with_own_steps
from support.family import HIGH, MEMBERS, WIDE, small_references
from support.snapshots import snapshot

EACH = pytest.mark.parametrize("name", MEMBERS)


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


def test_all_are_there_and_all_loops_are_known():
    assert {stock.__name__ for stock in ACCELERATED} - set(MODULAR) == set(FAMILY) == {one.name for one in MEMBERS.values()}
    for stock in (getattr(diffusers, name) for name in FAMILY):
        assert with_own_steps(stock) is not None, f"{stock.__name__}.__call__ is not as it was read"


@EACH
def test_the_picture_is_stocks_and_all_of_it_is_fast(checkpoint, name):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    expected = member.draw(pipe)
    before = snapshot(pipe)
    qwen_fast.enable(pipe, strict=True)
    for _ in range(2):
        member.assert_same(member.draw(pipe), expected)
    report = qwen_fast.report(pipe)
    steps = member.arguments["num_inference_steps"]
    taken = report.calls["packed transformer"]
    # Strength leaves the first ones out.
    assert 2 <= taken <= 2 * steps and report.calls["flow_match_schedule"] == 2
    assert report.calls.get("cfg_euler_step", 0) + report.calls.get("euler_step", 0) == taken
    assert pipe.fast_state.no_table is None and not report.fallbacks
    qwen_fast.disable(pipe)
    assert type(pipe) is member.cls and torch.equal(member.draw(pipe), expected)
    after = snapshot(pipe)
    for key in ("class", "classes", "components", "hooks", "weights"):
        assert after[key] == before[key], key


@EACH
@pytest.mark.parametrize(
    "options", [{"modulation": "layers"}, {"precise_sampler": True, "check_nan": True}, {"attention": "diffusers"}], ids=str
)
def test_options(checkpoint, name, options):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    expected = member.draw(pipe)
    actual = member.draw(qwen_fast.enable(pipe, **options))
    if "precise_sampler" in options:  # in fp32 the same, but for latents that a pipeline mixes itself
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max() and pipe.fast_state.nan_note == "all finite"
    else:
        member.assert_same(actual, expected)


@EACH
def test_without_guidance(checkpoint, name):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    other = {"true_cfg_scale": 1.0, "negative_prompt": None}
    expected = member.draw(pipe, **other)
    member.assert_same(member.draw(qwen_fast.enable(pipe), **other), expected)
    report = qwen_fast.report(pipe)
    assert report.calls["transformer"] == report.calls["euler_step"] and not report.fallbacks


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_as_near_to_fp32_as_stocks(checkpoint, name, dtype):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint, dtype)
    wide = copy.deepcopy(pipe)
    for part in wide.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float32)
    exact, expected = member.draw(wide).float(), member.draw(pipe).float()
    actual = member.draw(qwen_fast.enable(pipe)).float()
    ours, theirs = ((one - exact).square().mean().sqrt() for one in (actual, expected))
    assert 0 < theirs and ours <= 1.5 * theirs, (ours, theirs)


@EACH
def test_several_pictures_a_prompt(checkpoint, name):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    two = {"num_images_per_prompt": 2}
    try:
        expected = member.draw(pipe, **two)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        pytest.skip(f"stock cannot: {error}")
    member.assert_same(member.draw(qwen_fast.enable(pipe), **two), expected)
    assert not qwen_fast.report(pipe).fallbacks


@EACH
def test_a_lora_with_a_scale(checkpoint, name):
    from peft import LoraConfig

    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    plain = member.draw(pipe)
    torch.manual_seed(1)
    targets = ["to_q", "add_v_proj", "to_out.0", "img_mod.1", "proj_out"]
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="a")
    other = {"attention_kwargs": {"scale": 0.5}}
    expected = member.draw(pipe, **other)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    qwen_fast.enable(pipe)
    member.assert_same(member.draw(pipe, **other), expected)
    assert "packed transformer" in qwen_fast.report(pipe).calls and not qwen_fast.report(pipe).fallbacks
    pipe.transformer.delete_adapters("a")
    member.assert_same(member.draw(pipe), plain)


@EACH
def test_a_callback_that_changes_latents_and_prompt(checkpoint, name):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)

    def edit(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] * (0.5 if i else 1.0)}

    others = {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = member.draw(pipe, **others)
    member.assert_same(member.draw(qwen_fast.enable(pipe), **others), expected)
    assert not qwen_fast.report(pipe).fallbacks


@EACH
def test_hooks_and_a_replaced_block_are_called(checkpoint, name):
    member = MEMBERS[name]
    pipe, seen = member.pipe(checkpoint), []
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda m, a, output: seen.append(1) or output * 1.1)
    expected = member.draw(pipe)
    in_stock = len(seen)
    member.assert_same(member.draw(qwen_fast.enable(pipe)), expected)
    assert len(seen) == 2 * in_stock and qwen_fast.report(pipe).fallbacks


def test_a_union_of_controlnets(checkpoint):
    """One net, several pictures: all that diffusers' has for now."""
    member = MEMBERS["controlnet"]
    pipe = member.pipe(checkpoint)
    pipe.register_modules(controlnet=QwenImageMultiControlNetModel([pipe.controlnet]))
    others = {"control_image": [WIDE, WIDE.rotate(180)], "controlnet_conditioning_scale": [0.5, 0.8]}
    expected = member.draw(pipe, **others)
    assert (expected - member.draw(pipe, **others | {"controlnet_conditioning_scale": [0.5, 0.1]})).abs().max() > 1e-3
    member.assert_same(member.draw(qwen_fast.enable(pipe), **others), expected)
    assert not qwen_fast.report(pipe).fallbacks


def test_references_of_other_numbers_and_sizes_in_turn(checkpoint):
    member = MEMBERS["edit plus 2511"]
    pipes = member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint))
    for pictures in ([WIDE], [WIDE, HIGH, HIGH], [HIGH], [WIDE]):
        expected, actual = (member.draw(pipe, image=pictures) for pipe in pipes)
        member.assert_same(actual, expected)


def test_edits_leave_other_pipelines_on_the_same_transformer_alone(checkpoint):
    member = MEMBERS["edit"]
    pipe = member.pipe(checkpoint)
    other = diffusers.QwenImagePipeline(**{name: part for name, part in pipe.components.items() if name != "processor"})
    other.set_progress_bar_config(disable=True)
    text = MEMBERS["text"]
    expected = text.draw(other)
    qwen_fast.enable(pipe)
    member.draw(pipe)
    assert torch.equal(text.draw(other), expected)
