"""No prompt after the first one has to wait for a compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.triton
def test_prompts_of_any_length_share_one_compiled_kernel():
    """200 random prompts, batches and pictures: a kernel is compiled once for each of its configurations."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(Path(__file__).with_name("variants.py"))]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    variants = json.loads(found.stdout)
    assert len(variants) > 20 and set(variants.values()) == {1}, variants
