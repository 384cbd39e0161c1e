"""The modulation weights stay on the host, whatever moves the model; all else of the model is as it was.

The device is `meta` here, which holds no values, or the CPU with copies in the place of transfers. What needs CUDA is in
the tests marked gpu: pinned memory, a stock forward over weights on the host, group offload (with streams too, which
diffusers refuses for the CPU) and return_to_device with real memory. Where they rest is decided in test_modulation_placement.
"""

import copy
import logging
import pickle

import accelerate
import peft
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import QwenImageTransformer2DModel
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from qwen_fast.common.hardware import free_bytes
from qwen_fast.transformer import modulation_weights
from qwen_fast.transformer.modulation import TableCache, compute_table, weights_signature
from qwen_fast.transformer.modulation_weights import (
    HostSequential,
    host_bytes,
    keep_on_host,
    modulation_modules,
    return_to_device,
)
from support.memory import memory_taken
from support.small_transformer import BYTES, LAYERS, build, group_offload, needs_group_offload, pretend_elsewhere, run

MODS = [f"transformer_blocks.{layer}.{mod}" for layer in range(LAYERS) for mod in ("img_mod", "txt_mod")]
CPU = torch.device("cpu")


@pytest.fixture
def transformer() -> QwenImageTransformer2DModel:
    return build()


def add_lora(model):
    torch.manual_seed(3)
    targets = ["img_mod.1", "txt_mod.1", "to_q"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))


def snapshot(model) -> dict:
    """All that makes a model what it is."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "attributes": {name: set(vars(module)) for name, module in model.named_modules()},
        "parameters": [(n, id(p), p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "printed": repr(model),
    }


def assert_same(first: dict, second: dict) -> None:
    values = first.pop("values"), second.pop("values")
    assert first == second and list(values[0]) == list(values[1])
    assert all(torch.equal(a, b) for a, b in zip(values[0].values(), values[1].values(), strict=True))


def assert_home(model, elsewhere: str = "meta", dtype: torch.dtype = torch.float32) -> None:
    """The modulations' parameters, and only they, are on the CPU."""
    for name, parameter in model.named_parameters():
        inside = name.startswith(tuple(MODS))
        assert parameter.device.type == ("cpu" if inside else elsewhere) and parameter.dtype == dtype, name
        assert not inside or parameter.isfinite().all()


def accelerate_offload(model):
    for device in ("cpu", "meta"):
        _, hook = accelerate.cpu_offload_with_hook(model, execution_device=device)
        model._hf_hook.pre_forward(model)
        if device == "cpu":
            hook.offload()
        remove_hook_from_module(model)


@pytest.mark.parametrize("move", [lambda m: m.to("meta"), lambda m: m._apply(lambda t: t.to("meta")), accelerate_offload])
def test_weights_stay_whatever_moves_the_model(transformer, move):
    before = [(name, id(p)) for name, p in transformer.named_parameters() if name.startswith(tuple(MODS))]
    keys, values = list(transformer.state_dict()), {n: p.detach().clone() for n, p in transformer.named_parameters()}
    assert keep_on_host(transformer) == {} and host_bytes(transformer) == BYTES
    move(transformer)
    assert_home(transformer)
    assert [(n, id(p)) for n, p in transformer.named_parameters() if n.startswith(tuple(MODS))] == before
    assert list(transformer.state_dict()) == keys == list(values)
    assert all(torch.equal(p, values[n]) for n, p in transformer.named_parameters() if not p.is_meta)
    assert host_bytes(transformer) == BYTES


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.to("meta", torch.bfloat16), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16).to("meta").to(torch.float16), torch.float16),
    ],
)
def test_a_change_of_dtype_applies(transformer, cast, dtype):
    expected = {name: module[1].weight.detach().to(dtype) for name, module in modulation_modules(transformer)}
    keep_on_host(transformer)
    cast(transformer)
    assert_home(transformer, transformer.img_in.weight.device.type, dtype)
    assert host_bytes(transformer) == BYTES * dtype.itemsize // 4
    if dtype != torch.float16 or not transformer.img_in.weight.is_meta:  # the last case rounds twice
        assert all(torch.equal(module[1].weight, expected[name]) for name, module in modulation_modules(transformer))


