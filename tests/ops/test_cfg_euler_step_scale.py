"""The guidance scale of cfg_euler_step is read on the device, at every launch and every replay; a float is brought there.

Its values against stock's are in test_cfg_euler_step.py.
"""

import pytest
import torch
from sampler_cases import scale_of

from benchmarks.shared.budget import assert_bit_equal, differing
from qwen_fast_kernels.cfg_euler_step import DEFAULT_CONFIG, cfg_euler_step, launch_cfg_euler_step
from support.canaries import between_canaries
from support.emulated_cuda import notes
from support.recorded_sampler import Run, random_run

launch = between_canaries(launch_cfg_euler_step, config=DEFAULT_CONFIG)


def arguments(run: Run) -> tuple:
    """Of step 1, without the scale."""
    return run.latents[1], run.cond[1], run.uncond[1], run.sigmas, run.index(1)


@pytest.mark.parametrize("run", [pytest.param(launch, id="launcher", marks=pytest.mark.triton), cfg_euler_step])
def test_the_scale_is_read_from_where_it_lies_and_stays(run, device):
    """Anywhere in a table, and whatever stands there at the time of the call, NaN included."""
    stock = random_run((2, 77, 64), torch.bfloat16, device)
    front = arguments(stock)
    table = torch.tensor([2.5, 3.7, 7.0, 1.5, 4.0], device=device)
    for place, scale in enumerate(table.tolist()):
        assert_bit_equal(run(*front, table[place : place + 1]), cfg_euler_step(*front, scale))
    assert table.tolist() == torch.tensor([2.5, 3.7, 7.0, 1.5, 4.0]).tolist()
    assert run(*front, table[:1].fill_(float("nan"))).isnan().all()


def test_fp64_latents_take_the_scale_in_fp64():
    stock = random_run((1, 77, 64), torch.float32, torch.device("cpu"))
    latents, cond, uncond, *rest = arguments(stock)
    front = (latents.double(), cond.double(), uncond.double(), *rest)
    exact, rounded = torch.tensor([3.7], dtype=torch.float64), torch.tensor([3.7])
    assert_bit_equal(cfg_euler_step(*front, 3.7), cfg_euler_step(*front, exact))
    assert_bit_equal(cfg_euler_step(*front, rounded), cfg_euler_step(*front, rounded.item()))
    assert differing(cfg_euler_step(*front, exact), cfg_euler_step(*front, rounded)).any()


def test_compiled_code_serves_every_scale_of_a_tensor(device):
    stock = random_run((2, 77, 64), torch.bfloat16, device)
    front = arguments(stock)
    torch.compiler.reset()
    compiled = torch.compile(cfg_euler_step, fullgraph=True, backend="eager")
    for stance, scale in (("default", 3.7), ("fail_on_recompile", 2.5), ("fail_on_recompile", 4.0)):
        with torch.compiler.set_stance(stance):
            assert_bit_equal(compiled(*front, scale_of(front[0], scale)), cfg_euler_step(*front, scale))


@pytest.mark.triton
def test_a_captured_graph_takes_the_scale_of_its_replay(emulated_cuda):
    """The same launch in the same graph: nothing is loaded or captured anew."""
    stock = random_run((2, 77, 64), torch.bfloat16, torch.device("cpu"))
    front = arguments(stock)
    given = [tensor.to("cuda") for tensor in front]
    scale = torch.tensor([4.0]).to("cuda")
    cfg_euler_step(*given, scale)  # loads the code
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cfg_euler_step(*given, scale)
    for value in (4.0, 3.7, 2.5):
        scale.fill_(value)
        graph.replay()
        assert_bit_equal(out.cpu(), cfg_euler_step(*front, value))
    assert len(emulated_cuda.notes.of(notes.CAPTURE)) == 1 and not emulated_cuda.notes.of(notes.FIRST)


@pytest.mark.triton
def test_a_float_reaches_the_device_without_waiting_for_it(emulated_cuda):
    stock = random_run((2, 77, 64), torch.bfloat16, torch.device("cpu"))
    front = arguments(stock)
    given = [tensor.to("cuda") for tensor in front]
    with emulated_cuda.notes.during("step"):
        out = cfg_euler_step(*given, 3.7)
    seen = emulated_cuda.notes.of(phase="step")
    assert [note.kind for note in seen] == [notes.LAUNCH], list(map(str, seen))
    assert_bit_equal(out.cpu(), cfg_euler_step(*front, 3.7))
