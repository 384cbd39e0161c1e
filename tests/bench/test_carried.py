"""What goes to a GPU machine and what comes back: sources with their commit, wheels, archives that fit."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks.runbook import archives, wheels
from benchmarks.shared import source as sources

ROOT = Path(__file__).parents[2]

# Which sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    """A repository of its own; `(root, folder that is carried along, git)`."""
    root = tmp_path / "checkout"
    (root / "kernels" / "qwen_fast_kernels").mkdir(parents=True)
    (root / "kernels" / "op.py").write_text("x = 1")

    def git(*words: str) -> str:
        name = ["-c", "user.name=x", "-c", "user.email=x@x"]
        return subprocess.run(["git", *name, *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    return root, tmp_path / "wheels", git


def test_the_commit_goes_along_and_a_stale_one_says_so(checkout, monkeypatch):
    root, carried, git = checkout
    commit = git("rev-parse", "--short", "HEAD")
    assert sources.commit_of(root, carried) == (commit, "False")
    assert sources.stamp(carried, root).startswith(f"{commit} clean ")
    monkeypatch.setenv("PATH", "/nowhere")  # no git, as on a GPU machine
    assert sources.commit_of(root, carried) == (commit, "False")
    assert sources.source_key(root, carried) == (f"{commit} {sources.sources_hash(root)}", "False")
    (root / "kernels" / "op.py").write_text("x = 2")
    assert sources.commit_of(root, carried) == (commit, "True")
    (carried / "commit.txt").write_text("cut off")
    assert sources.commit_of(root, carried) == ("", "unknown")
    with pytest.raises(ValueError, match="no git history"):
        sources.stamp(carried, root)


def test_a_stamp_of_changed_sources_says_so(checkout, monkeypatch):
    root, carried, _ = checkout
    (root / "kernels" / "op.py").write_text("x = 2")
    assert " dirty " in sources.stamp(carried, root)
    monkeypatch.setenv("PATH", "/nowhere")
    assert sources.commit_of(root, carried)[1] == "True"


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
        "profile/memory_snapshot.pickle": os.urandom(50_000),  # where somebody asked for it
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
    assert len(listed) == 3 and len((tmp_path / "commit.txt").read_text().split()) == 3
    monkeypatch.setattr(wheels, "_pip", lambda *arguments: None)
    wheels.install(tmp_path, tmp_path / "site")
    assert (tmp_path / "site" / "ptxas").read_bytes() == b"machine code" and os.access(tmp_path / "site" / "ptxas", os.X_OK)


def test_the_folder_of_wheels_is_ignored():
    assert subprocess.run(["git", "check-ignore", "-q", "wheels/x.whl"], cwd=ROOT).returncode in (0, 128)
