"""Pipelines on the small checkpoint, and the question every parity test asks: the same latents, and not by stock's code?"""

import copy
import sys
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers.utils.torch_utils import randn_tensor

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
    """`pipe` (stock) and `fast_pipe`, or `pipe` after `enable`, give the same latents, and no step fell back."""
    make = arguments.pop("make", dict)  # arguments that a call consumes, such as generators, are made anew
    expected = draw(pipe, seed, **arguments, **make())
    exact = expected if expected.dtype == torch.float32 else in_fp32(pipe, seed, expected.dtype, **arguments, **make())
    fast_pipe = fast_pipe or qwen_fast.enable(pipe)
    before = sum(qwen_fast.report(fast_pipe).calls.values())
    actual = draw(fast_pipe, seed, **arguments, **make())
    assert_ran_fast(fast_pipe, before)
    assert_same_latents(actual, expected, exact)


def assert_same_latents(actual: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor | None = None) -> None:
    """The numerical contract of whole runs: fp32 within 2e-6 of the largest latent; bf16 and fp16 no farther than 1.25 x
    stock's own distance (RMS) from what the same weights and noise give in fp32, `exact`."""
    assert isinstance(actual, torch.Tensor) and actual.dtype == expected.dtype and actual.shape == expected.shape
    assert expected.isfinite().all() and expected.std() > 0.1
    if expected.dtype == torch.float32:
        assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max(), (actual - expected).abs().max()
    else:
        ours, theirs = ((latents.float() - exact).square().mean().sqrt() for latents in (actual, expected))
        assert theirs > 0 and ours <= 1.25 * theirs, f"{ours:.3e} from fp32, stock {theirs:.3e}"


def in_fp32(pipe, seed: int, dtype: torch.dtype, **arguments) -> torch.Tensor:
    """What stock draws with the same weights, but computed in fp32, from noise rounded to `dtype`."""
    wide = copy.deepcopy(pipe)
    for component in wide.components.values():
        if isinstance(component, torch.nn.Module):
            component.to(torch.float32)
    home = sys.modules[type(pipe).__module__]

    def rounded(shape, dtype=None, **kwargs):
        return randn_tensor(shape, dtype=half, **kwargs).to(dtype)

    half = dtype
    with mock.patch.object(home, "randn_tensor", rounded):
        return draw(wide, seed, **arguments)
