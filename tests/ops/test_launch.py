"""Launches: one compiled kernel for all prompts, and past Triton those that Triton would make, with little Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_fast_kernels import _launch
from qwen_fast_kernels.rms_norm_silu import default_config, launch_rms_norm_silu

pytestmark = pytest.mark.triton
ROOT = Path(__file__).parents[2]
# Calls of Python functions in an operator's implementation for CUDA, at most; through Triton's own launch they were 25 to 35.
CALLS = {
    "flow_match_schedule: Qwen-Image": 12,
    "euler_step: bf16": 12,
    "cfg_euler_step: bf16": 12,
    "ada_layer_norm: bf16": 17,
    "gated_residual: bf16": 16,
    "gated_residual_ada_layer_norm: bf16": 18,
    "qk_norm_rope: bf16": 12,
    "rms_norm_silu: bf16": 13,
}


def compiled(*command: str) -> dict:
    """What a process prints that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    found = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout)


@pytest.mark.slow
def test_prompts_of_any_length_share_one_compiled_kernel():
    """200 random prompts, batches and pictures: a kernel is compiled once for each of its configurations."""
    variants = compiled(str(Path(__file__).with_name("variants.py")))
    assert len(variants) > 20 and set(variants.values()) == {1}, variants


def test_a_launch_past_triton_is_tritons():
    """Of every case: grid, stream, machine code, arguments. And where Triton has to be asked, it is."""
    seen = compiled(str(Path(__file__).with_name("launches.py")))
    assert len(seen) > 120 and all(seen.values()), [name for name, right in seen.items() if not right]


def test_a_call_runs_few_python_functions():
    found = compiled("-m", "benchmarks.parts.host_time", "--calls")
    assert found.keys() == CALLS.keys()
    assert not {name: calls for name, calls in found.items() if calls > CALLS[name]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled")
def test_the_interpreter_launches_every_time():
    before = dict(_launch._COMPILED)
    x, gamma = torch.ones(3, 96), torch.ones(96)
    for _ in range(2):
        assert launch_rms_norm_silu(x, gamma, config=default_config(90, 96, 4)).isfinite().all()
    assert _launch._COMPILED == before


@pytest.mark.gpu
def test_on_a_gpu_both_launches_give_the_same(device):
    _launch._COMPILED.clear()
    x, gamma = torch.randn(77, 96, device=device), torch.randn(96, device=device)
    config = default_config(90, 96, 4)
    first, second = (launch_rms_norm_silu(x, gamma, config=config) for _ in range(2))
    assert _launch._COMPILED and torch.equal(first, second)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        other = launch_rms_norm_silu(x, gamma, config=config)
    stream.synchronize()
    assert torch.equal(other, first)
