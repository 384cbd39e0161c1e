"""The denoising loop: predictions of the fused transformer, each step's CFG and Euler update in one kernel."""

from collections import deque
from typing import Any

import torch

from ..common.stages import steps
from ..common.state import logger
from ..schedule import Schedule
from .denoiser import Denoiser, Task, guided

_STEPS_AHEAD = 2  # the host may prepare so many steps before it waits: `interrupt` and the progress bar stay honest


def denoise(pipe: Any, latents: torch.Tensor, task: Task, callback: Any, callback_inputs: list[str]) -> torch.Tensor:
    """T steps; the host never waits for the values of the device.

    Args:
        latents: `[B, S_img, C]` in the model's dtype.
        callback, callback_inputs: stock's `callback_on_step_end` and the tensors that it gets.
    Returns:
        Tensor: `[B, S_img, C]`; fp32 with the precise sampler.
    """
    state, scheduler, schedule = pipe.fast_state, pipe.scheduler, task.schedule
    own_step = pipe.own_step()
    denoiser = Denoiser(pipe, task, latents)
    if own_step is None:
        if state.options.precise_sampler:
            latents = latents.float()
        _show(scheduler, schedule, None)

    pace, check = _Pace(latents.device), FiniteCheck(latents, schedule.timesteps) if state.options.check_nan else None
    watched = callback is not None and not {"latents", "prompt_embeds"}.issuperset(callback_inputs)
    running = denoiser.running(latents, own_step, watched)
    with running, pipe.progress_bar(total=schedule.num_inference_steps) as progress_bar:
        for i, t in enumerate(steps(schedule.timesteps)):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t
            latents = denoiser.step(i, t, latents)
            if denoiser.own_step is None:
                scheduler._step_index = i + 1
            if callback is not None:
                latents = _call_back(callback, callback_inputs, denoiser, i, t, latents)
            if check is not None:
                check.look(i, latents)
            pace.step()
            progress_bar.update()
        if denoiser.graph is not None:
            latents = latents.clone()  # before it is released: the next call writes into its buffers
    pipe._current_timestep = None
    if check is not None:
        found = check.found()
        state.nan_note = found or "all finite"
        if found is not None:
            logger.warning("check_nan: %s.", found)
    return latents


def _call_back(
    callback: Any, names: list[str], denoiser: Denoiser, i: int, t: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Stock's `callback_on_step_end`; the latents that it leaves."""
    pipe, scheduler = denoiser.pipe, denoiser.pipe.scheduler
    embeds, mask = denoiser.task.prompts[0]
    own = latents if denoiser.graph is None else latents.clone()  # the next step writes into the graph's buffer
    tensors = guided(denoiser.predictions, denoiser.task.true_cfg_scale) if denoiser.watched else {}
    tensors |= {"latents": own, "prompt_embeds": embeds}
    shown = None if denoiser.own_step is not None else _shown(scheduler)
    outputs = callback(pipe, i, t, {name: tensors[name] for name in names})
    if denoiser.own_step is None and _drew(scheduler, i + 1):
        _show(scheduler, denoiser.task.schedule, i + 1)
    elif denoiser.own_step is None:
        step = pipe.own_step()
        if pipe.scheduler is not scheduler or _shown(scheduler) != shown:
            step = pipe.step_of_scheduler
        if step is not None:
            denoiser.state.fall_back("a callback changed the scheduler, which takes the steps from there on")
            denoiser.leave_steps_to(step)
    given = outputs.pop("prompt_embeds", embeds)
    denoiser.task.prompts[0] = (given, mask)
    denoiser.look(changed_prompt="prompt_embeds" in names or given is not embeds)  # it may have edited them in place
    return outputs.pop("latents", own)


def _show(scheduler: Any, schedule: Schedule, step_index: int | None) -> None:
    """Callbacks read the scheduler, so it shows what stock's would."""
    scheduler.sigmas, scheduler.timesteps = schedule.sigmas, schedule.timesteps
    scheduler.num_inference_steps = schedule.num_inference_steps
    scheduler._step_index, scheduler._begin_index = step_index, 0


def _drew(scheduler: Any, step_index: int) -> bool:
    """Whether a callback drew with another pipeline that has this scheduler, and left it at the end of its own run."""
    found = scheduler.step_index
    return found is not None and (found != step_index or found >= len(scheduler.timesteps))


def _shown(scheduler: Any) -> tuple[int, int]:
    """Which sigmas `scheduler` holds, and how often they were written to."""
    return id(scheduler.sigmas), 0 if scheduler.sigmas.is_inference() else scheduler.sigmas._version


class FiniteCheck:
    """Remembers on the device after which step each picture's latents first were not finite; the host asks at the end.

    Args:
        latents: `[B, S_img, C]`, before the first step.
        timesteps: `[T]`, of the schedule.
    """

    def __init__(self, latents: torch.Tensor, timesteps: torch.Tensor):
        self._timesteps = timesteps
        self._first = torch.full(latents.shape[:1], len(timesteps), dtype=torch.int64, device=latents.device)
        self.look(-1, latents)

    def look(self, step: int, latents: torch.Tensor) -> None:
        """Note the pictures that are not finite after `step` (0-based; -1: as they came), without waiting for the device."""
        bad = ~latents.flatten(1).isfinite().all(dim=1)
        self._first.masked_fill_(bad & (self._first > step), step)

    def found(self) -> str | None:
        """Where it began, or None if all stayed finite."""
        timesteps, parts = self._timesteps.tolist(), []
        for picture, step in enumerate(self._first.tolist()):
            if step < 0:
                parts.append(f"the latents of picture {picture} are not finite before the first step")
            elif step < len(timesteps):
                parts.append(
                    f"the latents of picture {picture} are not finite after step {step} of 0 to {len(timesteps) - 1} "
                    f"(timestep {timesteps[step]:g})"
                )
        return "; ".join(parts) or None


class _Pace:
    """Keeps the host from running more than two steps ahead of the device."""

    def __init__(self, device: torch.device):
        self._device = device
        self._events: deque | None = deque() if device.type == "cuda" else None

    def step(self) -> None:
        if self._events is None:
            return
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))  # which need not be the current device
        self._events.append(event)
        if len(self._events) > _STEPS_AHEAD:
            self._events.popleft().synchronize()
