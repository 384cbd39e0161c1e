"""Where the modulation weights rest: by the memory at hand, decided when a pipeline arrives; exactly pinned, streamed, told.

The device is an emulated one.
"""

import gc

import accelerate
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import draw, stock
from qwen_fast.common.hardware import free_bytes
from qwen_fast.common.placement import _say_not_pinned
from qwen_fast.transformer.call import ATTACHED
from qwen_fast.transformer.modulation import compute_table
from qwen_fast.transformer.modulation_weights import (
    HYSTERESIS,
    ROOM,
    HostSequential,
    host_bytes,
    keep_on_host,
    modulation_modules,
    rests_on_host,
    return_to_device,
    settle,
)
from support.emulated_cuda import notes
from support.pipelines import GUIDED, SMALL, assert_ran_fast
from support.small_transformer import BYTES, build, group_offload, needs_group_offload, run

CUDA = torch.device("cuda", 0)
PROMPT = {"prompt": "a red circle"}


@pytest.fixture
def transformer():
    return build()


def test_exactly_as_many_bytes_are_pinned(transformer, emulated_cuda):
    """torch would pin a power of two for each weight, and copy what is on the device through pageable memory first."""
    parameters = [p for _, module in modulation_modules(transformer) for p in module.parameters()]
    transformer.to("cuda")
    emulated_cuda.notes.clear()
    keep_on_host(transformer)
    registered = emulated_cuda.backend.registered
    assert sorted(registered.values()) == sorted(p.nbytes for p in parameters) and all(p.is_pinned() for p in parameters)
    assert all(address % 4096 == 0 for address in registered), "no page is shared with anything else"
    copies = emulated_cuda.notes.of(notes.TO_HOST)
    assert len(copies) == len(parameters) and all("pinned" in note.what for note in copies)
    before = [p.data_ptr() for p in parameters]
    keep_on_host(transformer)
    transformer.to("cuda")
    assert [p.data_ptr() for p in parameters] == before
    transformer.half()
    assert sum(registered.values()) == BYTES // 2 and all(p.is_pinned() for p in parameters)
    return_to_device(transformer, "cpu")
    assert not registered and not any(p.is_pinned() for p in parameters)
    keep_on_host(transformer)
    return_to_device(transformer, "cuda")
    assert not registered and all(p.is_cuda for p in parameters)


def test_memory_that_cannot_be_pinned_serves_as_well(transformer, emulated_cuda, caplog):
    expected = compute_table(transformer, torch.tensor([0.9, 0.3]), "cpu").values
    emulated_cuda.lockable = BYTES // 2
    _say_not_pinned.cache_clear()
    keep_on_host(transformer.to("cuda"))
    assert 0 < sum(emulated_cuda.backend.registered.values()) <= BYTES // 2
    assert caplog.text.count("could not be pinned") == 1
    table = compute_table(transformer, torch.tensor([0.9, 0.3]), "cuda")
    assert (table.values.cpu() - expected).abs().max() <= 1e-5


# Where they rest ------------------------------------------------------------------------------------------------------


