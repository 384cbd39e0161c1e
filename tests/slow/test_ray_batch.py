"""examples/ray_batch.py on a cluster of this machine's."""

import importlib
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import ray

from qwen_fast.demo.judge import judge

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    variables = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", EXAMPLES))), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False, runtime_env={"env_vars": variables})
    yield
    ray.shutdown()


def test_prompts_of_a_file_are_drawn_by_workers(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    alone = importlib.import_module("text_to_image").main([])  # of seed 0, as the first of a file
    prompts = ["a green circle on a white background", "a blue cross on a yellow background"]
    Path("prompts.txt").write_text("\n".join(prompts))
    files = importlib.import_module("ray_batch").main(["prompts.txt", "--out", "out"])
    assert [Path(file).name for file in files] == ["000000.png", "000001.png"]
    first, second = (np.asarray(PIL.Image.open(file)) for file in files)
    assert np.abs(first.astype(int) - np.asarray(alone, int)).max() <= 1, "the picture of its seed, in whatever batch"
    assert judge(first, prompts[0]).everything and judge(second, prompts[1]).everything
