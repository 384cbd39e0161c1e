"""One picture under the profiler: a trace for Perfetto, its kernels, host synchronisations, gaps and memory, as files.

`qwen-fast profile` is the command. The picture is drawn before it is profiled, so that nothing is compiled or captured in it.
"""

import contextlib
import csv
import pickle
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..shared.ceilings import Ceilings
from .trace import Row, Trace, busy, idle_gaps, kernel_table, load, memory_timeline, read, synchronisations

_ROWS, _GAPS = 25, 10  # of a printed table; the files hold all
_MEMORY_EVENTS = 200_000


@dataclass
class Files:
    """What a profile is written to."""

    folder: Path

    def __post_init__(self) -> None:
        names = {"trace": "trace.json.gz", "kernels": "kernels.csv", "memory": "memory.csv", "plot": "memory.png"}
        names |= {"snapshot": "memory_snapshot.pickle", "report": "report.txt", "summary": "summary.txt"}
        for name, file in names.items():
            setattr(self, name, self.folder / file)

    def prepare(self) -> None:
        """Make the folder, and find out before anything is drawn that nothing can be written there.

        Raises:
            OSError: it cannot.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.report.write_text("")
        except OSError as error:
            raise OSError(
                f"{self.folder}: the profile cannot be written there ({error.strerror}); name another folder."
            ) from error


def profile_call(call: Callable[[], object], files: Files, device: torch.device, *, snapshot: bool = False) -> Trace:
    """Run `call` under the profiler and write its trace.

    Args:
        call: draws the picture; it has run before.
        files: `files.prepare()` was called.
        snapshot: on CUDA the allocator's history too.
    """
    on_gpu = device.type == "cuda"
    snapshot = snapshot and on_gpu
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    if on_gpu:
        torch.cuda.synchronize(device)
    if snapshot:
        torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
    try:
        with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            call()
            if on_gpu:
                torch.cuda.synchronize(device)
        if snapshot:
            with files.snapshot.open("wb") as file:
                pickle.dump(torch.cuda.memory._snapshot(), file)
    finally:
        if snapshot:
            torch.cuda.memory._record_memory_history(enabled=None)
    # At once: to write the trace and to read it again takes longer than the picture, and a run may be cut short there.
    order = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    files.summary.write_text(profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))
    profiler.export_chrome_trace(str(files.trace))
    return read(load(files.trace))


def host_waits(call: Callable[[], object]) -> Counter[str]:
    """Where torch says that it waited for the device, file and line, in a run of `call`: another opinion than the trace's."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    return Counter(f"{w.filename}:{w.lineno}" for w in waits)


@contextlib.contextmanager
def nvtx_ranges(device: torch.device) -> Iterator[None]:
    """Every stage and operator as an NVTX range, and the profilers' capture range around it: what Nsight is started for."""
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        try:
            with torch.autograd.profiler.emit_nvtx():
                yield
            torch.cuda.synchronize(device)
        finally:
            torch.cuda.profiler.stop()


def nsight_commands(arguments: list[str], folder: Path) -> list[str]:
    """The command lines that profile the same run with Nsight Systems and Nsight Compute.

    Args:
        arguments: of `qwen-fast profile`, without the program.
    """
    same = shlex.join([sys.executable, "-m", "qwen_fast.cli", "profile", *arguments, "--nvtx"])
    nsys = f"nsys profile --trace=cuda,nvtx,osrt,cublas --capture-range=cudaProfilerApi --capture-range-end=stop -o {{}} {same}"
    # The clocks stay as they are: on a borrowed machine they are not ours to set.
    which = "--launch-count 20" if "--stock" in arguments else "--kernel-name regex:joint_attention --launch-count 5"
    ncu = f"ncu --profile-from-start off --clock-control none --set full {which} -o {{}} {same}"
    places = [shlex.quote(str(folder / name)) for name in ("nsys", "ncu")]
    return [command.format(place) for command, place in zip((nsys, ncu), places, strict=True)]


# Tables ---------------------------------------------------------------------------------------------------------------


def write_kernels(path: Path, rows: list[Row], ceilings: Ceilings | None) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("kernel operator launches microseconds share bytes flops gb_per_s tflop_per_s of_ceiling".split())
        for row in rows:
            numbers = (row.gb_per_s, row.tflop_per_s, of_ceiling(row, ceilings))
            cells = ["" if number is None else f"{number:.5g}" for number in numbers]
            measured = (row.launches, f"{row.microseconds:.3f}", f"{row.share:.5f}", row.bytes or "", row.flops or "")
            writer.writerow([row.kernel, row.op, *measured, *cells])


def of_ceiling(row: Row, ceilings: Ceilings | None) -> float | None:
    if ceilings is None:
        return None
    matmul = ceilings.matmul_flops_per_s[ceilings.dtype]
    return row.of_ceiling(ceilings.copy_bytes_per_s, matmul, ceilings.attention_flops_per_s)


def write_memory(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["seconds", "device", "allocated", "reserved", "stage"])
        writer.writeheader()
        writer.writerows(rows)


def plot_memory(path: Path, rows: list[dict]) -> bool:
    """Allocated memory over time, a line a device; False where nothing was recorded or matplotlib is not installed."""
    if not rows:
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    axes = (figure := Figure(figsize=(9, 4), layout="constrained")).subplots()
    for device in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == device]
        axes.step([r["seconds"] for r in own], [r["allocated"] / 2**30 for r in own], where="post", label=device)
    axes.set(xlabel="seconds", ylabel="allocated, GiB", title="Memory")
    axes.legend()
    figure.savefig(path)
    return True


