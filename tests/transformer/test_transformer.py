"""The fused forward is stock's: to 1e-11 in float64 for everything that a forward can be asked for."""

import copy
from unittest import mock

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import in_float64
from qwen_fast.common.options import Options
from qwen_fast.common.state import State
from qwen_fast.transformer import blocks
from qwen_fast.transformer import model as fused_transformer
from qwen_fast.transformer.attach import attach, detach
from qwen_fast.transformer.block_module import STOCK_BLOCK
from qwen_fast.transformer.call import ATTACHED, accelerated
from qwen_fast.transformer.model import STOCK
from support.small_transformer import fused, inputs, transformer

HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0, 0]])
REFERENCES = [[(1, 4, 6), (1, 2, 4), (1, 3, 3)]]


def assert_exact(model, arguments) -> None:
    """Fused and stock agree in float64: the same function, whatever the order of its sums."""
    with in_float64(), torch.no_grad():
        expected = model(**arguments)[0]
        actual = fused(model, arguments)  # calls the model's txt_norm
    assert actual.shape == expected.shape and expected.std() > 0.1
    assert (actual - expected).abs().max() < 1e-11 * expected.abs().max()


CASES = {
    "one sample": {},
    "one token": {"tokens": 1},
    "batch": {"batch": 2},
    "prefix mask": {"batch": 2, "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [3]])},
    "mask with holes": {"batch": 2, "encoder_hidden_states_mask": HOLES},
    "float mask": {"batch": 2, "encoder_hidden_states_mask": HOLES.float()},
    "mask of ones": {"encoder_hidden_states_mask": torch.ones(1, 7)},
    "a row without any text": {"batch": 2, "encoder_hidden_states_mask": HOLES * torch.tensor([[1], [0]])},
    "own timesteps": {"batch": 2, "timestep": torch.tensor([0.9, 0.2], dtype=torch.float64)},
    "reference pictures": {"shapes": REFERENCES},
    "frames": {"shapes": [[(3, 2, 4)]]},
    "one shape for all": {"batch": 2, "img_shapes": [[(1, 4, 6)]]},
    "shape without list": {"img_shapes": [(1, 4, 6)]},
    "lora scale": {"attention_kwargs": {"scale": 0.5}},
    "controlnet, one for two blocks": {"controlnet_block_samples": [torch.full((1, 24, 64), v).double() for v in (1.0, -2.0)]},
    "controlnet, one for each": {"controlnet_block_samples": list(torch.randn(3, 1, 24, 64, dtype=torch.float64))},
}


@pytest.mark.parametrize("name", CASES)
def test_equals_stock(name):
    assert_exact(transformer(torch.float64), inputs(torch.float64, **CASES[name]))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("timesteps", [(0.5, 0.5), (0.9, 0.2)], ids=["one timestep", "own timesteps"])
def test_reference_pictures_at_timestep_zero(batch, timesteps):
    arguments = inputs(torch.float64, batch=batch, shapes=REFERENCES * batch)
    arguments["timestep"] = torch.tensor(timesteps[:batch], dtype=torch.float64)
    assert_exact(transformer(torch.float64, zero_cond_t=True), arguments)


def test_layered_rotary_embedding_and_additional_condition():
    model = transformer(torch.float64, use_layer3d_rope=True, use_additional_t_cond=True)
    shapes = [[(1, 4, 6), (1, 4, 6), (1, 2, 4)]]
    assert_exact(model, inputs(torch.float64, shapes=shapes, additional_t_cond=torch.tensor([1])))


def test_head_dim_128():
    model = transformer(torch.float64, attention_head_dim=128, axes_dims_rope=(16, 56, 56), num_layers=1)
    assert_exact(model, inputs(torch.float64))


def test_text_of_one_prompt_serves_the_batch():
    """One negative prompt for several: in stock the blocks broadcast it."""
    model, arguments = transformer(torch.float64), inputs(torch.float64, batch=2)
    one = arguments | {"encoder_hidden_states": arguments["encoder_hidden_states"][:1]}
    two = arguments | {"encoder_hidden_states": arguments["encoder_hidden_states"][:1].expand(2, -1, -1)}
    assert torch.equal(fused(model, one), fused(model, two))
    assert_exact(model, two)


def test_mixed_shapes_in_a_batch_are_each_their_own():
    """Stock takes the first sample's positions for all and warns."""
    model = transformer(torch.float64)
    arguments = inputs(torch.float64, batch=2, img_shapes=[[(1, 4, 6)], [(1, 2, 12)]])
    both = fused(model, arguments)
    for n in range(2):
        alone = {name: value[n : n + 1] for name, value in arguments.items() if name != "return_dict"}
        assert (fused(model, alone | {"return_dict": False}) - both[n : n + 1]).abs().max() < 1e-12


def test_fp16_is_clipped_where_stock_clips():
    model = transformer(torch.float16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.net.2.weight"):
                parameter.mul_(30000)
    arguments = inputs(torch.float16)
    with torch.no_grad():
        expected = model(**arguments)[0]
    clipped = []
    original = fused_transformer.TokenStream.through

    def spy(stream, *args, **kwargs):
        original(stream, *args, **kwargs)
        clipped.append((stream.residual.abs() == 65504).any().item())

    with mock.patch.object(fused_transformer.TokenStream, "through", spy):
        actual = fused(model, arguments)
    assert any(clipped) and expected.isfinite().all()
    assert (actual - expected).norm(dtype=torch.float32) < 0.02 * expected.norm(dtype=torch.float32)


def test_return_dict_and_dtype():
    model, state = transformer(torch.bfloat16), State(Options(modulation="layers"))
    attach(model, state)
    with accelerated(model, state), torch.no_grad():
        output = model(**inputs(torch.bfloat16) | {"return_dict": True})
    assert output.sample.dtype == torch.bfloat16 and output.sample.shape == (1, 24, 16)
    detach(model, state)


def test_without_a_call_of_its_pipeline_an_attached_model_is_stock_to_the_bit():
    model, state = transformer(), State()
    with torch.no_grad():
        expected = model(**inputs())[0]
        attach(model, state)
        assert type(model) is not STOCK
        assert torch.equal(model(**inputs())[0], expected)
        other = transformer(seed=1)
        attach(other, State())
        with accelerated(other, State()):
            assert torch.equal(model(**inputs())[0], expected)
    assert not state.calls


def test_gradients_run_on_stock():
    model, state = transformer(), State(Options(modulation="layers"))
    attach(model, state)
    with accelerated(model, state):
        output = model(**inputs())[0]
    output.sum().backward()
    assert model.transformer_blocks[0].attn.to_q.weight.grad is not None
    assert not state.calls and any("gradients" in reason for reason in state.fallbacks)


def test_our_class_on_its_own(tmp_path):
    """Loaded as ours, every forward without gradients is fused; saved, it is stock's."""
    model = transformer()
    model.save_pretrained(tmp_path)
    ours = qwen_fast.QwenImageTransformer2DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, actual = model(**inputs())[0], ours(**inputs())[0]
    assert ours.__dict__[ATTACHED].own.calls == {"transformer": 1}
    assert 0 < (actual - expected).abs().max() < 1e-5 * expected.abs().max()
    ours.save_pretrained(tmp_path / "again")
    again = diffusers.QwenImageTransformer2DModel.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert (again(**inputs())[0] - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_attach_and_detach_are_exact_inverses():
    model = transformer()
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    keys, pointers = list(model.state_dict()), [p.data_ptr() for p in model.parameters()]
    one, two = State(), State(Options(modulation="layers"))
    attach(model, one), attach(model, one), attach(model, two)
    assert list(model.state_dict()) == keys and [p.data_ptr() for p in model.parameters()] == pointers
    detach(model, one)
    assert type(model) is not STOCK  # the second pipeline still uses it
    detach(model, two)
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == before


def test_weights_that_do_not_fit_back_leave_everything_as_it_was(monkeypatch):
    model, state = transformer(), State()
    attach(model, state)

    def refuse(model):
        raise RuntimeError("13.6 GB are needed")

    monkeypatch.setattr("qwen_fast.transformer.attach.return_to_device", refuse)
    with pytest.raises(RuntimeError, match="13.6 GB"):
        detach(model, state)
    assert state in model.__dict__[ATTACHED].users and type(model) is not STOCK
    monkeypatch.undo()
    detach(model, state)
    assert type(model) is STOCK


def test_a_copy_has_its_own_caches():
    model, state = transformer(), State(Options(modulation="layers"))
    fused(model, inputs(), state)
    attach(model, state)
    model.__dict__[ATTACHED].layouts["x"] = None
    twin = copy.deepcopy(model)
    assert not twin.__dict__[ATTACHED].layouts and type(twin) is type(model)
    detach(model, state)


def test_a_subclass_of_the_transformer_is_refused_by_name():
    class Custom(STOCK):
        pass

    model = transformer()
    model.__class__ = Custom
    assert "Custom" in attach(model, State()) and type(model) is Custom
    assert type(model.transformer_blocks[0]) is STOCK_BLOCK


def test_last_blocks_text_half_is_skipped():
    model = transformer()
    used, linear_into = [], blocks.linear_into
    spy = mock.patch.object(blocks, "linear_into", lambda layer, *args: used.append(layer.module) or linear_into(layer, *args))
    with spy:
        fused(model, inputs())
    first, *_, last = model.transformer_blocks
    assert any(module is first.attn.to_add_out for module in used)
    assert not any(module is last.attn.to_add_out for module in used)


def test_what_hangs_on_the_last_blocks_text_half_is_called_as_in_stock():
    model, called = transformer(), []
    last = model.transformer_blocks[-1]
    for module in (last.attn.to_add_out, last.txt_mlp.net[2]):
        module.register_forward_hook(lambda module, args, output: called.append(module))
    state = State(Options(modulation="layers"))
    attach(model, state)
    with torch.no_grad(), accelerated(model, state):
        model(**inputs())
    assert called == [last.attn.to_add_out, last.txt_mlp.net[2]] and state.calls["transformer"] == 1


def test_rotary_tables_are_made_once_per_size():
    model, state = transformer(), State(Options(modulation="layers"))
    attach(model, state)
    with mock.patch.object(fused_transformer, "build_layout", side_effect=fused_transformer.build_layout) as made:
        with accelerated(model, state), torch.no_grad():
            for _ in range(3):
                model(**inputs())
            model(**inputs(tokens=5))
    assert made.call_count == 2
    detach(model, state)


BAD = {
    "shapes of another length": ({"img_shapes": [[(1, 4, 5)]]}, "`img_shapes`.*20.*24"),
    "no shapes": ({"img_shapes": []}, "`img_shapes` is \\[\\]"),
    "shapes of two numbers": ({"img_shapes": [[(4, 6)]]}, "`img_shapes` holds \\(4, 6\\)"),
    "shapes for another batch": ({"img_shapes": [[(1, 4, 6)]] * 2}, "`img_shapes` has 2 entries for 1"),
    "mask of another length": (
        {"encoder_hidden_states_mask": torch.ones(1, 5)},
        "`encoder_hidden_states_mask` shape \\(1, 5\\)",
    ),
    "text for another batch": (
        {"encoder_hidden_states": torch.zeros(3, 7, 24)},
        "`encoder_hidden_states` holds 3 prompts for 1",
    ),
    "a prompt beyond the rotary table": ({"encoder_hidden_states": torch.zeros(1, 4200, 24)}, "4200 tokens"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    change, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        fused(transformer(), inputs() | change)


def test_fp32_embeddings_in_a_bf16_model_are_taken_as_stock_takes_them():
    model, arguments = transformer(torch.bfloat16), inputs(torch.bfloat16)
    wide = arguments | {"encoder_hidden_states": arguments["encoder_hidden_states"].float()}
    with torch.no_grad():
        expected = model(**wide)[0]
    actual = fused(model, wide)
    assert actual.dtype == expected.dtype and (actual - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kwargs", [{"attention_mask": None}, {"something": 1}], ids=str)
def test_other_attention_kwargs_run_on_stock_and_are_named(kwargs):
    model, state = transformer(), State(Options(modulation="layers"))
    attach(model, state)
    with accelerated(model, state), torch.no_grad():
        expected = STOCK.forward(model, **inputs(attention_kwargs=kwargs))[0]
        assert torch.equal(model(**inputs(attention_kwargs=kwargs))[0], expected)
    assert any(next(iter(kwargs)) in reason for reason in state.fallbacks) and not state.calls
