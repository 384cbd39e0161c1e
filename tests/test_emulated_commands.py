"""The project's own commands with an emulated CUDA device: everything that a run on a GPU goes through, at small size."""

import csv
import json
import subprocess
import sys

import pytest
import torch

from qwen_fast.cli import main
from qwen_fast.cli.loading import benchmarks
from support.emulated_cuda import environment_of_children, notes

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """What a machine can do at best is measured at a GPU's sizes, which take minutes here."""
    ceilings, shapes = benchmarks("ceilings"), benchmarks("grid").SHAPES
    own = ceilings.measure_ceilings

    def measured(device, dtype, **_others):
        return own(device, dtype, seconds=0.01, shape=shapes["tiny"], tokens=32, copy_bytes=2**16)

    for module in (ceilings, benchmarks("bench")):
        monkeypatch.setattr(module, "measure_ceilings", measured)


def assert_nothing_wrong(device) -> None:
    seen = device.notes
    assert not seen.of(notes.MIXED, notes.ILLEGAL, notes.RACE), seen.counted(notes.MIXED, notes.ILLEGAL, notes.RACE)
    assert seen.of(notes.LAUNCH)


def test_doctor(emulated_cuda, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cuda:0: an emulated GPU, sm_90, 80.0 GiB" in out
    assert "ok   transformer on cuda:0" in out and "ok   euler_step on cuda:0" in out
    assert_nothing_wrong(emulated_cuda)


def test_generate(checkpoint, emulated_cuda, tmp_path, capsys):
    arguments = ["--model", str(checkpoint), "--size", "96x64", "--steps", "3", "--out", str(tmp_path / "picture.png")]
    assert main(["generate", "--prompt", "a red circle", "--device", "cuda", *arguments]) == 0
    assert (tmp_path / "picture.png").exists() and "bfloat16 on cuda" in capsys.readouterr().out
    assert_nothing_wrong(emulated_cuda)


def test_bench(emulated_cuda, tmp_path):
    arguments = ["--shape", "tiny", "--size", "64x64", "--steps", "2", "--repeats", "1", "--seconds", "0.01"]
    # There is no code of torch.compile to run, and the rungs between the first and the last are options that have tests.
    names = ["compile", "fastest", "schedule", "fused", "table", "VAE"]
    skipped = [part for name in names for part in ("--skip", name)]
    assert main(["bench", *arguments, *skipped, "--device", "cuda", "--out", str(tmp_path)]) == 0
    with (tmp_path / "ladder.csv").open() as file:
        rows = {row["rung"]: row for row in csv.DictReader(file)}
    for name in ("stock diffusers", "+ packed CFG", "+ CUDA graph", "qwen_fast as enabled"):
        assert rows[name]["status"] == "ok", rows[name]
        assert float(rows[name]["peak_gib"]) >= 0 and rows[name]["psnr_db"]
    assert emulated_cuda.notes.of(notes.CAPTURE) and emulated_cuda.notes.of(notes.REPLAY)
    assert_nothing_wrong(emulated_cuda)


def test_profile(emulated_cuda, tmp_path, capsys):
    arguments = ["--shape", "tiny", "--size", "64x64", "--steps", "2", "--device", "cuda", "--out", str(tmp_path)]
    assert main(["profile", *arguments]) == 0
    assert "qwen_fast::joint_attention" in capsys.readouterr().out and (tmp_path / "memory_snapshot.pickle").exists()
    assert_nothing_wrong(emulated_cuda)


def test_the_profiler_hears_of_host_waits(checkpoint, emulated_cuda):
    """torch.cuda.set_sync_debug_mode, by which the profile lists where the host waits."""
    values = torch.ones(3, device="cuda")
    waits = benchmarks("profiling").host_waits(lambda: (values.sum().item(), values * 2))
    ((place, count),) = waits.items()
    assert place.startswith(__file__) and count == 1
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        values.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_a_process_and_its_children_have_a_device():
    """For commands that start others, as the run-book does."""
    inner = "import torch; print(torch.cuda.get_device_name(), float(torch.ones(2, device='cuda').sum()))"
    outer = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {inner!r}]).returncode)"
    environment = environment_of_children(name="a child's GPU", total=2**30)
    done = subprocess.run([sys.executable, "-c", outer], env=environment, capture_output=True, text=True)
    assert done.stdout == "a child's GPU 2.0\n", done.stderr
    assert json.loads(environment["EMULATED_CUDA"])["total"] == 2**30
