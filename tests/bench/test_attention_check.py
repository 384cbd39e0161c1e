"""The run-book's look at attention: what is wrong is seen, and what hangs or crashes costs its own way of launching only."""

import json
import sys

import pytest
import torch

from benchmarks.attention import check as attention_check


def forms(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def right_log() -> str:
    names = [f"{dtype}, {form}" for dtype in ("bfloat16", "float16") for form in attention_check.FORMS]
    return "$ command\n" + forms(*({"form": name, "fault": None, "error": 2e-3} for name in names))


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        (right_log(), "exit code 0", {}),
        ("$ x\n" + forms({"form": "a", "begun": True}), "no answer within 30 s", {"a": "no answer within 30 s"}),
        ("$ x\n" + forms({"form": "a", "fault": None, "error": 0.0}), "exit code -11", {"the process": "exit code -11"}),
        ("$ x\nTraceback", "exit code 1", {"the process": "exit code 1"}),
        (right_log() + forms({"form": "bfloat16, dense", "fault": "wrong"}), "exit code 0", {"bfloat16, dense": "wrong"}),
    ],
)
def test_what_a_process_found_is_read_from_its_log(tmp_path, text, ended, expected):
    (tmp_path / "log").write_text(text)
    found = attention_check.verdict(tmp_path / "log", ended)
    assert found["faults"] == expected and found["right"] == (not expected)


def test_a_way_that_hangs_and_one_that_crashes_cost_no_other(tmp_path, monkeypatch):
    """The first is killed, the second dies; the third is right and is chosen."""
    (tmp_path / "right.txt").write_text(right_log())
    codes = {
        "operator": f"import time; print({forms({'form': 'a', 'begun': True})!r}, flush=True); time.sleep(600)",
        "descriptors": "import os; os.kill(os.getpid(), 11)",
        "pointers": f"print(open({str(tmp_path / 'right.txt')!r}).read())",
    }
    begin = attention_check.start

    def start(command, log, environment):
        return begin([sys.executable, "-c", codes[command[command.index("--way") + 1]]], log, environment)

    monkeypatch.setattr(attention_check, "start", start)
    found = attention_check.check_all("cpu", {"own": "", "other": "/other/ptxas"}, tmp_path, 3.0)
    for each in found.values():
        assert each["operator"]["faults"] == {"a": "no answer within 3 s"} and each["pointers"]["right"]
        assert each["descriptors"]["faults"] == {"the process": "exit code -11"}
    assert attention_check.choose(found) == ("own", "pointers")
    assert attention_check.choose({"own": {"operator": found["own"]["operator"]}}) is None


@pytest.mark.parametrize("fault", [None, "scale", "tail", "noise", "moving", "nan"])
def test_faults_of_an_attention_are_seen(fault):
    case = attention_check.OperatorCase("joint_attention", "packed", torch.bfloat16, attention_check._SMALL)
    arguments = case.arguments(attention_check.Maker("cpu"))
    right = attention_check.launcher("operator", case, arguments)
    seeds = iter(range(100))

    def run() -> torch.Tensor:
        out, seed = right(), next(seeds)
        if fault == "scale":
            out *= 0.98
        elif fault == "tail":
            out[-3:] = 0
        elif fault == "noise":
            out += 0.25 * out.std() * torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        elif fault == "moving" and seed == 7:
            out[5, 1, 3] += 1
        elif fault == "nan":
            out[0, 0, 0] = float("nan")
        return out

    found, _ = attention_check.fault_of(case, arguments, run)
    assert bool(found) == bool(fault), found
    assert fault != "moving" or found == "launch 8 differs from the first"


def test_the_way_that_is_right_is_what_the_operator_takes_from_then_on(tmp_path, monkeypatch):
    from qwen_fast_kernels import tuning

    monkeypatch.setattr(tuning, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(tuning, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    path = attention_check.write_config("pointers", torch.device("cpu"))
    case = attention_check.OperatorCase("joint_attention", "packed", torch.bfloat16)
    dims = attention_check.DIMENSIONS["joint_attention"](*case.arguments(attention_check.Maker("meta", fake=True)))
    tuning.get_config.cache_clear()
    tuning._measured.cache_clear()
    chosen = tuning.get_config("joint_attention", dims, torch.device("cpu"), case.module().default_config)
    tuning.get_config.cache_clear()
    tuning._measured.cache_clear()
    assert path.parent == tmp_path / "configs" and not chosen["DESCRIPTORS"] and not chosen["WARP_SPECIALIZE"]
