"""The profile of a picture: what is read off a trace, by hand-made ones like a GPU's, and the command on the CPU."""

import csv
import gzip
import json

import pytest
import torch

from benchmarks.profiling import run as profiling
from benchmarks.profiling import trace
from benchmarks.profiling.trace import busy, idle_gaps, kernel_table, memory_timeline, read, synchronisations, work_of
from qwen_fast.cli import main
from support.cli import refused

BF16 = "c10::BFloat16"


class Recording:
    """Events as Kineto writes them for CUDA: operators on the host, calls of the runtime, activities of two streams."""

    def __init__(self):
        self.events, self._correlation = [], 0

    def host(self, kind: str, name: str, begin: float, duration: float, thread: int = 1, **args) -> None:
        event = {"ph": "X", "cat": kind, "name": name, "pid": 1, "tid": thread, "ts": begin, "dur": duration, "args": args}
        self.events.append(event)

    def op(self, name: str, begin: float, duration: float, *shapes: tuple, kind: str = BF16, concrete=(), **more) -> None:
        """An operator whose arguments are tensors of `shapes`, then the `concrete` ones."""
        args = {
            "Input Dims": [list(shape) for shape in shapes] + [[] for _ in concrete],
            "Input type": [kind] * len(shapes) + ["Scalar"] * len(concrete),
            "Concrete Inputs": [""] * len(shapes) + [str(value) for value in concrete],
        }
        self.host("cpu_op", name, begin, duration, **args, **more)

    def launch(
        self, kernel: str, at: float, begin: float, duration: float, stream: int = 7, kind="kernel", call=None, device=0
    ):
        """A call of the runtime at `at`, and what it makes the device do."""
        self._correlation += 1
        same = {"correlation": self._correlation}
        self.host("cuda_runtime", call or "cudaLaunchKernel", at, 1.0, **same)
        args = {"device": device, "stream": stream, **same}
        self.events.append(
            {"ph": "X", "cat": kind, "name": kernel, "pid": device, "tid": stream, "ts": begin, "dur": duration, "args": args}
        )

    def memory(self, at: float, allocated: int, device_type: int = 1) -> None:
        args = {"Total Allocated": allocated, "Total Reserved": 2 * allocated, "Device Type": device_type, "Device Id": 0}
        self.events.append({"ph": "i", "name": "[memory]", "ts": at, "args": args})


@pytest.fixture
def recording():
    """A loop from 100 to 300: attention and a product on stream 7, an overlapping copy on stream 8, two waits."""
    r = Recording()
    r.host("user_annotation", "qwen_fast::text", 0, 90)
    r.launch("text_kernel", 10, 20, 30)
    r.host("user_annotation", "qwen_fast::denoise", 100, 200)
    r.host("user_annotation", "qwen_fast::step", 100, 90)
    r.op("qwen_fast::linear_gelu", 105, 10, (64, 32), (128, 32), (128,))
    r.op("aten::_addmm_activation", 106, 8, (128,), (64, 32), (32, 128))
    r.launch("gemm", 107, 120, 40)
    r.launch("reduce", 110, 160, 5)
    r.op("aten::mm", 120, 10, (64, 32), (32, 16))
    r.launch("gemm", 121, 170, 10)
    r.launch("Memcpy HtoD (Pinned -> Device)", 130, 175, 20, stream=8, kind="gpu_memcpy", call="cudaMemcpyAsync")
    r.op("aten::item", 140, 30)
    r.op("aten::_local_scalar_dense", 141, 28)
    r.launch("Memcpy DtoH (Device -> Pageable)", 142, 200, 2, kind="gpu_memcpy", call="cudaMemcpyAsync")
    r.host("cuda_runtime", "cudaStreamSynchronize", 144, 20.0, correlation=900)
    r.host("cuda_runtime", "cudaEventSynchronize", 180, 5.0, correlation=901)
    r.host("cuda_runtime", "cudaMalloc", 190, 3.0, correlation=902)
    r.launch("late", 250, 260, 10)
    r.host("cuda_runtime", "cudaDeviceSynchronize", 400, 50.0, correlation=903)
    r.memory(50, 1000)
    r.memory(150, 5000)
    r.memory(160, 300, device_type=0)
    return r


