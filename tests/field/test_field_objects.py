"""Methods and parts replaced on one pipeline's objects: wrapped forwards, processors, rotary embeddings, own blocks."""

import functools
import types

import pytest
import torch
from diffusers.models import normalization
from diffusers.models.transformers import transformer_qwenimage as stock
from torch import nn

import qwen_fast
from support.field import GUIDED, ORDERS, assert_not_stocks_own, assert_same, compare, draw, guided

HALF, MORE = (lambda result: result * 0.5), (lambda result: result * 1.1)
AXES = [4, 14, 14]


def wrapped(path, change=None, name="forward"):
    """A situation: a method of a part of the transformer wrapped on the object."""
    return lambda run: run.wrap(run.transformer.get_submodule(path), name, change)


def partial_forward(run):
    def forward(model, scale, *args, **kwargs):
        run.note("forward", *args, **kwargs)
        return (type(model).forward(model, *args, **kwargs)[0] * scale,)

    run.transformer.forward = functools.partial(forward, run.transformer, 0.9)


def method_forward(run):
    """As TeaCache's scripts bind theirs; it calls its blocks as stock does."""
    old = run.transformer.forward

    def forward(self, *args, **kwargs):
        run.note("forward", *args, **kwargs)
        return (old(*args, **kwargs)[0] * 0.9,)

    run.transformer.forward = types.MethodType(forward, run.transformer)


class Halved(stock.QwenDoubleStreamAttnProcessor2_0):
    """A processor of one's own, on stock's."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def __call__(self, *args, **kwargs):
        self.run.note("processor", *args, **kwargs)
        image, text = super().__call__(*args, **kwargs)
        return image * 0.5, text


def own_processor(run):
    run.block(1).attn.set_processor(Halved(run))


def all_processors(run):
    for block in run.transformer.transformer_blocks:
        block.attn.processor = Halved(run)


class Scaled(nn.Module):
    """A module of one's own around one of stock's."""

    def __init__(self, run, name, inner, scale):
        super().__init__()
        self.inner, self.scale = inner, scale
        object.__setattr__(self, "_note", functools.partial(run.note, name))

    def forward(self, *args, **kwargs):
        self._note(*args, **kwargs)
        return self.inner(*args, **kwargs) * self.scale


def enclosed(path, scale=0.9):
    """A situation: a part replaced by a module of one's own that calls it."""

    def situation(run):
        parent, _, name = path.rpartition(".")
        parent = run.transformer.get_submodule(parent)
        inner = getattr(parent, name) if not name.isdigit() else parent[int(name)]
        setattr(parent, name, Scaled(run, path, inner, scale))

    return situation