def test_what_is_done_on_the_host_is_done(transformer):
    keep_on_host(transformer)
    assert transformer.share_memory() is transformer
    weight = transformer.transformer_blocks[0].img_mod[1].weight
    assert weight.is_shared()
    weight.grad = torch.ones_like(weight)
    transformer.to("meta")
    assert weight.grad.device == CPU and transformer.device.type == "meta"


@pytest.mark.parametrize("lora", [False, True])
def test_a_stock_forward_still_works_and_hooks_run_once(transformer, monkeypatch, lora):
    if lora:
        add_lora(transformer)
    expected, seen = run(transformer), []
    keep_on_host(transformer)
    for name in MODS:
        transformer.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append(m))
        transformer.get_submodule(f"{name}.1").register_forward_pre_hook(lambda m, i: seen.append(m))
    before, called = snapshot(transformer), pretend_elsewhere(monkeypatch)
    assert torch.equal(run(transformer), expected)
    assert len(called) == len(MODS) and len(seen) == 2 * len(MODS)
    assert_same(snapshot(transformer), before)


def test_return_to_device_leaves_no_trace(transformer, caplog):
    add_lora(transformer)
    before = snapshot(transformer)
    keep_on_host(transformer)
    assert keep_on_host(transformer) == {}
    assert {type(module) for _, module in modulation_modules(transformer)} == {HostSequential}
    with caplog.at_level(logging.INFO, "qwen_fast"):
        assert return_to_device(transformer) == 0  # the rest of the model is on the host as well
    assert "0 bytes" in caplog.text
    assert_same(snapshot(transformer), before)
    assert return_to_device(transformer) == host_bytes(transformer) == 0
    transformer.to("meta")
    assert all(parameter.is_meta for parameter in transformer.parameters())


def test_return_to_a_device_without_room_moves_nothing(transformer, caplog, monkeypatch):
    keep_on_host(transformer)
    before = snapshot(transformer)
    monkeypatch.setattr(modulation_weights, "free_bytes", lambda device, **_: BYTES - 1)
    with caplog.at_level(logging.INFO, "qwen_fast"), pytest.raises(RuntimeError, match=f"{BYTES} bytes on meta.*{BYTES - 1}"):
        return_to_device(transformer, "meta")
    assert str(BYTES) in caplog.text
    assert_same(snapshot(transformer), before)
    monkeypatch.setattr(modulation_weights, "free_bytes", lambda device, **_: BYTES)
    assert return_to_device(transformer, "meta") == BYTES
    for _, module in modulation_modules(transformer):
        assert type(module) is nn.Sequential and module[1].weight.is_meta
    assert not transformer.img_in.weight.is_meta


def test_weights_on_the_host_outlive_a_rest_without_values(transformer):
    keep_on_host(transformer)
    transformer.to("meta")
    assert return_to_device(transformer) == 0
    assert_home(transformer)


def test_saving_and_loading(transformer, tmp_path):
    transformer.save_pretrained(tmp_path / "before")
    keep_on_host(transformer)
    transformer.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    state = {name: value + 1 for name, value in transformer.state_dict().items()}
    for assign in (False, True):
        transformer.load_state_dict(state, assign=assign)
        assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())
        state = {name: value * 2 for name, value in state.items()}
    transformer.to("meta")
    assert_home(transformer)
    strayed = {name: torch.zeros_like(value, device="cpu") for name, value in transformer.state_dict().items()}
    transformer.load_state_dict(strayed, assign=True)
    keep_on_host(transformer)
    assert host_bytes(transformer) == BYTES and type(transformer.transformer_blocks[0].img_mod) is HostSequential


def test_a_copy_keeps_its_weights_on_the_host_too_and_a_pickle_is_stocks(transformer):
    keep_on_host(transformer)
    assert not any(isinstance(part, HostSequential) for part in pickle.loads(pickle.dumps(transformer)).modules())
    twin = copy.deepcopy(transformer)
    twin.to("meta")
    assert_home(twin)
    return_to_device(twin)
    assert host_bytes(twin) == 0 and host_bytes(transformer) == BYTES


