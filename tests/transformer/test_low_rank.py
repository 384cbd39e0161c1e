"""LoRA layers of PEFT: plain ones are added to the fused products, all others are called."""

import importlib

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.transformer import linear
from qwen_fast.transformer.linear import AdapterRows, Projection, feed_forward_into, linear_into
from qwen_fast.transformer.survey import survey
from qwen_fast_kernels import linear_gelu, tuning
from support import stand_in
from support.pipelines import GUIDED, SMALL


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)


def adapted(dtype: torch.dtype = torch.float32, **options) -> Two:
    """Both layers under two adapters that are on together, each with a scale of its own."""
    torch.manual_seed(0)
    model = Two()
    for name, rank in (("a", 4), ("b", 2)):
        config = LoraConfig(r=rank, lora_alpha=6, target_modules=["up", "down"], init_lora_weights=False, **options)
        inject_adapter_in_model(config, model, adapter_name=name)
    for part in (model.up, model.down):
        part.set_adapter(["a", "b"])
        part.scaling["b"] = 0.3
    return model.to(dtype).eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_products_of_low_rank_are_added(dtype, bias):
    model, wide = adapted(dtype), adapted()
    for part in (model.up, model.down, wide.up, wide.down) if not bias else ():
        part.base_layer.bias = None
    up, down = Projection(model.up), Projection(model.down)
    assert len(up.adapters) == 2 and up.weight_for(torch.empty(1, dtype=dtype)) is model.up.base_layer.weight
    rows = torch.randn(40, 16, dtype=dtype)
    exact = wide.up(rows.float())
    out = torch.empty(40, 32, dtype=dtype)
    linear_into(up, rows, out)
    stocks = model.up(rows)
    error, theirs = ((one.float() - exact).square().mean().sqrt() for one in (out, stocks))
    assert error <= (2e-6 if dtype == torch.float32 else theirs) and (out - model.up.base_layer(rows)).abs().max() > 0.1
    both = torch.empty(40, 16, dtype=dtype)
    feed_forward_into(up, down, rows, both)
    expected = wide.down(nn.functional.gelu(exact, approximate="tanh"))
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    assert (both.float() - expected).abs().max() <= limit * expected.abs().max()


def switch_off(model):
    model.up.enable_adapters(False)


def leave_one(model):
    model.up.set_adapter(["b"])


def merge(model):
    model.up.merge()


@pytest.mark.parametrize(("change", "left"), [(switch_off, []), (leave_one, ["b"])])
@torch.no_grad()
def test_adapters_that_are_off_are_not_added(change, left):
    model = adapted()
    change(model)
    found = Projection(model.up)
    assert [adapter.name for adapter in found.adapters] == left
    rows, out = torch.randn(5, 16), torch.empty(5, 32)
    linear_into(found, rows, out)
    assert (out - model.up(rows)).abs().max() <= 1e-6


def two(model):
    pass


def other_scales(model):
    model.up.scaling |= {"a": -1.7, "b": 0.0}


def other_strides(model):
    """As those of a decomposition: `torch.linalg.svd` gives its first factor column by column."""
    for name in ("a", "b"):
        factor = model.up.lora_B[name].weight
        factor.data = factor.data.t().contiguous().t()