INSIDE = {
    "transformer": (wrapped("", lambda out: (out[0] * 0.9,)), "forward|QwenImageTransformer2DModel"),
    "transformer, partial": (partial_forward, "forward|QwenImageTransformer2DModel"),
    "transformer, method": (method_forward, "forward|QwenImageTransformer2DModel"),
    "block": (wrapped("transformer_blocks.0", lambda out: (out[0], out[1] * 0.9)), "transformer_blocks.0|block"),
    "attention": (wrapped("transformer_blocks.0.attn", lambda out: (out[0] * 0.5, out[1])), "attn"),
    "own processor": (own_processor, "Halved"),
    "own processors": (all_processors, "Halved"),
    "to_q": (wrapped("transformer_blocks.0.attn.to_q", lambda query: query.roll(1, -1)), "to_q"),
    "to_out": (wrapped("transformer_blocks.0.attn.to_out.0", HALF), "to_out"),
    "norm_q": (wrapped("transformer_blocks.0.attn.norm_q", MORE), "norm_q"),
    "norm_added_k": (wrapped("transformer_blocks.1.attn.norm_added_k", MORE), "norm_added_k"),
    "img_norm1": (wrapped("transformer_blocks.0.img_norm1", MORE), "img_norm1"),
    "img_mod": (wrapped("transformer_blocks.0.img_mod", MORE), "img_mod"),
    "txt_mod.1": (wrapped("transformer_blocks.1.txt_mod.1", MORE), "txt_mod"),
    "img_mlp": (wrapped("transformer_blocks.0.img_mlp", HALF), "img_mlp"),
    "txt_mlp.net.2": (wrapped("transformer_blocks.0.txt_mlp.net.2", HALF), "txt_mlp"),
    "img_in": (wrapped("img_in", MORE), "img_in"),
    "txt_norm": (wrapped("txt_norm", MORE), "txt_norm"),
    "txt_in": (wrapped("txt_in", MORE), "txt_in"),
    "time_text_embed": (wrapped("time_text_embed", MORE), "time_text_embed"),
    "norm_out": (wrapped("norm_out", MORE), "norm_out"),
    "proj_out": (wrapped("proj_out", MORE), "proj_out"),
    "own to_v": (enclosed("transformer_blocks.0.attn.to_v"), "to_v|Scaled"),
    "own norm_k": (enclosed("transformer_blocks.0.attn.norm_k"), "norm_k|Scaled"),
    "own img_norm2": (enclosed("transformer_blocks.1.img_norm2"), "img_norm2|Scaled"),
    "own img_mlp": (enclosed("transformer_blocks.1.img_mlp"), "img_mlp|Scaled"),
    "own img_mod": (enclosed("transformer_blocks.1.img_mod"), "img_mod|Scaled"),
    "own time_text_embed": (enclosed("time_text_embed"), "time_text_embed|Scaled"),
    "own norm_out": (enclosed("norm_out"), "norm_out|Scaled"),
    "own txt_norm": (enclosed("txt_norm"), "txt_norm|Scaled"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", INSIDE)
def test_a_part_of_ones_own_is_called_as_in_stock(field, name, order):
    compare(field, INSIDE[name][0], order)


@pytest.mark.parametrize("name", ["", "transformer_blocks.0", "transformer_blocks.0.attn", "transformer_blocks.0.attn.to_k"])
def test_a_wrapper_that_changes_nothing_is_called_as_in_stock(field, name):
    compare(field, wrapped(name), "before", moves=False)


def test_a_layer_norm_becomes_another(field):
    """A norm of another kind in the place of one: its weights and its formula count."""

    def situation(run):
        norm = normalization.RMSNorm(64, eps=1e-6)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 1.5, 64))
        run.block().img_norm1 = norm

    compare(field, situation, "after")


# The rotary embedding


class Rope(stock.QwenEmbedRope):
    """A class of one's own that changes nothing but theta, which its arguments say."""


def own_rope(run):
    run.transformer.pos_embed = Rope(theta=20000, axes_dim=AXES, scale_rope=True)


def other_theta(run):
    run.transformer.pos_embed = stock.QwenEmbedRope(theta=20000, axes_dim=AXES, scale_rope=True)


def following_rope(run):
    """DyPE: frequencies that follow the timestep of the pipeline."""
    old = run.transformer.pos_embed.forward

    def forward(*args, **kwargs):
        run.note("pos_embed", *args, **kwargs)
        image, text = old(*args, **kwargs)
        time = 1.0 if run.pipe.current_timestep is None else float(run.pipe.current_timestep) / 1000
        return torch.polar(image.abs(), image.angle() * (1 - 0.5 * time)), text

    run.transformer.pos_embed.forward = forward


def frequencies_in_place(run):
    """Scripts for other sizes write into the tables."""
    run.transformer.pos_embed.pos_freqs = run.transformer.pos_embed.pos_freqs.conj()


ROPES = {
    "own class": (own_rope, "Rope"),
    "following the timestep": (following_rope, "pos_embed|QwenEmbedRope"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [own_rope, other_theta, following_rope])
def test_a_rotary_embedding_of_ones_own(field, situation, order):
    compare(field, situation, order)


def test_frequencies_replaced_in_stocks_rotary_embedding(field):
    """Before the first call only: stock keeps a copy on the device from then on."""
    compare(field, frequencies_in_place, "before")


# Blocks


class Skip(nn.Module):
    """A block of one's own."""

    def __init__(self, run):
        super().__init__()
        object.__setattr__(self, "_note", functools.partial(run.note, "skip"))

    def forward(self, hidden_states, encoder_hidden_states, **others):
        self._note(hidden_states, encoder_hidden_states, **others)
        return encoder_hidden_states, hidden_states


def own_block(run):
    run.transformer.transformer_blocks[0] = Skip(run)


def fewer_blocks(run):
    del run.transformer.transformer_blocks[0]


def a_block_twice(run):
    run.transformer.transformer_blocks.append(run.transformer.transformer_blocks[0])


def exchanged_blocks(run):
    run.transformer.transformer_blocks = run.transformer.transformer_blocks[::-1]


class Louder(stock.QwenImageTransformerBlock):
    """A subclass of stock's block."""

    def forward(self, *args, **kwargs):
        text, image = super().forward(*args, **kwargs)
        return text, image * 1.1


def subclassed_block(run):
    block = Louder(dim=64, num_attention_heads=2, attention_head_dim=32)
    block.load_state_dict(run.block().state_dict())
    run.transformer.transformer_blocks[0] = block.eval()


BLOCKS = {"own": (own_block, "Skip"), "subclass": (subclassed_block, "Louder")}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [own_block, fewer_blocks, a_block_twice, exchanged_blocks, subclassed_block])
def test_other_blocks(field, situation, order):
    compare(field, situation, order)


