"""Methods of classes and functions of modules that people replace: caches, token pruning, trainers' patches, profilers."""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.models import activations, attention, attention_dispatch, attention_processor, normalization
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as vae
from diffusers.models.transformers import transformer_qwenimage as stock
from peft import LoraConfig
from peft.tuners.lora import layer as lora
from torch import nn

import qwen_fast
from support.field import ORDERS, SMALL, assert_not_stocks_own, assert_same, compare, draw

ROOT = Path(__file__).parents[2]
MODEL = diffusers.QwenImageTransformer2DModel
HALF, MORE = (lambda result: result * 0.5), (lambda result: result * 1.1)


def one_block(self, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, timestep=None, **others):
    """A step cache in the manner of MagCache and TeaCache: blocks left out, written against the class."""
    image = self.img_in(hidden_states)
    text = self.txt_in(self.txt_norm(encoder_hidden_states))
    temb = self.time_text_embed(timestep.to(image.dtype), image)
    rope = self.pos_embed(others["img_shapes"], max_txt_seq_len=text.shape[1], device=image.device)
    for block in self.transformer_blocks[:1]:
        text, image = block(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=encoder_hidden_states_mask,
            temb=temb,
            image_rotary_emb=rope,
        )
    return (self.proj_out(self.norm_out(image, temb)),)


def a_cached_forward(run):
    run.patch.setattr(MODEL, "forward", one_block)


def after_the_class_of_the_model(run):
    """As the scripts do it: on whatever class the model has."""
    run.patch.setattr(type(run.transformer), "forward", one_block)


def a_forward_with_kwargs(run):
    """A trainer's patch: it names four arguments and hands the others on."""
    old = MODEL.forward

    def forward(self, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, **kwargs):
        run.note("forward", hidden_states, encoder_hidden_states, encoder_hidden_states_mask, **kwargs)
        return old(self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, **kwargs)

    run.patch.setattr(MODEL, "forward", forward)


def replaced(owner, name, change=None, inside=False):
    """A situation: `owner.name` wrapped."""
    return lambda run: run.wrap(owner, name, change, inside)


def conjugated(run):
    old = stock.apply_rotary_emb_qwen

    def apply(x, freqs_cis, use_real=True):
        run.note("apply", x, freqs_cis, use_real=use_real)
        return old(x, freqs_cis.conj(), use_real=use_real)

    if hasattr(stock, "ROPE_PER_DEVICE"):  # where diffusers 0.40 and 0.41 look it up
        run.patch.setitem(stock.ROPE_PER_DEVICE, "cuda", functools.partial(apply, use_real=False))
    else:
        run.patch.setattr(stock, "apply_rotary_emb_qwen", apply)


