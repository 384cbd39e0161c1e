"""The slow set keeps to itself, and in it a skip is a failure."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each way to leave a test out, and what pytest would have said.
SKIPPED = {
    "in_a_test": "import pytest\ndef test():\n    pytest.skip('no browser')",
    "by_a_mark": "import pytest\n@pytest.mark.skip(reason='no browser')\ndef test(): pass",
    "by_a_fixture": "import pytest\n@pytest.fixture\ndef page():\n    pytest.skip('no browser')\ndef test(page): pass",
    "with_its_module": "import pytest\npytest.importorskip('no_such_module', reason='no browser')\ndef test(): pass",
}


@pytest.fixture
def tests(tmp_path):
    """A project with our settings, a test of `make test` and a folder of slow ones."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    slow = tmp_path / "tests" / "slow"
    slow.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "slow" / "conftest.py", slow)
    (tmp_path / "tests" / "test_quick.py").write_text("def test(): pass")
    (slow / "test_runs.py").write_text("def test(): pass")

    def run(*arguments: str) -> tuple[int, str]:
        # -rN: no second list of the failures, which tells their reasons whole or cut, by the environment (CI, COLUMNS).
        command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "--color=no", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        return done.returncode, done.stdout

    return run, slow


def test_a_skip_fails_the_slow_set(tests):
    run, slow = tests
    code, said = run("tests/slow")
    assert code == 0 and "1 passed" in said, said
    for name, text in SKIPPED.items():
        (slow / f"test_{name}.py").write_text(text)
    code, said = run("tests/slow", "--continue-on-collection-errors")
    assert code == 1 and "skipped" not in said.splitlines()[-1], said
    assert said.count("nothing is skipped in the slow set: Skipped: no browser") == len(SKIPPED), said


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_is_marked_is_left_to_make_test_slow_and_to_nobody_else():
    def passed(target: str) -> list[list[str]]:
        said = subprocess.run(["make", "-n", "-W", "setup.py", target], cwd=ROOT, capture_output=True, text=True, check=True)
        found = (shlex.split(line) for line in said.stdout.splitlines() if "-m pytest" in line)
        return [words[words.index("pytest") + 1 :] for words in found]

    (quick,), (marked, folder) = passed("test"), passed("test-slow")
    assert quick[-3:] == ["-m", "not slow", "tests"] and marked == [*quick[:-3], "-m", "slow", "tests"]
    assert folder[-1] == "tests/slow" and "-m" not in folder
    assert (ROOT / ".ci" / "run").read_text().split()[-4:] == ["make", "test", "make", "test-slow"]


def test_the_other_tests_do_not_meet_it(tests):
    run, _ = tests
    code, said = run("tests")
    assert code == 0 and said.splitlines()[-1].startswith("1 passed"), said
