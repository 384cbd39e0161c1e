"""The operator benchmarks run: each once, its correctness check before it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")
ROOT = Path(__file__).parents[1]


def test_every_benchmark_runs_once():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-disable", "benchmarks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0 and int(last.split(" passed")[0].split()[-1]) > 50, done.stdout[-3000:]