# Situation, and the word by which `report` and strict=True have to name it.
INSIDE = {
    "transformer forward": (replaced(MODEL, "forward", lambda out: (out[0] * 0.9,)), "forward|QwenImageTransformer2DModel"),
    "transformer forward, cached": (a_cached_forward, "forward|QwenImageTransformer2DModel"),
    "block": (
        replaced(stock.QwenImageTransformerBlock, "forward", lambda out: (out[0], out[1] * 0.9)),
        "forward|QwenImageTransformerBlock",
    ),
    "block's modulation": (
        replaced(stock.QwenImageTransformerBlock, "_modulate", lambda out: (out[0] * 1.1, out[1])),
        "_modulate|QwenImageTransformerBlock",
    ),
    "processor": (
        replaced(stock.QwenDoubleStreamAttnProcessor2_0, "__call__", lambda out: (out[0] * 0.5, out[1])),
        "QwenDoubleStreamAttnProcessor2_0",
    ),
    "attention": (
        replaced(attention_processor.Attention, "forward", lambda out: (out[0] * 0.5, out[1]), inside=True),
        "Attention",
    ),
    "linear": (replaced(nn.Linear, "forward", lambda out: out * 0.97, inside=True), "Linear"),
    "rms norm": (replaced(normalization.RMSNorm, "forward", MORE, inside=True), "RMSNorm"),
    "layer norm": (replaced(nn.LayerNorm, "forward", MORE, inside=True), "LayerNorm"),
    "output norm": (replaced(normalization.AdaLayerNormContinuous, "forward", MORE), "AdaLayerNormContinuous"),
    "feed forward": (replaced(attention.FeedForward, "forward", HALF), "FeedForward"),
    "gelu": (replaced(activations.GELU, "forward", HALF), "GELU"),
    "timestep embedding": (replaced(stock.QwenTimestepProjEmbeddings, "forward", MORE), "QwenTimestepProjEmbeddings"),
    "rotary embedding": (
        replaced(stock.QwenEmbedRope, "forward", lambda out: (out[0].conj(), out[1])),
        "QwenEmbedRope|pos_embed",
    ),
    "apply_rotary_emb_qwen": (conjugated, "apply_rotary_emb_qwen|ROPE_PER_DEVICE"),
    "dispatch_attention_fn": (replaced(stock, "dispatch_attention_fn", HALF), "dispatch_attention_fn"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", INSIDE)
def test_a_replaced_function_is_called_as_in_stock(field, name, order):
    compare(field, INSIDE[name][0], order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_forward_replaced_on_the_class_of_the_model(field, order):
    compare(field, after_the_class_of_the_model, order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_forward_wrapped_with_kwargs(field, order):
    compare(field, a_forward_with_kwargs, order, moves=False)


@pytest.mark.parametrize("name", ["transformer forward", "block", "processor"])
def test_a_wrapper_that_changes_nothing_is_called_as_in_stock(field, name):
    owners = {
        "transformer forward": (MODEL, "forward"),
        "block": (stock.QwenImageTransformerBlock, "forward"),
        "processor": (stock.QwenDoubleStreamAttnProcessor2_0, "__call__"),
    }
    compare(field, replaced(*owners[name]), "after", moves=False)


@pytest.mark.parametrize("order", ORDERS)
def test_scaled_dot_product_attention_replaced(field, order):
    """On the CPU stock's dispatcher ends there, once a block and a forward."""
    counted = {}

    def halved(run):
        old = F.scaled_dot_product_attention

        def attend(query, key, value, *args, **kwargs):
            if query.shape[1] == 2:  # the transformer's heads; the text encoder has four
                counted[id(run)] = counted.get(id(run), 0) + 1
                run.note("attend", query, key, value)
            return old(query, key, value, *args, **kwargs) * 0.5

        run.patch.setattr(F, "scaled_dot_product_attention", attend)

    compare(field, halved, order)
    assert set(counted.values()) == {12}, "2 blocks, 3 steps, with and without the prompt"


OUTSIDE = {
    "text encoder": (
        replaced(transformers.Qwen2_5_VLForConditionalGeneration, "forward"),
        "text_encoder|Qwen2_5_VLForConditionalGeneration",
    ),
    "decode": (replaced(diffusers.AutoencoderKLQwenImage, "decode", lambda out: (out[0] * 0.5,)), "decode"),
    "decoder": (replaced(vae.QwenImageDecoder3d, "forward", HALF), "QwenImageDecoder3d|decoder"),
    "vae norm": (replaced(vae.QwenImageRMS_norm, "forward", MORE), "QwenImageRMS_norm"),
    "vae convolution": (replaced(vae.QwenImageCausalConv3d, "forward", MORE), "QwenImageCausalConv3d"),
    "vae block": (replaced(vae.QwenImageResidualBlock, "forward", MORE), "QwenImageResidualBlock"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_replaced_function_of_the_text_encoder_and_the_vae(field, name, order):
    """Pictures of the VAE are held to 1e-5."""
    if name == "text encoder":
        compare(field, OUTSIDE[name][0], order, moves=False)
    else:
        compare(field, OUTSIDE[name][0], order, output_type="pt", tolerance=1e-5)


# The second contract: what is not stock's own is named, and raises under strict=True.


@pytest.mark.parametrize("name", INSIDE)
def test_strict_a_replaced_function_is_named_and_raises(field, name):
    assert_not_stocks_own(field, *INSIDE[name])


@pytest.mark.parametrize("name", OUTSIDE)
def test_strict_a_replaced_function_outside_is_named_and_raises(field, name):
    assert_not_stocks_own(field, *OUTSIDE[name], output_type="latent" if name == "text encoder" else "pt")


def test_strict_what_was_put_back_is_stocks_own_again(field):
    """A patch that is undone leaves nothing behind: neither a name nor an error."""
    with field.run() as run:
        qwen_fast.enable(run.pipe, strict=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stock.QwenImageTransformerBlock, "forward", stock.QwenImageTransformerBlock.forward)
        draw(run.pipe, **SMALL)
        assert not qwen_fast.report(run.pipe).fallbacks


# Before qwen_fast is used for the first time in a process

FIRST_USE = """
import json, sys
import torch, diffusers
torch.set_num_threads(1)
model, scheduler = diffusers.QwenImageTransformer2DModel, diffusers.FlowMatchEulerDiscreteScheduler
calls = {"forward": 0, "step": 0}
forward, step = model.forward, scheduler.step
def wrapped(self, hidden_states, encoder_hidden_states=None, encoder_hidden_states_mask=None, attention_kwargs=None, **kwargs):
    calls["forward"] += 1
    return forward(self, hidden_states, encoder_hidden_states=encoder_hidden_states,
                   encoder_hidden_states_mask=encoder_hidden_states_mask, attention_kwargs=attention_kwargs, **kwargs)
def counted(self, *args, **kwargs):
    calls["step"] += 1
    return step(self, *args, **kwargs)
model.forward, scheduler.step = wrapped, counted
import qwen_fast
arguments = dict(prompt="a red circle", negative_prompt="blurry", true_cfg_scale=3.7, height=64, width=96,
                 num_inference_steps=3, output_type="latent")
def draw(enable):
    pipe = diffusers.QwenImagePipeline.from_pretrained(sys.argv[1])
    pipe.set_progress_bar_config(disable=True)
    if enable:
        qwen_fast.enable(pipe)
    calls.update(forward=0, step=0)
    picture = pipe(**arguments, generator=torch.Generator().manual_seed(7)).images
    return picture, dict(calls)
(theirs, expected), (ours, actual) = draw(False), draw(True)
print(json.dumps({"d": ((ours - theirs).abs().max() / theirs.abs().max()).item(), "stock": expected, "ours": actual}))
"""


def test_classes_wrapped_before_the_first_use(field):
    """What a trainer or a server replaced before it imported qwen_fast is not taken for stock's own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    command = [sys.executable, "-c", FIRST_USE, str(field.checkpoint)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["d"] <= 2e-6 and found["ours"] == found["stock"], found


def test_the_fused_forward_has_stocks_signature(field):
    """Libraries read it: cache-dit looks for its arguments, trainers filter their batch by it."""
    expected = inspect.signature(MODEL.forward)
    pipe = qwen_fast.enable(field.pipe())
    assert inspect.signature(qwen_fast.QwenImageTransformer2DModel.forward) == expected
    assert inspect.signature(type(pipe.transformer).forward) == expected
    assert inspect.signature(pipe.transformer.forward) == inspect.signature(field.pipe().transformer.forward)


def test_the_fused_block_has_stocks_signature(field):
    ours, theirs = (pipe.transformer.transformer_blocks[0] for pipe in (qwen_fast.enable(field.pipe()), field.pipe()))
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    assert isinstance(ours, stock.QwenImageTransformerBlock)


def test_the_backend_that_attention_takes_by_default_is_called_where_it_was_replaced(field, monkeypatch):
    registry = attention_dispatch._AttentionBackendRegistry
    native, seen = attention_dispatch.AttentionBackendName.NATIVE, []
    own = registry._backends[native]

    def weaker(*args, **kwargs):
        seen.append(1)
        return own(*args, **kwargs) * 0.9

    plain, ours = draw(field.pipe(), **SMALL), qwen_fast.enable(field.pipe())
    monkeypatch.setitem(registry._backends, native, weaker)
    expected = draw(field.pipe(), **SMALL)
    in_stock = len(seen)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert_same(draw(ours, **SMALL), expected)
    assert len(seen) == 2 * in_stock and "attention backend" in str(qwen_fast.report(ours))


def test_a_lora_layer_whose_forward_was_replaced_is_called(field, monkeypatch):
    forward = lora.Linear.forward

    def adapted():
        pipe = field.pipe()
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["to_q", "net.0.proj"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name="a")
        return pipe

    ours = qwen_fast.enable(adapted())
    plain = draw(ours, **SMALL)
    monkeypatch.setattr(lora.Linear, "forward", lambda self, x, *args, **kwargs: forward(self, x, *args, **kwargs) * 1.1)
    expected = draw(adapted(), **SMALL)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    assert_same(draw(ours, **SMALL), expected)


def test_sparse_weights_are_called(field):
    def sparse():
        pipe = field.pipe()
        for block in pipe.transformer.transformer_blocks:
            layer = block.img_mlp.net[2]
            layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
        return pipe

    try:
        expected = draw(sparse(), **SMALL)
    except RuntimeError as error:
        pytest.skip(f"torch cannot multiply by them here: {error}")
    assert_same(draw(qwen_fast.enable(sparse()), **SMALL), expected)


def test_torch_is_as_it_was(field):
    """Situations change classes for their own time only: the other tests of this session see stock's."""
    assert MODEL.forward.__module__ == stock.__name__ and "replaced" not in nn.Linear.forward.__qualname__
    assert torch.nn.functional.scaled_dot_product_attention is F.scaled_dot_product_attention