def test_who_launched_what(recording):
    found = read(recording.events)
    assert found.on_device and found.loop == (100, 300)
    by_name = {activity.name: activity for activity in found.activities}
    assert by_name["reduce"].launch.op["name"] == "qwen_fast::linear_gelu", "ours, not torch's inside it"
    assert (by_name["late"].launch.op, by_name["late"].launch.stage) == (None, "denoise")
    assert by_name["text_kernel"].launch.stage == "text" and by_name["reduce"].launch.stage == "step"
    assert {a.name for a in found.in_loop()} == set(by_name) - {"text_kernel"}


def test_the_kernel_table_adds_up(recording):
    rows = kernel_table(read(recording.events).in_loop())
    assert [(r.kernel, r.op, r.launches, r.microseconds) for r in rows[:2]] == [
        ("gemm", "qwen_fast::linear_gelu", 1, 40),
        ("Memcpy HtoD (Pinned -> Device)", "", 1, 20),
    ]
    assert sum(row.microseconds for row in rows) == 40 + 5 + 10 + 20 + 2 + 10
    assert sum(row.share for row in rows) == pytest.approx(1)
    named = {(row.kernel, row.op): row for row in rows}
    gelu, mm = named["gemm", "qwen_fast::linear_gelu"], named["gemm", "aten::mm"]
    assert gelu.bytes == 2 * (64 * 32 + 128 * 32 + 64 * 128 + 128) and gelu.flops == 2 * 64 * 32 * 128
    assert mm.bytes == 2 * (64 * 32 + 32 * 16 + 64 * 16) and mm.flops == 2 * 64 * 32 * 16
    assert gelu.tflop_per_s == pytest.approx(gelu.flops / 40e-6 / 1e12) and mm.gb_per_s == pytest.approx(mm.bytes / 10e-6 / 1e9)
    reduce = named["reduce", "qwen_fast::linear_gelu"]
    assert reduce.bytes == 0 and reduce.gb_per_s is None, "an operator's work counts once, for its longest kernel"


def test_the_share_of_a_ceiling_is_that_of_the_tighter_bound():
    row = trace.Row("k", "aten::mm", 1, 10.0, bytes=10_000, flops=1_000_000, known=10.0)
    assert row.of_ceiling(2e9, 1e12, 1.0) == pytest.approx(0.5)  # 5 us of copying, 1 us of multiplying
    assert row.of_ceiling(1e12, 2e11, 1.0) == pytest.approx(0.5)
    attention = trace.Row("k", "qwen_fast::joint_attention", 1, 10.0, bytes=1, flops=1_000_000, known=10.0)
    assert attention.of_ceiling(1e12, 1.0, 4e11) == pytest.approx(0.25)
    assert trace.Row("k", "").of_ceiling(1, 1, 1) is None


def op_event(name: str, *shapes, kind: str = BF16, concrete=()) -> dict:
    r = Recording()
    r.op(name, 0, 1, *shapes, kind=kind, concrete=concrete)
    return r.events[0]


def test_work_of_operators():
    qkv = (4126, 24, 128)
    attention = op_event("qwen_fast::joint_attention", qkv, qkv, qkv, (1, 2), concrete=(4126,))
    assert work_of(attention) == (4 * 4126 * 3072 * 2, 4 * 4126**2 * 3072)
    packed = op_event("qwen_fast::joint_attention", *[(8252, 24, 128)] * 3, (2, 2), concrete=(4126,))
    assert work_of(packed)[1] == 2 * 4 * 4126**2 * 3072
    assert work_of(op_event("aten::bmm", (3, 8, 4), (3, 4, 5), kind="float")) == (4 * 3 * (32 + 20 + 40), 2 * 3 * 8 * 4 * 5)
    for name, shape in (
        ("_scaled_dot_product_cudnn_attention", (1, 24, 77, 128)),
        ("_flash_attention_forward", (1, 77, 24, 128)),
    ):
        assert work_of(op_event(f"aten::{name}", shape, shape, shape)) == (4 * 24 * 77 * 128 * 2, 4 * 24 * 77 * 77 * 128)
    assert work_of(op_event("aten::scaled_dot_product_attention", *[(1, 24, 77, 128)] * 3)) is None, "the ones inside it work"
    norm = op_event("qwen_fast::ada_layer_norm", (100, 64), (20, 2, 64), (20, 2, 64), (1,), concrete=(3,))
    assert work_of(norm) == (2 * (2 * 100 + 4) * 64, 9 * 6400)


