"""`pytest benchmarks --benchmark-only`: on the current GPU at the model's sizes, without one on a CPU thread at small ones.

Everything of pytest-benchmark works: `--benchmark-save`, `--benchmark-autosave`, `--benchmark-compare`, `--benchmark-json`,
`-k "euler_step and not compiled"` (torch.compile takes most of the time on a CPU). `--rows FILE.csv` appends what the plots
are drawn from. A benchmark's `extra_info` holds its bytes, FLOPs, GB/s, TFLOP/s, share of this machine's measured ceiling,
errors, dtype, shapes and provenance.
"""

import functools
import time
from pathlib import Path

import pytest
import torch

from .operators.suite import FIELDS, rows, summary
from .operators.suite import measure as measure_runs
from .shared.ceilings import Ceilings, measure_ceilings
from .shared.machine import provenance
from .shared.rows import RowFile
from .shared.shapes import SHAPES

torch.set_num_threads(1)
GROUPS, ROWS = pytest.StashKey[list](), pytest.StashKey[RowFile]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows", type=Path, metavar="CSV", help="append a row for each benchmark, as the plots read them")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--rows")
    if path is not None:
        try:
            config.stash[ROWS] = RowFile(path, FIELDS)
        except OSError as error:
            raise pytest.UsageError(f"--rows {path}: nothing can be written there: {error}") from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a CPU the time of the one thread that works, so that other work on the machine does not count; see `suite.clock`."""
    chosen = any(argument.startswith("--benchmark-timer") for argument in config.invocation_params.args)
    if not chosen and not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=time.thread_time), append=False)  # the first one counts


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    """Versions, the GPU and its driver, into every result file."""
    machine_info["qwen_fast"] = provenance(_device())


@pytest.hookimpl(optionalhook=True, hookwrapper=True)
def pytest_benchmark_group_stats(config: pytest.Config):
    outcome = yield
    config.stash[GROUPS] = outcome.get_result()
    if ROWS in config.stash:
        for row in rows(config.stash[GROUPS]):
            config.stash[ROWS].add(row)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """pytest-benchmark's own table has no room for rates."""
    lines = list(summary(config.stash.get(GROUPS, [])))
    if lines and not config.getoption("benchmark_quiet"):
        terminalreporter.section("reached: bytes and FLOPs over the median", sep="-", yellow=True)
        for line in lines:
            terminalreporter.line(line)
    if ROWS in config.stash:
        written = config.stash[ROWS]
        terminalreporter.line(written.note or f"rows are in {written.path}")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return _device()


@pytest.fixture(scope="session")
def origin(device) -> dict[str, str]:
    """Where and with what this session measures."""
    return provenance(device)


@functools.cache
def _ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    if device.type == "cuda":
        return measure_ceilings(device, dtype, seconds=1.0)
    return measure_ceilings(device, dtype, seconds=0.2, shape=SHAPES["middle"], tokens=272)


@pytest.fixture
def measure(benchmark, device, origin, request: pytest.FixtureRequest):
    """`suite.measure` for this benchmark: takes runs, check, pieces, the dtype that names the ceilings, and more to note."""

    def run(runs, check, pieces, *, dtype: torch.dtype, **info) -> None:
        measure_runs(
            benchmark,
            runs,
            check,
            pieces,
            ceilings=functools.partial(_ceilings, device, dtype),
            max_time=float(request.config.getoption("benchmark_max_time")),
            min_rounds=request.config.getoption("benchmark_min_rounds"),
            device=device.type,
            dtype=str(dtype).removeprefix("torch."),
            provenance=origin,
            **info,
        )

    return run
