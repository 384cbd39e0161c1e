"""A stand-in for a GPU, for proofs: the operators' CUDA entry points on CPU tensors, interpreted, with faults put in.

stand_in_child.py is a proof's child process on it.
"""

import functools
import importlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qwen_fast_kernels import proof, tuning
from qwen_fast_kernels._arguments import Size
from qwen_fast_kernels.proof import Problem

ARCH = 90
SMALL = Size((20, 7), (70, 50), 2, 16)
LAUNCHES = 3
NAME = "a GPU without measured configurations"


# Faults: what a launcher is made into ---------------------------------------------------------------------------------


def _spoilt(spoil: Callable[[torch.Tensor], None]) -> Callable:
    """A launcher whose first result, or first argument where it returns none, is changed in place afterwards."""

    def fault(launch: Callable) -> Callable:
        @functools.wraps(launch)
        def launched(*args, **kwargs):
            result = launch(*args, **kwargs)
            first = args[0] if result is None else result[0] if isinstance(result, tuple) else result
            spoil(first)
            return result

        return launched

    return fault


def _in_place_of(instead: Callable[[], None]) -> Callable:
    return lambda launch: lambda *args, **kwargs: instead()


def _drop_tail(out: torch.Tensor) -> None:
    out[-3:] = 0


def _add_noise(out: torch.Tensor) -> None:
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out += (0.25 * out.float().square().mean().sqrt() * noise).to(out.dtype)


_COUNTER = itertools.count()


def _move(out: torch.Tensor) -> None:
    """One element by one unit in the last place, in every other launch: within any budget."""
    bits = out.view(-1)[5:6].view({2: torch.int16, 4: torch.int32}[out.element_size()])
    bits += next(_COUNTER) % 2


def _not_compiled() -> None:
    raise RuntimeError("PassManager::run failed")


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


FAULTS = {
    "wrong scale": _spoilt(lambda out: out.mul_(0.9)),
    "dropped tail": _spoilt(_drop_tail),
    "25 % noise": _spoilt(_add_noise),
    "moving": _spoilt(_move),
    "compile error": _in_place_of(_not_compiled),
    "hang": _in_place_of(lambda: time.sleep(600)),
    "crash": _in_place_of(os.abort),
    "no memory": _in_place_of(_out_of_memory),
}
# What the verdict says of it.
REASONS = {
    "wrong scale": "relative RMS error 0.1",
    "dropped tail": "relative RMS error",
    "25 % noise": "relative RMS error 0.25",
    "moving": "its result moves between 3 launches",
    "compile error": "it does not run: RuntimeError: PassManager::run failed",
    "hang": "it took more than",
    "crash": "its process ended with signal 6",
}


# Problems -------------------------------------------------------------------------------------------------------------


def problem(op: str, dtype: torch.dtype = torch.bfloat16, **variant) -> Problem:
    """A small problem of each operator; what its arguments need beyond the size is filled in."""
    # Of these two the interpreter has many small programs to run.
    size = {"rms_norm_silu": Size((), (90,), 1, 32), "qk_norm_rope": Size((5, 2), (9, 7), 2, 16)}.get(op, SMALL)
    needed = {
        "euler_step": {"shape": (1, 77, 8)},
        "cfg_euler_step": {"shape": (1, 77, 8)},
        "flow_match_schedule": {"steps": 20},
        "joint_attention": {"layout": "rows"},
        "qk_norm_rope": {"layout": "rows"},
        "linear_gelu": {"expansion": 1},
        "linear_gated_residual": {"expansion": 1},
    }
    return Problem.of(op, torch.float32 if op == "flow_match_schedule" else dtype, size, **(needed.get(op, {}) | variant))


RIGHT = [
    problem("joint_attention"),
    problem("joint_attention", torch.float16, masked=True),
    problem("joint_attention", torch.float32),
    problem("ada_layer_norm"),
    problem("ada_layer_norm", torch.float32, packed=True),
    problem("gated_residual", torch.float16, clip=True),
    problem("gated_residual_ada_layer_norm"),
    problem("gated_residual_ada_layer_norm", torch.float16, clip=True, added=True),
    problem("qk_norm_rope"),
    problem("linear_gelu"),
    problem("linear_gelu", ranks=20),
    problem("linear_gated_residual", torch.float32),
    problem("euler_step", torch.float32, prediction_dtype=torch.bfloat16),
    problem("cfg_euler_step"),
    problem("flow_match_schedule"),
    problem("flow_match_schedule", own=True),
    problem("rms_norm_silu"),
    problem("rms_norm_silu", torch.float32, bias=True, residual=True),
    problem("rms_norm_silu", bias=True, residual=True, silu=False),
]


# The device -----------------------------------------------------------------------------------------------------------


def interpret(set_attribute: Callable, faults: dict[str, str], arch: int = ARCH) -> None:
    """Configurations of a GPU, few launches, faults; `set_attribute` is setattr, or monkeypatch's."""
    tuning.get_config.cache_clear()
    set_attribute(tuning, "capability", lambda device: arch)
    set_attribute(tuning, "device_name", lambda device: NAME)
    set_attribute(proof, "LAUNCHES", LAUNCHES)
    gelu = importlib.import_module("qwen_fast_kernels.linear_gelu")
    set_attribute(gelu, "default_config", _by_triton(gelu.default_config))
    for op, fault in faults.items():
        module = importlib.import_module(f"qwen_fast_kernels.{op}")
        set_attribute(module, f"launch_{op}", FAULTS[fault](getattr(module, f"launch_{op}")))


def child(faults: dict[str, str] | None = None) -> list[str]:
    """The command of a child on the stand-in."""
    return [sys.executable, str(Path(__file__).with_name("stand_in_child.py")), json.dumps(faults or {})]


def launchers_for_cpu(library: torch.library.Library, ops: list[str]) -> None:
    """The registry's CPU kernels become the CUDA entry points, until `library` is destroyed."""
    for name in ops:
        module = importlib.import_module(f"qwen_fast_kernels.{name}")
        library.impl(name, getattr(module, f"_{name}_cuda"), "CPU", allow_override=True)


def _by_triton(default_config):
    """The GELU epilogue of cuBLASLt is another function on the CPU."""

    @functools.wraps(default_config)
    def config(*args):
        return default_config(*args) | {"BACKEND": "triton"}

    return config