def filled(device, free: int) -> torch.Tensor:
    """What leaves `free` bytes of the emulated device."""
    return torch.empty(device.free - free, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(("free", "on_host"), [(ROOM + BYTES, False), (ROOM + BYTES - 1, True)])
def test_auto_leaves_them_on_the_device_where_they_fit(transformer, emulated_cuda, free, on_host):
    hog = filled(emulated_cuda, free)
    settle(transformer, "auto", torch.device("cuda", 0), lambda: BYTES)
    assert rests_on_host(transformer) is on_host
    transformer.to("cuda")
    assert (host_bytes(transformer) == BYTES) is on_host
    del hog


def test_auto_takes_them_off_a_full_device_and_does_not_move_to_and_fro(transformer, emulated_cuda):
    transformer.to("cuda")
    cuda = torch.device("cuda", 0)

    def coming() -> int:
        return host_bytes(transformer)

    hog = filled(emulated_cuda, ROOM - 1)
    settle(transformer, "auto", cuda, coming)
    assert host_bytes(transformer) == BYTES
    for more, on_host in ((0, True), (HYSTERESIS - 2**20, True), (HYSTERESIS + 2**20, False), (0, False)):
        del hog
        hog = filled(emulated_cuda, ROOM + more + (0 if not rests_on_host(transformer) else BYTES))
        settle(transformer, "auto", cuda, coming)
        assert rests_on_host(transformer) is on_host
    del hog


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_moves_nothing_elsewhere(transformer, device):
    for _ in range(2):
        settle(transformer, "auto", torch.device(device), lambda: pytest.fail("counted"))
        assert not rests_on_host(transformer)
    keep_on_host(transformer)
    settle(transformer, "auto", torch.device(device), lambda: pytest.fail("counted"))
    assert rests_on_host(transformer)


@pytest.mark.parametrize("offload", ["accelerate", pytest.param("block_level", marks=needs_group_offload)])
def test_auto_leaves_them_at_home_where_the_model_travels(transformer, emulated_cuda, offload):
    if offload == "accelerate":
        accelerate.cpu_offload_with_hook(transformer, execution_device="cuda")
    else:
        group_offload(transformer, onload_device=torch.device("cuda"))
    settle(transformer, "auto", torch.device("cuda", 0), lambda: 0)
    assert host_bytes(transformer) == BYTES


def test_who_brings_them_with_every_forward_is_told_once(transformer, emulated_cuda, monkeypatch, caplog):
    monkeypatch.setattr(HostSequential, "said", False)
    keep_on_host(transformer)
    transformer.to("cuda")
    compute_table(transformer, torch.tensor([0.9, 0.3]), "cuda")
    assert "from host memory" not in caplog.text, "a table brings them once for all its steps"
    for _ in range(2):
        run(transformer, "cuda")
    assert caplog.text.count("brings the modulation weights from host memory") == 1


# Pipelines ------------------------------------------------------------------------------------------------------------


def weights_of(pipe) -> int:
    """Bytes of all weights."""
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    return sum(t.nbytes for module in modules for t in (*module.parameters(), *module.buffers()))


def modulation_bytes(pipe) -> int:
    return sum(p.nbytes for _, module in modulation_modules(pipe.transformer) for p in module.parameters())


def assert_draws_as_on_the_cpu(checkpoint, pipe, device) -> None:
    expected = draw(stock(checkpoint), **PROMPT, **GUIDED)
    actual = draw(pipe, **PROMPT, **GUIDED).cpu()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_ran_fast(pipe)
    wrong = device.notes.of(notes.MIXED, notes.ILLEGAL, notes.RACE)
    assert not wrong, wrong


WAYS = {
    "enabled, then moved": lambda path: qwen_fast.enable(stock(path)).to("cuda"),
    "moved, then enabled": lambda path: qwen_fast.enable(stock(path).to("cuda")),
    "loaded there": lambda path: _silent(qwen_fast.QwenImagePipeline.from_pretrained(path, device="cuda")),
}


def _silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.triton
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fits", [True, False])
def test_however_a_pipeline_arrives(checkpoint, emulated_cuda, way, fits):
    size = weights_of(stock(checkpoint))
    if not fits:
        emulated_cuda.memory.total = size + ROOM - 1
    pipe = WAYS[way](checkpoint)
    assert host_bytes(pipe.transformer) == (0 if fits else modulation_bytes(pipe))
    assert emulated_cuda.memory.allocated <= size - host_bytes(pipe.transformer) + 2**16
    before = [p.data_ptr() for p in pipe.transformer.parameters()]
    for _ in range(2):
        assert_draws_as_on_the_cpu(checkpoint, pipe, emulated_cuda)
        assert [p.data_ptr() for p in pipe.transformer.parameters()] == before, "a call moved weights"
    tables = pipe.transformer.__dict__[ATTACHED].tables
    assert (tables.misses, tables.hits) == ((0, 0) if fits else (1, 1))
    where = "where the model is" if fits else "in host memory"
    assert f"modulation auto: weights {where}" in str(qwen_fast.report(pipe))
    emulated_cuda.memory.total = 80 * 2**30
    qwen_fast.disable(pipe)
    assert {p.device.type for p in pipe.transformer.parameters()} == {"cuda"}


@pytest.mark.triton
@pytest.mark.parametrize(("option", "on_host"), [("host", True), ("device", False), ("layers", False)])
def test_the_option_is_followed_and_may_change(checkpoint, emulated_cuda, option, on_host):
    emulated_cuda.memory.total = weights_of(stock(checkpoint)) + ROOM + 2 * HYSTERESIS if on_host else ROOM
    pipe = stock(checkpoint).to("cuda")
    for wish, rests in ((option, on_host), ("host", True), (option, on_host)):
        qwen_fast.enable(pipe, modulation=wish)
        assert rests_on_host(pipe.transformer) is rests
        assert_draws_as_on_the_cpu(checkpoint, pipe, emulated_cuda)


@pytest.mark.triton
@pytest.mark.parametrize("modulation", ["auto", "host"])
def test_a_pipeline_that_leaves_takes_its_caches_along(checkpoint, emulated_cuda, modulation):
    """On the device stays what stays of a pipeline of diffusers: its schedule, and the frequencies of its rotary embedding."""
    left = []
    for enable in (lambda pipe: pipe, lambda pipe: qwen_fast.enable(pipe, modulation=modulation, prompt_cache=None)):
        before = emulated_cuda.memory.allocated
        pipe = enable(stock(checkpoint)).to("cuda")
        draw(pipe, **PROMPT, **GUIDED)
        pipe.to("cpu")
        gc.collect()
        left.append(emulated_cuda.memory.allocated - before)
        if len(left) == 1:
            del pipe
            gc.collect()
    assert left[1] <= left[0]
    attachment = pipe.transformer.__dict__[ATTACHED]
    assert not attachment.layouts and not attachment.tables.nbytes
    assert_draws_as_on_the_cpu(checkpoint, pipe, emulated_cuda)
    pipe.to("cpu")
    assert attachment.layouts, "what is where the model is stays"


@pytest.mark.triton
def test_a_pipeline_that_leaves_forgets_its_graphs(checkpoint, emulated_cuda):
    pipe = qwen_fast.enable(stock(checkpoint), cuda_graph=True).to("cuda")
    draw(pipe, **PROMPT, **GUIDED)
    attachment = pipe.transformer.__dict__[ATTACHED]
    assert attachment.graphs
    pipe.to("cpu")
    assert not attachment.graphs
    assert_draws_as_on_the_cpu(checkpoint, pipe, emulated_cuda)


@pytest.mark.triton
def test_a_fallback_where_they_do_not_fit_runs_on_stock_all_the_same(checkpoint, emulated_cuda, caplog, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint), modulation="host").to("cuda")
    expected = draw(stock(checkpoint), **PROMPT, **SMALL)
    monkeypatch.setattr("qwen_fast.transformer.modulation_weights.free_bytes", lambda device, **_: 1000)
    monkeypatch.setattr("qwen_fast.pipelines.call.unsupported_reason", lambda device: "another reason")
    actual = draw(pipe, **PROMPT, **SMALL).cpu()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert rests_on_host(pipe.transformer) and "nothing was moved" in caplog.text
    assert qwen_fast.report(pipe).fallbacks == {"another reason": 1}
    with pytest.raises(RuntimeError, match="nothing was moved"):
        qwen_fast.disable(pipe)
    monkeypatch.undo()
    qwen_fast.disable(pipe)
    assert not rests_on_host(pipe.transformer)


