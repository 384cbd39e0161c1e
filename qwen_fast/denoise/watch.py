"""What runs beside the steps: whether latents stay finite, and how far the host runs ahead of the device."""

from collections import deque

import torch

from ..common.state import logger

_STEPS_AHEAD = 2  # the host may prepare so many steps before it waits: `interrupt` and the progress bar stay honest


class FiniteCheck:
    """Remembers on the device after which step each picture's latents first were not finite; the host asks at the end.

    Args:
        latents: `[B, S_img, C]`, before the first step.
        timesteps: `[T]`, of the schedule, or `[B, T]`, of each picture's.
    """

    def __init__(self, latents: torch.Tensor, timesteps: torch.Tensor):
        self._timesteps = timesteps.expand(len(latents), -1)
        self._first = torch.full(latents.shape[:1], timesteps.shape[-1], dtype=torch.int64, device=latents.device)
        self.look(-1, latents)

    def look(self, step: int, latents: torch.Tensor) -> None:
        """Note the pictures that are not finite after `step` (0-based; -1: as they came), without waiting for the device."""
        if len(latents) != len(self._first):
            return  # a callback left some out, and nobody knows which
        bad = ~latents.flatten(1).isfinite().all(dim=1)
        self._first.masked_fill_(bad & (self._first > step), step)

    def told(self) -> str:
        """What was found, for `report`; what is wrong goes to the log too."""
        found = self.found()
        if found is not None:
            logger.warning("check_nan: %s.", found)
        return found or "all finite"

    def found(self) -> str | None:
        """Where it began, or None if all stayed finite."""
        parts = []
        for picture, (timesteps, step) in enumerate(zip(self._timesteps.tolist(), self._first.tolist(), strict=True)):
            if step < 0:
                parts.append(f"the latents of picture {picture} are not finite before the first step")
            elif step < len(timesteps):
                parts.append(
                    f"the latents of picture {picture} are not finite after step {step} of 0 to {len(timesteps) - 1} "
                    f"(timestep {timesteps[step]:g})"
                )
        return "; ".join(parts) or None


class Pace:
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