@pytest.mark.parametrize(
    "event", [{"name": "aten::mm", "args": {}}, op_event("aten::mm"), op_event("qwen_fast::unknown", (1,))]
)
def test_work_that_is_not_known_is_none(event):
    assert work_of(event) is None


def test_host_synchronisations_of_the_loop(recording):
    found = {(s.kind, s.call, s.op): s for s in synchronisations(read(recording.events))}
    assert set(found) == {
        ("wait", "cudaStreamSynchronize", "aten::_local_scalar_dense"),
        ("copy to the host", "cudaMemcpyAsync", "aten::_local_scalar_dense"),
        ("wait", "cudaEventSynchronize", ""),
        ("allocation", "cudaMalloc", ""),
    }
    stream = found["wait", "cudaStreamSynchronize", "aten::_local_scalar_dense"]
    assert (stream.count, stream.microseconds, stream.stage) == (1, 20.0, "step")


@pytest.mark.parametrize(
    "call", ["cudaMallocAsync", "cudaFreeAsync", "cudaLaunchKernel", "cudaStreamWaitEvent", "cuEventRecord"]
)
def test_what_does_not_wait_is_not_listed(recording, call):
    before = len(synchronisations(read(recording.events)))
    recording.host("cuda_runtime", call, 200, 1.0, correlation=950)
    assert len(synchronisations(read(recording.events))) == before


def test_gaps_are_those_of_all_streams_together(recording):
    activities = read(recording.events).in_loop()
    assert busy(activities) == {0: [(120, 165), (170, 195), (200, 202), (260, 270)]}
    gaps = idle_gaps(activities)
    assert [(gap.begin, gap.duration) for gap in gaps] == [(202, 58), (165, 5), (195, 5)]
    assert (gaps[0].after, gaps[0].before) == ("Memcpy DtoH (Device -> Pageable)", "late")
    assert gaps[2].after == "Memcpy HtoD (Pinned -> Device)", "the copy on stream 8 ended last"
    assert [gap.duration for gap in idle_gaps(activities, least=6)] == [58]


def test_a_stream_that_is_done_early_makes_no_gap():
    r = Recording()
    for begin, duration, stream in ((0, 100, 7), (10, 5, 8), (120, 10, 7)):
        r.launch("k", begin, begin, duration, stream=stream)
    assert [(gap.begin, gap.duration) for gap in idle_gaps(read(r.events).activities)] == [(100, 20)]


def test_two_devices_have_gaps_of_their_own():
    r = Recording()
    for device, begin in ((0, 0), (0, 30), (1, 10), (1, 50)):
        r.launch("k", begin, begin, 10, device=device)
    assert {(gap.device, gap.begin, gap.duration) for gap in idle_gaps(read(r.events).activities)} == {(0, 10, 20), (1, 20, 30)}


def test_a_kernel_of_a_graph_belongs_to_its_stage():
    r = Recording()
    r.host("user_annotation", "qwen_fast::denoise", 0, 100)
    r.launch("captured", 10, 20, 5, call="cudaGraphLaunch")
    (row,) = kernel_table(read(r.events).in_loop())
    assert (row.kernel, row.op, row.gb_per_s) == ("captured", "", None)


def test_memory_over_time(recording):
    rows = memory_timeline(read(recording.events))
    assert [(row["device"], row["allocated"], row["reserved"], row["stage"]) for row in rows] == [
        ("cuda:0", 1000, 2000, "text"),
        ("cuda:0", 5000, 10000, "step"),
        ("cpu", 300, 600, "step"),
    ]
    assert rows[1]["seconds"] == pytest.approx(1e-4)


