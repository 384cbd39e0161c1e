"""Stock diffusers as the reference: drawn, in fp32, in float64; and whether the latents of ours are the same."""

import contextlib
import copy
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_qwenimage
from diffusers.utils.torch_utils import randn_tensor


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, what stock computes in fp32 whatever the model's dtype is computed in float64: rotation and RMS."""

    def rotate(x, freqs_cis, use_real=True, use_real_unbind_dim=-1):
        assert not use_real
        pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis.to(torch.complex128).unsqueeze(1)).flatten(3).to(x.dtype)

    def normalize(self, hidden_states):
        variance = hidden_states.double().square().mean(-1, keepdim=True)
        return (hidden_states.double() * torch.rsqrt(variance + self.eps) * self.weight.double()).to(hidden_states.dtype)

    by_device = vars(transformer_qwenimage).get("ROPE_PER_DEVICE", {})  # in diffusers 0.40 and 0.41
    with (
        mock.patch.object(transformer_qwenimage, "apply_rotary_emb_qwen", rotate),
        mock.patch.dict(by_device, {"cuda": functools.partial(rotate, use_real=False)}),
        mock.patch.object(RMSNorm, "forward", normalize),
    ):
        yield


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
