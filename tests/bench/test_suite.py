"""The benchmarks run, their figures are right, and pytest-benchmark's own options work on them."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")

from pytest_benchmark.session import PerformanceRegression

from benchmarks.operators import bench_operators, suite
from benchmarks.operators.arguments import TRAFFIC
from benchmarks.operators.suite import DeviceClock, measure, sets
from benchmarks.operators.work import Piece, count, floor_seconds
from benchmarks.parts.transformer import StepForwards
from benchmarks.shared.ceilings import Ceilings
from benchmarks.shared.rows import read
from benchmarks.shared.shapes import SHAPES, PictureCase
from qwen_fast_kernels import ada_layer_norm, euler_step

ROOT = Path(__file__).parents[2]
ROUND = 2.0**-11  # seconds between two readings of `tick`, exact in binary
CASE = "euler_step-fp32-op and not cfg"  # of these there is one
BYTES, FLOPS = 3 * 256 * 64 * 4, 2 * 256 * 64  # of it on a CPU: latents and velocity read, latents written
CEILINGS = Ceilings("CPU", "float32", 1e9, {"float32": 1e12}, 2e12, "math", {}, 1.0, "made up")
_now = 0.0


def tick() -> float:
    """A timer that moves on by `ROUND` whenever it is read."""
    global _now
    _now += ROUND
    return _now


def tick_slowly() -> float:
    """One that needs three times as long."""
    tick()
    tick()
    return tick()


class FakeEvent:
    """A CUDA event on a device that takes `ROUND` from one record to the next and writes down what is asked of it."""

    log: list[str] = []

    def record(self) -> None:
        self.log.append("record")
        self.milliseconds = 1e3 * ROUND * self.log.count("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.milliseconds - self.milliseconds


_fake_clock = DeviceClock(FakeEvent, lambda: FakeEvent.log.append("pause"))


def fake_device_clock() -> float:
    return _fake_clock()


@pytest.fixture
def session(monkeypatch, tmp_path):
    """A function that runs pytest on the benchmarks in this process: arguments -> (exit code, benchmarks of its JSON)."""
    # pytest-benchmark measures nothing under xdist, whose environment a worker's children inherit.
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)

    def run(*arguments: str, timer: str | None = "tick") -> tuple[int, list[dict]]:
        path = tmp_path / "result.json"
        path.unlink(missing_ok=True)
        common = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        own = ["--benchmark-only", f"--benchmark-json={path}"]
        if timer is not None:
            own.append(f"--benchmark-timer={__name__}.{timer}")
        code = pytest.main(
            [*common, *own, "-k", CASE, *arguments, str(ROOT / "benchmarks" / "operators" / "bench_operators.py")]
        )
        # Nothing is written when there is nothing to write.
        return code, json.loads(path.read_text())["benchmarks"] if path.exists() and path.stat().st_size else []

    return run


@pytest.mark.slow
def test_every_benchmark_runs_once():
    """Those of torch.compile take minutes on a CPU: one of them."""
    selection = "not compiled or euler_step-bf16-compiled and not cfg"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", selection, "benchmarks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and int(last.split(" passed")[0].split()[-1]) > 70, done.stdout[-3000:]
    assert "reached" not in done.stdout  # nothing was timed


def test_figures_follow_from_the_time_and_the_declared_traffic(session, capsys):
    code, (found,) = session()
    info, table = found["extra_info"], capsys.readouterr().out
    assert code == 0 and found["stats"]["median"] == ROUND
    assert (info["bytes"], info["flops"], info["dtype"], info["variant"]) == (BYTES, FLOPS, "float32", "op")
    assert info["GB/s"] == pytest.approx(BYTES / ROUND / 1e9) and info["TFLOP/s"] == pytest.approx(FLOPS / ROUND / 1e12)
    assert 0 < info["share_of_ceiling"] and info["ceiling"] == "copy"
    assert info["shapes"] == [[1, 256, 64], [1, 256, 64], [21], [1]]
    assert info["buffer_sets"] == 2 and info["first_call_seconds"] > 0 and 0 < info["rms_error"] < 1e-6
    assert info["provenance"]["torch"] == torch.__version__ and info["provenance"]["machine"]
    header, group, row = table.split("reached: bytes and FLOPs over the median")[1].strip("- \n").splitlines()[:3]
    assert header.split() == ["median", "x", "stock", "GB/s", "TFLOP/s", "of", "ceiling", "ceiling", "error"]
    assert group.startswith("euler_step: fp32 cpu")
    assert row.split()[:3] == ["op", "488.28", "us"] and f"{BYTES / ROUND / 1e9:.1f}" in row.split()


def test_rows(session, tmp_path, capsys):
    """With no timer named, a CPU's is the thread's own."""
    path = tmp_path / "rows" / "operators.csv"
    for times in (1, 2):
        code, (found,) = session(f"--rows={path}", "--benchmark-max-time=0.01", timer=None)
        written = read(path)
        assert code == 0 and len(written) == times and f"rows are in {path}" in capsys.readouterr().out
    row = written[-1]
    assert row["clock"] == "thread_time" and float(row["seconds_p50"]) == pytest.approx(found["stats"]["median"], rel=1e-4)
    assert (row["bytes"], row["flops"], row["variant"], row["dtype"]) == (str(BYTES), str(FLOPS), "op", "float32")
    assert row["torch"] == torch.__version__ and row["group"] == "euler_step: fp32 cpu"


def test_rows_that_cannot_be_written_stop_the_session(session, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert session(f"--rows={tmp_path / 'file' / 'rows.csv'}")[0] == pytest.ExitCode.USAGE_ERROR
    assert "--rows" in capsys.readouterr().err


def test_save_and_compare(session, tmp_path):
    storage = f"--benchmark-storage={tmp_path / 'storage'}"
    code, _ = session(storage, "--benchmark-save=first")
    (saved,) = (tmp_path / "storage").rglob("*_first.json")
    assert code == 0 and json.loads(saved.read_text())["benchmarks"][0]["extra_info"]["bytes"] == BYTES
    assert json.loads(saved.read_text())["machine_info"]["qwen_fast"]["torch"] == torch.__version__
    compared = [storage, "--benchmark-compare", "--benchmark-compare-fail=median:50%"]
    assert session(*compared)[0] == 0
    with pytest.raises(PerformanceRegression):
        session(*compared, timer="tick_slowly")


def test_a_wrong_result_is_not_timed(session, monkeypatch, capsys):
    right = bench_operators.subject

    def wrong(case, variant, arguments):
        run, comparable = right(case, variant, arguments)
        return lambda: run() * 1.001, comparable

    monkeypatch.setattr(bench_operators, "subject", wrong)
    code, found = session()
    output = capsys.readouterr().out
    assert code == 1 and not found and "exceeds its budget" in output and "reached" not in output


def test_the_device_clock_is_a_timer_of_pytest_benchmark(session):
    FakeEvent.log.clear()
    code, (found,) = session("--benchmark-min-rounds=3", "--benchmark-max-time=1e-9", timer="fake_device_clock")
    assert code == 0 and found["stats"]["data"] == [ROUND] * 3
    assert FakeEvent.log == ["pause", "record", "record", "synchronize"] * 3


def test_the_device_clock_forgets_a_round_cut_short():
    FakeEvent.log.clear()
    clock = DeviceClock(FakeEvent, lambda: None)
    clock()
    clock.reset()
    assert [clock(), clock(), clock(), clock()] == [0.0, ROUND, 0.0, ROUND]


@pytest.mark.parametrize(("host", "timer"), [(False, suite.DEVICE_CLOCK), (True, suite.synchronized_clock)])
def test_what_is_timed_on_a_gpu(monkeypatch, host, timer):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert suite.clock(host=host).kwargs == {"timer": timer}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not suite.clock(host=host).kwargs  # a CPU's is chosen in conftest.py, after the command line is read


@pytest.mark.parametrize(("nbytes", "count"), [(4_000_000, 30), (10**9, 2), (1, 64), (0, 64)])
def test_buffers_overflow_the_cache_twice(monkeypatch, nbytes, count):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=60_000_000))
    assert sets(torch.device("cuda", 0), nbytes) == count
    assert sets(torch.device("cpu"), nbytes) == 2


class Fixture:
    """As much of pytest-benchmark's fixture as `measure` uses; every round takes 2 s."""

    enabled, stats = True, types.SimpleNamespace(stats=types.SimpleNamespace(median=2.0))

    def __init__(self) -> None:
        self.extra_info: dict = {}

    def pedantic(self, target, setup, rounds) -> None:
        for _ in range(rounds):
            arguments, keywords = setup()
            target(*arguments, **keywords)


