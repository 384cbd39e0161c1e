"""The GPU run-book: what is done is kept, whatever ends a run; what comes back fits; what a machine lacks is said."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import archives, environment, runbook, wheels
from benchmarks.runbook import STAGES, TUNING, Stage, State

ROOT = Path(__file__).parents[1]
KEY = "abc 123"


def stage(name: str, code: str, seconds: float = 60.0, **more) -> Stage:
    return Stage(name, seconds, ("-c", code), **more)


def touch(name: str) -> Stage:
    """Appends a line to DIR/name.txt."""
    return stage(name, f"open('{{out}}/{name}.txt', 'a').write('ran\\n'); print('{name} speaks')")


@pytest.fixture
def book(tmp_path, capsys):
    """`book(*stages)` runs them and gives the state and what was printed; again, and it goes on."""

    def run(*stages: Stage, minutes: float = 5.0, key: str = KEY, **options) -> tuple[State, str]:
        state = State(tmp_path / "state.json", key)
        runbook.run(stages, tmp_path, state, dict(os.environ), minutes=minutes, **options)
        return State(tmp_path / "state.json", key), capsys.readouterr().out

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


def test_what_a_stage_started_ends_with_it(book, tmp_path, monkeypatch):
    monkeypatch.setattr(runbook, "_GRACE", 0.2)
    child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import signal, time; "
    child += "signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)']).pid, flush=True); time.sleep(60)"
    book(stage("slow", child, seconds=8.0))
    pid = int((tmp_path / "logs" / "slow.log").read_text().splitlines()[1])
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the stage's child lives on")


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
    assert State(tmp_path / "state.json", KEY).status("one") == "done"


def test_the_key_is_that_of_the_sources(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "op.py").write_text("x = 1")
    first = runbook.source_key(tmp_path)
    (tmp_path / "kernels" / "op.py").write_text("x = 2")
    assert runbook.source_key(tmp_path) != first
    assert len(runbook.source_key().split()) >= 2


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_a_state_of_something_else_is_named(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"state\.json: not the state of a run-book"):
        State(tmp_path / "state.json", KEY)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_is_offered(tmp_path, capsys):
    assert runbook.main(["--out", str(tmp_path / "book")]) == 2
    assert "--dry-run does every stage" in capsys.readouterr().err


def test_bad_input_is_named(tmp_path, capsys):
    assert runbook.main(["--out", str(tmp_path), "--dry-run", "--again", "nothing"]) == 2
    assert "--again: nothing is none of environment" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert runbook.main(["--out", str(tmp_path / "b"), "--dry-run", "--wheels", str(tmp_path / "empty")]) == 2
    assert "--prepare" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert runbook.main(["--out", str(tmp_path / "file" / "b"), "--dry-run"]) == 2


def test_the_stages_are_those_of_their_commands():
    """Every option that a stage passes to one of our commands exists, and the budgets leave the ladder its time."""
    from qwen_fast.cli import build_parser

    for one in (*STAGES, *TUNING):
        for command in filter(None, (one.command, one.small)):
            if command[:2] == ("-m", "qwen_fast.cli"):
                build_parser().parse_args([word.replace("{out}", "x") for word in command[2:]])
    assert sum(one.seconds for one in STAGES) <= 12.5 * 60, "caps, of which most stages leave a part"
    assert [one.name for one in STAGES][:2] == ["environment", "tests-gpu"]
    assert {one.name for one in STAGES if one.small is None} == {"tests-gpu", "tests-alone", "sanitizer"}
    file, _, name = runbook.ALONE.partition("::")
    assert f"def {name}(" in (ROOT / file).read_text()


# Every stage, killed and resumed --------------------------------------------------------------------------------------


def test_a_dry_run_killed_after_each_stage_goes_on(tmp_path):
    """Every stage does its work on the CPU, once, though the run-book is killed behind each of them."""
    out, command = tmp_path / "book", [sys.executable, "-m", "benchmarks.runbook", "--dry-run", "--out", str(tmp_path / "book")]
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
    assert "tests-gpu: not run (needs a CUDA device)" in printed and "sanitizer: not run" in printed

    with tarfile.open(out / "rows.tar.gz") as archive:
        names = set(archive.getnames())
    assert {"state.json", "environment.json", "operators.json", "tests-ops.xml", "profile/report.txt"} <= names
    assert {"ladder/ladder.csv", "ladder/ceilings.csv", "profile/kernels.csv"} <= names
    assert {f"logs/{name}.log" for name in working} <= names
    with tarfile.open(out / "traces.tar.gz") as archive:
        assert archive.getnames() == ["profile/trace.json.gz"]
    assert json.loads((out / "environment.json").read_text())["ptxas"] == ""
    assert json.loads((out / "operators.json").read_text())["benchmarks"]


# What comes back ------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "book"
    for name, data in {
        "state.json": b"{}",
        "logs/one.log": b"log",
        "logs/large.log": os.urandom(40_000),
        "ladder/ladder.csv": b"rows",
        "profile/trace.json.gz": os.urandom(30_000),
        "profile/memory_snapshot.pickle": os.urandom(50_000),
        "site/diffusers/x.py": b"installed",
        "state.tmp": b"half",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def names_in(path: Path) -> set[str]:
    with tarfile.open(path) as archive:
        return set(archive.getnames())


def test_two_archives_hold_everything_but_what_was_installed(results, tmp_path):
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "op,D=3072,device_name=X.json").write_text("{}")
    for _ in range(2):  # the second time the archives are there already
        assert archives.write_archives(results, results, more=[configs]) == []
    rows = {"state.json", "logs/one.log", "logs/large.log", "ladder/ladder.csv", "configs/op,D=3072,device_name=X.json"}
    assert names_in(results / "rows.tar.gz") == rows
    assert names_in(results / "traces.tar.gz") == {"profile/trace.json.gz", "profile/memory_snapshot.pickle"}


def test_what_does_not_fit_is_left_out_and_named(results, tmp_path):
    left_out = archives.write_archives(results, tmp_path / "out", limit=35_000)
    assert [line.split(":")[0] for line in left_out] == ["profile/memory_snapshot.pickle", "logs/large.log"]
    assert all(path.stat().st_size <= 35_000 for path in (tmp_path / "out").iterdir())
    assert names_in(tmp_path / "out" / "traces.tar.gz") == {"profile/trace.json.gz", archives.NOTE}
    with tarfile.open(tmp_path / "out" / "rows.tar.gz") as archive:
        note = archive.extractfile(archives.NOTE).read().decode()
    assert "memory_snapshot.pickle: 50000 bytes" in note and "large.log: 40000 bytes" in note


def test_an_unpacked_archive_goes_on(book, tmp_path):
    """As on the next machine, where nothing else of the first one is left."""
    book(touch("one"), after=lambda: archives.write_archives(tmp_path, tmp_path / "out"))
    other = tmp_path / "other"
    with tarfile.open(tmp_path / "out" / "rows.tar.gz") as archive:
        archive.extractall(other, filter="data")
    assert State(other / "state.json", KEY).status("one") == "done"


# What is carried along ------------------------------------------------------------------------------------------------


def fake_wheel(folder: Path, name: str, module: str) -> Path:
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{module}.py", "value = 7\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{module}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def test_wheels_are_installed_offline_into_their_own_folder(tmp_path, monkeypatch):
    carried, site = tmp_path / "wheels", tmp_path / "site"
    carried.mkdir()
    fake_wheel(carried, "carried_along", "carried_module")
    wheels.install(carried, site)
    done = subprocess.run(
        [sys.executable, "-c", "import carried_module; print(carried_module.__file__)"],
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(site / "carried_module.py")
    monkeypatch.setattr(wheels, "_pip", lambda *arguments: pytest.fail("installed again"))
    wheels.install(carried, site)


def test_what_is_prepared_is_pinned_and_replaces_what_was_there(tmp_path, monkeypatch):
    """Without a network: what pip would be asked for."""
    asked = []

    def pip(*arguments):
        asked.append(arguments)
        target = Path(arguments[arguments.index("--dest") + 1])
        name = "triton" if wheels.PTXAS_WHEEL in arguments else "diffusers"
        with zipfile.ZipFile(target / f"{name}-9.whl", "w") as archive:
            archive.writestr(wheels.PTXAS, b"machine code")

    monkeypatch.setattr(wheels, "_pip", pip)
    (tmp_path / "diffusers-1.whl").write_text("old")
    listed = wheels.prepare(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"diffusers-9.whl", "ptxas.gz", "commit.txt"}
    assert all("==" in name for name in (*wheels.PINNED, wheels.PTXAS_WHEEL)) and set(wheels.PINNED) <= set(asked[0])
    assert all("--no-deps" in arguments and "--python-version=3.12" in arguments for arguments in asked)
    assert len(listed) == 3 and wheels.carried_commit(tmp_path)
    monkeypatch.setattr(wheels, "_pip", lambda *arguments: None)
    wheels.install(tmp_path, tmp_path / "site")
    assert (tmp_path / "site" / "ptxas").read_bytes() == b"machine code" and os.access(tmp_path / "site" / "ptxas", os.X_OK)


def test_the_folder_of_wheels_is_ignored():
    assert subprocess.run(["git", "check-ignore", "-q", "wheels/x.whl"], cwd=ROOT).returncode in (0, 128)


@pytest.mark.gpu
def test_every_kernel_is_launched(device, capsys):
    assert environment.launch_all(device) > 20
    assert not any(environment.attention_faults(device).values())
