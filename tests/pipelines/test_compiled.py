"""torch.compile of a transformer, in each way that users have, over fused blocks: stock's picture, nothing compiled twice."""

import copy
import io
import pickle

import diffusers
import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, in_fp32, stock
from qwen_fast.denoise import graph
from qwen_fast.transformer import compiled
from qwen_fast.transformer.compiled import without_compiler
from qwen_fast.transformer.modulation import ModulationTable
from support.family import MEMBERS, small_references
from support.pipelines import GUIDED

ARGUMENTS = GUIDED | {"prompt": "a red circle", "num_inference_steps": 3}
LONG = "a red circle to the left of a blue square on a green background, and nothing else in it"
SHORT = {"num_inference_steps": 2, "negative_prompt": None}  # where stock's blocks are traced, which takes seconds
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


class Backend:
    """A backend of torch.compile that counts what it compiles: through AOTAutograd, or as Dynamo has traced it."""

    def __init__(self, through_aot: bool):
        self.compiled, self.through_aot = 0, through_aot

    def __call__(self, graph, inputs):
        self.compiled += 1
        return aot_eager(graph, inputs) if self.through_aot else graph


@pytest.fixture(params=[True], ids=["aot"])
def backend(request):
    torch.compiler.reset()
    counters.clear()
    yield Backend(request.param)
    torch.compiler.reset()


TRACED = pytest.mark.parametrize("backend", [False], indirect=True, ids=["traced"])  # as good here, in half the time


def regional(pipe, **how):
    pipe.transformer.compile_repeated_blocks(**how)


def in_place(pipe, **how):
    pipe.transformer.compile(**how)