def report(trace: Trace, rows: list[Row], ceilings: Ceilings | None, waits: Counter[str] | None = None) -> str:
    """Stages, kernels, synchronisations and gaps as text."""
    return "\n\n".join(
        "\n".join(part)
        for part in (_stages(trace), _kernels(trace, rows, ceilings), _syncs(trace, waits), _gaps(trace), _memory(trace))
        if part
    )


def _stages(trace: Trace) -> list[str]:
    lines = ["stage            host ms  device ms" if trace.on_device else "stage            host ms"]
    for name, spans in trace.ranges.items():
        host = sum(end - begin for begin, end in spans) / 1e3
        line = f"{name.removeprefix('qwen_fast::'):14s} {host:9.2f}"
        if trace.on_device:
            own = [a for a in trace.activities if a.launch and any(b <= a.launch.begin <= e for b, e in spans)]
            line += f"  {sum(e - b for spans in busy(own).values() for b, e in spans) / 1e3:9.2f}"
        lines.append(line)
    return lines


def _kernels(trace: Trace, rows: list[Row], ceilings: Ceilings | None) -> list[str]:
    total = sum(row.microseconds for row in rows)
    what = "kernel" if trace.on_device else "operator"
    lines = [f"{len(rows)} {what}s in the loop, {total / 1e3:.2f} ms"]
    if ceilings is not None:
        matmul = ceilings.matmul_flops_per_s[ceilings.dtype]
        lines.append(
            f"ceilings: copy {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, {ceilings.dtype} product {matmul / 1e12:.3f} TFLOP/s, "
            f"attention {ceilings.attention_flops_per_s / 1e12:.3f} TFLOP/s"
        )
    lines.append(f"{'ms':>9s} {'share':>6s} {'calls':>6s} {'GB/s':>8s} {'TFLOP/s':>8s} {'ceiling':>7s}  {what}")
    for row in rows[:_ROWS]:
        part = of_ceiling(row, ceilings)
        cells = (
            f"{row.microseconds / 1e3:9.3f} {row.share:6.1%} {row.launches:6d}",
            f"{row.gb_per_s:8.1f}" if row.gb_per_s else " " * 8,
            f"{row.tflop_per_s:8.3f}" if row.tflop_per_s else " " * 8,
            f"{part:7.1%}" if part is not None else " " * 7,
        )
        name = row.kernel[:60] + (f"  [{row.op}]" if trace.on_device and row.op else "")
        lines.append(f"{' '.join(cells)}  {name}")
    return lines


def _syncs(trace: Trace, waits: Counter[str] | None) -> list[str]:
    if not trace.on_device:
        return ["no device: nothing to synchronise with, no gaps"]
    found = synchronisations(trace)
    lines = [f"{sum(sync.count for sync in found)} host synchronisations in the loop" + (":" if found else "")]
    lines += [
        f"{sync.microseconds / 1e3:9.3f} ms {sync.count:6d}  {sync.kind}: {sync.call}"
        + (f" in {sync.op}" if sync.op else "")
        + (f", stage {sync.stage}" if sync.stage else "")
        for sync in found
    ]
    if waits is not None:
        lines.append(f"torch's sync debug mode, the whole picture: {sum(waits.values())} synchronising calls")
        lines += [f"{count:6d}  {place}" for place, count in waits.most_common(_GAPS)]
    return lines


def _gaps(trace: Trace) -> list[str]:
    activities = trace.in_loop()
    if not trace.on_device or not activities:
        return []
    gaps = idle_gaps(activities)
    span = max(a.end for a in activities) - min(a.begin for a in activities)
    idle = sum(gap.duration for gap in gaps)
    lines = [f"device idle for {idle / 1e3:.3f} ms of {span / 1e3:.3f} ms in the loop ({idle / span:.1%}), {len(gaps)} gaps"]
    lines += [f"{gap.duration:9.1f} us  after {gap.after[:50]}, before {gap.before[:50]}" for gap in gaps[:_GAPS]]
    return lines


def _memory(trace: Trace) -> list[str]:
    rows = memory_timeline(trace)
    devices = dict.fromkeys(row["device"] for row in rows)
    peaks = {device: max((row for row in rows if row["device"] == device), key=lambda r: r["allocated"]) for device in devices}
    return [
        f"most memory on {device}: {peak['allocated'] / 2**20:.1f} MiB allocated after {peak['seconds']:.3f} s"
        + (f", stage {peak['stage']}" if peak["stage"] else "")
        for device, peak in peaks.items()
    ]


def write(trace: Trace, files: Files, ceilings: Ceilings | None, waits: Counter[str] | None = None, stages: str = "") -> str:
    """All tables into their files, the stage table first in the report; the rest of the report as text."""
    rows = kernel_table(trace.in_loop())
    write_kernels(files.kernels, rows, ceilings)
    memory = memory_timeline(trace)
    write_memory(files.memory, memory)
    plot_memory(files.plot, memory)
    text = report(trace, rows, ceilings, waits)
    files.report.write_text(f"{stages}\n\n{text}\n" if stages else f"{text}\n", encoding="utf-8")
    return text
