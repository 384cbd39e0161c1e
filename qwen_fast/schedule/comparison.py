"""Our schedule against diffusers', and with the three errors that this project corrects."""

import math
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from .flow_match import Schedule


def compare(config: Mapping[str, Any], schedule: Schedule, image_seq_len: int, sigmas: list[float] | None) -> tuple[str, bool]:
    """Compare with diffusers' scheduler, driven as its pipeline drives it: a sentence, and whether all is well."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    ours = schedule.num_inference_steps
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(image_seq_len, *(scheduler.config[key] for key in keys))
    with np.errstate(divide="ignore", invalid="ignore"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / ours, ours) if sigmas is None else sigmas, mu=mu, device="cpu")
    name = f"diffusers {diffusers.__version__} FlowMatchEulerDiscreteScheduler"
    if scheduler.sigmas.isnan().any() and schedule.sigmas.isfinite().all():
        return f"{name}: gives NaN here, 0 / 0 in its stretch to shift_terminal; ours leaves the stretch out.", True
    pairs = ((schedule.sigmas.cpu(), scheduler.sigmas), (schedule.timesteps.cpu(), scheduler.timesteps))
    if all(torch.equal(a, b) for a, b in pairs):
        return f"{name}: sigmas and timesteps equal bit for bit.", True
    largest = [(a - b).abs().max().item() for a, b in pairs]
    return f"{name}: DIFFERENT, by up to {largest[0]:.3g} in sigma and {largest[1]:.3g} in timestep.", False


def historical_errors(config: Mapping[str, Any], steps: int, image_seq_len: int) -> dict[str, Schedule]:
    """The schedule with each of the three errors of the implementation that this project corrects.

    mu was interpolated geometrically (through ln and exp) instead of along a straight line; the input sigmas ran to
    shift_terminal instead of 1/N; the stretch to shift_terminal was missing. What a config cannot show is left out.
    """
    wrong = {}
    if config.get("use_dynamic_shifting", False):
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        if 0 < base != top > 0:
            mu = math.exp(math.log(base) + (image_seq_len - low) / (high - low) * math.log(top / base))
            wrong["mu through ln/exp"] = Schedule.from_config(config, steps, mu=mu)
    terminal = config.get("shift_terminal")
    if terminal:
        sigmas = np.linspace(1.0, terminal, steps)
        wrong["linspace to shift_terminal"] = Schedule.from_config(config, image_seq_len=image_seq_len, sigmas=sigmas)
        unstretched = {**config, "shift_terminal": None}
        wrong["no stretch"] = Schedule.from_config(unstretched, steps, image_seq_len=image_seq_len)
    return wrong