@pytest.mark.triton
def test_autocast_does_not_poison_the_next_call(checkpoint, emulated_cuda):
    pipe = qwen_fast.enable(stock(checkpoint), modulation="host").to("cuda")
    before = draw(pipe, **PROMPT, **SMALL).clone()
    pipe.transformer.__dict__[ATTACHED].tables.leave(torch.device("cpu"))
    with torch.autocast("cuda", torch.bfloat16):
        other = pipe.transformer.__dict__[ATTACHED].tables.table(pipe.transformer, torch.tensor([0.5]), "cuda")
    assert other.values.dtype == torch.bfloat16
    assert torch.equal(draw(pipe, **PROMPT, **SMALL), before)


@pytest.mark.triton
def test_timesteps_are_divided_where_stock_divides_them(checkpoint, emulated_cuda, monkeypatch):
    """In fp32 CUDA multiplies by a reciprocal where a CPU divides: a table of the host's quotients is off by a last digit,
    which the embedding makes a thousand times as large."""
    from qwen_fast.transformer import modulation

    seen, compute = [], modulation.compute_table
    monkeypatch.setattr(modulation, "compute_table", lambda *args: seen.append(args[1]) or compute(*args))
    for option in ("device", "host"):
        draw(qwen_fast.enable(stock(checkpoint), modulation=option).to("cuda"), **PROMPT, **SMALL)
    assert len(seen) == 2 and all(timesteps.is_cuda for timesteps in seen)


