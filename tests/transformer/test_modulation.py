"""A modulation table holds stock's values to the bit, and its signature sees every change of weights.

The device is the CPU here. That weights elsewhere are brought along is tested with copies in the place of transfers; the
transfers themselves, the side stream and CUDA's bits are in the tests marked gpu.
"""

import copy

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from qwen_fast.common import fingerprint, placement
from qwen_fast.transformer import host_weights, modulation
from qwen_fast.transformer.modulation import compute_table, weights_signature
from qwen_fast_kernels._modulation import check_modulation
from support.pipelines import DTYPES
from support.small_transformer import (
    LAYERS,
    WIDTH,
    assert_equals_stock,
    build,
    pretend_elsewhere,
    stock_values,
    timesteps,
    with_fused_lora,
    with_layerwise_casting,
    with_lora,
)

CHANGES = {
    "a LoRA": with_lora,
    "two LoRAs": lambda t: with_lora(with_lora(t), 4, "other"),
    "DoRA": lambda t: with_lora(t, use_dora=True),
    "a fused LoRA": with_fused_lora,
    "layerwise casting": with_layerwise_casting,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}, {"use_additional_t_cond": True, "zero_cond_t": True}])
def test_every_row_equals_stock_to_the_bit(dtype, config):
    transformer, steps = build(dtype, **config), timesteps(dtype)
    condition = {"additional_t_cond": torch.tensor([1])} if "use_additional_t_cond" in config else {}
    expected = stock_values(transformer, steps, **condition)
    table = compute_table(transformer, steps, device="cpu", **condition)
    assert table.zero_row == (3 if config else None)
    assert table.rows.shape == (4 if config else 3, LAYERS, 2, 6, WIDTH)
    assert {t.dtype for t in (table.rows, table.norm_out, table.temb)} == {dtype} and not table.rows.requires_grad
    assert_equals_stock(table, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_what_stock_cuts_and_no_copies(dtype):
    transformer, steps = build(dtype), timesteps(dtype)
    table = compute_table(transformer, steps, device="cpu")
    zeros, x = torch.zeros(1, 1, WIDTH, dtype=dtype), torch.randn(1, 7, WIDTH).to(dtype)
    for layer, block in enumerate(transformer.transformer_blocks):
        views = table.block(layer)
        for stream, mod in enumerate((block.img_mod, block.txt_mod)):
            halves = mod(table.temb[1:2]).chunk(2, dim=-1)
            for half, (shift, scale, gate) in zip(halves, (views[:3], views[3:]), strict=True):
                expected, expected_gate = block._modulate(x, half)
                assert torch.equal(expected, x * (1 + scale[1, stream]) + shift[1, stream])
                assert torch.equal(block._modulate(zeros, half)[0][0, 0], shift[1, stream])
                assert torch.equal(expected_gate[0, 0], gate[1, stream])
        check_modulation(5, WIDTH, views._asdict(), torch.zeros(1, dtype=torch.int64), 2, None, torch.device("cpu"))
        assert {view.untyped_storage().data_ptr() for view in views} == {table.rows.untyped_storage().data_ptr()}
    shift, scale = table.out()
    norm = transformer.norm_out
    assert torch.equal(norm(x, table.temb[2:3]), norm.norm(x) * (1 + scale[2]) + shift[2])
    assert shift.shape == (3, 1, WIDTH) and shift.untyped_storage().data_ptr() == table.norm_out.untyped_storage().data_ptr()
    assert table.nbytes == (3 * LAYERS * 12 + 3 * 3) * WIDTH * dtype.itemsize


def state_of(transformer) -> dict[str, tuple]:
    """Identity, memory, dtype and content of each parameter."""
    parameters = transformer.named_parameters()
    return {n: (id(p), p.data_ptr(), p.dtype, p.detach().double().sum().item()) for n, p in parameters}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moved", [False, True])
def test_modules_are_called_with_adapters_and_hooks(monkeypatch, change, moved):
    dtype = torch.bfloat16
    plain = compute_table(build(dtype), timesteps(dtype), device="cpu")
    transformer = CHANGES[change](build(dtype))
    expected = stock_values(transformer, timesteps(dtype))
    before = state_of(transformer)
    calls = pretend_elsewhere(monkeypatch) if moved else None
    table = compute_table(transformer, timesteps(dtype), device="cpu")
    assert not moved or len(calls) == 3 * (2 * LAYERS + 2)
    assert_equals_stock(table, expected)
    assert not torch.equal(table.rows, plain.rows)
    after = state_of(transformer)
    if change == "layerwise casting" and not moved:  # diffusers' own casts give a called layer new memory
        before, after = ({n: (i, d, s) for n, (i, _, d, s) in state.items()} for state in (before, after))
    assert after == before


def test_weights_travel_to_another_device_layer_by_layer(monkeypatch):
    transformer, calls = build(), []
    monkeypatch.setattr(modulation, "on_device", lambda *a: calls.append(a) or placement.on_device(*a))
    table = compute_table(transformer, timesteps(), device="meta")
    assert table.rows.is_meta and table.rows.shape == (3, LAYERS, 2, 6, WIDTH)
    assert all(p.device.type == "cpu" for p in transformer.parameters()) and len(calls) == 2


def test_guidance_goes_where_stock_puts_it():
    class Embedding(torch.nn.Module):
        def forward(self, timestep, guidance, hidden_states, condition=None):
            assert guidance.dtype == hidden_states.dtype == torch.bfloat16 and condition is None
            return (timestep + guidance / 5000).expand(1, WIDTH) if guidance.shape == (1,) else None

    steps, transformer = timesteps(torch.bfloat16), build(torch.bfloat16)
    with pytest.raises(TypeError) as ours:
        compute_table(transformer, steps, device="cpu", guidance=3.5)
    with pytest.raises(TypeError) as stocks:
        stock_values(transformer, steps, guidance=torch.tensor([3.5]))
    assert str(ours.value) == str(stocks.value)  # diffusers 0.42.1 cannot run a guidance-distilled model
    transformer.time_text_embed = Embedding()
    expected = stock_values(transformer, steps, guidance=torch.tensor([3.5]))
    assert_equals_stock(compute_table(transformer, steps, device="cpu", guidance=3.5), expected)
    other = compute_table(transformer, steps, device="cpu", guidance=torch.tensor(3.0))
    assert not torch.equal(other.temb, expected["time_text_embed"][:, 0])


def test_bad_input_is_named():
    transformer = build()
    for bad in (torch.zeros(0), torch.zeros(1, 3), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="model_timesteps"):
            compute_table(transformer, bad, device="cpu")
    with pytest.raises(ValueError, match="additional_t_cond.*2 values"):
        compute_table(transformer, timesteps(), device="cpu", additional_t_cond=torch.tensor([0, 1]))
    transformer.transformer_blocks[1].txt_mod.register_forward_hook(lambda m, i, out: out.double())
    with pytest.raises(ValueError, match="float64 in a model of torch.float32"):
        compute_table(transformer, timesteps(), device="cpu")


def test_a_table_made_in_inference_mode_is_an_ordinary_one():
    with torch.inference_mode():
        table = compute_table(build(), timesteps(), device="cpu")
    assert not table.rows.is_inference() and table.rows.isfinite().all()


def test_the_signature_sees_every_tensor_it_depends_on_and_no_other():
    transformer = build(use_additional_t_cond=True)
    first = weights_signature(transformer)
    assert weights_signature(transformer) == first and weights_signature(copy.deepcopy(transformer)).content == first.content
    assert weights_signature(copy.deepcopy(transformer)).addresses != first.addresses
    relevant = 0
    for name, parameter in transformer.named_parameters():
        version = parameter._version
        original = parameter.data.clone()
        parameter.data.mul_(1 + 2**-20)  # in place, past `_version`
        depends = "_mod." in name or name.startswith(("time_text_embed.", "norm_out.linear."))
        assert (weights_signature(transformer).content != first.content) == depends, name
        parameter.data.copy_(original)
        assert parameter._version == version
        relevant += depends
    assert relevant == 4 + 1 + 2 + 4 * LAYERS and weights_signature(transformer) == first


def test_the_signature_sees_what_adapters_do():
    transformer, seen = build(), []

    def changed(step):
        seen.append(weights_signature(transformer).content)
        assert seen.count(seen[-1]) == 1, step

    def again(step, index):
        assert weights_signature(transformer).content == seen[index], step

    changed("plain")
    changed(with_lora(transformer) and "loaded")
    changed(with_lora(transformer, 4, "other") and "a second one")
    transformer.set_adapters(["style", "other"], [0.5, 1.0])
    changed("scaled")
    transformer.set_adapters(["style"], [1.0])
    changed("one active")
    transformer.set_adapters(["style"], [0.5])
    changed("one active, scaled")
    transformer.disable_adapters()
    changed("switched off")
    transformer.enable_adapters()
    again("switched on", 5)
    transformer.fuse_lora(adapter_names=["style"])
    changed("fused")
    transformer.unload_lora()
    changed("fused for good")  # types and shapes as at the start: only the sampled content differs
    assert not any("lora" in name for name, _ in transformer.named_modules())


@pytest.mark.parametrize("shape", [(18432, 3072), (6144, 3072), (3072, 3072), (3072, 256), (18432,), (4, 3072), (513,), (7, 5)])
@pytest.mark.parametrize("transposed", [False, True])
def test_samples_are_spread_over_rows_and_columns(shape, transposed):
    tensor = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    sample = fingerprint._sample(tensor.t() if transposed and tensor.dim() == 2 else tensor)
    count, step = len(sample), sample.stride(0)
    assert 128 <= count <= 511 or count == tensor.numel() and step == 1
    positions = range(0, count * step, step)
    assert positions[-1] < tensor.numel() < positions[-1] + 2 * step + 1
    for part in (lambda p: p % shape[-1], lambda p: p // shape[-1]):
        wanted = min(64, shape[-1] if part(shape[-1]) == 0 else tensor.numel() // shape[-1], count)
        assert len({part(position) for position in positions}) >= wanted


def test_signature_of_other_kinds_of_tensors():
    transformer = build()
    linear = transformer.transformer_blocks[0].img_mod[1]
    halves = [linear.weight.detach().clone(), torch.randn(6 * WIDTH, WIDTH)]
    contents = [weights_signature(transformer).content]
    for weight in (
        TwoTensor(*halves),
        linear.weight.detach().t().contiguous().t(),
        linear.weight.detach().to(torch.float8_e5m2),
    ):
        linear.weight = torch.nn.Parameter(weight, requires_grad=False)
        contents.append(weights_signature(transformer).content)
        halves[1].zero_() if isinstance(weight, TwoTensor) else linear.weight.data.copy_(torch.zeros(6 * WIDTH, WIDTH))
        contents.append(weights_signature(transformer).content)
    assert None not in contents and len(set(contents)) == len(contents)
    linear.weight = torch.nn.Parameter(torch.empty(6 * WIDTH, WIDTH, device="meta"))
    assert weights_signature(transformer).content is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("home", ["cuda", "cpu", "host"])
def test_on_cuda_resident_streamed_and_stock_agree(dtype, zero_cond_t, home):
    transformer = build(dtype, zero_cond_t=zero_cond_t).cuda()
    steps = timesteps(dtype).cuda()
    expected = stock_values(transformer, steps, "cuda")
    if home == "host":
        assert host_weights.keep_on_host(transformer) == {}
    transformer.to("cpu" if home == "cpu" else "cuda")
    assert_equals_stock(compute_table(transformer, steps, device="cuda"), expected)


@pytest.mark.gpu
def test_on_cuda_the_signature_copies_once_and_equals_that_on_the_cpu(monkeypatch):
    transformer = build(torch.bfloat16)
    on_cpu, copies, cpu = weights_signature(transformer).content, [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    assert weights_signature(transformer.cuda()).content == on_cpu and len(copies) == 1
