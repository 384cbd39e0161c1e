"""Tables of weights that rest in host memory are kept: what hits, what misses, what is bounded, and who has to wait."""

import copy
import pickle
import threading

import accelerate
import pytest
import torch

from qwen_fast.transformer.modulation import FromTable, TableCache, compute_table, weights_signature
from qwen_fast.transformer.modulation_weights import keep_on_host, table_reason
from support.emulated_cuda import notes
from support.small_transformer import (
    assert_as_near_as_stock,
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
    table = cache.table(transformer, steps, "cpu")
    assert cache.table(transformer, steps.clone(), torch.device("cpu")) is table
    assert (cache.hits, cache.misses, cache.nbytes) == (1, 1, table.values.nbytes)
    for parameter in transformer.parameters():
        parameter.data = parameter.data.clone()  # as offloading does
    assert cache.table(transformer, steps, "cpu") is table
    cache.leave(torch.device("cpu"))
    assert cache.table(transformer, steps, "cpu") is table
    cache.leave(torch.device("cuda", 0))
    assert cache.nbytes == 0 and cache.table(transformer, steps, "cpu") is not table


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
    first = cache.table(transformer, steps, "cpu")
    MISSES[change](transformer)
    second = cache.table(transformer, steps, "cpu")
    assert (cache.hits, cache.misses) == (0, 2) and cache.table(transformer, steps, "cpu") is second
    assert_as_near_as_stock(second, transformer, stock_values(transformer, steps), 3)
    assert not torch.equal(first.values, second.values)


def test_other_schedules_miss_and_a_lora_taken_away_hits():
    cache, transformer = TableCache(), build()
    schedules = [timesteps(), timesteps(image_seq_len=25), timesteps(steps=4)]
    tables = [cache.table(transformer, steps, "cpu") for steps in schedules]
    assert cache.misses == 3 and len({id(table) for table in tables}) == 3
    with_lora(transformer)
    cache.table(transformer, schedules[0], "cpu")
    transformer.delete_adapters("style")
    transformer.unload_lora()
    assert [cache.table(transformer, steps, "cpu") for steps in schedules] == tables and cache.misses == 4


def test_autocast_does_not_poison():
    """A table that one call computed under autocast is not that of the next call without."""
    cache, transformer, steps = TableCache(), build(), timesteps()
    with torch.autocast("cpu", torch.bfloat16):
        poisoned = cache.table(transformer, steps, "cpu")
    table = cache.table(transformer, steps, "cpu")
    assert poisoned.values.dtype == torch.bfloat16 and table.values.dtype == torch.float32
    assert torch.equal(table.values, compute_table(transformer, steps, "cpu").values)
    with torch.autocast("cpu", torch.bfloat16):
        assert cache.table(transformer, steps, "cpu") is poisoned


def test_the_same_bytes_in_another_dtype_are_no_hit():
    cache, transformer, steps = TableCache(), build(torch.bfloat16), timesteps(torch.bfloat16)
    cache.table(transformer, steps, "cpu")
    with pytest.raises(RuntimeError, match="dtype"):  # weights in bf16 do not take fp16
        cache.table(transformer, steps.view(torch.float16), "cpu")


def test_bounds_of_the_cache():
    transformer, schedules = build(), [timesteps(steps=steps) for steps in (2, 3, 4)]
    size = compute_table(transformer, schedules[0], "cpu").values.nbytes // 2
    cache = TableCache(7 * size)
    first, second, third = (cache.table(transformer, steps, "cpu") for steps in schedules)
    assert cache.nbytes == 7 * size
    cache.table(transformer, schedules[1], "cpu")  # now the third is the older one
    assert cache.table(transformer, schedules[0], "cpu") is not first
    assert cache.table(transformer, schedules[1], "cpu") is second and cache.nbytes == 5 * size
    small = TableCache(3 * size)
    assert len(small.table(transformer, schedules[2], "cpu").values) == 4 and small.nbytes == 0


@pytest.mark.parametrize("twin_of", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_starts_empty(twin_of):
    cache, transformer = TableCache(10**6), build()
    table = cache.table(transformer, timesteps(), "cpu")
    twin = twin_of(cache)
    assert twin.nbytes == twin.hits == twin.misses == 0 and twin.max_bytes == 10**6
    assert cache.table(transformer, timesteps(), "cpu") is table


def test_weights_out_of_reach_are_computed_each_time():
    cache, transformer, steps = TableCache(), build(torch.bfloat16), timesteps(torch.bfloat16)
    expected = stock_values(transformer, steps)
    accelerate.cpu_offload(transformer, execution_device="cpu")
    for _ in range(2):
        assert_as_near_as_stock(cache.table(transformer, steps, "cpu"), transformer, expected, 3)
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
        compute_table(transformer, timesteps(), "cpu")
    transformer, steps = build(), timesteps()
    expected = stock_values(transformer, steps)
    transformer.enable_group_offload(**options, offload_type="leaf_level")
    assert "leaf-level" in table_reason(transformer)
    assert_as_near_as_stock(compute_table(transformer, steps, "cpu"), transformer, expected, 3)


def on_the_host(dtype=torch.float32, **config):
    """A transformer on the emulated device, but for its modulation weights."""
    transformer = build(dtype, **config)
    keep_on_host(transformer)
    return transformer.to("cuda")


def test_only_weights_that_are_elsewhere_are_kept(emulated_cuda):
    for transformer, kept in ((build().to("cuda"), False), (on_the_host(), True)):
        tables, steps = TableCache(), timesteps().to("cuda")
        for _ in range(2):
            source = FromTable(transformer, tables, steps, torch.zeros(1, dtype=torch.int32, device="cuda"))
            source.begin(steps[:1])
        assert (tables.misses, tables.hits) == ((1, 1) if kept else (0, 0))
    assert not emulated_cuda.notes.of(notes.RACE, notes.MIXED)


def test_many_schedules_take_two_buffers_and_one_stream(emulated_cuda, monkeypatch):
    """Memory that PyTorch keeps belongs to a stream: a new one for each schedule, or buffers for each module, would pile up."""
    transformer, streams, large = on_the_host(num_layers=6), [], []
    module = transformer.transformer_blocks[0].img_mod
    size = sum(-(-parameter.nbytes // 512) * 512 for parameter in module.parameters())
    made, allocate = torch.cuda.Stream, emulated_cuda.memory.allocate
    monkeypatch.setattr(torch.cuda, "Stream", lambda *a: streams.append(made(*a)) or streams[-1])

    def allocated(shape, stride, dtype, *others):
        large.append((shape, others[1])) if dtype == torch.uint8 else None
        return allocate(shape, stride, dtype, *others)

    monkeypatch.setattr(emulated_cuda.memory, "allocate", allocated)
    taken = []
    for steps in range(2, 10):
        large.clear()
        expected = compute_table(build(num_layers=6), timesteps(steps=steps), "cpu")
        emulated_cuda.notes.clear()
        table = compute_table(transformer, timesteps(steps=steps).to("cuda"), "cuda")
        assert not emulated_cuda.notes.of(notes.SYNC, notes.EVENT), "the host waited"
        assert [tuple(shape) for shape, _ in large] == [(size,)] * 2
        assert {stream for _, stream in large} == {torch.cuda.current_stream()}, "the buffers go back to the stream of the work"
        assert (table.values.cpu() - expected.values).abs().max() <= 1e-5
        del table
        taken.append(emulated_cuda.memory.allocated)
    assert len(streams) == 1 and len(set(taken)) == 1
    assert not emulated_cuda.notes.of(notes.RACE, notes.MIXED)


def test_a_table_of_another_thread_and_stream_is_waited_for(emulated_cuda):
    transformer, cache, steps = on_the_host(), TableCache(), timesteps()
    found, streams = {}, [torch.cuda.Stream() for _ in range(2)]

    def work(number: int) -> None:
        with torch.cuda.stream(streams[number]):
            found[number] = cache.table(transformer, steps, "cuda")
            found[number].values.sum()

    for number in range(2):
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join()
    assert found[0] is found[1] and (cache.misses, cache.hits) == (1, 1)
    assert not emulated_cuda.notes.of(notes.RACE)
    block = emulated_cuda.memory.block(found[0].values)
    assert streams[1].id in block.shared_with, "its memory may be reused while the second stream reads it"


def test_two_threads_at_once(emulated_cuda):
    transformer, cache = on_the_host(), TableCache()
    expected = {steps: compute_table(build(), timesteps(steps=steps), "cpu").values for steps in (3, 4)}
    found, barrier = [], threading.Barrier(4)

    def work(steps: int) -> None:
        barrier.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                found.append((steps, cache.table(transformer, timesteps(steps=steps), "cuda")))

    threads = [threading.Thread(target=work, args=(steps,)) for steps in (3, 4, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and (cache.misses, cache.hits) == (2, 10)
    torch.cuda.synchronize()
    for steps, table in found:
        assert (table.values.cpu() - expected[steps]).abs().max() <= 1e-5
    assert not emulated_cuda.notes.of(notes.RACE, notes.MIXED)
