"""A modulation table holds stock's values up to the rounding of a product of several rows; its signature sees what changes.

The device is the CPU or an emulated one here. That weights elsewhere are brought along is tested with copies in the place of
transfers; CUDA's own products and transfers are in the tests marked gpu.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor

from qwen_fast.common import fingerprint
from qwen_fast.transformer.by_rows import of_rows
from qwen_fast.transformer.modulation import FromRow, FromTable, TableCache, compute_table, weights_signature
from qwen_fast.transformer.modulation_weights import keep_on_host
from qwen_fast_kernels._modulation import check_modulation
from support.emulated_cuda import notes
from support.pipelines import DTYPES
from support.small_transformer import (
    LAYERS,
    WIDTH,
    assert_as_near_as_stock,
    build,
    names_of,
    pretend_elsewhere,
    rows_of,
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
@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}], ids=str)
def test_every_row_is_stocks(dtype, config):
    transformer, steps = build(dtype, **config), timesteps(dtype)
    expected = stock_values(transformer, steps)
    table = compute_table(transformer, steps, "cpu")
    assert table.zero_row == (3 if config else None) and table.width == WIDTH
    assert table.values.shape == (4 if config else 3, (12 * LAYERS + 3) * WIDTH)
    assert table.values.dtype == dtype and not table.values.requires_grad
    assert_as_near_as_stock(table, transformer, expected, len(steps))


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64_it_is_as_near_as_stock(dtype):
    """The contract of every fused operator, at the real width, over 8 seeds: RMS 1.05 x stock's, largest error 1.5 x.

    Small whole models are held to it by test_parity. A product alone is not in fp32, where it depends on the processor: MKL's
    for several rows has 0.5 to 1.4 x the error of its own for one, both some 1e-7 of the values.
    """
    limit = 1.5 if dtype == torch.float32 else 1.05
    ours, theirs = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        linear = torch.nn.Linear(3072, 512)
        module = torch.nn.Sequential(torch.nn.SiLU(), linear).to(dtype)
        temb = torch.randn(20, 3072).to(dtype)
        with torch.no_grad():
            expected = F.silu(temb).double() @ linear.weight.double().T + linear.bias.double()
            ours.append(of_rows(module, module, temb) - expected)
            theirs.append(torch.cat([module(row) for row in temb.split(1)]) - expected)
    rms = [torch.stack(errors).square().mean().sqrt() for errors in (ours, theirs)]
    assert 0 < rms[0] <= limit * rms[1]
    assert torch.stack(ours).abs().max() <= 1.5 * torch.stack(theirs).abs().max()


class Counted:
    """Numbers of rows that each linear layer of a model got, by its name."""

    def __init__(self, monkeypatch, transformer):
        self.rows: dict[str, list[int]] = {}
        names, linear = {id(m.weight): n for n, m in transformer.named_modules() if hasattr(m, "weight")}, F.linear

        def counted(input, weight, bias=None):
            self.rows.setdefault(names[id(weight)], []).append(len(input))
            return linear(input, weight, bias)

        monkeypatch.setattr(F, "linear", counted)


def test_one_product_for_each_module(monkeypatch):
    transformer = build(num_layers=5)
    with_lora(transformer)
    counted = Counted(monkeypatch, transformer)
    compute_table(transformer, timesteps(steps=7), "cpu")
    assert {tuple(rows) for rows in counted.rows.values()} == {(7,)}
    assert len(counted.rows) == 2 + 10 * 3 + 1  # embedding, base layer and two of the LoRA, norm_out


class OneScale(torch.nn.Linear):
    """A quantised linear: activations in 8 bits, with one scale for all of them."""

    def forward(self, input):
        scale = input.abs().max() / 127
        return super().forward((input / scale).round() * scale)


def test_what_mixes_its_rows_is_called_for_each(monkeypatch):
    transformer, steps = build(), timesteps(steps=4)
    linear = transformer.transformer_blocks[1].txt_mod[1]
    linear.__class__ = OneScale
    expected = stock_values(transformer, steps)
    counted = Counted(monkeypatch, transformer)
    table = compute_table(transformer, steps, "cpu")
    assert counted.rows.pop("transformer_blocks.1.txt_mod.1") == [1] * 4
    assert {tuple(rows) for rows in counted.rows.values()} == {(4,)}
    assert_as_near_as_stock(table, transformer, expected, 4)


@pytest.mark.parametrize("foreign", ["hook", "forward", "wrapper"])
def test_what_is_not_known_is_called_for_each(monkeypatch, foreign):
    transformer, seen = build(), []
    module = transformer.transformer_blocks[0].img_mod
    if foreign == "hook":
        module[1].register_forward_hook(lambda m, i, out: seen.append(len(out)))
    elif foreign == "forward":
        forward = module[1].forward
        module[1].forward = lambda x: seen.append(len(x)) or forward(x)
    else:
        weight = module[1].weight.detach()
        module[1].weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
        module[0].register_forward_hook(lambda m, i, out: seen.append(len(out)))
    compute_table(transformer, timesteps(), "cpu")
    assert seen == [1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_are_what_stock_cuts_and_no_copies(dtype):
    transformer, steps = build(dtype), timesteps(dtype)
    table = compute_table(transformer, steps, "cpu")
    zeros, x = torch.zeros(1, 1, WIDTH, dtype=dtype), torch.randn(1, 7, WIDTH).to(dtype)
    rows = dict(zip(names_of(transformer), rows_of(table), strict=True))
    for layer, block in enumerate(transformer.transformer_blocks):
        views = table.block(layer)
        for stream, mod in enumerate(("img_mod", "txt_mod")):
            halves = rows[f"transformer_blocks.{layer}.{mod}"][1:2].chunk(2, dim=-1)
            for half, (shift, scale, gate) in zip(halves, (views[:3], views[3:]), strict=True):
                expected, expected_gate = block._modulate(x, half)
                assert torch.equal(expected, x * (1 + scale[1, stream]) + shift[1, stream])
                assert torch.equal(block._modulate(zeros, half)[0][0, 0], shift[1, stream])
                assert torch.equal(expected_gate[0, 0], gate[1, stream])
        check_modulation(5, WIDTH, views._asdict(), torch.zeros(1, dtype=torch.int64), 2, None, torch.device("cpu"))
        assert {view.untyped_storage().data_ptr() for view in views} == {table.values.untyped_storage().data_ptr()}
    shift, scale = table.out()
    assert torch.equal(torch.cat([scale, shift], dim=-1)[:, 0], rows["norm_out.linear"]) and shift.shape == (3, 1, WIDTH)
    assert shift.untyped_storage().data_ptr() == table.values.untyped_storage().data_ptr()


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}], ids=str)
def test_one_row_in_a_buffer_serves_as_the_table_does(config):
    transformer, steps = build(**config), timesteps()
    index = torch.zeros(1, dtype=torch.int32)
    whole = FromTable(transformer, TableCache(), steps, index)
    assert whole.begin(steps[:1])
    buffer = whole.table.row_buffer()
    address, row = buffer.values.data_ptr(), FromRow(buffer)
    for step in (2, 0, 1):
        index.fill_(step)
        whole.table.row_into(buffer, index)
        assert row.begin(steps[:1]) and buffer.values.data_ptr() == address
        assert torch.equal(row.temb(2), whole.temb(2)) and torch.equal(row.out()[0][0], whole.out()[0][step])
        for layer in range(LAYERS):
            assert all(torch.equal(a[0], b[step]) for a, b in zip(row.block(layer), whole.block(layer), strict=True))
        if config:
            assert torch.equal(row.block(1).gate1[row.zero_row], whole.block(1).gate1[whole.zero_row])
    assert row.zero_row == (1 if config else None)


def test_a_row_is_copied_by_one_piece_of_work_and_no_wait(emulated_cuda):
    transformer = build().to("cuda")
    index = torch.ones(1, dtype=torch.int32, device="cuda")
    table = compute_table(transformer, timesteps(), "cuda")
    buffer, graph = table.row_buffer(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        table.row_into(buffer, index)
    assert len(graph.steps) == 1
    graph.replay()
    assert torch.equal(buffer.values[0].cpu(), table.values[1].cpu()) and not emulated_cuda.notes.of(notes.ILLEGAL)


def state_of(transformer) -> dict[str, tuple]:
    """Identity, memory, dtype and content of each parameter."""
    parameters = transformer.named_parameters()
    return {n: (id(p), p.data_ptr(), p.dtype, p.detach().double().sum().item()) for n, p in parameters}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("moved", [False, True])
def test_modules_are_called_with_adapters_and_hooks(monkeypatch, change, moved):
    dtype = torch.bfloat16
    plain = compute_table(build(dtype), timesteps(dtype), "cpu")
    transformer = CHANGES[change](build(dtype))
    expected = stock_values(transformer, timesteps(dtype))
    before = state_of(transformer)
    calls = pretend_elsewhere(monkeypatch) if moved else None
    table = compute_table(transformer, timesteps(dtype), "cpu")
    assert not moved or len(calls) == 2 * LAYERS + 2
    assert_as_near_as_stock(table, transformer, expected, 3)
    assert not torch.equal(table.values, plain.values)
    after = state_of(transformer)
    if change == "layerwise casting" and not moved:  # diffusers' own casts give a called layer new memory
        before, after = ({n: (i, d, s) for n, (i, _, d, s) in state.items()} for state in (before, after))
    assert after == before


def test_weights_stay_where_they_are():
    transformer = build()
    table = compute_table(transformer, timesteps(), "meta")
    assert table.values.is_meta and table.values.shape == (3, (12 * LAYERS + 3) * WIDTH)
    assert all(p.device.type == "cpu" for p in transformer.parameters())


def test_bad_input_is_named():
    transformer = build()
    for bad in (torch.zeros(0), torch.zeros(1, 3), torch.tensor([1, 2])):
        with pytest.raises(ValueError, match="timesteps"):
            compute_table(transformer, bad, "cpu")
    transformer.transformer_blocks[1].txt_mod.register_forward_hook(lambda m, i, out: out.double())
    with pytest.raises(ValueError, match="float64 in a model of torch.float32"):
        compute_table(transformer, timesteps(), "cpu")


def test_a_table_made_in_inference_mode_is_an_ordinary_one():
    with torch.inference_mode():
        table = compute_table(build(), timesteps(), "cpu")
    assert not table.values.is_inference() and table.values.isfinite().all()


def test_weights_on_the_device_leave_nothing_behind(monkeypatch):
    """Neither kept, nor digested: the table is computed for each call."""
    transformer, tables, steps = build(), TableCache(), timesteps()
    monkeypatch.setattr("qwen_fast.transformer.modulation.modules_signature", lambda *_, **__: pytest.fail("digested"))
    for factor in (1, 2):
        transformer.transformer_blocks[0].img_mod[1].weight.data.mul_(factor)
        source = FromTable(transformer, tables, steps, torch.zeros(1, dtype=torch.int32))
        source.begin(steps[:1])
        assert torch.equal(source.table.values, compute_table(transformer, steps, "cpu").values)
    assert (tables.hits, tables.misses, tables.nbytes) == (0, 0, 0)


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
        assert keep_on_host(transformer) == {}
    transformer.to("cpu" if home == "cpu" else "cuda")
    assert_as_near_as_stock(compute_table(transformer, steps, "cuda"), transformer, expected, len(steps))


@pytest.mark.gpu
def test_on_cuda_the_signature_copies_once_and_equals_that_on_the_cpu(monkeypatch):
    transformer = build(torch.bfloat16)
    on_cpu, copies, cpu = weights_signature(transformer).content, [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self.shape) or cpu(self))
    assert weights_signature(transformer.cuda()).content == on_cpu and len(copies) == 1