def test_rounds_take_the_buffers_by_turns():
    calls, benchmark = [], Fixture()
    runs = [lambda name=name: calls.append(name) for name in "abc"]
    pieces = [Piece("euler_step", 10**9, 10), Piece("joint_attention", 10, 10**12)]
    measure(benchmark, runs, lambda _: {}, pieces, ceilings=lambda: CEILINGS, max_time=0.0, min_rounds=5, variant="op")
    assert "".join(calls) == "a" + "abc" + "abcab"  # checked, warmed up, timed
    info = benchmark.extra_info
    assert info["GB/s"] == pytest.approx(0.5) and info["TFLOP/s"] == pytest.approx(0.5) and info["variant"] == "op"
    assert info["share_of_ceiling"] == pytest.approx(0.75) and info["ceiling"] == "copy"  # (1 s + 0.5 s) of 2 s


def test_rounds_fill_the_time(monkeypatch):
    seconds, calls = iter(range(100)), []  # every reading half a second later: a call takes that
    monkeypatch.setattr(suite, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds) / 2))
    runs, pieces = [lambda: calls.append(0)], [Piece("euler_step", 1, 1)]
    measure(Fixture(), runs, lambda _: {}, pieces, ceilings=lambda: CEILINGS, max_time=6.5, min_rounds=5)
    assert len(calls) == 2 + 13


