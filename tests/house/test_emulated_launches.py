"""Launches on an emulated CUDA device: interpreted, or compiled as a whole picture launches them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qwen_fast
import qwen_fast_kernels as kernels
from benchmarks.shared.stock import draw, stock
from support import emulated_cuda as emulation
from support.emulated_cuda import notes
from support.pipelines import GUIDED, SMALL

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = GUIDED | {"prompt": "a red circle", "num_inference_steps": 2, "output_type": "pt"}
# Of a guided picture with our attention: qk_norm_rope once per block and forward, and so on.
KERNELS = {
    "_ada_layer_norm_kernel",
    "_cfg_euler_step_kernel",
    "_flow_match_schedule_kernel",
    "_gated_residual_ada_layer_norm_kernel",
    "_joint_attention_kernel",
    "_qk_norm_rope_kernel",
    "_rms_norm_silu_kernel",
}


def launched(seen: notes.Notes) -> set[str]:
    return {note.what.split("[")[0] for note in seen.of(notes.LAUNCH)}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda")


@pytest.mark.triton
def test_an_operator_enters_its_cuda_implementation(emulated_cuda):
    x = random(4, 8)
    sigmas, index = torch.tensor([1.0, 0.7, 0.1, 0.0]), torch.tensor([1], dtype=torch.int32)
    expected = kernels.euler_step(x.cpu(), x.cpu(), sigmas, index)
    actual = kernels.euler_step(x, x, sigmas.to("cuda"), index.to("cuda"))
    (launch,) = emulated_cuda.notes.of(notes.LAUNCH)
    assert launch.what == "_euler_step_kernel[1]" and launch.where.startswith("kernels/qwen_fast_kernels/euler_step.py:")
    assert actual.is_cuda and torch.equal(actual.cpu(), expected)
    with pytest.raises(ValueError, match="float64 is not supported on cuda"):
        kernels.euler_step(x.double(), x, sigmas.to("cuda"), index.to("cuda"))


@pytest.mark.triton
def test_an_operator_in_a_capture(emulated_cuda):
    x = random(4, 8)
    sigmas, index = torch.tensor([1.0, 0.7, 0.1, 0.0]).to("cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    latents = x.clone()

    def step():
        latents.copy_(kernels.euler_step(latents, x, sigmas, index))
        index.add_(1)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert torch.equal(latents.cpu(), x.cpu()) and index.item() == 0
    expected = x.cpu()
    for i in range(3):
        graph.replay()
        expected = kernels.euler_step(expected, x.cpu(), sigmas.cpu(), torch.tensor([i]))
        assert torch.equal(latents.cpu(), expected)
    with pytest.raises(ValueError, match="outside the schedule"):
        graph.replay()


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively here")
def test_replays_through_the_interpreter(checkpoint):
    """A capture keeps the launches, and each replay interprets the kernels again on the same memory."""
    arguments = SMALL | {
        "prompt": "a red circle",
        "width": 32,
        "height": 32,
        "sigmas": [1.0, 0.7, 0.4],
        "num_inference_steps": 3,
    }
    expected = draw(qwen_fast.enable(stock(checkpoint)), **arguments)
    with emulation.emulated_cuda(launches="interpret") as device:
        pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=True)
        first, actual = draw(pipe, **arguments), draw(pipe, **arguments)
        assert torch.equal(first, actual)
        assert (actual.cpu() - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert launched(device.notes) == KERNELS - {"_rms_norm_silu_kernel", "_cfg_euler_step_kernel"} | {"_euler_step_kernel"}
        assert len(device.notes.of(notes.REPLAY)) == 2 and not device.notes.of(notes.MIXED, notes.ILLEGAL, notes.RACE)


@pytest.mark.triton
def test_a_launcher_outside_an_operator_is_interpreted(emulated_cuda):
    from qwen_fast_kernels.euler_step import DEFAULT_CONFIG, launch_euler_step

    x = random(3, 5)
    sigmas, index = torch.tensor([1.0, 0.4, 0.0]).to("cuda"), torch.ones(1, dtype=torch.int32, device="cuda")
    actual = launch_euler_step(x, x, sigmas, index, config=DEFAULT_CONFIG)
    assert torch.equal(actual.cpu(), kernels.euler_step(x.cpu(), x.cpu(), sigmas.cpu(), index.cpu()))


@pytest.mark.triton
def test_a_launch_with_a_cpu_tensor_is_refused(emulated_cuda):
    from qwen_fast_kernels.euler_step import DEFAULT_CONFIG, launch_euler_step

    x, index = random(3, 5), torch.zeros(1, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        launch_euler_step(x, x, torch.tensor([1.0, 0.0]), index, config=DEFAULT_CONFIG)
    assert emulated_cuda.notes.of(notes.MIXED)


@pytest.mark.triton
@pytest.mark.parametrize("warm", [False, True])
def test_the_first_launch_of_a_kernel_in_a_capture(emulated_cuda, warm):
    """Its code is loaded then. Another dtype is another kernel."""
    x, index = random(16), torch.zeros(1, dtype=torch.int32, device="cuda")
    sigmas = torch.tensor([1.0, 0.0]).to("cuda")
    kernels.euler_step(x if warm else x.bfloat16(), x if warm else x.bfloat16(), sigmas, index)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        kernels.euler_step(x, x, sigmas, index)
    assert bool(emulated_cuda.notes.of(notes.FIRST)) is not warm


COMPILE = """
import json, sys
import qwen_fast
from benchmarks.shared.stock import draw, stock
from support.emulated_cuda import emulated_cuda
with emulated_cuda(launches="compile", capability=int(sys.argv[2]), attention="triton") as device:
    pipe = qwen_fast.enable(stock(sys.argv[1], getattr(__import__("torch"), "bfloat16")).to("cuda"), cuda_graph=False)
    images = draw(pipe, **json.loads(sys.argv[3]))
    assert images.isfinite().all()
    print(json.dumps([[one.name, "cubin" in one.kernel.asm] for one in device.launches.compiled]))
"""


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled and run here")
def test_a_picture_whose_launches_compile(checkpoint):
    """Every kernel that a picture launches, specialised as it launches it, becomes code for sm_90."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = (ROOT / "kernels", ROOT, ROOT / "tests")
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", COMPILE, str(checkpoint), "90", json.dumps(ARGUMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    compiled = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in compiled} == KERNELS and all(cubin for _, cubin in compiled)
