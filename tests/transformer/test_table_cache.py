"""Tables are kept in memory and on disk: what hits, what misses, what is bounded, and what becomes of a damaged file."""

import copy
import pickle
import tempfile

import accelerate
import pytest
import torch
from safetensors.torch import load_file

from qwen_fast.transformer import modulation
from qwen_fast.transformer.modulation import TableCache, compute_table, table_reason, weights_signature
from support.small_transformer import (
    assert_equals_stock,
    build,
    needs_group_offload,
    stock_values,
    timesteps,
    with_fused_lora,
    with_layerwise_casting,
    with_lora,
)


def test_a_schedule_computed_twice_hits():
    cache, transformer, steps = TableCache(), build(), timesteps()
    table = cache.get(transformer, steps, device="cpu")
    assert cache.get(transformer, steps.clone(), device=torch.device("cpu")) is table
    assert (cache.hits, cache.misses, cache.nbytes) == (1, 1, table.nbytes)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()  # as offloading does
    assert cache.get(transformer, steps, device="cpu") is table
    cache.clear()
    assert cache.nbytes == 0 and cache.get(transformer, steps, device="cpu") is not table


def _write_through_data(transformer):
    transformer.transformer_blocks[1].txt_mod[1].weight.data.mul_(0.5)


MISSES = {
    "LoRA loaded": with_lora,
    "LoRA fused": with_fused_lora,
    "written through .data": _write_through_data,
    "layerwise casting": lambda t: with_layerwise_casting(t.to(torch.bfloat16)),
    "embedding written": lambda t: t.time_text_embed.timestep_embedder.linear_2.bias.data.add_(1),
    "norm_out written": lambda t: t.norm_out.linear.weight.data.mul_(2),
}


@pytest.mark.parametrize("change", MISSES)
def test_changed_weights_miss(change):
    cache, transformer, steps = TableCache(), build(torch.bfloat16), timesteps(torch.bfloat16)
    first = cache.get(transformer, steps, device="cpu")
    MISSES[change](transformer)
    second = cache.get(transformer, steps, device="cpu")
    assert (cache.hits, cache.misses) == (0, 2) and cache.get(transformer, steps, device="cpu") is second
    assert_equals_stock(second, stock_values(transformer, steps))
    assert not all(torch.equal(getattr(first, n), getattr(second, n)) for n in ("rows", "norm_out", "temb"))


def test_other_arguments_miss_and_a_lora_taken_away_hits():
    cache, transformer = TableCache(max_entries=9), build(use_additional_t_cond=True)
    calls = [
        {"model_timesteps": timesteps(), "additional_t_cond": 0},
        {"model_timesteps": timesteps(), "additional_t_cond": 1},
        {"model_timesteps": timesteps(image_seq_len=25), "additional_t_cond": 0},
        {"model_timesteps": timesteps(steps=4), "additional_t_cond": 0},
    ]
    tables = [cache.get(transformer, device="cpu", **call) for call in calls]
    assert cache.misses == 4 and len({id(table) for table in tables}) == 4
    with_lora(transformer)
    cache.get(transformer, device="cpu", **calls[0])
    transformer.delete_adapters("style")
    transformer.unload_lora()
    assert [cache.get(transformer, device="cpu", **call) for call in calls] == tables and cache.misses == 5


def test_the_same_bytes_in_another_dtype_are_no_hit():
    cache, transformer, steps = TableCache(), build(torch.bfloat16), timesteps(torch.bfloat16)
    cache.get(transformer, steps, device="cpu")
    with pytest.raises(RuntimeError, match="dtype"):  # weights in bf16 do not take fp16
        cache.get(transformer, steps.view(torch.float16), device="cpu")


def test_bounds_of_the_cache():
    transformer, schedules = build(), [timesteps(steps=steps) for steps in (2, 3, 4)]
    size = compute_table(transformer, schedules[0], device="cpu").nbytes // 2
    cache = TableCache(max_entries=2)
    first, second, third = (cache.get(transformer, steps, device="cpu") for steps in schedules)
    assert cache.nbytes == second.nbytes + third.nbytes
    cache.get(transformer, schedules[1], device="cpu")  # now the third is the older one
    assert cache.get(transformer, schedules[0], device="cpu") is not first
    assert cache.get(transformer, schedules[1], device="cpu") is second and cache.nbytes == 5 * size
    small = TableCache(max_bytes=3 * size)
    small.get(transformer, schedules[0], device="cpu")
    small.get(transformer, schedules[1], device="cpu")
    assert small.nbytes == 3 * size
    assert len(small.get(transformer, schedules[2], device="cpu").rows) == 4 and small.nbytes == 0


