"""Loading a pipeline onto a device, stock against ours: seconds, and host memory at its peak and afterwards.

    python -m benchmarks.parts.loading [--checkpoint DIR] [--device meta|cpu|cuda] [--repeats N]
        [--append benchmarks/results/loading.csv]

Each load is a process of its own, the two kinds in turns. Host memory is anonymous memory (RssAnon) above what the process
held before, sampled every 2 ms: pages of the mapped files are not in it, since the system drops them when it needs room.
The files are in the page cache. Without --checkpoint one of about 430 MB in bf16 is built.

"meta" stands in for a GPU where there is none: every tensor is read and copied as on its way to a device, then dropped.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import diffusers
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import qwen_fast
from qwen_fast.testing import build_checkpoint

from ..shared.rows import append
from ..shared.source import git

FIELDS = "date commit dirty machine torch diffusers transformers device dtype checkpoint_bytes how repeats seconds_p50".split()
FIELDS += ["cpu_seconds_p50", "peak_host_bytes", "host_bytes_after"]
KINDS = ("stock", "ours")


class ReadAndDrop(TorchDispatchMode):
    """Copies to meta read what they copy, in the dtype that it is asked for, as a copy to a GPU does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and str(kwargs.get("device")) == "meta" and not args[0].is_meta:
            args[0].to(kwargs.get("dtype") or args[0].dtype, copy=True)
        return function(*args, **kwargs)


def host_bytes() -> int:
    """Anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) * 1024


def load(how: str, path: str, device: str, dtype: torch.dtype) -> object:
    """One pipeline."""
    if how == "ours":
        return qwen_fast.QwenImagePipeline.from_pretrained(path, device=device, dtype=dtype)
    return diffusers.QwenImagePipeline.from_pretrained(path, dtype=dtype).to(device)


def measure(how: str, path: str, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Seconds, CPU seconds, bytes at the peak and bytes afterwards of one load, in this process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:  # everything that is imported at first use
        load(how, str(build_checkpoint(Path(folder, "tiny"))), "cpu", dtype)
    if device == "cuda":
        torch.zeros(1, device=device)
    before = peak = host_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, host_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin, cpu = time.perf_counter(), time.process_time()
    with ReadAndDrop() if device == "meta" else contextlib.nullcontext():
        pipe = load(how, path, device, dtype)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    done.set()
    watcher.join()
    after = host_bytes()
    del pipe
    return {"seconds": seconds, "cpu": cpu, "peak": peak - before, "after": after - before}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--device", choices=("meta", "cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "meta")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--append", type=Path, help="CSV file that gets one row a case")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.one:
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
        print(json.dumps(measure(options.one, str(options.checkpoint), options.device, getattr(torch, options.dtypes[0]))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = options.checkpoint or build_checkpoint(
            Path(folder, "checkpoint"), num_layers=3, num_attention_heads=10, attention_head_dim=128, joint_attention_dim=1024,
            text_layers=3, vae_base_dim=32, dtype=torch.bfloat16, max_shard_size="100MB",
        )  # fmt: skip
        size = sum(file.stat().st_size for file in Path(path).rglob("*.safetensors"))
        source = git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain"))  # before the rows change it
        for dtype in options.dtypes:
            rows = compare(path, size, dtype, source, options)
            if options.append:
                append(options.append, FIELDS, rows)
    return 0


def compare(path: Path, size: int, dtype: str, source: tuple[str, bool], options: argparse.Namespace) -> list[list]:
    """Rows of one dtype; printed too. `source`: commit, and whether it was changed."""
    results: dict[str, list[dict[str, float]]] = {how: [] for how in KINDS}
    # Freed tensors go back to the system at once, rather than when the C library sees fit.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    for repeat in range(options.repeats):
        for how in KINDS[:: -1 if repeat % 2 else 1]:
            command = [sys.executable, "-m", "benchmarks.parts.loading", "--one", how, "--checkpoint", str(path)]
            command += ["--device", options.device, "--dtypes", dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            results[how].append(json.loads(done.stdout.splitlines()[-1]))
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU, 1 thread"
    rows = []
    for how, runs in results.items():
        seconds, cpu, after = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu", "after"))
        peak = max(run["peak"] for run in runs)
        print(
            f"{dtype:9s} to {options.device}, {how:5s}: {seconds:.2f} s ({cpu:.2f} s of CPU time), host memory "
            f"{peak / 2**20:.0f} MiB at its peak, {after / 2**20:.0f} MiB afterwards; files of {size / 2**20:.0f} MiB",
            flush=True,
        )
        rows.append(
            [
                datetime.date.today(), *source, machine, torch.__version__, diffusers.__version__,
                transformers.__version__, options.device, dtype, size, how, options.repeats,
                f"{seconds:.3f}", f"{cpu:.3f}", peak, int(after),
            ]
        )  # fmt: skip
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
