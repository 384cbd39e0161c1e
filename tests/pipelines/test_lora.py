"""LoRA in every way that users load, scale, combine, fuse and remove it: the picture follows as in stock."""

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG as LIGHTNING
from support.pipelines import GUIDED, assert_same_picture

pytest.importorskip("peft", reason="LoRA needs peft")

ARGUMENTS = GUIDED | {"prompt": "a red circle"}
# What published LoRAs of Qwen-Image target; Lightning's the modulations too.
LAYERS = ("attn.to_q", "attn.to_k", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj")
LAYERS += ("img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1")


@pytest.fixture
def pair(checkpoint):
    """Stock, and the same checkpoint enabled."""
    return stock(checkpoint), qwen_fast.enable(stock(checkpoint))


def weights(pipe, seed: int, layers=LAYERS, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA as a state dict in the keys of diffusers, for all blocks."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        for layer in layers:
            module = block.get_submodule(layer)
            module = getattr(module, "base_layer", module)
            prefix = f"transformer.transformer_blocks.{index}.{layer}"
            state[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(rank, module.in_features, generator=generator)
            state[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, rank, generator=generator)
    return state


def load(pipe, seed: int, name: str, **kwargs) -> None:
    pipe.load_lora_weights(weights(pipe, seed, **kwargs), adapter_name=name)


def assert_follows(pair, *changes) -> None:
    """Each change, made to both, moves the picture, and both show the same one."""
    before = draw(pair[0], **ARGUMENTS)
    for change in changes:
        for pipe in pair:
            change(pipe)
        after = draw(pair[0], **ARGUMENTS)
        assert (after - before).abs().max() > 1e-2 * before.abs().max(), "this change does nothing"
        assert_same_latents(draw(pair[1], **ARGUMENTS), after)
        before = after
    assert not qwen_fast.report(pair[1]).fallbacks


def test_loaded_scaled_and_unloaded(pair):
    assert_follows(
        pair,
        lambda pipe: load(pipe, 0, "style"),
        lambda pipe: pipe.set_adapters(["style"], [0.4]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    )


def test_two_at_once_and_one_deleted(pair):
    assert_follows(
        pair,
        lambda pipe: load(pipe, 0, "style"),
        lambda pipe: load(pipe, 1, "thing", layers=("attn.to_v", "img_mod.1")),
        lambda pipe: pipe.set_adapters(["style", "thing"], [0.5, 0.8]),
        lambda pipe: pipe.delete_adapters(["style"]),
    )


def test_fused_and_unfused(pair):
    assert_follows(pair, lambda pipe: load(pipe, 0, "style"))
    for pipe in pair:
        pipe.fuse_lora(adapter_names=["style"], lora_scale=0.7)
    assert_same_latents(draw(pair[1], **ARGUMENTS), draw(pair[0], **ARGUMENTS))
    for pipe in pair:
        pipe.unfuse_lora()
    assert_same_latents(draw(pair[1], **ARGUMENTS), draw(pair[0], **ARGUMENTS))


@pytest.mark.parametrize("layers", [LAYERS, ("img_mod.1",), ("txt_mod.1",), ("attn.to_q",)], ids=str)
def test_loaded_before_enable_and_left_after_disable(checkpoint, layers):
    pipe = stock(checkpoint)
    plain = draw(pipe, **ARGUMENTS)
    load(pipe, 0, "style", layers=layers)
    expected = draw(pipe, **ARGUMENTS)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    assert_same_picture(pipe, **ARGUMENTS)
    assert torch.equal(draw(qwen_fast.disable(pipe), **ARGUMENTS), expected)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.7])
def test_scale_of_one_call(pair, scale):
    for pipe in pair:
        load(pipe, 0, "style")
    scaled = ARGUMENTS | {"attention_kwargs": {"scale": scale}}
    assert_same_latents(draw(pair[1], **scaled), draw(pair[0], **scaled))
    assert_same_latents(draw(pair[1], **ARGUMENTS), draw(pair[0], **ARGUMENTS))  # and the next call is at 1 again


def test_scale_changed_by_a_callback(pair):
    for pipe in pair:
        load(pipe, 0, "style")

    def fade(pipe, step, timestep, tensors):
        pipe.set_adapters(["style"], [1.0 - 0.3 * step])
        return {}

    expected, actual = (draw(pipe, callback_on_step_end=fade, **ARGUMENTS) for pipe in pair)
    assert_same_latents(actual, expected)


def test_scale_changed_by_a_callback_of_stocks_loop(checkpoint):
    from support.snapshots import EDITING

    cls = diffusers.QwenImageImg2ImgPipeline
    pair = stock(checkpoint, cls=cls), qwen_fast.enable(stock(checkpoint, cls=cls))
    for pipe in pair:
        load(pipe, 0, "style")

    def fade(pipe, step, timestep, tensors):
        pipe.set_adapters(["style"], [1.0 - 0.4 * step])
        return {}

    expected, actual = (draw(pipe, callback_on_step_end=fade, **(ARGUMENTS | EDITING[cls])) for pipe in pair)
    assert_same_latents(actual, expected)


@pytest.mark.parametrize("steps", [4, 8])
def test_lightning(pair, steps):
    """Few steps, no guidance, Lightning's schedule, its LoRA on the modulations too."""
    for pipe in pair:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING)
        load(pipe, 0, "lightning")
    arguments = ARGUMENTS | {"num_inference_steps": steps, "true_cfg_scale": 1.0, "negative_prompt": None}
    for _ in range(2):
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    report = qwen_fast.report(pair[1])
    assert report.calls["transformer"] == 2 * steps and not report.fallbacks


@pytest.mark.parametrize("cls", [diffusers.QwenImageImg2ImgPipeline], ids=["img2img"])
def test_in_a_pipeline_with_stocks_loop(checkpoint, cls):
    from support.snapshots import EDITING

    pair = stock(checkpoint, cls=cls), qwen_fast.enable(stock(checkpoint, cls=cls))
    for scale in (1.0, 0.4):
        for pipe in pair:
            if scale == 1.0:
                load(pipe, 0, "style")
            pipe.set_adapters(["style"], [scale])
        arguments = ARGUMENTS | EDITING[cls]
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    report = qwen_fast.report(pair[1])
    assert {"transformer", "packed transformer"} & report.calls.keys() and not report.fallbacks


def test_weights_written_through_data(pair):
    """What neither `_version` nor an address shows."""

    def edit(pipe):
        for block in pipe.transformer.transformer_blocks:
            block.img_mod[1].weight.data.mul_(1.1)

    assert_follows(pair, edit, lambda pipe: pipe.transformer.norm_out.linear.weight.data.mul_(0.8))
