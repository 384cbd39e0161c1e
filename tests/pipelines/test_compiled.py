"""torch.compile of a transformer, in each way that users have, over fused blocks: stock's picture, nothing compiled twice."""

import copy

import diffusers
import pytest
import torch
from torch._dynamo.utils import counters

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.transformer import compiled
from qwen_fast.transformer.modulation import ModulationTable
from support.compiled import ARGUMENTS, TRACED, around, compiled_blocks, in_place, made, regional
from support.family import MEMBERS, small_references

LONG = "a red circle to the left of a blue square on a green background, and nothing else in it"
# What changes between calls, and compiles nothing anew.
CHANGES = (
    {},
    {"prompt": LONG},
    {"negative_prompt": LONG},
    {"height": 128, "width": 64},
    {"num_images_per_prompt": 3},
    {"prompt": ["a cat", LONG], "negative_prompt": ["", "bad"]},
    {"negative_prompt": None},
    {"num_inference_steps": 5},
)


@pytest.mark.parametrize(
    ("way", "order"), [(regional, "after"), (in_place, "after"), (around, "after"), (regional, "before"), (around, "before")]
)
def test_every_call_is_stocks_picture_and_only_the_first_compiles(checkpoint, plain, backend, way, order):
    pipe = made(checkpoint, way, backend, order)
    for changes in CHANGES:
        before = compiled_blocks(pipe)
        assert_same_latents(draw(pipe, **ARGUMENTS | changes), plain(**changes))
        steps = changes.get("num_inference_steps", 3)
        assert compiled_blocks(pipe) == before + 2 * steps, "a block that was not compiled"
        assert backend.compiled == 2, f"one for all blocks but the last, and one for that; {changes}"
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 2
    assert not qwen_fast.report(pipe).fallbacks and pipe.fast_state.no_table is None


@TRACED
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_users_word_on_dynamic_sizes_counts(checkpoint, plain, backend, dynamic):
    pipe = made(checkpoint, regional, backend, dynamic=dynamic)
    found = []
    for changes in ({}, {"height": 128, "width": 64}, {"prompt": LONG}):
        assert_same_latents(draw(pipe, **ARGUMENTS | changes), plain(**changes))
        found.append(backend.compiled)
    assert found == ([2, 2, 2] if dynamic else [2, 4, 6])


@TRACED
def test_disable_gives_back_what_was_compiled(checkpoint, plain, backend):
    pipe = stock(checkpoint)
    for way in (regional, in_place, around):
        way(pipe, backend=backend)
    inner, outer = pipe.transformer._orig_mod, pipe.transformer
    before = [part.__dict__["_compiled_call_impl"] for part in (inner, *inner.transformer_blocks)]
    qwen_fast.enable(pipe)
    assert_same_latents(draw(pipe, **ARGUMENTS), plain())
    assert compiled_blocks(pipe)
    qwen_fast.disable(pipe)
    assert pipe.transformer is outer and outer._orig_mod is inner and type(inner) is diffusers.QwenImageTransformer2DModel
    assert all(
        part.__dict__["_compiled_call_impl"] is one
        for part, one in zip((inner, *inner.transformer_blocks), before, strict=True)
    )


@pytest.mark.parametrize("name", ["edit plus 2511", "layered", "controlnet"])
def test_the_family(checkpoint, backend, name):
    """Rows of timestep 0, residuals behind each block, conditions: with guidance and without."""
    with small_references():
        member = MEMBERS[name]
        pipe = member.pipe(checkpoint)
        expected = [member.draw(pipe, **one) for one in ({}, {"negative_prompt": None})]
        qwen_fast.enable(pipe, strict=True)
        regional(pipe, backend=backend, fullgraph=True)
        for one, picture in zip(({}, {"negative_prompt": None}), expected, strict=True):
            member.assert_same(member.draw(pipe, **one), picture)
            assert backend.compiled == 2
        assert compiled_blocks(pipe) and pipe.fast_state.uncompiled is None


def test_one_row_of_a_table_has_an_address_of_its_own():
    table = ModulationTable(torch.randn(4, (12 * 2 + 3) * 8), 8)
    row = compiled.StepRow(table)
    address, views = row.table.values.data_ptr(), row.block(1)
    for step in (2, 0, 3):
        row.take(torch.tensor([step], dtype=torch.int32))
        assert torch.equal(row.table.values[0], table.values[step]) and row.step_index == 0
    row.take(torch.tensor([-1], dtype=torch.int32))
    assert row.step_index == -1, "no row stays no row"
    assert row.table.values.data_ptr() == address and row.block(1) is views


def test_each_structure_of_a_block_is_a_code_of_its_own():
    """Dynamo compiles a code eight times at most, and raises the ninth time under fullgraph."""
    codes = [compiled._variant((rank,)).__code__ for rank in range(9)]
    assert len({id(code) for code in codes}) == len({code.co_name for code in codes}) == 9
    assert compiled._variant((0,)).__code__ is codes[0]


# What a guard does not see


LAYERS = ("attn.to_q", "attn.add_v_proj", "attn.to_out.0", "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.2", "img_mod.1")