def around(pipe, **how):
    pipe.transformer = torch.compile(pipe.transformer, **how)


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Stock, never changed, and its pictures."""
    pipe, drawn = stock(checkpoint), {}

    def picture(**changes):
        key = repr(changes)
        if key not in drawn:
            drawn[key] = draw(pipe, **ARGUMENTS | changes)
        return drawn[key]

    return picture


def made(checkpoint, way, backend, order="after", options=None, **how):
    """An enabled pipeline with its transformer compiled."""
    pipe, how = stock(checkpoint), {"fullgraph": True, "backend": backend} | how
    if order == "before":
        way(pipe, **how)
    qwen_fast.enable(pipe, **({"strict": True} if options is None else options))
    if order == "after":
        draw(pipe, **ARGUMENTS | {"num_inference_steps": 1, "negative_prompt": None})
        way(pipe, **how)
    return pipe


def compiled_blocks(pipe) -> int:
    return qwen_fast.report(pipe).calls.get("compiled block", 0)


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
        load_lora(pipe, 1, "thing", ("img_mlp.net.2",), rank=8)
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


# Left as it is


@TRACED
def test_a_hook_around_what_was_compiled_is_not_gone_around(checkpoint, backend):
    """As when a pipeline is offloaded whose transformer was compiled: the hook is outside, and brings the weights."""
    accelerate = pytest.importorskip("accelerate")

    class Noted(accelerate.hooks.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    pair, noted = (stock(checkpoint), made(checkpoint, around, backend, options={})), Noted()
    for pipe in pair:
        del without_compiler(pipe.transformer).transformer_blocks[1:]
    accelerate.hooks.add_hook_to_module(pair[1].transformer, noted)
    expected, actual = (draw(pipe, **ARGUMENTS | SHORT) for pipe in pair)
    assert_same_latents(actual, expected)
    assert noted.calls == 2 and "a hook on a torch.compile" in str(qwen_fast.report(pair[1]).fallbacks)


@TRACED
def test_a_layer_that_is_called_leaves_its_block_uncompiled(checkpoint, backend):
    pair = stock(checkpoint), made(checkpoint, regional, backend, options={})
    for pipe in pair:
        mlp = pipe.transformer.transformer_blocks[0].img_mlp
        mlp.net[0].register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    assert_same_latents(draw(pair[1], **ARGUMENTS), draw(pair[0], **ARGUMENTS))
    assert compiled_blocks(pair[1]) == 6 and "FeedForward" in pair[1].fast_state.uncompiled
    assert "the last call's not" in str(qwen_fast.report(pair[1]))


@TRACED
def test_a_quantised_transformer_stays_what_was_compiled(checkpoint, backend):
    quantised = pytest.importorskip("torchao.quantization")
    pair = stock(checkpoint), stock(checkpoint)
    for pipe in pair:
        del pipe.transformer.transformer_blocks[1:]
        quantised.quantize_(pipe.transformer.transformer_blocks, quantised.Int8WeightOnlyConfig())
    regional(qwen_fast.enable(pair[1]), backend=backend)
    expected, actual = (draw(pipe, **ARGUMENTS | SHORT) for pipe in pair)
    assert_same_latents(actual, expected)
    (reason,) = qwen_fast.report(pair[1]).fallbacks
    assert "Int8Tensor" in reason and backend.compiled
    assert type(pair[1].transformer) is diffusers.QwenImageTransformer2DModel


@TRACED
def test_where_a_torch_keeps_its_settings_elsewhere_stock_runs_as_compiled(checkpoint, backend, monkeypatch):
    monkeypatch.setattr(compiled, "compiler_of", lambda compiled: None)
    pair = stock(checkpoint), made(checkpoint, regional, backend, options={})
    for pipe in pair:
        del pipe.transformer.transformer_blocks[1:]
    expected, actual = (draw(pipe, **ARGUMENTS | SHORT) for pipe in pair)
    assert_same_latents(actual, expected)
    (reason,) = qwen_fast.report(pipe).fallbacks
    assert "torch.compile" in reason and not compiled_blocks(pipe) and backend.compiled


def test_compilation_that_is_switched_off_is_none(checkpoint, plain, backend, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # what TORCH_COMPILE_DISABLE=1 makes of it
    pipe = made(checkpoint, regional, backend)
    assert_same_latents(draw(pipe, **ARGUMENTS), plain())
    assert qwen_fast.report(pipe).calls["packed transformer"] == 3 and not compiled_blocks(pipe)


@TRACED
def test_calls_of_the_users_own_are_what_was_compiled(checkpoint, backend):
    """Outside of the pipeline's calls the transformer is stock's, compiled."""
    pipe = made(checkpoint, around, backend, options={})
    del pipe.transformer._orig_mod.transformer_blocks[1:]
    arguments = {
        "hidden_states": torch.randn(1, 24, 64),
        "encoder_hidden_states": torch.randn(1, 9, pipe.transformer.config.joint_attention_dim),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [[(1, 4, 6)]],
    }
    with torch.no_grad():
        expected = pipe.transformer._orig_mod(**arguments).sample
        assert not backend.compiled
        torch.testing.assert_close(pipe.transformer(**arguments).sample, expected, rtol=0, atol=1e-6)
    assert backend.compiled == 1


@TRACED
def test_autocast_runs_on_what_was_compiled_of_stocks(checkpoint, backend):
    """Also fullgraph: Dynamo finds the forward of stock's block behind ours."""
    pair = stock(checkpoint), made(checkpoint, regional, backend, options={})
    for pipe in pair:
        del pipe.transformer.transformer_blocks[1:]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = (draw(pipe, **ARGUMENTS | SHORT).float() for pipe in pair)
    assert (actual - expected).abs().max() <= 5e-2 * expected.abs().max()
    assert backend.compiled and not compiled_blocks(pair[1])
    assert any("autocast" in reason for reason in qwen_fast.report(pair[1]).fallbacks)


# Beside


@TRACED
def test_copies_are_not_compiled(checkpoint, plain, backend):
    """As copies of stock's are not: what was compiled would compute with the weights of the original."""
    pipe = made(checkpoint, regional, backend)
    in_place(pipe, backend=backend)
    twin = copy.deepcopy(pipe)
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].img_mlp.net[2].weight.zero_()
    assert_same_latents(draw(twin, **ARGUMENTS), plain())
    read = pickle.loads(pickle.dumps(twin.transformer))
    torch.save(pipe.transformer, io.BytesIO())
    for model in (twin.transformer, read):
        assert all(part._compiled_call_impl is None for part in (model, *model.transformer_blocks))


