"""Launches past Triton beside Triton's own, in a process that does not interpret; prints what was seen as JSON.

Through a driver that does nothing, on CPU tensors: every launch is noted with all its arguments.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import triton

from benchmarks.operators.cases import Maker
from benchmarks.parts.host_time import IdleDriver, call, idle_driver, small_cases
from qwen_fast_kernels import _launch
from qwen_fast_kernels._library import replace_kernel, restore_kernels
from qwen_fast_kernels.proof import Problem, examine
from qwen_fast_kernels.rms_norm_silu import launch_rms_norm_silu

CONFIG = {"BLOCK_ROWS": 4, "BLOCK_CHANNELS": 32, "num_warps": 1}


class Launches:
    """The launches of a function, and how many of them Triton's `run` made."""

    def __init__(self, idle: IdleDriver) -> None:
        self.idle = idle

    def of(self, function: Callable[[], object]) -> tuple[list[tuple], int]:
        self.idle.log.clear()
        self.idle.noting = True
        own = triton.runtime.jit.JITFunction.run
        with mock.patch.object(triton.runtime.jit.JITFunction, "run", autospec=True, side_effect=own) as run:
            function()
        self.idle.noting = False
        return [plain(args) for args in self.idle.log], run.call_count


def plain(args: tuple) -> tuple:
    """Grid, stream, function, what the compiler says of it, and the arguments, tensors as addresses; without the hooks."""
    return *args[:6], *(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args[9:])


def without_outputs(launched: list[tuple], inputs: set[int]) -> list[tuple]:
    """Addresses that no input has, which each call allocates, as whether they are aligned."""
    large = 1 << 32  # no stride is, every address is
    return [
        tuple(
            arg % 16 == 0 if position > 5 and isinstance(arg, int) and arg > large and arg not in inputs else arg
            for position, arg in enumerate(args)
        )
        for args in launched
    ]


def proofs(launches: Launches) -> dict[str, bool]:
    """A proof launches what the pipeline does: the first time through Triton, afterwards past it."""
    seen = {}
    for case in [case for case in small_cases() if case.name in ("bf16", "Qwen-Image")]:
        _launch._COMPILED.clear()
        problem = Problem.of(case.op, case.dtype, case.size, **case.variant)
        launched, count = launches.of(partial(examine, problem, torch.device("cpu"), launches=4))
        seen[f"{case}: a proof launches past Triton"] = (len(launched), count) == (4, 1)
    return seen


def replacements(launches: Launches) -> dict[str, bool]:
    """A replaced kernel is not launched, however often it was before; that of another dtype is, past Triton."""
    seen = {}
    for case in [case for case in small_cases() if case.name == "bf16"]:
        arguments = {dtype: replace(case, dtype=dtype).arguments(Maker("cpu")) for dtype in (torch.bfloat16, torch.float32)}
        for _ in range(2):
            for given in arguments.values():
                getattr(case.module(), f"_{case.op}_cuda")(*given)
        replace_kernel(case.op, torch.device("cpu"), torch.bfloat16)
        try:
            found = {dtype: launches.of(partial(case.operator(), *given)) for dtype, given in arguments.items()}
        finally:
            restore_kernels()
        seen[f"{case}: not launched once it is replaced"] = found[torch.bfloat16] == ([], 0)
        launched, count = found[torch.float32]
        seen[f"{case}: launched for another dtype"] = (len(launched), count) == (1, 0)
    return seen


def main() -> None:
    seen = {}
    with idle_driver() as idle, mock.patch.dict(_launch._COMPILED, clear=True):
        launches, through_triton = Launches(idle), {}
        calls = {str(case): (call(case), case) for case in small_cases()}
        for name, (function, _) in calls.items():
            _launch._COMPILED.clear()
            through_triton[name], count = launches.of(function)
            seen[f"{name}: Triton is asked first"] = count == len(through_triton[name]) == 1
        for function, _ in calls.values():
            function()
        for name, (function, _) in calls.items():
            past, count = launches.of(function)
            inputs = {cell.data_ptr() for cell in function.__closure__[0].cell_contents if isinstance(cell, torch.Tensor)}
            equal = without_outputs(past, inputs) == without_outputs(through_triton[name], inputs)
            seen[f"{name}: the same launch past it"] = equal and count == 0

        x, gamma = torch.zeros(8, 32), torch.zeros(32)

        def launch() -> None:
            launch_rms_norm_silu(x, gamma, config=CONFIG)

        def asks_triton(name: str, function: Callable[[], object] = launch) -> None:
            seen[f"{name}: Triton is asked"] = all(launches.of(function)[1] == 1 for _ in range(2))

        launch()
        seen["a known launch: Triton is not asked"] = launches.of(launch)[1] == 0
        runtime = triton.knobs.runtime
        for hook in ("launch_enter_hook", "launch_exit_hook"):
            with mock.patch.object(runtime, hook, lambda *_: None):
                asks_triton(hook)
        idle.device = 1
        asks_triton("another current device")
        idle.device = x.device.index
        from qwen_fast_kernels.rms_norm_silu import _rms_norm_silu_kernel as kernel

        constants = {"HAS_BIAS": False, "HAS_RESIDUAL": False, "SILU": True, "SCALE": 1.0, "SMALLEST": 1e-12, "CHANNELS": 32}

        def launch_wide() -> None:
            _launch.launch(kernel, (1,), (x, x, gamma, gamma, x), (2**31,), (32,), **constants, **CONFIG)

        asks_triton("more rows than 32 bits count", launch_wide)
        replacement = mock.Mock(side_effect=lambda grid: mock.Mock())
        with mock.patch.object(triton.runtime.jit.KernelInterface, "__getitem__", replacement):
            launch()
        seen["launches that another took over"] = replacement.call_count == 1
        seen["and what he gave back is not kept"] = launches.of(launch)[1] == 0
        seen |= proofs(launches) | replacements(launches)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
