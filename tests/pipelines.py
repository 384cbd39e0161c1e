"""Pipelines on the small checkpoint, and the question every parity test asks: the same latents, and not by stock's code?"""

from pathlib import Path

import diffusers
import torch

import qwen_fast

SMALL = {"height": 64, "width": 96, "num_inference_steps": 4, "output_type": "latent"}
GUIDED = SMALL | {"negative_prompt": "blurry", "true_cfg_scale": 3.7}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stock(checkpoint: Path, dtype: torch.dtype = torch.float32, cls: type = diffusers.QwenImagePipeline):
    """A pipeline of diffusers, silent."""
    pipe = cls.from_pretrained(checkpoint, **{_dtype_argument(): dtype})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _dtype_argument() -> str:
    return "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"


def draw(pipe, seed: int = 7, **arguments):
    """The images of one call, its noise seeded."""
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(**arguments).images


def assert_ran_fast(pipe, before: int = 0) -> None:
    """Something of `pipe` ran on qwen_fast since `before` calls, and nothing fell back to stock."""
    report = qwen_fast.report(pipe)
    assert sum(report.calls.values()) > before and not report.fallbacks, str(report)


def assert_same_picture(pipe, fast_pipe=None, seed: int = 7, **arguments) -> None:
    """`pipe` (stock) and `fast_pipe`, or `pipe` after `enable`, give equal latents, and no step fell back.

    On the CPU the sampler is stock's own arithmetic, so that equality holds to the bit in every dtype.
    """
    make = arguments.pop("make", dict)  # arguments that a call consumes, such as generators, are made anew
    expected = draw(pipe, seed, **arguments, **make())
    fast_pipe = fast_pipe or qwen_fast.enable(pipe)
    before = sum(qwen_fast.report(fast_pipe).calls.values())
    actual = draw(fast_pipe, seed, **arguments, **make())
    assert_ran_fast(fast_pipe, before)
    assert isinstance(actual, torch.Tensor) and actual.dtype == expected.dtype
    assert expected.isfinite().all() and expected.std() > 0.1
    assert torch.equal(actual, expected), (actual - expected).abs().max()
