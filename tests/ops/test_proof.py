"""Kernels prove themselves: right ones pass, seven faults do not, and neither a hang, a crash nor a broken folder stops it.

There is no GPU here: the kernels are interpreted, in this process or in tests/support/stand_in.py, which is the child then.
"""

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen_fast_kernels import proof
from qwen_fast_kernels._child import NoChild
from qwen_fast_kernels._kept import Kept
from qwen_fast_kernels.proof import Problem, examine, prove
from support import stand_in
from support.stand_in import RIGHT, problem

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU `qwen-fast doctor --prove` does this"),
]


# One kernel -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", RIGHT, ids=str)
def test_a_right_kernel_proves_itself(interpreted, one):
    verdict = examine(one, interpreted)
    assert verdict.right, verdict
    assert verdict.error <= verdict.limit and not verdict.reason
    assert Problem.from_json(one.to_json()) == one


def test_the_limit_of_attention_is_tight(interpreted):
    """25 % noise passed the check that this one replaces; relative RMS 5e-3 is what a right kernel stays well within."""
    verdict = examine(problem("joint_attention"), interpreted)
    assert verdict.error < 2.5e-3 and 2.5e-3 < verdict.limit < 5e-3


@pytest.mark.parametrize("fault", ["wrong scale", "dropped tail", "25 % noise", "moving", "compile error"])
@pytest.mark.parametrize("op", ["joint_attention", "rms_norm_silu", "gated_residual_ada_layer_norm", "linear_gelu"])
def test_a_fault_is_seen(interpreted, monkeypatch, op, fault):
    stand_in.interpret(monkeypatch.setattr, {op: fault})
    verdict = examine(problem(op), interpreted)
    assert not verdict.right and verdict.final
    assert stand_in.REASONS[fault] in verdict.reason, verdict


@pytest.mark.parametrize("fault", ["wrong scale", "moving"])
def test_a_fault_in_what_is_written_in_place_is_seen(interpreted, monkeypatch, fault):
    stand_in.interpret(monkeypatch.setattr, {"qk_norm_rope": fault})
    verdict = examine(problem("qk_norm_rope"), interpreted)
    assert not verdict.right and stand_in.REASONS[fault] in verdict.reason, verdict


def test_want_of_memory_is_no_verdict_to_keep(interpreted, monkeypatch):
    stand_in.interpret(monkeypatch.setattr, {"euler_step": "no memory"})
    verdict = examine(problem("euler_step"), interpreted)
    assert not verdict.right and not verdict.final and "out of memory" in verdict.reason


def test_a_kernel_has_twenty_launches_and_twenty_seconds(interpreted, monkeypatch):
    monkeypatch.undo()
    assert (proof.LAUNCHES, proof.LIMIT) == (20, 20.0)
    stand_in.interpret(monkeypatch.setattr, {})
    monkeypatch.setattr(proof, "LAUNCHES", 20)
    module, launched = sys.modules["qwen_fast_kernels.euler_step"], []
    launch = module.launch_euler_step
    monkeypatch.setattr(module, "launch_euler_step", lambda *a, **k: launched.append(1) or launch(*a, **k))
    assert examine(problem("euler_step"), interpreted).right and len(launched) == 20


# Many, in a child -----------------------------------------------------------------------------------------------------


def test_a_child_tells_six_faults_from_right_kernels(interpreted, child, tmp_path):
    faults = {
        "ada_layer_norm": "wrong scale",
        "rms_norm_silu": "dropped tail",
        "joint_attention": "25 % noise",
        "cfg_euler_step": "moving",
        "qk_norm_rope": "compile error",
        "flow_match_schedule": "crash",
    }
    right = ["gated_residual", "euler_step"]
    started = child(faults)
    problems = [problem(op) for op in (*faults, *right)]
    told, seen = [], []
    found = prove(problems, interpreted, Kept(interpreted, tmp_path), tell=told.append, each=lambda *one: seen.append(one))
    for op, fault in faults.items():
        verdict = found[problem(op)]
        assert not verdict.right and verdict.final and stand_in.REASONS[fault] in verdict.reason, (op, verdict)
    assert all(found[problem(op)].right for op in right)
    assert len(started) == 2, "one child, and another after the crash"
    assert seen == list(found.items()) and list(found) == problems
    assert len(told) == 1 and told[0].startswith("8 kernels prove themselves on CPU before their first use")

    child(None)  # and now from the folder alone
    again = prove(problems, interpreted, Kept(interpreted, tmp_path), tell=told.append)
    assert again == found and len(told) == 1