def test_with_a_block_of_ones_own_everything_can_still_be_asked(field):
    with field.run() as run:
        own_block(run)
        expected = draw(run.pipe, **GUIDED)
        assert qwen_fast.report(qwen_fast.enable(run.pipe)).enabled
        assert_same(draw(run.pipe, **GUIDED), expected)
        assert_same(draw(qwen_fast.enable(run.pipe, modulation="layers"), **GUIDED), expected)
        qwen_fast.disable(run.pipe)
        assert_same(draw(run.pipe, **GUIDED), expected, 0.0)


# Methods wrapped on the pipeline's own objects, as diffusers' profiling example does


def profiled(run):
    for owner, name in (
        (run.pipe.transformer, "forward"),
        (run.pipe.vae, "decode"),
        (run.pipe.scheduler, "step"),
        (run.pipe, "encode_prompt"),
    ):
        run.wrap(owner, name)


@pytest.mark.parametrize("order", ORDERS)
def test_methods_wrapped_for_a_profile(field, order):
    run = compare(field, profiled, order, output_type="pt", tolerance=1e-5, moves=False)
    assert {name: len(calls) for name, calls in run.seen.items()} == {"encode_prompt": 2, "forward": 6, "step": 3, "decode": 1}


def text_encoder_forward(run):
    run.wrap(run.pipe.text_encoder, "forward")


def inner_text_model(run):
    """A layer of the text encoder changed: the embeddings move."""
    layer = run.pipe.text_encoder.model.language_model.layers[0].mlp.down_proj
    run.wrap(layer, "forward", HALF)


def decoder_forward(run):
    run.wrap(run.pipe.vae.decoder, "forward", HALF)


def post_quant_conv(run):
    run.wrap(run.pipe.vae.post_quant_conv, "forward", MORE)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [text_encoder_forward, inner_text_model])
def test_the_text_encoder_wrapped(field, situation, order):
    compare(field, situation, order, moves=situation is inner_text_model)


def seamless(run):
    """What scripts for seamless pictures do."""
    for module in run.pipe.vae.decoder.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (3, 3):
            module.padding_mode = "circular"


def softer_norm(run):
    run.pipe.vae.decoder.norm_out.scale *= 0.7


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [decoder_forward, post_quant_conv, seamless, softer_norm])
def test_the_vae_wrapped(field, situation, order):
    compare(field, situation, order, output_type="pt", tolerance=1e-5)


# The second contract: what is not stock's own is named, and raises under strict=True.
OWN = INSIDE | {f"rope, {name}": value for name, value in ROPES.items()} | {f"block, {k}": v for k, v in BLOCKS.items()}


@pytest.mark.parametrize("name", OWN)
def test_strict_a_part_of_ones_own_is_named_and_raises(field, name):
    assert_not_stocks_own(field, *OWN[name])


@pytest.mark.parametrize(("situation", "word"), [(seamless, "padding_mode is 'circular'"), (softer_norm, "norm_out.scale")])
def test_strict_an_edited_vae_is_named_and_raises(field, situation, word):
    assert_not_stocks_own(field, situation, word, output_type="pt")


@pytest.mark.parametrize("situation", [other_theta, fewer_blocks, a_block_twice, exchanged_blocks])
def test_strict_parts_of_stocks_own_kind_do_not_raise(field, situation):
    """Another theta, fewer blocks or another order of them are still stock's functions."""
    compare(field, situation, "after", options={"strict": True})


def test_strict_a_profile_raises(field):
    with field.run() as run:
        qwen_fast.enable(run.pipe, strict=True)
        profiled(run)
        with pytest.raises(RuntimeError, match="strict=True"):
            draw(run.pipe, **guided())
