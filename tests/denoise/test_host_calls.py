"""How many Python calls a picture costs the host, at the real number of layers: before the steps, in a step, after a callback.

Calls, not seconds: they are the same on every machine. Milliseconds are rows of benchmarks/parts/call_time.py.
"""

import sys

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import stock

LAYERS = 60
CALL = {"prompt": "a red circle", "negative_prompt": "x", "true_cfg_scale": 3.0, "height": 32, "width": 32}


@pytest.fixture
def pipes(checkpoint):
    """stock's and ours, of 60 narrow layers. Anew for each test: what an adapter leaves behind costs calls."""
    made = []
    for _ in range(2):
        pipe = stock(checkpoint)
        config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
        torch.manual_seed(0)
        pipe.transformer = diffusers.QwenImageTransformer2DModel(**config | {"num_layers": LAYERS}).eval()
        made.append(pipe)
    return made[0], qwen_fast.enable(made[1])


def calls(pipe, steps: int, **others) -> int:
    """Python calls of the second of two pictures."""
    counted = 0

    def count(frame, event, argument):
        nonlocal counted
        counted += event == "call"

    for profile in (None, count):
        sys.setprofile(profile)
        try:
            pipe(num_inference_steps=steps, output_type="latent", **CALL, **others)
        finally:
            sys.setprofile(None)
    return counted


def before_the_steps(pipes) -> tuple[float, float, int]:
    """Calls before the first step and behind the last beside stock's own, those of a step, and of a picture of four."""
    (stock_two, stock_four), (two, four) = ([calls(pipe, steps) for steps in (2, 4)] for pipe in pipes)
    step, stocks_step = (four - two) / 2, (stock_four - stock_two) / 2
    return (two - 2 * step) - (stock_two - 2 * stocks_step), step, four


def test_python_calls_of_a_picture(pipes):
    """Once: 48,100 calls before the first step beside stock's own, 12,800 after each callback, 20,100 a step.

    A third of the first two was asked for. Stock's own are five walks over all modules, of which ours has two.
    """
    beside, step, four = before_the_steps(pipes)
    shown = {"callback_on_step_end": lambda pipe, step, timestep, tensors: {}}
    callback = (calls(pipes[1], 4, **shown) - four) / 4
    assert beside <= -25_000 and callback <= 1_000 and step <= 14_500, (beside, callback, step)


def test_with_a_lora(pipes):
    """Each of whose layers is eight modules more. Once: 15,600 calls beside stock's own."""
    peft = pytest.importorskip("peft")
    for pipe in pipes:
        pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.2"]))
    beside, step, _ = before_the_steps(pipes)
    assert beside <= -90_000 and step <= 15_500, (beside, step)
