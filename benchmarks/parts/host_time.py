"""Python's share of an operator's launch, without a GPU: what lies between the dispatcher and the driver.

    python -m benchmarks.parts.host_time          microseconds of a call (thread's CPU time, minimum) and calls of functions
    python -m benchmarks.parts.host_time --calls  the latter alone, as JSON

Triton compiles for sm_90 and launches through a driver that does nothing, on CPU tensors of few rows: the dispatcher, the
guard of the current device and the C side of a launch are left out. Needs a process without TRITON_INTERPRET.
"""

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from ..compiler.offline import active_driver
from ..operators.cases import CASES, Maker, OperatorCase

# Those that launch through one helper; the products by Triton are not chosen by default.
OPS = ("ada_layer_norm", "gated_residual", "gated_residual_ada_layer_norm", "qk_norm_rope", "rms_norm_silu")
OPS += ("euler_step", "cfg_euler_step", "flow_match_schedule")
CALLS, ROUNDS = 2000, 20


class IdleDriver:
    """What Triton and `launch` ask of a driver. Launches are noted in `log`: (x, y, z, stream, function, ...)."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.noting, self.device = False, torch.device("cpu").index
        self.utils, self._handles = self, itertools.count(1)

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *args: self.log.append(args) if self.noting else None

    def load_binary(self, *_) -> tuple:
        return "module", next(self._handles), 32, 0, 1024

    def unload_module(self, *_) -> None:
        """Triton 3.9 does so when a kernel is freed."""

    def get_device_properties(self, _device) -> dict:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int | None:
        return self.device

    def get_current_stream(self, _device) -> int:
        return 7


@contextlib.contextmanager
def idle_driver() -> Iterator[IdleDriver]:
    """Inside, the CUDA implementations of the operators take CPU tensors and launch nothing."""
    from qwen_fast_kernels import tuning

    idle = IdleDriver()
    with (
        active_driver(idle),
        mock.patch.object(tuning, "capability", lambda _device: 90),
        mock.patch.object(tuning, "device_name", lambda _device: "no GPU"),
    ):
        yield idle


def small_cases() -> list[OperatorCase]:
    """All of these operators, with few rows at their own widths, since only the host's work counts."""

    def small(case: OperatorCase) -> OperatorCase:
        txt = tuple(range(5, 5 + len(case.size.txt)))
        return replace(case, size=replace(case.size, txt=txt, img=(20,) * len(case.size.img)))

    return [small(case) for case in CASES if case.op in OPS]


def call(case: OperatorCase) -> Callable[[], object]:
    """A call of the operator's implementation for CUDA."""
    function, arguments = getattr(case.module(), f"_{case.op}_cuda"), case.arguments(Maker("cpu"))
    return lambda: function(*arguments)


def microseconds(function: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.thread_time_ns()
        for _ in range(CALLS):
            function()
        best = min(best, (time.thread_time_ns() - begin) / CALLS / 1000)
    return best


def python_calls(function: Callable[[], object]) -> int:
    """Python functions that run, but for the one given."""
    names = []
    sys.setprofile(lambda frame, event, _: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(names) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", action="store_true", help="only the calls of Python functions, as JSON")
    options = parser.parse_args()
    found = {}
    with idle_driver():
        for case in [case for case in small_cases() if case.name in ("bf16", "Qwen-Image")]:
            function = call(case)
            for _ in range(3):  # compiles, then is known
                function()
            found[str(case)] = python_calls(function)
            if not options.calls:
                print(f"{str(case):40} {microseconds(function):6.1f} us {found[str(case)]:4} calls", flush=True)
    if options.calls:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