@TRACED
@pytest.mark.parametrize("whole", [False, True])
def test_a_transformer_of_ours_alone(checkpoint, backend, whole):
    model = qwen_fast.QwenImageTransformer2DModel.from_pretrained(checkpoint / "transformer")
    arguments = {
        "hidden_states": torch.randn(2, 24, 64),
        "encoder_hidden_states": torch.randn(2, 9, model.config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.arange(9).expand(2, -1) < torch.tensor([[9], [5]]),
        "timestep": torch.tensor([0.5, 0.25]),
        "img_shapes": [[(1, 4, 6)]] * 2,
    }
    with torch.no_grad():
        expected = diffusers.QwenImageTransformer2DModel.from_pretrained(checkpoint / "transformer")(**arguments).sample
        (model.compile if whole else model.compile_repeated_blocks)(backend=backend, fullgraph=True)
        for _ in range(2):
            assert_same_latents(model(**arguments).sample, expected)
    assert qwen_fast.report(model).calls["transformer"] == 2 and backend.compiled == 2


def test_inference_mode_and_bf16(checkpoint, backend):
    pipe = stock(checkpoint, torch.bfloat16)
    expected, exact = draw(pipe, **ARGUMENTS), in_fp32(pipe, 7, torch.bfloat16, **ARGUMENTS)
    qwen_fast.enable(pipe, strict=True)
    regional(pipe, backend=backend, fullgraph=True)
    plain = draw(pipe, **ARGUMENTS)
    assert_same_latents(plain, expected, exact)
    with torch.inference_mode():
        assert torch.equal(draw(pipe, **ARGUMENTS), plain)
    assert torch.equal(draw(pipe, **ARGUMENTS), plain) and backend.compiled == 4


def test_inductor(checkpoint, plain, backend):
    pipe = made(checkpoint, regional, "inductor")
    for changes in ({}, {"height": 128, "width": 64}, {"num_images_per_prompt": 3}):
        assert_same_latents(draw(pipe, **ARGUMENTS | changes), plain(**changes))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({}, None),
        ({"mode": "max-autotune-no-cudagraphs"}, None),
        ({"mode": "reduce-overhead"}, "graphs of its own"),
        ({"mode": "max-autotune"}, "graphs of its own"),
        ({"options": {"triton.cudagraphs": True}}, "graphs of its own"),
        ({"backend": "aot_eager"}, "another backend"),
    ],
    ids=str,
)
def test_graphs_do_not_nest(how, word):
    for fullgraph in (False, True):
        reason = compiled.graph_reason([compiled.compiler_of(torch.compile(lambda x: x, fullgraph=fullgraph, **how))])
        assert reason is None if word is None else word in reason


def test_a_step_whose_blocks_inductor_compiled_is_captured(checkpoint, plain, backend, monkeypatch):
    """Capture finds everything compiled, whatever the mode of the call; here the step itself stands for its replay."""
    captured = []

    def capture(step, device):
        captured.append(counters["stats"]["unique_graphs"])

        def replay():
            with torch.inference_mode(False), torch.no_grad():
                step()

        return replay

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    pipe = made(checkpoint, regional, "inductor", options={"cuda_graph": True}, order="before")
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert_same_latents(draw(pipe, **ARGUMENTS), plain())
    assert captured == [2] == [counters["stats"]["unique_graphs"]] and pipe.fast_state.graph is None
    assert qwen_fast.report(pipe).calls["compiled block"] == 18
    regional(pipe, mode="reduce-overhead")
    assert_same_latents(draw(pipe, **ARGUMENTS), plain())
    assert "graphs of its own" in pipe.fast_state.graph and len(captured) == 1
