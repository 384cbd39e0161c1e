"""The denoising loop: predictions of the fused transformer, each step's CFG and Euler update in one kernel."""

import contextlib
from collections import deque
from typing import Any

import torch

from ..common.stages import steps
from ..common.state import logger
from ..schedule import Schedule
from ..transformer.call import CALL, accelerated, lora_scale
from . import graph
from .denoiser import Forwards, Task, sampler_step

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
    model_dtype = latents.dtype
    own_step = pipe.own_step()
    if state.precise_sampler and own_step is None:
        latents = latents.float()
    step_index = torch.zeros(1, dtype=torch.int32, device=latents.device)
    if own_step is None:
        _show(scheduler, schedule, None)

    pace, check = _Pace(latents.device), FiniteCheck(latents, schedule.timesteps) if state.check_nan else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(lora_scale(pipe.transformer, pipe.attention_kwargs))
        call = stack.enter_context(accelerated(pipe.transformer, state))
        call.changing = callback is not None
        progress_bar = stack.enter_context(pipe.progress_bar(total=schedule.num_inference_steps))
        forwards = Forwards(pipe, call, task, step_index, latents.shape[0], model_dtype)
        captured = None
        reason = "the scheduler takes the steps itself"
        if own_step is None:
            reason = graph.reason_against(pipe, forwards, callback)
        if reason is None:
            captured = graph.captured_step(pipe, call, forwards, latents)
        state.graph = reason
        for i, t in enumerate(steps(schedule.timesteps)):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t
            if captured is not None:
                latents = captured.run(state)
            else:
                predictions = forwards.predict(latents.to(model_dtype))
                predicted = {}
                if own_step is not None or not {"latents", "prompt_embeds"}.issuperset(callback_inputs):
                    predicted = guided(predictions, task.true_cfg_scale)
                if own_step is not None:
                    outside = CALL.set(None)
                    try:
                        latents = own_step(predicted["noise_pred"], t, latents)
                    finally:
                        CALL.reset(outside)
                else:
                    latents = sampler_step(state, latents, predictions, schedule.sigmas, step_index, task.true_cfg_scale)
                step_index.add_(1)  # in stream order, so no program of this step can see the next index
            if own_step is None:
                scheduler._step_index = i + 1
            if callback is not None:
                tensors = predicted | {"latents": latents, "prompt_embeds": task.prompts[0][0]}
                shown = None if own_step is not None else _shown(scheduler)
                outside = CALL.set(None)  # a callback may run another pipeline on the same transformer
                try:
                    outputs = callback(pipe, i, t, {name: tensors[name] for name in callback_inputs})
                finally:
                    CALL.reset(outside)
                if own_step is None and _drew(scheduler, i + 1):
                    _show(scheduler, schedule, i + 1)
                elif own_step is None:
                    own_step = pipe.own_step()
                    if pipe.scheduler is not scheduler or _shown(scheduler) != shown:
                        own_step = pipe.step_of_scheduler
                    if own_step is not None:
                        state.fall_back("a callback changed the scheduler, which takes the steps from there on")
                latents = outputs.pop("latents", latents)
                embeds = outputs.pop("prompt_embeds", task.prompts[0][0])
                task.prompts[0] = (embeds, task.prompts[0][1])
                forwards = Forwards(pipe, call, task, step_index, latents.shape[0], model_dtype, kept=forwards)
            if check is not None:
                check.look(i, latents)
            pace.step()
            progress_bar.update()
    pipe._current_timestep = None
    if check is not None:
        found = check.found()
        state.nan_note = found or "all finite"
        if found is not None:
            logger.warning("check_nan: %s.", found)
    return latents if captured is None else latents.clone()  # the next call writes into the graph's buffers


def guided(predictions: tuple[torch.Tensor, ...], true_cfg_scale: float | None) -> dict[str, torch.Tensor]:
    """What stock's loop has of a step's predictions, by its names and with its roundings; "noise_pred" is the velocity."""
    if true_cfg_scale is None:
        return {"noise_pred": predictions[0]}
    cond, uncond = predictions
    combined = uncond + true_cfg_scale * (cond - uncond)
    cond_norm, noise_norm = (torch.norm(one, dim=-1, keepdim=True) for one in (cond, combined))
    return {
        "noise_pred": combined * (cond_norm / noise_norm),
        "neg_noise_pred": uncond,
        "comb_pred": combined,
        "cond_norm": cond_norm,
        "noise_norm": noise_norm,
    }


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