# Free memory ----------------------------------------------------------------------------------------------------------


def test_free_bytes_counts_what_this_stream_can_have(emulated_cuda, monkeypatch):
    """Not what a graph's pool holds, nor another stream's blocks, nor what is in use."""

    def segment(stream: int, pool: tuple, *blocks: tuple[str, int], device: int = 0) -> dict:
        blocks = [{"state": state, "size": size} for state, size in blocks]
        return {"device": device, "stream": stream, "segment_pool_id": pool, "blocks": blocks}

    own = torch.cuda.current_stream().cuda_stream
    segments = [
        segment(own, (0, 0), ("active_allocated", 1), ("inactive", 10), ("active_awaiting_free", 100)),
        segment(own, (0, 1), ("inactive", 1000)),
        segment(own + 1, (0, 0), ("inactive", 10_000)),
        segment(own, (0, 0), ("inactive", 100_000), device=1),
        segment(own, (0, 0), ("inactive", 1_000_000)),
    ]
    asked = []
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: asked.append(1) or segments)
    assert free_bytes(CUDA) == emulated_cuda.free + 1_000_010 and len(asked) == 1
    assert free_bytes(torch.device("cuda"), enough=emulated_cuda.free) == emulated_cuda.free and len(asked) == 1
    assert free_bytes(torch.device("cpu")) is None


@pytest.fixture
def overestimated(monkeypatch):
    """More is counted as free than there is."""
    for place in ("qwen_fast.denoise.step.free_bytes", "qwen_fast.vae.bands.free_bytes"):
        monkeypatch.setattr(place, lambda device, **_: 2**40)


@pytest.mark.triton
def test_a_forward_of_both_predictions_that_runs_out_of_memory(checkpoint, emulated_cuda, caplog, overestimated):
    arguments = PROMPT | GUIDED | {"height": 128, "width": 128}
    expected = draw(qwen_fast.enable(stock(checkpoint)), **arguments)
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=False)
    draw(pipe, **arguments)  # caches of this size
    before = qwen_fast.report(pipe).calls
    emulated_cuda.memory.total = emulated_cuda.memory.allocated + 450_000
    actual = draw(pipe, **arguments).cpu()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    calls = qwen_fast.report(pipe).calls
    assert calls["packed transformer out of memory"] == 1 and calls["transformer"] == 8
    assert calls["packed transformer"] == before["packed transformer"] and "one after the other" in caplog.text
    assert not emulated_cuda.notes.of(notes.MIXED, notes.ILLEGAL, notes.RACE)
    emulated_cuda.memory.total = emulated_cuda.memory.allocated + 50_000
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe, **arguments)


@pytest.mark.triton
@pytest.mark.parametrize("batch", [1, 2])
def test_a_picture_whose_vae_runs_out_of_memory(checkpoint, emulated_cuda, caplog, overestimated, batch):
    vae = qwen_fast.enable_vae(stock(checkpoint).vae)
    latents = torch.randn(batch, 16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        vae, latents = vae.to("cuda"), latents.to("cuda")
        emulated_cuda.memory.total = emulated_cuda.memory.allocated + 900_000 + (batch - 1) * 400_000
        actual = vae.decode(latents).sample.cpu()
        assert (actual - expected).abs().max() <= 2e-5
        calls = qwen_fast.report(vae).calls
        assert calls["vae out of memory"] >= 1 and calls["vae bands"] > 1
        assert "memory was too short to decode a picture whole" in caplog.text
        emulated_cuda.memory.total = emulated_cuda.memory.allocated + 200_000
        with pytest.raises(torch.OutOfMemoryError):
            vae.decode(latents)
