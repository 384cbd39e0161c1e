"""One whole pipeline whose every operator is its Triton launcher, interpreted on the CPU, each call counted."""

import importlib
from collections import Counter

import pytest
import torch

import qwen_fast
from pipelines import DTYPES, GUIDED, SMALL, draw, stock

OPS = ("flow_match_schedule", "euler_step", "cfg_euler_step")


@pytest.fixture
def launches(monkeypatch) -> Counter:
    """Each operator's launcher in the place of its CPU reference; counts its launches."""
    counter = Counter()

    def stand_in(name, module):
        launch = getattr(module, f"launch_{name}")

        def run(*args):
            counter[name] += 1
            return launch(*args, config=module.DEFAULT_CONFIG)

        monkeypatch.setattr(module, f"{name}_reference", run)

    for name in OPS:
        stand_in(name, importlib.import_module(f"qwen_fast_kernels.{name}"))
    return counter


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively here")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("arguments", "step_op"), [(SMALL, "euler_step"), (GUIDED, "cfg_euler_step")])
def test_whole_pipeline_through_the_launchers(checkpoint, launches, dtype, arguments, step_op):
    pipe = stock(checkpoint, dtype)
    expected = draw(pipe, prompt="a red circle", **arguments)
    actual = draw(qwen_fast.enable(pipe), prompt="a red circle", **arguments)
    assert launches == {"flow_match_schedule": 1, step_op: 4}
    assert qwen_fast.report(pipe).calls == dict(launches) and not qwen_fast.report(pipe).fallbacks
    if dtype == torch.float32 and step_op == "cfg_euler_step":
        # The only freedom of the contract: the order in which a norm's squares are added.
        assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
    else:
        assert torch.equal(actual, expected)


def test_every_operator_of_the_registry_takes_part():
    import qwen_fast_kernels

    assert sorted(OPS) == sorted(name for name in qwen_fast_kernels.__all__ if name != "HAS_TRITON")