def test_a_lora_comes_along(transformer):
    plain, control = run(transformer), copy.deepcopy(transformer)
    add_lora(control)
    keep_on_host(transformer)
    transformer.load_lora_adapter(peft.get_peft_model_state_dict(control), prefix=None)
    assert torch.equal(run(transformer), run(control)) and not torch.equal(run(transformer), plain)
    assert keep_on_host(transformer) == {} and host_bytes(transformer) > BYTES
    transformer.to("meta")
    assert_home(transformer)
    assert all(module[1].lora_A["default_0"].weight.device == CPU for _, module in modulation_modules(transformer))
    transformer.unload_lora()
    transformer.to("meta")
    assert_home(transformer)
    assert host_bytes(transformer) == BYTES


@pytest.mark.parametrize("keep_first", [False, True])
@torch.no_grad()
def test_layerwise_casting(transformer, keep_first, monkeypatch):
    transformer.to(torch.bfloat16)
    control = copy.deepcopy(transformer)
    steps = [
        lambda: keep_on_host(transformer),
        lambda: transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16),
    ]
    for step in steps if keep_first else reversed(steps):
        step()
    control.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    inputs = torch.randn(1, 64, dtype=torch.bfloat16)
    pretend_elsewhere(monkeypatch)
    for (_, module), (_, expected) in zip(modulation_modules(transformer), modulation_modules(control), strict=True):
        assert module[1].weight.dtype == torch.float8_e4m3fn
        pointer = module[1].weight.data_ptr()
        assert torch.equal(module(inputs), expected(inputs)) and module[1].weight.data_ptr() == pointer
    transformer.to("meta")
    assert transformer.transformer_blocks[1].txt_mod[1].weight.device == CPU


def groups_of(model) -> list:
    return [block._diffusers_hook.get_hook("group_offloading").group for block in model.transformer_blocks]


@needs_group_offload
@pytest.mark.parametrize("keep_first", [False, True])
@pytest.mark.parametrize("num_blocks_per_group", [1, 2])
def test_group_offload_moves_all_but_the_modulations(transformer, keep_first, num_blocks_per_group):
    expected = run(transformer)
    if keep_first:
        keep_on_host(transformer)
    group_offload(transformer, num_blocks_per_group=num_blocks_per_group)
    whole = [list(group.modules) for group in groups_of(transformer)]
    assert keep_on_host(transformer) == keep_on_host(transformer) == {}
    moved = {id(p) for group in groups_of(transformer) for module in group.modules for p in module.parameters()}
    blocks = dict(transformer.transformer_blocks.named_parameters(prefix="transformer_blocks"))
    assert {name for name, p in blocks.items() if id(p) not in moved} == {n for n in blocks if n.startswith(tuple(MODS))}
    assert torch.equal(run(transformer), expected)
    return_to_device(transformer)
    assert [list(group.modules) for group in groups_of(transformer)] == whole
    assert all(set(vars(group)) == set(vars(groups_of(transformer)[0])) for group in groups_of(transformer))
    assert not any("qwen_fast" in key for key in vars(groups_of(transformer)[0]))
    assert torch.equal(run(transformer), expected)


@pytest.mark.parametrize("reason", ["accelerate", pytest.param("leaf-level", marks=needs_group_offload)])
def test_modules_that_hooks_provide_for_are_left(transformer, reason):
    expected, steps = run(transformer), torch.tensor([0.9, 0.3])
    table = compute_table(transformer, steps, "cpu")
    if reason == "accelerate":
        accelerate.cpu_offload(transformer, execution_device=CPU)
    else:
        group_offload(transformer, "leaf_level")
    before = {name: type(module) for name, module in transformer.named_modules()}
    left = keep_on_host(transformer)
    assert list(left) == MODS and all(reason in text for text in left.values())
    assert before == {name: type(module) for name, module in transformer.named_modules()} and host_bytes(transformer) == 0
    assert torch.equal(run(transformer), expected)
    torch.testing.assert_close(compute_table(transformer, steps, "cpu").values, table.values)
    assert return_to_device(transformer) == 0