def no_rank(model):
    model.up.lora_A["b"].weight = nn.Parameter(torch.empty(0, 16, dtype=model.up.weight.dtype))
    model.up.lora_B["b"].weight = nn.Parameter(torch.empty(32, 0, dtype=model.up.weight.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("change", "ranks"),
    [(two, 6), (leave_one, 2), (other_scales, 6), (other_strides, 6), (no_rank, 4), (switch_off, None), (merge, None)],
)
@torch.no_grad()
def test_the_first_layer_of_an_mlp_takes_them_into_its_one_operator(change, ranks, dtype, monkeypatch):
    """Nearer to float64 than PEFT's layer and GELU behind it are; a single adapter's factor is read where it lies."""
    model, wide, seen = adapted(dtype), adapted(dtype).double(), []
    for one in (model, wide):
        change(one)
        one.down = nn.Linear(32, 32, bias=False).to(one.up.weight.dtype)
        one.down.weight.copy_(torch.eye(32))
    rows, out = torch.randn(40, 16, dtype=dtype), torch.empty(40, 32, dtype=dtype)
    monkeypatch.setattr(linear, "linear_gelu", lambda *given: (seen.append(given), linear_gelu(*given))[1])
    feed_forward_into(Projection(model.up), Projection(model.down), rows, out)
    exact, theirs = (nn.functional.gelu(one.up(rows.to(one.down.weight.dtype)), approximate="tanh") for one in (wide, model))
    error, limit = ((one.double() - exact).square().mean().sqrt().item() for one in (out, theirs))
    assert error <= (1e-6 if dtype == torch.float32 else limit)
    ((_, weight, bias, *factors),) = seen
    assert weight is model.up.base_layer.weight and bias is model.up.base_layer.bias
    if ranks is None:
        assert factors == [None, None]
    else:
        assert [tuple(factor.shape) for factor in factors] == [(40, ranks), (32, ranks)]
    if change is leave_one:
        assert factors[1].data_ptr() == model.up.lora_B["b"].weight.data_ptr()


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """Ranks of each launch: the operator is its kernel, interpreted on the CPU, as configured on sm_90."""
    stand_in.interpret(monkeypatch.setattr, {})
    module, seen = importlib.import_module("qwen_fast_kernels.linear_gelu"), []
    launch = module.launch_linear_gelu

    def counted(*arguments, config):
        seen.append(arguments[3].shape[1])
        return launch(*arguments, config=config)

    monkeypatch.setattr(module, "launch_linear_gelu", counted)
    library = torch.library.Library("qwen_fast", "IMPL")
    stand_in.launchers_for_cpu(library, ["linear_gelu"])
    yield seen
    library._destroy()
    tuning.get_config.cache_clear()


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs natively here")
def test_a_picture_through_the_kernel(checkpoint, launches):
    pipe, arguments = stock(checkpoint), SMALL | {"prompt": "a red circle", "num_inference_steps": 2}
    torch.manual_seed(0)
    for name, rank in (("style", 20), ("thing", 3)):
        config = LoraConfig(r=rank, lora_alpha=5, target_modules=["net.0.proj"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name=name)
    pipe.transformer.set_adapters(["style", "thing"], [0.7, -0.6])
    expected = draw(pipe, **arguments)
    assert_same_latents(draw(qwen_fast.enable(pipe, strict=True), **arguments), expected)
    assert launches == [23] * 2 * 3, "two blocks, of which the last has no text half"
    pipe.transformer.disable_adapters()
    qwen_fast.disable(pipe)
    assert (draw(pipe, **arguments) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_rows_with_adapters_of_their_own_get_those_alone():
    model, gelu = adapted(), nn.GELU("tanh")
    up, down = Projection(model.up), Projection(model.down)
    rows, out = torch.randn(7, 16), torch.empty(7, 16)
    feed_forward_into(up, down, rows, out, adapted=AdapterRows((("a", slice(2, 5)),), 0.5))
    expected = model.down.base_layer(gelu(model.up.base_layer(rows)))
    model.up.set_adapter(["a"])
    model.down.set_adapter(["a"])
    for part in (model.up, model.down):
        part.scaling["a"] *= 0.5
    expected[2:5] = model.down(gelu(model.up(rows[2:5])))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("off", [False, True])
@torch.no_grad()
def test_merged_adapters_are_in_the_weight(off):
    """Switched off, the layer takes them out when it is called: that has to happen."""
    model = adapted()
    merge(model)
    if off:
        model.up._disable_adapters = True  # without the unmerging of `enable_adapters`
    found, rows, out = Projection(model.up), torch.randn(5, 16), torch.empty(5, 32)
    assert not found.adapters and (found.parameters is None) == off
    linear_into(found, rows, out)
    assert (out - model.up(rows)).abs().max() <= 1e-6


def hook(model):
    model.up.lora_A["a"].register_forward_hook(lambda *_: None)


def replace(model):
    model.up.lora_B["a"].forward = lambda x: x


def bias(model):
    model.up.lora_B["a"].bias = nn.Parameter(torch.ones(32))


def subclass(model):
    model.up.base_layer.__class__ = type("Own", (nn.Linear,), {})


OTHERS = {
    "DoRA": lambda: adapted(use_dora=True),
    "dropout": lambda: adapted(lora_dropout=0.5),
    **{change.__name__: (lambda change=change: (lambda model: (change(model), model)[1])(adapted())) for change in
       (hook, replace, bias, subclass)},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_all_others_are_called(name):
    found = Projection(OTHERS[name]().up)
    assert found.parameters is None and not found.adapters


def test_adapters_of_another_dtype_are_called():
    model = adapted(torch.bfloat16)
    model.up.lora_A["a"].to(torch.float32)
    assert Projection(model.up).weight_for(torch.empty(1, dtype=torch.bfloat16)) is None


def test_the_blocks_of_a_pipeline_read_them(checkpoint):
    pipes = stock(checkpoint), qwen_fast.enable(stock(checkpoint), strict=True)
    targets = ["to_q", "add_k_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2", "img_in", "proj_out"]
    for pipe in pipes:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name="a")
    for scale in (1.0, 0.4):
        for pipe in pipes:
            pipe.transformer.set_adapters(["a"], [scale])
        expected, actual = (draw(pipe, prompt="a red circle", **GUIDED) for pipe in pipes)
        assert_same_latents(actual, expected)
    parts = survey(pipes[1].transformer).parts.values()
    assert parts and all(part.image[0].adapters and part.to_out.adapters and not part.image[1].adapters for part in parts)
