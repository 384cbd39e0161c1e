"""The GPU run-book: what is done is kept, whatever ends a run; what comes back fits; what a machine lacks is said."""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks.runbook import archives, environment
from benchmarks.runbook import run as runbook
from benchmarks.runbook.run import Progress
from benchmarks.runbook.stages import HOGS, LATER, STAGES, TUNING, Stage
from benchmarks.shared import processes
from benchmarks.shared.watchdog import GO_ON

ROOT = Path(__file__).parents[2]
KEY = "abc 123"


def stage(name: str, code: str, seconds: float = 60.0, **more) -> Stage:
    return Stage(name, seconds, ("-c", code), **more)


def touch(name: str) -> Stage:
    """Appends a line to DIR/name.txt."""
    return stage(name, f"open('{{out}}/{name}.txt', 'a').write('ran\\n'); print('{name} speaks')")


@pytest.fixture
def book(tmp_path, capsys):
    """`book(*stages)` runs them and gives the state and what was printed; again, and it goes on."""

    def run(*stages: Stage, minutes: float = 5.0, key: str = KEY, **options) -> tuple[Progress, str]:
        state = Progress(tmp_path / "state.json", key)
        runbook.run(stages, tmp_path, state, dict(os.environ), minutes=minutes, **options)
        return Progress(tmp_path / "state.json", key), capsys.readouterr().out

    return run


def test_stages_run_once_each_with_a_log(book, tmp_path):
    state, out = book(touch("one"), stage("two", "import sys; print('no'); sys.exit(3)"), touch("three"))
    assert [state.status(name) for name in ("one", "two", "three")] == ["done", "failed", "done"]
    assert "two: failed after" in out and "with exit code 3" in out
    assert (tmp_path / "logs" / "one.log").read_text().endswith("one speaks\n")
    state, out = book(touch("one"), stage("two", "1 / 0"), touch("three"), touch("four"))
    assert out.count(", before") == 3 and state.status("four") == "done"
    assert (tmp_path / "one.txt").read_text() == "ran\n"
    assert (tmp_path / "logs" / "two.log").read_text().endswith("no\n"), "a red result is a result"


@pytest.mark.slow
def test_a_stage_that_takes_too_long_is_asked_to_stop_and_run_again(book, tmp_path):
    slow = (
        "import time\n"
        "try:\n    print('begins', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt:\n    open('{out}/kept.txt', 'w').write('kept')"
    )
    state, out = book(stage("slow", slow, seconds=8), touch("next"))
    assert (state.status("slow"), state.status("next")) == ("timed out", "done")
    assert (tmp_path / "kept.txt").read_text() == "kept"
    state, _ = book(stage("slow", "print('quick')"), touch("next"))
    assert state.status("slow") == "done" and (tmp_path / "next.txt").read_text() == "ran\n"


@pytest.mark.slow
def test_a_hanging_a_crashing_and_a_slow_stage_cost_no_other(book, tmp_path):
    """One that no signal reaches but the last, one that dies of a fault, one whose results come while it runs."""
    hang = "import signal, time\nfor n in (2, 6, 15): signal.signal(n, signal.SIG_IGN)\nprint('hangs', flush=True)\n"
    hang += "time.sleep(600)"
    slow = "import time\nfor n in range(4): open('{out}/rows.csv', 'a').write('row\\n'); time.sleep(0.4)"
    packed = []
    begin = time.monotonic()
    state, out = book(
        stage("hang", hang, seconds=2.0, grace=0.3),
        stage("crash", "import os; os.kill(os.getpid(), 11)"),
        stage("slow", slow),
        touch("next"),
        pack=lambda: packed.append((tmp_path / "rows.csv").exists() and (tmp_path / "rows.csv").read_text().count("row")),
        every=0.5,
    )
    assert time.monotonic() - begin < 20
    assert [state.status(name) for name in ("hang", "crash", "slow", "next")] == ["timed out", "failed", "done", "done"]
    assert state.stages["crash"]["code"] == -11 and "crash: failed after" in out
    assert {1, 4} & set(packed) and set(packed) & {2, 3}, "packed while it ran"


def test_a_stage_that_hung_and_goes_on_by_itself_is_begun_again(book, tmp_path):
    code = "import sys; f = open('{out}/tries.txt', 'a+'); f.write('x'); f.seek(0); "
    code += f"sys.exit({GO_ON} if len(f.read()) < 3 else 0)"
    state, out = book(stage("goes on", code, tries=3), stage("never", f"import sys; sys.exit({GO_ON})", tries=2))
    assert (state.status("goes on"), state.status("never")) == ("done", "failed")
    assert (tmp_path / "tries.txt").read_text() == "xxx" and out.count("it goes on behind that") == 3
    assert (tmp_path / "logs" / "goes on-3.log").exists()


def test_what_cannot_be_packed_costs_nothing(book):
    state, out = book(touch("one"), touch("two"), pack=lambda: 1 / 0)
    assert state.status("two") == "done" and "not packed: ZeroDivisionError" in out


