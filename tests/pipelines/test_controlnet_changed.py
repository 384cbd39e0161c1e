"""A ControlNet that somebody changed is called as in stock, and what a callback does is followed."""

import copy

import diffusers
import pytest
import torch
from diffusers import QwenImageControlNetModel

import qwen_fast
from support.controlnet import STEPS, build, counted, union
from support.family import MEMBERS, WIDE


class Louder(torch.nn.Linear):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return 1.5 * super().forward(rows)


class Block(torch.nn.Module):
    def __init__(self, block: torch.nn.Module):
        super().__init__()
        self.block = block

    def forward(self, **arguments):
        text, image = self.block(**arguments)
        return text, image * 0.9


class Subclass(QwenImageControlNetModel):
    def forward(self, *args, **kwargs):
        return [sample * 1.5 for sample in super().forward(*args, **kwargs)]


def hook(pipe) -> None:
    pipe.controlnet.controlnet_blocks[0].register_forward_hook(lambda module, args, output: output * 1.5)


def hook_on_the_whole(pipe) -> None:
    pipe.controlnet.register_forward_hook(lambda module, args, output: [one * 1.5 for one in output])


def replaced_layer(pipe) -> None:
    pipe.controlnet.controlnet_x_embedder.__class__ = Louder


def replaced_block(pipe) -> None:
    pipe.controlnet.transformer_blocks[1] = Block(pipe.controlnet.transformer_blocks[1])


def replaced_forward(pipe) -> None:
    forward = pipe.controlnet.forward
    pipe.controlnet.forward = lambda **arguments: [one * 1.5 for one in forward(**arguments)]


def subclass(pipe) -> None:
    pipe.controlnet.__class__ = Subclass


def compiled(pipe) -> None:
    forward = pipe.controlnet.forward
    pipe.controlnet._compiled_call_impl = lambda **arguments: [one * 1.5 for one in forward(**arguments)]


def processor(pipe) -> None:
    class Own(type(pipe.controlnet.transformer_blocks[0].attn.processor)):
        def __call__(self, *args, **kwargs):
            image, text = super().__call__(*args, **kwargs)
            return image * 1.5, text

    pipe.controlnet.transformer_blocks[0].attn.processor = Own()


def offloaded(pipe) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload_with_hook(pipe.controlnet, execution_device=torch.device("cpu"))


CHANGES = [hook, hook_on_the_whole, replaced_layer, replaced_block, replaced_forward, subclass, compiled, processor]


