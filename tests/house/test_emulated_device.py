"""The emulated CUDA device: values and types as on a GPU, and everything noted that a GPU would make the host pay for."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F

from qwen_fast_kernels import gated_residual
from support.emulated_cuda import IllegalInCapture, notes
from support.emulated_cuda import emulated_cuda as another_device

CUDA = torch.device("cuda", 0)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x(emulated_cuda):
    tensor = random(4, 8).to("cuda")
    emulated_cuda.notes.clear()
    return tensor


# Tensors --------------------------------------------------------------------------------------------------------------


def test_a_tensor_is_a_plain_one_on_cuda(x):
    layer = torch.nn.Linear(8, 8).to("cuda")
    assert type(x) is torch.Tensor and type(layer.weight) is torch.nn.Parameter
    assert x.is_cuda and x.device == CUDA and x.to("cuda") is x and x.untyped_storage().device == CUDA
    assert x[1:].data_ptr() == x.data_ptr() + 32 and x.data_ptr() % 512 == 0
    assert copy.deepcopy(layer).weight.device == CUDA and repr(x).endswith("device='cuda:0')")


CALLS = {
    "add": lambda x: x + 1,
    "product": lambda x: x @ x.t(),
    "out": lambda x: torch.addmm(x[0, :4], x, x.t(), out=torch.empty(4, 4, device=x.device)),
    "out that grows": lambda x: torch.abs(x, out=torch.empty(0, device=x.device)),
    "view": lambda x: x.view(2, 16)[:, ::3],
    "unfold": lambda x: x.unfold(1, 2, 2),
    "index": lambda x: x[[2, 0]],
    "mask": lambda x: x[x > 0],
    "layer norm": lambda x: F.layer_norm(x, (8,)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "convolution": lambda x: F.conv2d(x.view(1, 2, 4, 4), x.view(-1)[:18].view(1, 2, 3, 3)),
    "channels last": lambda x: x.view(1, 2, 4, 4).contiguous(memory_format=torch.channels_last),
    "upsampling": lambda x: F.interpolate(x.view(1, 2, 4, 4), scale_factor=2.0, mode="nearest-exact"),
    "complex": lambda x: torch.view_as_real(torch.polar(x, x)),
    "narrow": lambda x: x.to(torch.bfloat16).float(),
    "in place": lambda x: x.clone().mul_(2).index_fill_(0, torch.tensor([1], device=x.device), 3.0),
    "assigned": lambda x: (lambda y: (y.__setitem__(slice(1, 3), y[:2].clone()), y)[1])(x.clone()),
    "cat": lambda x: torch.cat([x, x[:1]]),
    "several results": lambda x: torch.cat([x.max(dim=1).values, x.topk(2).values.flatten()]),
    "a number": lambda x: x * torch.tensor(2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"])
def test_operators_give_the_cpus_values(emulated_cuda, name, mode):
    own = random(4, 8)
    with mode():
        expected, actual = CALLS[name](own), CALLS[name](own.to("cuda"))
    assert actual.is_cuda and actual.stride() == expected.stride()
    torch.testing.assert_close(actual.cpu(), expected)


def test_what_is_allocated_is_poisoned(emulated_cuda):
    assert torch.empty(3, device="cuda").isnan().all() and torch.empty(3, dtype=torch.bfloat16, device="cuda").isnan().all()
    assert torch.empty(3, dtype=torch.int32, device="cuda").tolist() == [2**31 - 1] * 3


def test_a_product_depends_a_little_on_its_rows(emulated_cuda):
    a, b = random(9, 1024).to("cuda"), random(1024, 64, seed=1).to("cuda")
    whole, part = a @ b, a[:4] @ b
    assert not torch.equal(whole[:4], part)
    torch.testing.assert_close(whole[:4], part, rtol=0, atol=1e-6 * whole.abs().max().item())
    assert torch.equal(part, a[:4] @ b), "and on nothing else"


def test_every_result_may_depend_on_its_sizes():
    if torch.cuda.is_available():
        pytest.skip("there is a real device")
    calls = {
        "product": lambda x: x.flatten(1) @ x.flatten(1)[0],
        "norm": lambda x: x.norm(dim=-1),
        "layer norm": lambda x: F.layer_norm(x, (8,)),
        "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
        "convolution": lambda x: F.conv2d(x, x[:1, :, :3, :3]),
        "ours": lambda x: gated_residual(
            *2 * [x.flatten(0, 2)], x.flatten(0, 1)[:1, :2], torch.zeros_like(x[0, 0, 0, :1]).int()
        ),
    }
    with another_device(shapes_show=True), torch.no_grad():
        whole, part = random(4, 2, 8, 8).to("cuda"), random(4, 2, 8, 8)[:3].to("cuda")
        for name, call in calls.items():
            found = call(part)
            assert torch.equal(found, call(part)) and not torch.equal(call(whole)[: len(found)], found), name
        assert torch.equal((whole * 2)[:3], part * 2)


def test_the_device_has_its_own_random_numbers(emulated_cuda):
    state = torch.get_rng_state()
    torch.cuda.manual_seed(3)
    first = torch.randn(5, device="cuda")
    torch.cuda.manual_seed(3)
    assert torch.equal(first, torch.randn(5, device="cuda")) and torch.equal(state, torch.get_rng_state())
    generator = torch.Generator("cuda")
    assert generator.device == CUDA and isinstance(generator, torch.Generator)
    assert torch.randn(2, device="cuda", generator=generator.manual_seed(1)).is_cuda


# What the host pays for -----------------------------------------------------------------------------------------------


WAITS = {
    "item": lambda x: x[0, 0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool((x > 0).any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "from the CPU": lambda x: torch.ones(2).to("cuda"),
    "tensor": lambda x: torch.tensor([1, 2], device="cuda"),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "assigned mask": lambda x: x.__setitem__(x > 0, x[x > 0]),
    "list": lambda x: x[[0, 1]],
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(4, dtype=torch.int64, device="cuda"), dim=0),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "stream": lambda x: torch.cuda.current_stream().synchronize(),
    "pinned, blocking": lambda x: x.copy_(torch.zeros(4, 8).pin_memory()),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_of_the_host_is_noted_with_its_place(emulated_cuda, x, name):
    WAITS[name](x)
    (note, *_) = emulated_cuda.notes.waits()
    assert note.where.startswith("tests/house/test_emulated_device.py:") and note.phase == "before" and not note.capturing


QUIET = {
    "work": lambda x: (x @ x.t()).softmax(-1).index_select(0, torch.zeros(1, dtype=torch.int32, device="cuda")),
    "where": lambda x: torch.where(x > 0, x, 0.0).masked_fill_(x > 1, 2.0),
    "filled mask": lambda x: x.__setitem__(x > 0, 3.0),
    "constants": lambda x: (torch.full((2,), 1.0, device="cuda"), torch.arange(3, device="cuda"), x.fill_(2.0)),
    "pinned": lambda x: x.copy_(torch.zeros(4, 8).pin_memory(), non_blocking=True),
    "within the device": lambda x: x.to(torch.float16).clone(),
}


@pytest.mark.parametrize("name", QUIET)
def test_work_makes_nobody_wait(emulated_cuda, x, name):
    QUIET[name](x)
    assert not emulated_cuda.notes.waits()


def test_a_copy_to_the_host_arrives_when_the_host_has_waited(emulated_cuda, x):
    arriving = x.to("cpu", non_blocking=True)
    assert arriving.isnan().all() and not emulated_cuda.notes.waits()
    torch.cuda.current_stream().synchronize()
    assert torch.equal(arriving, x.cpu())


@pytest.mark.parametrize("early", [True, False])
def test_pinned_memory_is_copied_when_its_turn_comes(emulated_cuda, x, early):
    pinned = torch.zeros(4, 8).pin_memory()
    x.copy_(pinned, non_blocking=True)
    if not early:
        torch.cuda.synchronize()
    pinned.fill_(1.0)
    torch.cuda.synchronize()
    assert bool(emulated_cuda.notes.of(notes.RACE)) is early


def test_devices_do_not_mix(emulated_cuda, x):
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(8)
    with pytest.raises(RuntimeError, match="same device"):
        F.conv2d(x.view(1, 2, 4, 4), torch.ones(1, 2, 3, 3))
    assert emulated_cuda.notes.of(notes.MIXED)
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


def test_memory_is_counted_and_runs_out(emulated_cuda):
    before = torch.cuda.memory_allocated()
    kept = torch.empty(2**20, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    torch.empty(2**20, device="cuda")
    assert torch.cuda.memory_allocated() == before + 2**22 and torch.cuda.max_memory_allocated() == before + 2**23
    free, total = torch.cuda.mem_get_info()
    hog = torch.empty(free - 2**20, dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**21, dtype=torch.uint8, device="cuda")
    del hog, kept
    assert torch.cuda.memory_allocated() == before and torch.cuda.mem_get_info()[0] == total - before


# Streams --------------------------------------------------------------------------------------------------------------


def test_a_stream_that_does_not_wait_is_a_race(emulated_cuda, x):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        doubled = x * 2
        done = side.record_event()
    assert not emulated_cuda.notes.of(notes.RACE)
    doubled + 1
    (race,) = emulated_cuda.notes.of(notes.RACE)
    assert "add" in race.what and race.where.startswith("tests/house/test_emulated_device.py:")
    emulated_cuda.notes.clear()
    torch.cuda.current_stream().wait_event(done)
    doubled + 1
    assert not emulated_cuda.notes.of(notes.RACE)


def test_writing_over_what_another_stream_reads_is_a_race(emulated_cuda, x):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        x.sum()
    x.zero_()
    assert emulated_cuda.notes.of(notes.RACE)


def test_the_host_orders_streams_too(emulated_cuda, x):
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda.default_stream().synchronize()
        x.mul_(2)
        side.synchronize()
    x + 1
    assert not emulated_cuda.notes.of(notes.RACE)


@pytest.mark.parametrize("recorded", [False, True])
def test_memory_freed_while_another_stream_uses_it(emulated_cuda, recorded):
    side = torch.cuda.Stream()
    short_lived = torch.zeros(8, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        short_lived.sum()
    if recorded:
        short_lived.record_stream(side)
    del short_lived
    torch.empty(8, device="cuda")
    assert bool(emulated_cuda.notes.of(notes.RACE)) is not recorded


def test_each_thread_has_its_own_stream(emulated_cuda, x):
    seen = []
    with torch.cuda.stream(torch.cuda.Stream()):
        thread = threading.Thread(target=lambda: seen.append((torch.cuda.current_stream(), (x + 1).is_cuda)))
        thread.start()
        thread.join()
    assert seen == [(torch.cuda.default_stream(), True)]


# Graphs ---------------------------------------------------------------------------------------------------------------


def captured(work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = work()
    return graph, results


def test_a_capture_runs_nothing_and_a_replay_runs_all(emulated_cuda, x):
    buffer = torch.zeros(4, 8, device="cuda")
    expected = buffer.cpu()

    def work():
        doubled = buffer * 2
        buffer.copy_(doubled + x)
        return doubled, buffer.max(dim=1).values

    graph, results = captured(work)
    assert all(result.isnan().all() for result in results) and torch.equal(buffer.cpu(), expected)
    for _ in range(3):
        graph.replay()
        doubled = expected * 2
        expected = doubled + x.cpu()
        torch.testing.assert_close(buffer.cpu(), expected)
        torch.testing.assert_close(results[0].cpu(), doubled)
    torch.testing.assert_close(results[1].cpu(), expected.max(dim=1).values)
    x.zero_()
    graph.replay()
    torch.testing.assert_close(buffer.cpu(), expected * 2)


def test_a_replay_reads_addresses_and_not_names(emulated_cuda):
    class Holder:
        value = torch.ones(4, device="cuda")

    graph, result = captured(lambda: Holder.value * 3)
    kept, Holder.value = Holder.value, torch.full((4,), 5.0, device="cuda")
    graph.replay()
    assert result.tolist() == [3.0] * 4
    kept.fill_(7.0)
    graph.replay()
    assert result.tolist() == [21.0] * 4


def test_a_replay_of_freed_memory_is_an_error(emulated_cuda):
    short_lived = [torch.ones(4, device="cuda")]
    graph, _ = captured(lambda: short_lived[0] * 3)
    short_lived.clear()
    with pytest.raises(RuntimeError, match="freed since the capture"):
        graph.replay()


ILLEGAL = {**WAITS, "pageable, non-blocking": lambda x: x.copy_(torch.zeros(4, 8), non_blocking=True)}


@pytest.mark.parametrize("name", ILLEGAL)
def test_what_waits_is_illegal_in_a_capture(emulated_cuda, x, name):
    with pytest.raises(IllegalInCapture, match="not permitted when stream is capturing"):
        captured(lambda: ILLEGAL[name](x))
    (note, *_) = emulated_cuda.notes.of(notes.ILLEGAL)
    assert note.where.startswith("tests/house/test_emulated_device.py:")
    assert not torch.cuda.is_current_stream_capturing() and x.sum().item() != 0


@pytest.mark.parametrize("name", QUIET)
def test_work_is_legal_in_a_capture(emulated_cuda, x, name):
    graph, _ = captured(lambda: QUIET[name](x))
    graph.replay()
    assert not emulated_cuda.notes.of(notes.ILLEGAL)


def test_work_on_a_stream_that_is_not_captured(emulated_cuda, x):
    def astray():
        with torch.cuda.stream(torch.cuda.Stream()):
            return x * 2

    with pytest.raises(IllegalInCapture, match="not captured"):
        captured(astray)


def test_a_stream_joins_a_capture_and_has_to_come_back(emulated_cuda, x):
    side = torch.cuda.Stream()

    def forked(join: bool):
        current = torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            doubled = x * 2
        if join:
            current.wait_stream(side)
        return doubled

    graph, doubled = captured(lambda: forked(True))
    graph.replay()
    assert torch.equal(doubled.cpu(), x.cpu() * 2)
    with pytest.raises(IllegalInCapture, match="unjoined"):
        captured(lambda: forked(False))


def test_another_threads_work_is_not_captured(emulated_cuda, x):
    values = []

    def work():
        thread = threading.Thread(target=lambda: values.append((x + 1).sum().item()))
        thread.start()
        thread.join()
        return x * 2

    captured(work)
    assert values == [(x + 1).sum().item()]


# The device as a whole ------------------------------------------------------------------------------------------------


def test_it_goes_away_again(emulated_cuda):
    with pytest.raises(RuntimeError, match="already"), another_device():
        pass


def test_without_the_fixture_there_is_no_device():
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    assert torch.Generator().device.type == "cpu" and not torch.ones(1).is_pinned()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(1).to("cuda")