@needs_group_offload
def test_weights_on_disk_are_left(transformer, tmp_path):
    group_offload(transformer, offload_to_disk_path=str(tmp_path))
    left = keep_on_host(transformer)
    assert list(left) == MODS and all("on disk" in text for text in left.values())


def test_sequential_offload_enabled_afterwards_takes_over(transformer):
    expected = run(transformer)
    keep_on_host(transformer)
    accelerate.cpu_offload(transformer, execution_device=CPU)
    assert torch.equal(run(transformer), expected) and host_bytes(transformer) == 0
    transformer.to(torch.float32)
    assert len(keep_on_host(transformer)) == len(MODS)
    assert return_to_device(transformer) == 0
    remove_hook_from_module(transformer, recurse=True)  # brings the weights back
    assert torch.equal(run(transformer), expected)
    assert {type(module) for _, module in modulation_modules(transformer)} == {nn.Sequential}


def test_modules_of_another_kind_are_left(transformer):
    class Custom(nn.Sequential):
        pass

    first, second = transformer.transformer_blocks
    first.img_mod.__class__ = Custom
    weight = first.txt_mod[1].weight.detach()
    first.txt_mod[1].weight = nn.Parameter(TwoTensor(weight, weight), requires_grad=False)
    second.img_mod[1].to("meta")
    left = keep_on_host(transformer)
    assert list(left) == MODS[:3]
    for text, reason in zip(left.values(), ("Custom", "1.weight is a TwoTensor", "1.weight is on meta"), strict=True):
        assert reason in text
    assert type(second.txt_mod) is HostSequential and host_bytes(transformer) == BYTES // 4


def test_signature_and_table_are_the_same_from_the_host(transformer):
    cache, steps = TableCache(), torch.tensor([0.9, 0.3])
    table, signature = cache.table(transformer, steps, "cpu"), weights_signature(transformer)
    keep_on_host(transformer)
    assert weights_signature(transformer).content == signature.content
    assert cache.table(transformer, steps, "cpu") is table


@pytest.mark.gpu
def test_on_cuda_weights_are_pinned_and_a_stock_forward_brings_them(transformer):
    expected = run(transformer.cuda(), "cuda")
    torch.cuda.synchronize()
    used = torch.cuda.memory_allocated()
    assert keep_on_host(transformer) == {} and used - torch.cuda.memory_allocated() >= BYTES
    transformer.cuda()
    assert_home(transformer, "cuda")
    assert all(p.is_pinned() for _, module in modulation_modules(transformer) for p in module.parameters())
    transformer.to(torch.bfloat16).to(torch.float32).to("cpu").to("cuda")
    assert all(p.is_pinned() for _, module in modulation_modules(transformer) for p in module.parameters())
    torch.testing.assert_close(run(transformer, "cuda"), expected, rtol=0, atol=0.1 * expected.abs().max().item())
    assert_home(transformer, "cuda")
    assert return_to_device(transformer) == BYTES
    assert {p.device.type for p in transformer.parameters()} == {"cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("use_stream", [False, True])
def test_on_cuda_group_offload_leaves_the_modulations_on_the_host(transformer, use_stream):
    expected, seen = run(copy.deepcopy(transformer).cuda(), "cuda"), []
    group_offload(transformer, onload_device=torch.device("cuda"), use_stream=use_stream)
    assert keep_on_host(transformer) == {}
    block = transformer.transformer_blocks[1]
    block.attn.register_forward_pre_hook(
        lambda m, i: seen.append((block.img_mod[1].weight.device.type, m.to_q.weight.device.type))
    )
    for _ in range(3):
        assert torch.equal(run(transformer, "cuda"), expected)
    assert seen == [("cpu", "cuda")] * 3


@pytest.mark.gpu
def test_on_cuda_too_little_memory_is_noticed_before_anything_moves(transformer):
    keep_on_host(transformer)
    free = free_bytes(torch.device("cuda"))
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
    transformer.transformer_blocks[0].img_mod[1].weight = nn.Parameter(torch.empty(2**27))
    with memory_taken(but=2**28), pytest.raises(RuntimeError, match="nothing was moved"):
        return_to_device(transformer, "cuda")
    assert {p.device.type for _, module in modulation_modules(transformer) for p in module.parameters()} == {"cpu"}
