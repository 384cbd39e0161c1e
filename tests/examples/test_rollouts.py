"""The example that tunes a LoRA on a reward: it runs, its weights move, and it stops where pictures and gradients part."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import qwen_fast

EXAMPLE = Path(__file__).parents[2] / "examples" / "rollouts.py"


@pytest.fixture
def rollouts():
    spec = importlib.util.spec_from_file_location("rollouts", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_and_ours_follows(rollouts, tmp_path, capsys):
    means = rollouts.main(["--iterations", "2", "--pictures", "3", "--out", str(tmp_path / "lora")])
    assert len(means) == 2 and means[0] != means[1]
    assert "ours and stock" in capsys.readouterr().out
    (file,) = (tmp_path / "lora").glob("*.safetensors")
    ups = [weight for name, weight in load_file(file).items() if "lora_B" in name]
    still = [weight for weight in ups if weight.abs().max() == 0]  # a LoRA begins with zeros there
    assert ups and len(still) <= 1, "but for the text of the last block, which nothing reads"


def test_the_gate_sees_two_models(rollouts, monkeypatch):
    disable = qwen_fast.disable

    def other(pipe):
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.001)
        return disable(pipe)

    monkeypatch.setattr(qwen_fast, "disable", other)
    with pytest.raises(RuntimeError, match="of two models"):
        rollouts.main(["--iterations", "1", "--pictures", "2"])
