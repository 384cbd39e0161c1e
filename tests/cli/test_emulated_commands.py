"""The project's own commands with an emulated CUDA device: everything that a run on a GPU goes through, at small size."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen_fast.cli import main
from qwen_fast.cli.benchmarks import benchmarks
from support.emulated_cuda import environment_of_children, notes

pytestmark = pytest.mark.triton


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """What a machine can do at best is measured at a GPU's sizes, which take minutes here."""
    ceilings, shapes = benchmarks("shared.ceilings"), benchmarks("shared.shapes").SHAPES
    own, small = ceilings.measure_ceilings, {"seconds": 0.01, "shape": shapes["tiny"], "tokens": 32, "copy_bytes": 2**16}
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda device, dtype, **others: own(device, dtype, **others | small))


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


def small(stage: str, out: Path) -> list[str]:
    """The command of a stage of the run-book as its dry run has it, but on the device."""
    (found,) = [one for one in benchmarks("runbook.stages").STAGES if one.name == stage]
    words = [word.replace("{out}", str(out)) for word in found.small]
    assert words[:2] == ["-m", "qwen_fast.cli"] and words.count("cpu") == 1
    return ["cuda" if word == "cpu" else word for word in words[2:]]


def rows_of(path: Path) -> list[dict]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_ladder_of_the_run_book(emulated_cuda, tmp_path):
    """Stock, and the rungs of which every other is a part; the options between have tests."""
    names = "stock + cuDNN attention", "+ packed CFG", "+ CUDA graph", "qwen_fast as enabled"
    assert main([*small("ladder", tmp_path), *(part for name in names for part in ("--only", name))]) == 0
    rows = {row["rung"]: row for row in rows_of(tmp_path / "ladder" / "ladder.csv")}
    for name in ("stock diffusers", *names):
        assert rows[name]["status"] == "ok" and rows[name]["psnr_db"], rows[name]
    assert emulated_cuda.notes.of(notes.CAPTURE) and emulated_cuda.notes.of(notes.REPLAY)
    assert_nothing_wrong(emulated_cuda)


@pytest.mark.slow
def test_the_sizes_of_the_run_book(emulated_cuda, tmp_path):
    """Few-step pictures, and each call with a new size and prompt."""
    assert main(small("sizes", tmp_path)) == 0
    assert {row["status"] for row in rows_of(tmp_path / "ladder" / "ladder.csv")} == {"ok"}
    assert rows_of(tmp_path / "ladder" / "changing.csv")
    assert_nothing_wrong(emulated_cuda)


def test_the_profile_of_the_run_book(emulated_cuda, tmp_path, capsys):
    assert main(small("profile", tmp_path)) == 0
    assert "qwen_fast::qk_norm_rope" in capsys.readouterr().out
    assert_nothing_wrong(emulated_cuda)


def test_the_smoke_test_of_the_run_book(emulated_cuda, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smoke"])
    assert benchmarks("runbook.smoke").main() == 0
    assert "an emulated GPU, sm_90" in capsys.readouterr().out


def test_the_profiler_hears_of_host_waits(checkpoint, emulated_cuda):
    """torch.cuda.set_sync_debug_mode, by which the profile lists where the host waits."""
    values = torch.ones(3, device="cuda")
    waits = benchmarks("profiling.run").host_waits(lambda: (values.sum().item(), values * 2))
    ((place, count),) = waits.items()
    assert place.startswith(__file__) and count == 1
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        values.tolist()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_a_process_and_its_children_have_a_device():
    """For commands that start others, as the run-book does; their children inherit it."""
    code = "import torch; print(torch.cuda.get_device_name(), float(torch.ones(2, device='cuda').sum()))"
    environment = environment_of_children(name="a child's GPU", total=2**30)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "a child's GPU 2.0\n", done.stderr
    assert json.loads(environment["EMULATED_CUDA"])["total"] == 2**30