def test_the_report_of_a_gpus_trace(recording, tmp_path):
    files = profiling.Files(tmp_path / "profile")
    files.prepare()
    ceilings = profiling.Ceilings("GPU", "bfloat16", 4e12, {"bfloat16": 8e14}, 6e14, "flash", {}, 1.0, "CUDA events")
    text = profiling.write(read(recording.events), files, ceilings, profiling.Counter({"pipeline.py:7": 3}))
    assert text == files.report.read_text().rstrip("\n")
    assert "4 host synchronisations in the loop:" in text and "wait: cudaStreamSynchronize in aten::_local_scalar_dense" in text
    assert "device idle for 0.068 ms of 0.150 ms in the loop (45.3%), 3 gaps" in text
    assert "     3  pipeline.py:7" in text and "most memory on cuda:0" in text
    with files.kernels.open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["kernel"] == "gemm" and float(rows[0]["of_ceiling"]) == pytest.approx(28928 / 4e12 * 1e6 / 40, rel=1e-4)


def test_an_empty_trace_is_no_error(tmp_path):
    files = profiling.Files(tmp_path)
    files.prepare()
    assert "0 operators in the loop" in profiling.write(read([]), files, None)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [False, True], ids=["fast", "stock"])
def test_a_picture_is_profiled(checkpoint, tmp_path, capsys, monkeypatch, stock):
    monkeypatch.setattr("qwen_fast.cli.profile._ceilings", lambda path, device, dtype: None)
    arguments = ["--model", str(checkpoint), "--size", "64x64", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "p")]
    assert main(["profile", *arguments, *["--stock"] * stock]) == 0
    out = capsys.readouterr().out
    with gzip.open(tmp_path / "p" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    table, report = out.split("stage         seconds    share\n")[1], (tmp_path / "p" / "report.txt").read_text()
    assert {line.split()[0] for line in table.split("total")[0].splitlines()} >= {"text", "schedule", "denoise", "vae", "other"}
    assert report.startswith("stage         seconds    share\n"), "one stage table: generate's, bench's and this one"
    names = {event["name"] for event in events}
    assert {"qwen_fast::text", "qwen_fast::schedule", "qwen_fast::denoise", "qwen_fast::vae"} <= names
    assert ("qwen_fast::joint_attention" in names) is not stock
    loop = [e for e in events if e["name"] == "qwen_fast::denoise"]
    assert len(loop) == 1, "one picture, and not the one that warms up"
    with (tmp_path / "p" / "kernels.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = sum(float(row["microseconds"]) for row in rows)
    # Of the loop's wall time, which holds other processes' work where the machine is busy.
    assert 0.05 * loop[0]["dur"] < measured <= 1.01 * loop[0]["dur"]
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu" if stock else "qwen_fast::joint_attention"
    calls = {row["operator"]: int(row["launches"]) for row in rows}
    assert calls[attention] == (8 if stock else 4), "two blocks, two steps, prompt and negative prompt packed in ours"
    assert (tmp_path / "p" / "memory.csv").stat().st_size > 500 and (tmp_path / "p" / "report.txt").read_text() in out + "\n"
    assert "nsys profile --trace=cuda,nvtx" in out and "ncu --profile-from-start off" in out
    assert ("--stock" in out.splitlines()[-1]) is stock and "--nvtx" in out.splitlines()[-1]


def test_bad_input_is_refused_before_anything_is_drawn(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert "the profile cannot be written there" in refused(capsys, "profile", "--device", "cpu", "--out", "file/profile")
    assert "invalid choice: 'huge'" in refused(capsys, "profile", "--device", "cpu", "--shape", "huge")
    assert "--graph" in refused(capsys, "profile", "--stock", "--graph")
    if not torch.cuda.is_available():
        assert "Nsight on a CUDA device" in refused(capsys, "profile", "--nvtx")


@pytest.mark.gpu
def test_a_picture_is_profiled_on_a_gpu(checkpoint, tmp_path, capsys):
    arguments = ["--model", str(checkpoint), "--size", "256x256", "--steps", "2", "--device", "cuda", "--out", str(tmp_path)]
    arguments += ["--snapshot"]
    assert main(["profile", *arguments]) == 0
    out = capsys.readouterr().out
    assert "host synchronisations in the loop" in out and "device idle for" in out
    with (tmp_path / "kernels.csv").open() as file:
        rows = {row["operator"]: row for row in csv.DictReader(file)}
    assert float(rows["qwen_fast::qk_norm_rope"]["gb_per_s"]) > 0
    assert (tmp_path / "memory_snapshot.pickle").stat().st_size > 1000
    assert main(["profile", *arguments, "--nvtx"]) == 0