def load_lora(pipe, seed=0, name="style", layers=LAYERS, rank=4):
    generator, state = torch.Generator().manual_seed(seed), {}
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        for layer in layers:
            module = block.get_submodule(layer)
            module = getattr(module, "base_layer", module)
            prefix = f"transformer.transformer_blocks.{index}.{layer}"
            state[f"{prefix}.lora_A.weight"] = 0.2 * torch.randn(rank, module.in_features, generator=generator)
            state[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(module.out_features, rank, generator=generator)
    pipe.load_lora_weights(state, adapter_name=name)


def test_a_lora_is_followed(checkpoint, backend):
    pytest.importorskip("peft", reason="LoRA needs peft")
    pair = stock(checkpoint), made(checkpoint, regional, backend)
    plain = before = draw(pair[0], **ARGUMENTS)
    scaled, other = {"attention_kwargs": {"scale": 0.3}}, 0

    def add_another(pipe):
        load_lora(pipe, 1, "thing", ("img_mlp.net.0.proj", "img_mlp.net.2"), rank=8)
        pipe.set_adapters(["style", "thing"], [0.7, -0.6])

    changes = (
        (load_lora, {}, 2),
        (lambda pipe: pipe.set_adapters(["style"], [0.4]), {}, 0),
        (lambda pipe: None, scaled, 0),
        (add_another, {}, 2),
        (lambda pipe: pipe.fuse_lora(), {}, 2),  # what was there first, but PEFT has frozen the weights since
        (lambda pipe: pipe.unfuse_lora(), {}, 0),
        (lambda pipe: pipe.unload_lora_weights(), {}, 0),
    )
    draw(pair[1], **ARGUMENTS)
    for change, arguments, anew in changes:
        for pipe in pair:
            change(pipe)
        count, blocks = backend.compiled, compiled_blocks(pair[1])
        after = draw(pair[0], **ARGUMENTS | arguments)
        other += (after - before).abs().max() > 1e-2 * before.abs().max()
        assert_same_latents(draw(pair[1], **ARGUMENTS | arguments), after)
        assert compiled_blocks(pair[1]) == blocks + 6
        assert backend.compiled == count + anew, "a scale, or what was there before, compiles nothing"
        before = after
    assert other == len(changes) - 2, "fused and unfused, a LoRA gives the same picture"
    assert_same_latents(before, plain)


def hooked(pipe, path):
    return pipe.transformer.get_submodule(path).register_forward_hook(
        lambda module, args, out: tuple(0.9 * one for one in out) if isinstance(out, tuple) else 0.9 * out
    )


@TRACED
@pytest.mark.parametrize(
    ("way", "path"),
    [
        (regional, ""),
        (in_place, ""),
        (regional, "transformer_blocks.0"),
        (in_place, "transformer_blocks.1.img_mlp"),
        (around, "transformer_blocks.1.attn.to_v"),
    ],
)
def test_a_hook_is_called_and_leaves_again(checkpoint, plain, backend, way, path):
    pair = stock(checkpoint), made(checkpoint, way, backend, options={})
    draw(pair[1], **ARGUMENTS)
    hooks = [hooked(pipe, path) for pipe in pair]
    expected = draw(pair[0], **ARGUMENTS)
    assert (expected - plain()).abs().max() > 1e-3
    assert_same_latents(draw(pair[1], **ARGUMENTS), expected)
    assert any("a forward hook" in reason for reason in qwen_fast.report(pair[1]).fallbacks)
    for hook in hooks:
        hook.remove()
    count = backend.compiled
    assert_same_latents(draw(pair[1], **ARGUMENTS), plain())
    assert backend.compiled == count and pair[1].fast_state.uncompiled is None


@TRACED
def test_what_a_callback_changes_counts_from_the_next_step_on(checkpoint, plain, backend):
    def callback(pipe, index, t, tensors):
        block = pipe.transformer.transformer_blocks[0]
        if index == 0:
            block.img_mlp.net[2].weight.data.mul_(0.5)
        elif index == 1:
            block.txt_mlp.net[2] = copy.deepcopy(block.txt_mlp.net[2]).requires_grad_(False)
            block.txt_mlp.net[2].weight.mul_(0.5)
            block.txt_mlp.register_forward_hook(lambda module, args, out: 0.5 * out)
        return {}

    pair = stock(checkpoint), made(checkpoint, regional, backend, options={})
    expected, actual = (draw(pipe, callback_on_step_end=callback, **ARGUMENTS | {"num_inference_steps": 4}) for pipe in pair)
    assert (expected - plain(num_inference_steps=4)).abs().max() > 1e-3
    assert_same_latents(actual, expected)


@TRACED
def test_a_callback_compiles(checkpoint, plain, backend):
    def callback(pipe, index, t, tensors):
        if index == 0:
            around(pipe, backend=backend, fullgraph=True)
        return {}

    pipe = qwen_fast.enable(stock(checkpoint), strict=True)
    assert_same_latents(draw(pipe, callback_on_step_end=callback, **ARGUMENTS), plain())
    assert compiled_blocks(pipe) == 4 and backend.compiled == 2
    pipe.transformer = pipe.transformer._orig_mod
    assert_same_latents(draw(pipe, **ARGUMENTS), plain())
    assert compiled_blocks(pipe) == 4


@TRACED
def test_a_cache_of_diffusers_over_compiled_blocks(checkpoint, plain, backend):
    pair = stock(checkpoint), made(checkpoint, regional, backend)
    for pipe in pair:
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.8))
    expected = draw(pair[0], **ARGUMENTS)
    assert (expected - plain()).abs().max() > 1e-3, "the cache skips nothing"
    assert_same_latents(draw(pair[1], **ARGUMENTS), expected)
    assert compiled_blocks(pair[1])


@TRACED
def test_offloaded_blocks(checkpoint, plain, backend):
    """Each is called through the hook that brings its weights; what is compiled gets them as they are then."""
    accelerate = pytest.importorskip("accelerate")
    pipe = made(checkpoint, regional, backend)
    for block in pipe.transformer.transformer_blocks:
        accelerate.hooks.add_hook_to_module(
            block, accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        )
    assert_same_latents(draw(pipe, **ARGUMENTS), plain())
    assert compiled_blocks(pipe) == 6 and pipe.fast_state.uncompiled is None
