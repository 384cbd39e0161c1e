"""What stays as the user compiled it; and copies, CUDA graphs, modes and compilers beside compiled blocks."""

import copy
import io
import pickle

import diffusers
import pytest
import torch
from torch._dynamo.utils import counters

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, in_fp32, stock
from qwen_fast.denoise import graph
from qwen_fast.transformer import compiled
from qwen_fast.transformer.compiled import without_compiler
from support.compiled import ARGUMENTS, SHORT, TRACED, around, compiled_blocks, in_place, made, regional

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
    weight = "Int8Tensor" if hasattr(quantised, "Int8Tensor") else "AffineQuantizedTensor"  # of torchao 0.14
    assert weight in reason and backend.compiled
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