@pytest.mark.parametrize("change", [*CHANGES, offloaded], ids=lambda change: change.__name__)
def test_what_was_changed_is_called(checkpoint, change):
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    plain = member.draw(pipe)
    change(pipe)
    expected = member.draw(pipe)
    assert change is offloaded or (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    member.assert_same(member.draw(qwen_fast.enable(pipe)), expected)
    assert "ControlNet" not in str(qwen_fast.report(pipe).replaced)
    assert counted(pipe) == 0 and any("ControlNet" in reason for reason in qwen_fast.report(pipe).fallbacks)
    assert qwen_fast.report(pipe).calls["packed transformer"] == STEPS
    qwen_fast.enable(pipe, strict=True)
    with pytest.raises(RuntimeError, match="ControlNet"):
        member.draw(pipe)


def test_a_hook_on_a_union_is_called(checkpoint):
    member, pipe, seen = MEMBERS["controlnet"], union(checkpoint), []
    pipe.controlnet.register_forward_hook(lambda module, args, output: seen.append(1) or [one * 1.5 for one in output])
    others = {"control_image": [WIDE], "controlnet_conditioning_scale": [0.5]}
    expected = member.draw(pipe, **others)
    member.assert_same(member.draw(qwen_fast.enable(pipe), **others), expected)
    assert len(seen) == 2 * STEPS and counted(pipe) == 0


def test_a_class_of_diffusers_that_was_replaced(checkpoint, monkeypatch):
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    forward = QwenImageControlNetModel.forward
    monkeypatch.setattr(QwenImageControlNetModel, "forward", lambda *args, **kw: [1.5 * one for one in forward(*args, **kw)])
    expected = member.draw(pipe)
    member.assert_same(member.draw(qwen_fast.enable(pipe)), expected)
    assert counted(pipe) == 0 and qwen_fast.report(pipe).fallbacks


def with_lora(pipe, **changes) -> None:
    from peft import LoraConfig

    torch.manual_seed(1)
    targets = ["to_q", "add_v_proj", "img_mod.1", "controlnet_x_embedder", "controlnet_blocks.1", "img_mlp.net.0.proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **changes)
    pipe.controlnet.add_adapter(config, adapter_name="a")


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_on_the_controlnet(checkpoint, dora):
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    plain = member.draw(pipe)
    with_lora(pipe, use_dora=dora)
    expected = member.draw(pipe)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    member.assert_same(member.draw(qwen_fast.enable(pipe)), expected)
    assert counted(pipe) == STEPS and not qwen_fast.report(pipe).fallbacks
    pipe.controlnet.delete_adapters("a")
    member.assert_same(member.draw(pipe), plain)


def test_a_hook_on_the_transformer_gets_residuals_where_the_scale_is_zero(checkpoint):
    member, pipe, seen = MEMBERS["controlnet"], build(checkpoint), []

    def noted(module, args, kwargs):
        seen.append(kwargs["controlnet_block_samples"])

    pipe.transformer.register_forward_pre_hook(noted, with_kwargs=True)
    others = {"control_guidance_end": 0.5}
    expected = member.draw(pipe, **others)
    before = [None if one is None else [sample.clone() for sample in one] for one in seen]
    seen.clear()
    member.assert_same(member.draw(qwen_fast.enable(pipe), **others), expected)
    assert len(seen) == len(before) == 2 * STEPS
    for ours, theirs in zip(seen, before, strict=True):
        assert all((one - other).abs().max() <= 1e-4 for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("place", [0, 1])
def test_a_hooked_block_of_the_transformer_gets_its_residual(checkpoint, place):
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    plain = member.draw(pipe)

    def changed(module, args, output):
        return output[0], output[1] * 1.2

    pipe.transformer.transformer_blocks[place].register_forward_hook(changed)
    expected = member.draw(pipe)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    member.assert_same(member.draw(qwen_fast.enable(pipe)), expected)
    assert counted(pipe) == STEPS


# Callbacks


def assert_same_with(checkpoint, callback, names=("latents",)) -> None:
    member = MEMBERS["controlnet"]
    drawn = []
    for enabled in (False, True):
        pipe = build(checkpoint)
        others = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": list(names)}
        pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, "controlnet_block_samples", "control_image"]
        drawn.append(member.draw(qwen_fast.enable(pipe) if enabled else pipe, **others, control_guidance_end=0.7))
    member.assert_same(drawn[1], drawn[0])


def test_a_callback_that_changes_the_prompt(checkpoint):
    def callback(pipe, i, t, given):  # not by a factor, which the text's norm takes out
        return {"prompt_embeds": given["prompt_embeds"].roll(1, dims=-1)}

    assert_same_with(checkpoint, callback, ["latents", "prompt_embeds"])


def test_a_callback_that_changes_the_network(checkpoint):
    def callback(pipe, i, t, given):
        if i == 0:
            for weight in (pipe.controlnet.img_in.weight, pipe.controlnet.transformer_blocks[0].img_mod[1].weight):
                weight.mul_(1.5)
        return {}

    assert_same_with(checkpoint, callback)


def test_a_callback_that_puts_another_network_in(checkpoint):
    def callback(pipe, i, t, given):
        if i == 0:
            net = copy.deepcopy(pipe.controlnet)
            net.controlnet_blocks[0].weight.data.mul_(2)
            net.txt_in.weight.data.mul_(2)
            pipe.controlnet = net
        return {}

    assert_same_with(checkpoint, callback)


def test_a_callback_that_writes_into_the_control_latents(checkpoint):
    def callback(pipe, i, t, given):
        given["control_image"].mul_(0.5)
        return {}

    assert_same_with(checkpoint, callback, ["latents", "control_image"])


def test_a_callback_that_reads_residuals_sees_zeros_where_the_scale_is_zero(checkpoint):
    def callback(pipe, i, t, given):
        (first, *_), latents = given["controlnet_block_samples"], given["latents"]
        assert (i == STEPS - 1) is (not first.any())
        return {"latents": latents + first[..., :64] * 0.01}

    assert_same_with(checkpoint, callback, ["latents", "controlnet_block_samples"])


def test_a_pipeline_beside_it_with_the_same_network_stays_stocks(checkpoint):
    member, pipe = MEMBERS["controlnet"], build(checkpoint)
    other = diffusers.QwenImageControlNetPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    expected = member.draw(other)
    member.draw(qwen_fast.enable(pipe))
    assert torch.equal(member.draw(other), expected)
