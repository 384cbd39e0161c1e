"""Kernels prove themselves: right ones pass, seven faults do not, and neither a hang, a crash nor a broken folder stops it.

There is no GPU here: the kernels are interpreted, in this process or in tests/stand_in.py, which is the child then.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import stand_in
from qwen_fast_kernels import _kept, proof
from qwen_fast_kernels._child import Child, NoChild
from qwen_fast_kernels._kept import Kept
from qwen_fast_kernels._library import is_replaced, replace_kernel, restore_kernels
from qwen_fast_kernels.proof import Problem, Size, Verdict, examine, prove

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
SMALL = Size((20, 7), (70, 50), 2, 16)
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU `qwen-fast doctor --prove` does this"),
]


def problem(op: str, dtype: torch.dtype = BF16, **variant) -> Problem:
    """A small problem of each operator; what its arguments need beyond the size is filled in."""
    # Of these two the interpreter has many small programs to run.
    size = {"rms_norm_silu": Size((), (90,), 1, 32), "qk_norm_rope": Size((5, 2), (9, 7), 2, 16)}.get(op, SMALL)
    needed = {
        "euler_step": {"shape": (1, 77, 8)},
        "cfg_euler_step": {"shape": (1, 77, 8)},
        "flow_match_schedule": {"steps": 20},
        "joint_attention": {"layout": "rows"},
        "qk_norm_rope": {"layout": "rows"},
        "linear_gelu": {"expansion": 1},
        "linear_gated_residual": {"expansion": 1},
    }
    return Problem.of(op, FP32 if op == "flow_match_schedule" else dtype, size, **(needed.get(op, {}) | variant))


@pytest.fixture
def device(monkeypatch):
    """The stand-in, without a fault in this process; tests put them into the child by `child`."""
    stand_in.interpret(monkeypatch.setattr, {})
    library = torch.library.Library("qwen_fast", "IMPL")
    stand_in.launchers_for_cpu(library, monkeypatch, ["linear_gelu"])
    yield CPU
    library._destroy()


@pytest.fixture
def child(monkeypatch):
    """Seeds faults into the child, or forbids it altogether; counts the children."""
    started = []

    def set_child(faults: dict[str, str] | None) -> list:
        def command(module):
            if faults is None:
                raise NoChild("the test forbids it")
            started.append(module)
            return stand_in.child(faults)

        monkeypatch.setattr(proof, "command", command)
        return started

    return set_child


# One kernel -----------------------------------------------------------------------------------------------------------

RIGHT = [
    problem("joint_attention"),
    problem("joint_attention", torch.float16, masked=True),
    problem("joint_attention", FP32),
    problem("ada_layer_norm"),
    problem("ada_layer_norm", FP32, packed=True),
    problem("gated_residual", torch.float16, clip=True),
    problem("gated_residual_ada_layer_norm"),
    problem("qk_norm_rope"),
    problem("linear_gelu"),
    problem("linear_gated_residual", FP32),
    problem("euler_step", FP32, prediction_dtype=BF16),
    problem("cfg_euler_step"),
    problem("flow_match_schedule"),
    problem("flow_match_schedule", own=True),
    problem("rms_norm_silu"),
    problem("rms_norm_silu", FP32, bias=True, residual=True),
    problem("rms_norm_silu", bias=True, residual=True, silu=False),
]


@pytest.mark.parametrize("one", RIGHT, ids=str)
def test_a_right_kernel_proves_itself(device, one):
    verdict = examine(one, device)
    assert verdict.right, verdict
    assert verdict.error <= verdict.limit and not verdict.reason
    assert Problem.from_json(one.to_json()) == one


def test_the_limit_of_attention_is_tight(device):
    """25 % noise passed the check that this one replaces; relative RMS 5e-3 is what a right kernel stays well within."""
    verdict = examine(problem("joint_attention"), device)
    assert verdict.error < 2.5e-3 and 2.5e-3 < verdict.limit < 5e-3


@pytest.mark.parametrize("fault", ["wrong scale", "dropped tail", "25 % noise", "moving", "compile error"])
@pytest.mark.parametrize("op", ["joint_attention", "rms_norm_silu", "gated_residual_ada_layer_norm", "linear_gelu"])
def test_a_fault_is_seen(device, monkeypatch, op, fault):
    stand_in.interpret(monkeypatch.setattr, {op: fault})
    verdict = examine(problem(op), device)
    assert not verdict.right and verdict.final
    assert stand_in.REASONS[fault] in verdict.reason, verdict


@pytest.mark.parametrize("fault", ["wrong scale", "moving"])
def test_a_fault_in_what_is_written_in_place_is_seen(device, monkeypatch, fault):
    stand_in.interpret(monkeypatch.setattr, {"qk_norm_rope": fault})
    verdict = examine(problem("qk_norm_rope"), device)
    assert not verdict.right and stand_in.REASONS[fault] in verdict.reason, verdict


def test_want_of_memory_is_no_verdict_to_keep(device, monkeypatch):
    stand_in.interpret(monkeypatch.setattr, {"euler_step": "no memory"})
    verdict = examine(problem("euler_step"), device)
    assert not verdict.right and not verdict.final and "out of memory" in verdict.reason


def test_a_kernel_has_twenty_launches_and_twenty_seconds(device, monkeypatch):
    monkeypatch.undo()
    assert (proof.LAUNCHES, proof.LIMIT) == (20, 20.0)
    stand_in.interpret(monkeypatch.setattr, {})
    monkeypatch.setattr(proof, "LAUNCHES", 20)
    module, launched = sys.modules["qwen_fast_kernels.euler_step"], []
    launch = module.launch_euler_step
    monkeypatch.setattr(module, "launch_euler_step", lambda *a, **k: launched.append(1) or launch(*a, **k))
    assert examine(problem("euler_step"), device).right and len(launched) == 20


# Many, in a child -----------------------------------------------------------------------------------------------------


def test_a_child_tells_six_faults_from_right_kernels(device, child, tmp_path):
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
    found = prove(problems, device, Kept(device, tmp_path), tell=told.append, each=lambda *one: seen.append(one))
    for op, fault in faults.items():
        verdict = found[problem(op)]
        assert not verdict.right and verdict.final and stand_in.REASONS[fault] in verdict.reason, (op, verdict)
    assert all(found[problem(op)].right for op in right)
    assert len(started) == 2, "one child, and another after the crash"
    assert seen == list(found.items()) and list(found) == problems
    assert len(told) == 1 and told[0].startswith("8 kernels prove themselves on CPU before their first use")

    child(None)  # and now from the folder alone
    again = prove(problems, device, Kept(device, tmp_path), tell=told.append)
    assert again == found and len(told) == 1


def test_a_hang_is_ended_and_the_next_kernel_proved(device, child, tmp_path):
    started = child({"cfg_euler_step": "hang"})
    begin = time.monotonic()
    found = prove([problem("cfg_euler_step"), problem("euler_step")], device, Kept(device, tmp_path), limit=6.0)
    assert time.monotonic() - begin < 60
    verdict = found[problem("cfg_euler_step")]
    assert not verdict.right and verdict.final and verdict.reason == "it took more than 6 s"
    assert found[problem("euler_step")].right
    assert len(started) == 2


def test_after_a_crash_this_process_is_not_risked(device, child, monkeypatch, tmp_path):
    """Where no second child can be started, the rest stays unproved, is not used, and is tried again another time."""
    child({"flow_match_schedule": "crash"})
    once = [stand_in.child({"flow_match_schedule": "crash"})]

    def command(module):
        if not once:
            raise NoChild("the test forbids another")
        return once.pop()

    monkeypatch.setattr(proof, "command", command)
    monkeypatch.setattr(proof, "examine", lambda *_: pytest.fail("in this process"))
    kept, rest = Kept(device, tmp_path), problem("euler_step")
    found = prove([problem("flow_match_schedule"), rest], device, kept)
    assert not found[rest].right and not found[rest].final and "may have spoilt the device" in found[rest].reason
    assert kept.get(str(rest)) is None and Kept(device, tmp_path).get(str(rest)) is None


@pytest.mark.parametrize("case", ["forbidden", "ends at once", "another card", "silent"])
def test_without_a_child_kernels_prove_themselves_here(device, monkeypatch, tmp_path, case):
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
    found = prove([problem("euler_step"), problem("cfg_euler_step")], device, Kept(device, tmp_path), tell=told.append)
    assert [verdict.right for verdict in found.values()] == [True, False]
    reason = {"forbidden": "forbids", "ends at once": "no CUDA", "another card": "is another, not CPU", "silent": "2 s"}[case]
    assert len(told) == 2 and "in this process" in told[1] and reason in told[1]


def test_a_child_without_memory_leaves_the_proof_to_this_process(device, child, tmp_path):
    child({"euler_step": "no memory"})
    found = prove([problem("euler_step")], device, Kept(device, tmp_path))
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


# Marks and the folder -------------------------------------------------------------------------------------------------


def test_a_mark_that_was_left_counts_as_failed(device, child, tmp_path):
    """A whole process is killed in the middle of a kernel, and its child with it."""
    code = (
        "import sys, torch, stand_in\nfrom pathlib import Path\nfrom qwen_fast_kernels import proof, _kept\n"
        "proof.command = lambda module: stand_in.child({'euler_step': 'hang'})\n"
        "import test_proof\n"
        "proof.prove([test_proof.problem('euler_step')], test_proof.CPU, _kept.Kept(test_proof.CPU, Path(sys.argv[1])))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, start_new_session=True)
    kept = Kept(device, tmp_path)
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
    found = prove([one], device, kept, each=lambda *pair: seen.append(pair))
    assert not found[one].right and "has not come back" in found[one].reason and len(seen) == 1
    assert prove([one], device, Kept(device, tmp_path)) == found

    child({})
    assert prove([one], device, Kept(device, tmp_path), again=True)[one].right
    assert prove([one], device, Kept(device, tmp_path))[one].right


def test_an_interrupt_is_not_held_against_the_kernel(device, child, monkeypatch, tmp_path):
    child({})

    def ask(self, question, seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "ask", ask)
    kept, one = Kept(device, tmp_path), problem("euler_step")
    with pytest.raises(KeyboardInterrupt):
        prove([one], device, kept)
    assert kept.get(str(one)) is None and Kept(device, tmp_path).get(str(one)) is None


def test_a_second_process_waits_and_reads(device, child, tmp_path):
    """What the process that was first has proved is not proved again."""
    one, first, second = problem("euler_step"), Kept(device, tmp_path), Kept(device, tmp_path)
    child(None)

    class Waits(Kept):
        def alone(self, seconds):
            first.put(str(one), asdict(Verdict(True)))  # meanwhile
            return super().alone(seconds)

    second.__class__ = Waits
    assert prove([one], device, second, tell=pytest.fail)[one] == Verdict(True)


CHANGES = {
    "card": lambda patch: patch.setattr(_kept, "environment", lambda device: {"card": "another"}),
    "triton": lambda patch: patch.setattr(_kept.triton, "__version__", "3.99.0"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "2.99.0"),
    "assembler": lambda patch: patch.setenv("TRITON_PTXAS_PATH", patch.own_ptxas),
    "sources": lambda patch: patch.setattr(_kept, "_sources", lambda: "changed"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_environment_has_verdicts_of_its_own(device, tmp_path, what):
    own = tmp_path / "ptxas"
    own.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.9, V99.9.1'\n")
    own.chmod(0o755)
    before = Kept(device, tmp_path)
    before.put("finding", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.own_ptxas = str(own)
        _kept.environment.cache_clear()
        CHANGES[what](patch)
        changed = Kept(device, tmp_path)
        assert changed.folder != before.folder and changed.get("finding") is None
    _kept.environment.cache_clear()
    assert Kept(device, tmp_path).get("finding") == 1
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


def test_a_folder_that_cannot_be_written_costs_only_the_memory_of_it(device, child, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    child({})
    kept, one = Kept(device, tmp_path / "file"), problem("euler_step")
    assert kept.folder is None and "cannot be written" in caplog.text
    assert prove([one], device, kept)[one].right
    child(None)
    assert prove([one], device, kept)[one].right, "this process knows it"


def test_a_damaged_file_is_written_anew(device, child, tmp_path, caplog):
    child(None)
    kept, one = Kept(device, tmp_path), problem("euler_step")
    prove([one], device, kept)
    path = kept._path(str(one))
    odd = json.dumps({"key": str(one), "value": {"right": True, "odd": 1}})
    for text in ("", "{", "[]", '{"key": "another", "value": 1}', odd):
        path.write_text(text)
        assert prove([one], device, Kept(device, tmp_path))[one].right
        assert json.loads(path.read_text())["value"]["right"], text
    assert "is damaged and will be written anew" in caplog.text


def test_a_folder_that_becomes_unwritable(device, tmp_path, caplog):
    kept = Kept(device, tmp_path)
    kept.put("a", 1)
    for path in kept.folder.iterdir():
        path.unlink()
    kept.folder.rmdir()
    kept.put("b", 2)
    assert (kept.get("a"), kept.get("b"), kept.folder) == (1, 2, None) and "any more" in caplog.text


def test_known_verdicts_cost_less_than_fifty_milliseconds(device, tmp_path):
    problems = [problem("euler_step", steps=steps) for steps in range(2, 42)]
    for one in problems:
        Kept(device, tmp_path).put(str(one), asdict(Verdict(True)))
    seconds = []
    for _ in range(5):
        _kept.environment.cache_clear()
        begin = time.perf_counter()
        assert all(verdict.right for verdict in prove(problems, device, Kept(device, tmp_path)).values())
        seconds.append(time.perf_counter() - begin)
    # The first of a process also asks both assemblers for their versions, 10 ms each.
    assert min(seconds) < 0.05, seconds


# Replacements ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored():
    yield
    restore_kernels()


OPS = sorted({one.op for one in RIGHT} - {"joint_attention"})


@pytest.mark.parametrize("one", [one for one in RIGHT if one.op != "joint_attention"], ids=str)
def test_torchs_operators_take_the_place_of_a_wrong_kernel(restored, monkeypatch, one):
    """The registry's operator passes the proof that its kernel failed."""
    dtype = getattr(torch, one.dtype)
    module = sys.modules[f"qwen_fast_kernels.{one.op}"]
    assert replace_kernel(one.op, CPU, dtype) and is_replaced(one.op, CPU, dtype)
    monkeypatch.setattr(module, f"launch_{one.op}", lambda *_, **__: pytest.fail("the kernel was launched"))
    registered = getattr(torch.ops.qwen_fast, one.op)
    if one.op == "rms_norm_silu":

        def entry(x, gamma, bias, residual, silu):
            with_residual = registered.residual, (x, gamma, bias, residual, silu)
            function, arguments = with_residual if residual is not None else (registered, (x, gamma, bias, silu))
            return function(*arguments)
    else:
        entry = registered
    monkeypatch.setattr(module, f"_{one.op}_cuda", entry)
    verdict = examine(one, CPU, launches=2)
    assert verdict.right, verdict


def test_only_that_dtype_is_replaced(restored, device, monkeypatch):
    module = sys.modules["qwen_fast_kernels.euler_step"]
    launched = []
    launch = module.launch_euler_step
    monkeypatch.setattr(module, "launch_euler_step", lambda *a, **k: launched.append(a[0].dtype) or launch(*a, **k))
    replace_kernel("euler_step", CPU, BF16)
    for dtype in (BF16, FP32):
        torch.ops.qwen_fast.euler_step(*problem("euler_step", dtype).arguments(CPU))
    assert launched == [FP32]
    assert is_replaced("euler_step", CPU, BF16) and not is_replaced("euler_step", CPU, FP32)


def test_the_joint_attention_is_the_drivers_to_replace():
    assert not replace_kernel("joint_attention", CPU, BF16)


def test_the_log_says_how_long_it_took(device, child, tmp_path, caplog):
    child({})
    with caplog.at_level(logging.INFO):
        prove([problem("euler_step")], device, Kept(device, tmp_path))
    assert "1 kernels, 0 of them wrong" in caplog.text
