"""What diffusers' loops ask of the call that is under way: pipelines/stock_call.py and modular.py put it into them."""

from collections.abc import Iterator
from typing import Any

import torch

from ..common.stages import steps
from .denoiser import CURRENT, Denoiser
from .step import Found, Step


def current(pipe: Any) -> Denoiser | None:
    """The denoiser of the call of `pipe` that is under way."""
    denoiser = CURRENT.get()
    return denoiser if denoiser is not None and denoiser.pipe is pipe else None


def take_step(
    pipe: Any,
    t: torch.Tensor,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    cond: dict[str, Any],
    uncond: dict[str, Any] | None,
    true_cfg_scale: float | None,
    normalize: bool,
    control: dict[str, Any] | None,
) -> Found | None:
    """A step of the call of `pipe` that is under way, see `Step`; None: stock's loop takes it."""
    denoiser = current(pipe)
    if denoiser is None:
        return None
    forwards = (cond,) if uncond is None else (cond, uncond)
    return denoiser.step(Step(t, latents, timestep, forwards, true_cfg_scale, normalize, control))


def behind_step(pipe: Any, i: int, latents: torch.Tensor) -> None:
    """Where stock's loop ends its turn `i`, behind callbacks."""
    denoiser = current(pipe)
    if denoiser is not None:
        denoiser.behind(i, latents)


def around_steps(timesteps: torch.Tensor) -> Iterator[torch.Tensor]:
    """The timesteps that stock's loop goes through."""
    denoiser = CURRENT.get()
    if denoiser is not None:
        denoiser.scheduled = timesteps
    return steps(timesteps)