def test_a_process_that_a_driver_holds_is_not_waited_for(monkeypatch):
    held = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    monkeypatch.setattr(processes, "KILLED_PATIENCE", 0.1)
    monkeypatch.setattr(processes, "_DUMP_PATIENCE", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda *_: None)
        assert not processes.stop(held, 0.1)
    assert processes.stop(held, 0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="no PR_SET_PDEATHSIG")
def test_what_was_started_by_a_run_book_that_is_dead_already_does_not_run():
    """Killed between the fork and the child's wish to die with it: 15 of 40 children lived on."""
    another = functools.partial(processes._as_child, os.getppid())
    done = subprocess.run([sys.executable, "-c", "print('lives')"], preexec_fn=another, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (1, b"")


def test_without_what_every_stage_needs_nothing_is_run(book):
    state, out = book(stage("smoke", "print('MISSING diffusers'); raise SystemExit(1)", needed=True), touch("one"))
    assert state.status("one") == "not run" and "MISSING diffusers" in out


@pytest.mark.slow
def test_what_a_stage_started_ends_with_it(book, tmp_path):
    child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import signal, time; "
    child += "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)']).pid, flush=True); time.sleep(60)"
    book(stage("slow", child, seconds=8.0, grace=0.2))
    pid = int((tmp_path / "logs" / "slow.log").read_text().splitlines()[1])
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the stage's child lives on")


@pytest.mark.slow
def test_the_whole_run_keeps_its_time(book):
    state, out = book(stage("long", "import time; time.sleep(60)"), touch("late"), minutes=6.5 / 60)
    assert (state.status("long"), state.status("late")) == ("timed out", "not run")
    assert "late: not run (the time is over)" in out
    state, _ = book(stage("long", "pass"), touch("late"))
    assert (state.status("long"), state.status("late")) == ("done", "done")


def test_what_the_machine_lacks_is_not_run_and_said(book):
    state, out = book(touch("one"), stage("tool", "pass", under=("no-such-sanitizer", "--x")))
    assert "no-such-sanitizer is not on the PATH" in out
    _, out = book(stage("gpu", "pass"), small=True)
    assert "gpu: not run (needs a CUDA device)" in out


def test_a_program_runs_the_interpreter(book, tmp_path):
    book(stage("under", "print('inside')", under=("env", "MARK=1")))
    assert (tmp_path / "logs" / "under.log").read_text().startswith("$ env MARK=1 ")


def test_the_ptxas_that_is_right_serves_the_stages_behind(book, tmp_path):
    shown = "import os; print(os.environ.get('TRITON_PTXAS_PATH'))"
    decide = "import json, sys; json.dump({'ptxas': sys.argv[1]}, open('{out}/environment.json', 'w'))"
    first = Stage("environment", 60, ("-c", decide, "{ptxas}"))
    book(stage("before", shown), first, stage("after", shown), ptxas="/other/ptxas")
    assert (tmp_path / "logs" / "before.log").read_text().endswith("None\n")
    assert (tmp_path / "logs" / "after.log").read_text().endswith("/other/ptxas\n")


@pytest.mark.parametrize("chosen", ["", None])
def test_tritons_own_ptxas_needs_no_variable(tmp_path, chosen):
    (tmp_path / "environment.json").write_text(json.dumps({"ptxas": chosen}))
    assert runbook.chosen_ptxas(tmp_path) == {}


def test_other_sources_are_another_run(book, tmp_path):
    book(touch("one"))
    state, _ = book(touch("one"), key="abc 456")
    assert (tmp_path / "one.txt").read_text() == "ran\nran\n"
    assert Progress(tmp_path / "state.json", KEY).status("one") == "done"


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_state_of_something_else_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json: not the state of a run-book"):
        Progress(tmp_path / "state.json", KEY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_is_offered(tmp_path, capsys):
    assert runbook.main(["--out", str(tmp_path / "book")]) == 2
    told = capsys.readouterr()
    assert "--dry-run does every stage" in told.out and "environment: " not in told.out


def test_bad_input_is_named(tmp_path, capsys):
    for option in ("--again", "--only", "--skip"):
        assert runbook.main(["--out", str(tmp_path), "--dry-run", option, "nothing"]) == 2
        assert f"{option}: nothing is none of smoke, environment" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert runbook.main(["--out", str(tmp_path / "b"), "--dry-run", "--wheels", str(tmp_path / "empty")]) == 2
    assert "--prepare" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert runbook.main(["--out", str(tmp_path / "file" / "b"), "--dry-run"]) == 2


def test_the_stages_are_those_of_their_commands():
    """Every option that a stage passes to one of our commands exists, and the budgets leave the ladder its time."""
    from qwen_fast.cli import build_parser

    for one in (*STAGES, *LATER, *TUNING):
        for command in filter(None, (one.command, one.small)):
            if command[:2] == ("-m", "qwen_fast.cli"):
                build_parser().parse_args([word.replace("{out}", "x") for word in command[2:]])
        assert one.estimate is None or one.estimate < one.limit
    assert sum(one.estimate for one in STAGES) <= 8 * 60 and all(one.estimate for one in STAGES)
    assert [one.name for one in STAGES][:6] == ["smoke", "environment", "stress", "attention", "operators", "ladder"]
    assert LATER[0].name == "ladder-compile" and [one.name for one in STAGES if one.needed] == ["smoke"]
    assert {one.name for one in STAGES if one.small is None} == {"tests-gpu"}
    assert len({one.name for one in (*STAGES, *LATER, *TUNING)}) == len((*STAGES, *LATER, *TUNING))
    for name in HOGS:
        file, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text()
    files = [word for one in STAGES for word in one.command if word.startswith("tests/") and "::" not in word]
    assert files and all((ROOT / file).exists() for file in files)


def test_every_test_that_needs_a_gpu_is_in_the_stage():
    (stage,) = (one for one in STAGES if one.name == "tests-gpu")
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    assert marked
    for path in (path.relative_to(ROOT) for path in marked):
        assert str(path) in stage.command or str(path.parent) in stage.command, path


def test_stages_are_chosen_by_name():
    def names(*words: str) -> list[str]:
        parsed = {"tune": False, "next": False, "only": [], "skip": [], "again": []} | {words[0]: list(words[1:])}
        return [one.name for one in runbook.selected(argparse.Namespace(**parsed))]

    assert names("only", "memory", "operators") == ["smoke", "operators", "memory"]
    assert names("skip", "tests-ops", "tests-gpu") == [
        *("smoke", "environment", "stress", "attention", "operators", "ladder", "sizes", "profile")
    ]


def test_the_time_limit_of_a_test_needs_its_plugin(monkeypatch, tmp_path):
    for there, expected in ((True, ["--timeout=60", "--timeout-method=thread"]), (None, [])):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, there=there: there)
        assert runbook.words_of(["-m", "{timeout}", "{out}/x"], tmp_path, "") == ["-m", *expected, f"{tmp_path}/x"]


# Every stage, killed and resumed --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_killed_after_each_stage_goes_on(tmp_path):
    """Every stage does its work on the CPU, once, though the run-book is killed behind each of them."""
    out, command = (
        tmp_path / "book",
        [sys.executable, "-m", "benchmarks.runbook", "--dry-run", "--out", str(tmp_path / "book")],
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # Under xdist's name for a worker pytest-benchmark would refuse to measure.
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    environment = kept | {"PYTHONPATH": paths}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def done() -> dict[str, float]:
        path = out / "state.json"
        (stages,) = json.loads(path.read_text()).values() if path.exists() else ({},)
        return {name: entry["seconds"] for name, entry in stages.items() if entry["status"] in runbook.FINAL}

    kills, seen = 0, {}
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        while process.poll() is None and done() == seen:
            time.sleep(0.05)
        if process.poll() is not None:
            break
        assert done().items() >= seen.items(), "what was done is done"
        seen = done()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
    printed = process.communicate()[0]
    working = [one.name for one in STAGES if one.small is not None]
    assert process.returncode == 0, printed + "".join(path.read_text()[-800:] for path in (out / "logs").iterdir())
    assert kills >= len(working) - 1
    assert list(seen) == working or set(done()) == set(working)
    assert printed.count(", before") >= len(working) - 1
    assert "tests-gpu: not run (needs a CUDA device)" in printed

    with tarfile.open(out / "rows.tar.gz") as archive:
        names = set(archive.getnames())
    assert {
        "state.json",
        "environment.json",
        "operators_of_the_model.csv",
        "ceilings.json",
        "profile/report.txt",
    } <= names
    assert {"ladder/ladder.csv", "ladder/ceilings.csv", "ladder/changing.csv", "profile/kernels.csv"} <= names
    assert {"attention.csv", "attention_stress.csv", "runbook.csv"} <= names
    assert {f"logs/{name}.log" for name in working} <= names
    with tarfile.open(out / "traces.tar.gz") as archive:
        assert archive.getnames() == ["profile/trace.json.gz"]
    assert json.loads((out / "environment.json").read_text())["ptxas"] == ""
    for rows in (
        "operators_of_the_model.csv",
        "attention_stress.csv",
        "attention.csv",
        "ladder/ladder.csv",
        "ladder/changing.csv",
    ):
        text = (out / rows).read_text()
        assert "wrong" not in text and "failed" not in text, text


def test_an_unpacked_archive_goes_on(book, tmp_path):
    """As on the next machine, where nothing else of the first one is left."""
    book(touch("one"), pack=lambda: archives.write_archives(tmp_path, tmp_path / "out"))
    other = tmp_path / "other"
    with tarfile.open(tmp_path / "out" / "rows.tar.gz") as archive:
        archive.extractall(other, filter="data")
    assert Progress(other / "state.json", KEY).status("one") == "done"


@pytest.mark.gpu
def test_every_kernel_is_launched(device):
    assert environment.launch_all(device) > 20