@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_starts_empty(tmp_path, twin_of):
    cache, transformer = TableCache(max_bytes=10**6, max_entries=3, folder=tmp_path), build()
    table = cache.get(transformer, timesteps(), device="cpu")
    twin = twin_of(cache)
    assert twin.nbytes == twin.hits == twin.misses == 0
    assert (twin.max_bytes, twin.max_entries, twin.folder) == (10**6, 3, tmp_path)
    assert cache.get(transformer, timesteps(), device="cpu") is table


def test_weights_out_of_reach_are_computed_each_time():
    cache, transformer, steps = TableCache(), build(torch.bfloat16), timesteps(torch.bfloat16)
    expected = stock_values(transformer, steps)
    accelerate.cpu_offload(transformer, execution_device="cpu")
    for _ in range(2):
        assert_equals_stock(cache.get(transformer, steps, device="cpu"), expected)
    assert cache.misses == 2 and cache.nbytes == 0 and "accelerate" in table_reason(transformer)
    assert table_reason(build()) is None


@needs_group_offload
def test_group_offload_on_disk_and_by_leaf_is_named(tmp_path):
    transformer = build()
    options = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    transformer.enable_group_offload(
        **options, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert "on disk" in table_reason(transformer) and weights_signature(transformer).content is None
    with pytest.raises(ValueError, match="on disk"):
        compute_table(transformer, timesteps(), device="cpu")
    transformer, steps = build(), timesteps()
    expected = stock_values(transformer, steps)
    transformer.enable_group_offload(**options, offload_type="leaf_level")
    assert "leaf-level" in table_reason(transformer)
    assert_equals_stock(compute_table(transformer, steps, device="cpu"), expected)


@pytest.fixture
def no_computing(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("computed")

    return lambda: monkeypatch.setattr(modulation, "compute_table", fail)


def test_another_process_finds_the_table_on_disk(tmp_path, no_computing):
    transformer, steps = build(torch.bfloat16, zero_cond_t=True), timesteps(torch.bfloat16)
    table = TableCache(folder=tmp_path / "new").get(transformer, steps, device="cpu")
    no_computing()
    other = TableCache(folder=str(tmp_path / "new"))
    found = other.get(copy.deepcopy(transformer), steps, device="cpu")
    assert (other.hits, other.misses) == (1, 0) and found.zero_row == 3
    assert all(torch.equal(getattr(found, n), getattr(table, n)) for n in ("rows", "norm_out", "temb"))
    assert other.get(transformer, steps, device="cpu") is found
    (file,) = (tmp_path / "new").iterdir()
    assert set(load_file(file)) == {"rows", "norm_out", "temb"}
    with pytest.raises(AssertionError, match="computed"):
        other.get(transformer, timesteps(torch.bfloat16, 4), device="cpu")


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a flipped bit of the data": lambda path: _flip(path, -100),
    "a flipped bit of the header": lambda path: _flip(path, 12),
    "something else": lambda path: path.write_text("no table"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_written_anew(tmp_path, caplog, no_computing, damage):
    transformer, steps = build(), timesteps()
    table = TableCache(folder=tmp_path).get(transformer, steps, device="cpu")
    (file,) = tmp_path.iterdir()
    DAMAGES[damage](file)
    cache = TableCache(folder=tmp_path)
    assert torch.equal(cache.get(transformer, steps, device="cpu").rows, table.rows)
    assert cache.misses == 1 and str(file) in caplog.text and "damaged" in caplog.text
    no_computing()
    assert torch.equal(TableCache(folder=tmp_path).get(transformer, steps, device="cpu").rows, table.rows)
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written(tmp_path, caplog, monkeypatch):
    def refuse(dir):
        raise PermissionError(f"Permission denied: {dir}")

    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=str(tmp_path / "file" / "tables")):
        TableCache(folder=tmp_path / "file" / "tables")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"{tmp_path}, .*Permission denied"):
        patch.setattr(tempfile, "TemporaryFile", refuse)  # root, as tests may run, is refused nothing
        TableCache(folder=tmp_path)
    cache = TableCache(folder=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cache.get(build(), timesteps(), device="cpu").rows.isfinite().all()
    assert str(tmp_path / "gone") in caplog.text and cache.nbytes