def test_rounds_are_bounded():
    calls, pieces = [], [Piece("euler_step", 1, 1)]
    runs = [lambda: calls.append(0)]
    measure(Fixture(), runs, lambda _: {}, pieces, ceilings=lambda: CEILINGS, max_time=1e9, min_rounds=5)
    assert len(calls) == 2 + 1000


def test_floor():
    pieces = [Piece("copy", 10**9, 0), Piece("mm", 1, 10**12), Piece("mm", 1, 10**12), Piece("joint_attention", 1, 10**12)]
    assert floor_seconds(pieces, CEILINGS) == pytest.approx({"copy": 1.0, "product": 2.0, "attention": 0.5})


def test_work_is_counted():
    x, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    latents, sigmas, index = torch.randn(1, 4, 64), torch.linspace(1, 0, 3) ** 2, torch.zeros(1, dtype=torch.int32)
    query = torch.randn(1, 2, 6, 8)
    with torch.no_grad():
        (product,) = count(lambda: F.linear(x, weight, bias).add(1))
        (step,) = count(lambda: euler_step(latents, latents, sigmas, index))
        (attention,) = count(lambda: F.scaled_dot_product_attention(query, query, query))
    assert product[1:] == (4 * (5 * 8 + 3 * 8 + 3 + 5 * 3), 2 * 5 * 8 * 3)
    assert step == ("euler_step", 3 * 4 * 256, 2 * 256)
    assert attention[1:] == (4 * 4 * query.numel(), 4 * 2 * 6 * 6 * 8) and attention.kind == "attention"


def test_arguments_at_their_defaults_are_counted_too(monkeypatch):
    """They do not come through the dispatcher."""
    seen = []
    monkeypatch.setitem(TRAFFIC, "ada_layer_norm", lambda *arguments: seen.append(arguments) or (1, 1))
    x, table, index = torch.randn(5, 8), torch.randn(3, 2, 8), torch.zeros(1, dtype=torch.int32)
    with torch.no_grad():
        count(lambda: ada_layer_norm(x, table, table, index, 2))
    ((*_, txt_rows, token_rows, eps),) = seen
    assert (txt_rows, token_rows, eps) == (2, None, 1e-6)


def test_the_count_of_a_step_agrees_with_the_ladders_arithmetic():
    """Two ways to the FLOPs of a step: counted while it runs, and from the sizes of the model."""
    with torch.no_grad():
        case = StepForwards("middle", 128, (14, 6), torch.float32)
        case.from_table_packed()  # fills the table
        pieces = count(case.from_table_packed)
    large = [piece for piece in pieces if "attention" in piece.op or "linear" in piece.op or "mm" in piece.op]
    work = PictureCase(128, 128, 4, True, 1, 14, SHAPES["middle"]).work()
    counted = {kind: sum(piece.flops for piece in large if piece.kind == kind) for kind in ("product", "attention")}
    # The last block's text needs no queries, but has them (20 rows); the latents enter once for both predictions (64 rows).
    queries, entered = 2 * 20 * 512 * 512, 2 * 64 * 64 * 512
    assert counted["product"] == work.product_flops + queries - entered
    assert counted["attention"] == work.attention_flops + sum(4 * text * (64 + text) * 512 for text in (14, 6))
