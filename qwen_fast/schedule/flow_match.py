"""The noise schedule of a run, from a scheduler's config, computed once on the device that samples."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from qwen_fast_kernels import flow_match_schedule

from ..common.hardware import check_device


def calculate_mu(image_seq_len: int, config: Mapping[str, Any]) -> float:
    """Shift parameter of an image: a straight line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift).

    Args:
        image_seq_len: number of image tokens (a 1024x1024 picture has 4096). Beyond max_image_seq_len mu is extrapolated.
        config: the scheduler's config; missing keys take diffusers' own defaults.
    Source: diffusers 0.42.1, pipelines/qwenimage/pipeline_qwenimage.py, calculate_shift.
    """
    base_seq_len, max_seq_len = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    intercept = base_shift - slope * base_seq_len
    return image_seq_len * slope + intercept


def layered_mu(base_image_seq_len: int) -> float:
    """Shift parameter of QwenImageLayeredPipeline: the square root of the condition image's tokens over 256.

    Use it as `Schedule.from_config(config, mu=layered_mu(n), sigmas=layered_sigmas(steps))`.

    Source: diffusers 0.42.1, pipelines/qwenimage/pipeline_qwenimage_layered.py, QwenImageLayeredPipeline.__call__.
    """
    return (base_image_seq_len / (256 * 256 / 16 / 16)) ** 0.5


def layered_sigmas(num_inference_steps: int) -> np.ndarray:
    """Input sigmas `[T]` fp64 of QwenImageLayeredPipeline: linspace(1, 0, T + 1) without the last. Source: as layered_mu."""
    return np.linspace(1.0, 0, check_num_inference_steps(num_inference_steps) + 1)[:-1]


def check_num_inference_steps(value: Any) -> int:
    """`value` as an int of at least 1, or a ValueError that names it."""
    try:
        steps = operator.index(value)
    except TypeError:
        steps = 0
    if steps < 1:
        raise ValueError(f"`num_inference_steps` is {value!r}; a whole number of at least 1 is needed.")
    return steps


def check_sigmas(values: Any) -> torch.Tensor:
    """The caller's sigmas as `[T]` fp32 on the CPU, or a ValueError: they must lie in [0, 1] and never ascend."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().float().numpy()
    sigmas = torch.from_numpy(np.array(values, dtype=np.float32))
    if sigmas.dim() != 1 or sigmas.numel() == 0:
        raise ValueError(f"`sigmas` has shape {tuple(sigmas.shape)}; a list of at least one number is needed.")
    outside = ~((sigmas >= 0) & (sigmas <= 1))
    if outside.any():
        raise ValueError(f"`sigmas` holds {sigmas[outside][0].item():g}; every value must lie in [0, 1].")
    ascents = (sigmas.diff() > 0).nonzero()
    if len(ascents):
        i = int(ascents[0])
        raise ValueError(
            f"`sigmas` ascends from {sigmas[i].item():g} to {sigmas[i + 1].item():g} at position {i + 1}; "
            "noise is removed from 1 to 0, so pass them in descending order."
        )
    return sigmas


@dataclass(frozen=True)
class Schedule:
    """Sigmas and timesteps of one run.

    Attributes:
        mu (float | None): shift parameter; None when the config does not shift dynamically.
        sigmas (Tensor): `[T + 1]` fp32, noise fraction, descending, the terminal sigma (0) appended.
        timesteps (Tensor): `[T]` fp32, num_train_timesteps * sigma.
    """

    mu: float | None
    sigmas: torch.Tensor
    timesteps: torch.Tensor

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        num_inference_steps: int | None = None,
        *,
        image_seq_len: int | None = None,
        mu: float | None = None,
        sigmas: Sequence[float] | np.ndarray | torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> "Schedule":
        """The schedule that diffusers' Qwen-Image pipelines use with this config, bit for bit.

        Where diffusers divides 0 by 0 (one step with shift_terminal: NaN latents and a black picture) the stretch is left
        out: one step gives sigmas [1, 0] and timestep [1000].

        Args:
            config: `pipe.scheduler.config`, or a dict of the keys of FlowMatchEulerDiscreteScheduler.
            num_inference_steps: T; not needed, and ignored as in diffusers, when `sigmas` are given.
            image_seq_len: number of image tokens, from which mu follows.
            mu: shift parameter, instead of `image_seq_len`.
            sigmas: own sigmas `[T]` in [0, 1], descending, without the terminal one; they are still shifted and stretched.
            device: where the tables are computed and stay.
        Raises:
            ValueError: an argument that is missing or out of range, a scheduler of another kind, or CUDA where there is none.
        """
        device = check_device(device)
        kind = config.get("_class_name", FlowMatchEulerDiscreteScheduler.__name__)
        if kind != FlowMatchEulerDiscreteScheduler.__name__:
            raise ValueError(f"`config` is of a {kind}; the schedule is that of a FlowMatchEulerDiscreteScheduler.")
        if sigmas is not None:
            sigmas = check_sigmas(sigmas)
            steps = sigmas.numel()
        else:
            steps = check_num_inference_steps(num_inference_steps)
        dynamic = bool(config.get("use_dynamic_shifting", False))
        if not dynamic:
            mu = None
        elif mu is None:
            if image_seq_len is None or image_seq_len < 1:
                raise ValueError(f"`image_seq_len` is {image_seq_len}; this config needs it (at least 1), or `mu`.")
            mu = calculate_mu(image_seq_len, config)

        if any(config.get(f"use_{name}_sigmas", False) for name in ("karras", "exponential", "beta")):
            return cls(mu, *_converted(config, steps, mu, sigmas, device))
        if not dynamic:
            shift, time_shift = config.get("shift", 1.0), "static"
        else:
            exponential = config.get("time_shift_type", "exponential") == "exponential"
            shift, time_shift = math.exp(mu) if exponential else mu, "dynamic"
        tables = flow_match_schedule(
            steps,
            None if sigmas is None else sigmas.to(device),
            shift=shift,
            time_shift=time_shift,
            shift_terminal=config.get("shift_terminal"),
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            invert_sigmas=bool(config.get("invert_sigmas", False)),
            device=device,
        )
        return cls(mu, *tables)

    @classmethod
    def from_scheduler(cls, scheduler: FlowMatchEulerDiscreteScheduler, *args: Any, **kwargs: Any) -> "Schedule":
        """`from_config` with the scheduler's config and its current `shift`, which `set_shift` may have changed."""
        return cls.from_config({**scheduler.config, "shift": scheduler.shift}, *args, **kwargs)

    @property
    def num_inference_steps(self) -> int:
        """T."""
        return self.timesteps.numel()

    def model_timesteps(self, dtype: torch.dtype) -> torch.Tensor:
        """`[T]` in `dtype`: what the transformer receives. diffusers rounds the timestep to the model's dtype *before* it
        divides by 1000, so in bf16 the model sees 968.75 where the schedule says 968.17."""
        return self.timesteps.to(dtype) / 1000


def _converted(config, steps, mu, sigmas, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Karras, exponential and beta sigmas go through diffusers itself: nothing of them is worth a kernel."""
    keys = {key: value for key, value in config.items() if not key.startswith("_")}
    sigmas = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas.numpy()
    if sigmas[-1] == 1.0:
        keys["shift_terminal"] = None  # it would divide 0 by 0
    scheduler = FlowMatchEulerDiscreteScheduler(**keys)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device=device)
    return scheduler.sigmas, scheduler.timesteps
