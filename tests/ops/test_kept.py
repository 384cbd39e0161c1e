"""What is found out about a card is kept: marks of kernels that were launched, folders that break, environments that change."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch

from qwen_fast_kernels import _kept
from qwen_fast_kernels._child import Child
from qwen_fast_kernels._kept import Kept
from qwen_fast_kernels.proof import Verdict, prove
from support.stand_in import problem

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU `qwen-fast doctor --prove` does this"),
]


def test_a_mark_that_was_left_counts_as_failed(interpreted, child, tmp_path):
    """A whole process is killed in the middle of a kernel, and its child with it."""
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom qwen_fast_kernels import proof\nfrom support import stand_in\n"
        "proof.command = lambda module: stand_in.child({'euler_step': 'hang'})\n"
        "cpu = torch.device('cpu')\n"
        "proof.prove([stand_in.problem('euler_step')], cpu, proof.Kept(cpu, Path(sys.argv[1])))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, start_new_session=True)
    kept = Kept(interpreted, tmp_path)
    one = problem("euler_step")
    try:
        end = time.monotonic() + 60
        while "begun" not in (kept.get(str(one)) or {}):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        with kept.alone(0.0) as alone:
            assert not alone, "the other is inside"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    child(None)
    seen = []
    found = prove([one], interpreted, kept, each=lambda *pair: seen.append(pair))
    assert not found[one].right and "has not come back" in found[one].reason and len(seen) == 1
    assert prove([one], interpreted, Kept(interpreted, tmp_path)) == found

    child({})
    assert prove([one], interpreted, Kept(interpreted, tmp_path), again=True)[one].right
    assert prove([one], interpreted, Kept(interpreted, tmp_path))[one].right


def test_an_interrupt_is_not_held_against_the_kernel(interpreted, child, monkeypatch, tmp_path):
    child({})

    def ask(self, question, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "ask", ask)
    kept, one = Kept(interpreted, tmp_path), problem("euler_step")
    with pytest.raises(KeyboardInterrupt):
        prove([one], interpreted, kept)
    assert kept.get(str(one)) is None and Kept(interpreted, tmp_path).get(str(one)) is None


def test_a_second_process_waits_and_reads(interpreted, child, tmp_path):
    """What the process that was first has proved is not proved again."""
    one, first, second = problem("euler_step"), Kept(interpreted, tmp_path), Kept(interpreted, tmp_path)
    child(None)

    class Waits(Kept):
        def alone(self, seconds):
            first.put(str(one), asdict(Verdict(True)))  # meanwhile
            return super().alone(seconds)

    second.__class__ = Waits
    assert prove([one], interpreted, second, tell=pytest.fail)[one] == Verdict(True)


CHANGES = {
    "card": lambda patch: patch.setattr(_kept, "environment", lambda device: {"card": "another"}),
    "triton": lambda patch: patch.setattr(_kept.triton, "__version__", "3.99.0"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "2.99.0"),
    "assembler": lambda patch: patch.setenv("TRITON_PTXAS_PATH", patch.own_ptxas),
    "sources": lambda patch: patch.setattr(_kept, "_sources", lambda: "changed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_environment_has_verdicts_of_its_own(interpreted, tmp_path, what):
    own = tmp_path / "ptxas"
    own.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.9, V99.9.1'\n")
    own.chmod(0o755)
    before = Kept(interpreted, tmp_path)
    before.put("finding", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.own_ptxas = str(own)
        _kept.environment.cache_clear()
        CHANGES[what](patch)
        changed = Kept(interpreted, tmp_path)
        assert changed.folder != before.folder and changed.get("finding") is None
    _kept.environment.cache_clear()
    assert Kept(interpreted, tmp_path).get("finding") == 1
    about = json.loads((before.folder / "environment.json").read_text())
    assert set(about) == {"card", "driver", "torch", "triton", "assembler", "sources"}


def test_sources_are_those_of_kernels_and_configurations(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(_kept, "_PACKAGE", tmp_path)
    hashes = []
    for name, text in (("a.py", "1"), ("a.py", "2"), ("configs/b.json", "{}"), ("c.txt", "ignored")):
        (tmp_path / name).write_text(text)
        hashes.append(_kept._sources())
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(interpreted, child, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    child({})
    kept, one = Kept(interpreted, tmp_path / "file"), problem("euler_step")
    assert kept.folder is None and "cannot be written" in caplog.text
    assert prove([one], interpreted, kept)[one].right
    child(None)
    assert prove([one], interpreted, kept)[one].right, "this process knows it"


def test_a_damaged_file_is_written_anew(interpreted, child, tmp_path, caplog):
    child(None)
    kept, one = Kept(interpreted, tmp_path), problem("euler_step")
    prove([one], interpreted, kept)
    path = kept._path(str(one))
    odd = json.dumps({"key": str(one), "value": {"right": True, "odd": 1}})
    for text in ("", "{", "[]", '{"key": "another", "value": 1}', odd):
        path.write_text(text)
        assert prove([one], interpreted, Kept(interpreted, tmp_path))[one].right
        assert json.loads(path.read_text())["value"]["right"], text
    assert "is damaged and will be written anew" in caplog.text


def test_a_folder_that_becomes_unwritable(interpreted, tmp_path, caplog):
    kept = Kept(interpreted, tmp_path)
    kept.put("a", 1)
    for path in kept.folder.iterdir():
        path.unlink()
    kept.folder.rmdir()
    kept.put("b", 2)
    assert (kept.get("a"), kept.get("b"), kept.folder) == (1, 2, None) and "any more" in caplog.text


def test_known_verdicts_cost_less_than_fifty_milliseconds(interpreted, tmp_path):
    problems = [problem("euler_step", steps=steps) for steps in range(2, 42)]
    for one in problems:
        Kept(interpreted, tmp_path).put(str(one), asdict(Verdict(True)))
    seconds = []
    for _ in range(5):
        _kept.environment.cache_clear()
        begin = time.perf_counter()
        assert all(verdict.right for verdict in prove(problems, interpreted, Kept(interpreted, tmp_path)).values())
        seconds.append(time.perf_counter() - begin)
    # The first of a process also asks both assemblers for their versions, 10 ms each.
    assert min(seconds) < 0.05, seconds


def test_cards_of_one_kind_share_what_is_known(monkeypatch):
    """By name and compute capability, whatever their index."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100" if device.index < 2 else "NVIDIA L4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index < 2 else (8, 9))
    monkeypatch.setattr(_kept, "_DRIVER", _kept._PACKAGE / "no such file")
    _kept.environment.cache_clear()
    one, two, other = (_kept.environment(torch.device("cuda", index)) for index in (0, 1, 2))
    _kept.environment.cache_clear()
    assert one == two and one["card"] == "NVIDIA H100, sm_90" and one["driver"].startswith("CUDA ")
    assert {key for key in one if one[key] != other[key]} == {"card"}
