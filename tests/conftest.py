"""One process-wide set-up: without a GPU, Triton interprets the kernels; with one, the same tests run natively."""

import gc
import importlib.util
import mmap
import os
from pathlib import Path

import pytest

# Before numpy: on few cores its threaded BLAS makes interpreted matrix products 8 to 12 times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

HAS_CUDA = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_CUDA:
    # Before the first `import triton`, which diffusers performs.
    os.environ["TRITON_INTERPRET"] = "1"
    if HAS_TRITON:
        from support import interpreter

        interpreter.install()
torch.set_num_threads(1)

NO_GPU = "needs a CUDA device"
NO_TRITON = "needs Triton"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-archs", action="store_true", help="compile for all six GPU architectures, not only two")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; listed at the end of a run that had none")
    config.addinivalue_line("markers", "triton: launches a Triton kernel")
    config.addinivalue_line("markers", "slow: takes long; `make test` leaves it to `make test-slow`")
    # numpy speaks up where the hardware quietly gives inf or NaN, which is what the tests then look at.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_sessionstart() -> None:
    # The tests read what their children print. This run's own colours are settled by now.
    for name in ("FORCE_COLOR", "PY_COLORS", "MYPY_FORCE_COLOR"):
        os.environ.pop(name, None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif not HAS_TRITON and item.get_closest_marker("triton"):
            item.add_marker(pytest.mark.skip(reason=NO_TRITON))


def pytest_collection_finish() -> None:
    """What is there before the first test stays to the end: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    names = sorted(report.nodeid for report in skipped if NO_GPU in str(report.longrepr))
    if names:
        terminalreporter.section(f"{len(names)} skipped for want of a GPU")
        for name in names:
            terminalreporter.line(name)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the operator tests run: natively on the current GPU if there is one, else on the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if HAS_CUDA else torch.device("cpu")


@pytest.fixture
def emulated_cuda():
    """A CUDA device of our own for the time of a test; what it saw is in `.notes`. See tests/support/emulated_cuda."""
    if HAS_CUDA:
        pytest.skip("with a GPU the tests marked gpu take its place")
    from support import emulated_cuda as package

    gc.collect()  # pinned memory of tests before, which is given back behind a wait for the device
    with package.emulated_cuda() as device:
        yield device


@pytest.fixture
def nan_filled_empties():
    """Every torch.empty*, also one inside torch, is filled with NaN (integers: their maximum) instead of old memory."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def one_far_program(monkeypatch: pytest.MonkeyPatch):
    """Make the interpreter run a single program with a large id, on tensors of which hardly a page is ever touched.

    Returns a function of (program, numel, dtype, count) that gives `count` one-dimensional tensors of `numel` elements.
    They share one reserved address range and start 1 MiB apart, so only a few elements at their ends are their own.
    Before each lies as much room again: an offset that wrapped to a negative number reads zeros and does not crash.
    """
    if HAS_CUDA:
        pytest.skip("with a GPU a test of the real size takes its place")
    from triton.runtime import interpreter

    def far(program: int, numel: int, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
        def set_grid_idx(builder, x: int, y: int, z: int) -> None:
            builder.grid_idx = (x + program, y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", set_grid_idx)
        # It copies the storages back, from and to the same place for CPU tensors: that would touch every page.
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
        apart = 2**20 // dtype.itemsize
        total = 2 * numel + count * apart
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it since 3.13; Linux's value
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        reserved = torch.frombuffer(mmap.mmap(-1, total * dtype.itemsize, flags=flags), dtype=dtype)
        return [reserved[numel + i * apart :][:numel] for i in range(count)]

    return far


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete small Qwen-Image checkpoint in diffusers' folder layout, seeded, shared by the session: read only."""
    from qwen_fast.testing import build_checkpoint

    path = tmp_path_factory.mktemp("checkpoint") / "qwen-image-tiny"
    build_checkpoint(path, seed=0)
    return path


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch):
    """A proof's stand-in for a GPU in this process, without a fault: the CPU, whose kernels are interpreted."""
    from support import stand_in

    stand_in.interpret(monkeypatch.setattr, {})
    return torch.device("cpu")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch):
    """Seeds faults into a proof's child process, or (None) forbids one; returns the list of children started so far."""
    from qwen_fast_kernels import proof
    from qwen_fast_kernels._child import NoChild
    from support import stand_in

    started: list[str] = []

    def of(faults: dict[str, str] | None) -> list[str]:
        def command(module: str) -> list[str]:
            if faults is None:
                raise NoChild("the test forbids it")
            started.append(module)
            return stand_in.child(faults)

        monkeypatch.setattr(proof, "command", command)
        return started

    return of
