"""Pipelines on the small checkpoint, and the question every parity test asks: the same latents, and not by stock's code?"""

import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, in_fp32

SMALL = {"height": 64, "width": 96, "num_inference_steps": 4, "output_type": "latent"}
GUIDED = SMALL | {"negative_prompt": "blurry", "true_cfg_scale": 3.7}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_ran_fast(pipe, before: int = 0) -> None:
    """Something of `pipe` ran on qwen_fast since `before` calls, and nothing fell back to stock."""
    report = qwen_fast.report(pipe)
    assert sum(report.calls.values()) > before and not report.fallbacks, str(report)


def assert_same_picture(pipe, fast_pipe=None, seed: int = 7, **arguments) -> None:
    """`pipe` (stock) and `fast_pipe`, or `pipe` after `enable`, give the same latents, and no step fell back."""
    make = arguments.pop("make", dict)  # arguments that a call consumes, such as generators, are made anew
    expected = draw(pipe, seed, **arguments, **make())
    exact = expected if expected.dtype == torch.float32 else in_fp32(pipe, seed, expected.dtype, **arguments, **make())
    fast_pipe = fast_pipe or qwen_fast.enable(pipe)
    before = sum(qwen_fast.report(fast_pipe).calls.values())
    actual = draw(fast_pipe, seed, **arguments, **make())
    assert_ran_fast(fast_pipe, before)
    assert_same_latents(actual, expected, exact)
