"""One whole pipeline whose every operator is its Triton launcher, interpreted on the CPU, each launch counted.

The operators' CUDA entry points take the place of their CPU ones: checks, choice of the configuration, launcher, kernel.
"""

import functools
import importlib
import inspect
from collections import Counter

import pytest
import torch

import qwen_fast
import qwen_fast_kernels
from benchmarks.shared.stock import assert_same_latents, draw, in_fp32, stock
from qwen_fast_kernels import tuning
from support.pipelines import DTYPES, GUIDED, SMALL

OPS = sorted(name for name in qwen_fast_kernels.__all__ if name != "HAS_TRITON")
OF_THE_VAE = {"rms_norm_silu"}  # tests/vae/test_vae_bands.py decodes through its launcher
# Per forward of two blocks; the last one has no text half, and its last norm is the output's.
FORWARD = {"ada_layer_norm": 1, "qk_norm_rope": 2, "joint_attention": 2, "gated_residual_ada_layer_norm": 4, "linear_gelu": 3}


@pytest.fixture(params=[80, 90], ids=lambda arch: f"sm_{arch}")
def launches(request, monkeypatch) -> Counter:
    """Counts launches by operator; configurations are those of the architecture in `request.param`."""
    counter = Counter()
    library = torch.library.Library("qwen_fast", "IMPL")
    monkeypatch.setattr(tuning, "capability", lambda device: request.param)
    monkeypatch.setattr(tuning, "device_name", lambda device: "a GPU without measured configurations")
    tuning.get_config.cache_clear()
    for name in set(OPS) - OF_THE_VAE:
        module = importlib.import_module(f"qwen_fast_kernels.{name}")
        if name == "linear_gelu":  # the GELU epilogue of cuBLASLt is another function on the CPU
            monkeypatch.setattr(module, "default_config", _by_triton(module.default_config))
        monkeypatch.setattr(module, f"launch_{name}", _counted(getattr(module, f"launch_{name}"), name, counter))
        library.impl(name, getattr(module, f"_{name}_cuda"), "CPU", allow_override=True)
    yield counter
    library._destroy()
    tuning.get_config.cache_clear()


def _by_triton(default_config):
    @functools.wraps(default_config)
    def config(*args):
        return default_config(*args) | {"BACKEND": "triton"}

    return config


def _counted(launch, name: str, counter: Counter):
    def launched(*args, **kwargs):
        counter[name] += 1
        return launch(*args, **kwargs)

    return launched


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively here")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("arguments", "step_op"), [(SMALL, "euler_step"), (GUIDED, "cfg_euler_step")], ids=["plain", "guided"])
def test_whole_pipeline_through_the_launchers(checkpoint, launches, dtype, arguments, step_op):
    pipe = stock(checkpoint, dtype)
    arguments = arguments | {"prompt": "a red circle", "num_inference_steps": 2}
    expected = draw(pipe, **arguments)
    exact = None if dtype == torch.float32 else in_fp32(pipe, 7, dtype, **arguments)
    assert not launches
    actual = draw(qwen_fast.enable(pipe), **arguments)
    assert launches == {"flow_match_schedule": 1, step_op: 2} | {name: 2 * count for name, count in FORWARD.items()}
    assert not qwen_fast.report(pipe).fallbacks
    assert_same_latents(actual, expected, exact)


def test_the_cpu_runs_references_again_afterwards():
    """The launchers of the test above were taken out of the registry."""
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module("qwen_fast_kernels.gated_residual")
        patch.setattr(module, "launch_gated_residual", None)
        x, gate = torch.ones(2, 4), torch.ones(1, 1, 4)
        index = torch.zeros(1, dtype=torch.int32)
        assert torch.equal(qwen_fast_kernels.gated_residual(x, x, gate, index), 2 * x)


def test_every_operator_of_the_registry_is_counted_or_named():
    sampler = {"flow_match_schedule", "euler_step", "cfg_euler_step"}
    hooked_blocks_only = {"gated_residual"}
    epilogue_until_it_measures_faster = {"linear_gated_residual"}
    assert set(OPS) == sampler | set(FORWARD) | hooked_blocks_only | epilogue_until_it_measures_faster | OF_THE_VAE
    assert all(inspect.isfunction(getattr(qwen_fast_kernels, name)) for name in OPS)