def test_a_hang_is_ended_and_the_next_kernel_proved(interpreted, child, tmp_path):
    started = child({"cfg_euler_step": "hang"})
    begin = time.monotonic()
    found = prove([problem("cfg_euler_step"), problem("euler_step")], interpreted, Kept(interpreted, tmp_path), limit=6.0)
    assert time.monotonic() - begin < 60
    verdict = found[problem("cfg_euler_step")]
    assert not verdict.right and verdict.final and verdict.reason == "it took more than 6 s"
    assert found[problem("euler_step")].right
    assert len(started) == 2


def test_after_a_crash_this_process_is_not_risked(interpreted, child, monkeypatch, tmp_path):
    """Where no second child can be started, the rest stays unproved, is not used, and is tried again another time."""
    child({"flow_match_schedule": "crash"})
    once = [stand_in.child({"flow_match_schedule": "crash"})]

    def command(module):
        if not once:
            raise NoChild("the test forbids another")
        return once.pop()

    monkeypatch.setattr(proof, "command", command)
    monkeypatch.setattr(proof, "examine", lambda *_: pytest.fail("in this process"))
    kept, rest = Kept(interpreted, tmp_path), problem("euler_step")
    found = prove([problem("flow_match_schedule"), rest], interpreted, kept)
    assert not found[rest].right and not found[rest].final and "may have spoilt the device" in found[rest].reason
    assert kept.get(str(rest)) is None and Kept(interpreted, tmp_path).get(str(rest)) is None


@pytest.mark.parametrize("case", ["forbidden", "ends at once", "another card", "silent"])
def test_without_a_child_kernels_prove_themselves_here(interpreted, monkeypatch, tmp_path, case):
    def command(module):
        if case == "forbidden":
            raise NoChild("the test forbids it")
        code = {"ends at once": "raise SystemExit('no CUDA')", "silent": "import time; time.sleep(60)"}
        card = f'print({proof.answer.__globals__["_SIGN"]!r} + \'{{"card": "another"}}\', flush=True); input()'
        return [sys.executable, "-c", code.get(case, card)]

    monkeypatch.setattr(proof, "command", command)
    monkeypatch.setattr(proof, "START_LIMIT", 2.0 if case == "silent" else 60.0)
    stand_in.interpret(monkeypatch.setattr, {"cfg_euler_step": "wrong scale"})
    told = []
    found = prove(
        [problem("euler_step"), problem("cfg_euler_step")], interpreted, Kept(interpreted, tmp_path), tell=told.append
    )
    assert [verdict.right for verdict in found.values()] == [True, False]
    reason = {"forbidden": "forbids", "ends at once": "no CUDA", "another card": "is another, not CPU", "silent": "2 s"}[case]
    assert len(told) == 2 and "in this process" in told[1] and reason in told[1]


def test_a_child_without_memory_leaves_the_proof_to_this_process(interpreted, child, tmp_path):
    child({"euler_step": "no memory"})
    found = prove([problem("euler_step")], interpreted, Kept(interpreted, tmp_path))
    assert found[problem("euler_step")].right


def test_the_child_finds_what_this_process_finds(tmp_path):
    """Started from `python -c`, in another folder, with the package on sys.path alone."""
    paths = [str(Path(proof.__file__).parents[1])]
    code = (
        f"import sys; sys.path[:0] = {paths!r}\n"
        "from qwen_fast_kernels import proof\n"
        "child = proof.Child([*proof.command('qwen_fast_kernels.proof'), 'cpu'], 100)\n"
        "print(child.about['card'])\n"
        "child.stop()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "CPU\n", done.stderr


@pytest.mark.parametrize("attribute", [("frozen", True), ("executable", "/opt/application"), ("executable", "")])
def test_a_program_that_is_no_interpreter_is_not_started_again(monkeypatch, attribute):
    monkeypatch.setattr(sys, *attribute, raising=False)
    with pytest.raises(NoChild, match="no Python interpreter"):
        proof.command("qwen_fast_kernels.proof")


def test_the_log_says_how_long_it_took(interpreted, child, tmp_path, caplog):
    child({})
    with caplog.at_level(logging.INFO):
        prove([problem("euler_step")], interpreted, Kept(interpreted, tmp_path))
    assert "1 kernels, 0 of them wrong" in caplog.text
