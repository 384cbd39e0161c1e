"""What a training stage keeps on disk and says on the terminal."""

import os
import time
from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` whole or not at all: an interruption leaves the file that was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    torch.save(state, aside)
    os.replace(aside, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None where it wrote nothing."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None


class Progress:
    """A line now and then: how far, the losses since the last line, the pace and the time left."""

    def __init__(self, stage: str, total: int, done: int = 0, every: float = 20.0) -> None:
        self.stage, self.total, self.every = stage, total, every
        self.first, self.began = done, time.monotonic()
        self.said, self.sums, self.count = self.began, {}, 0

    def step(self, done: int, samples: int, **losses: torch.Tensor) -> None:
        """Count one optimiser step, the `done`th, of `samples` samples."""
        for name, loss in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.detach()
        self.count += 1
        now = time.monotonic()
        if now - self.said < self.every and done < self.total:
            return
        means = "  ".join(f"{name} {float(value) / self.count:.4f}" for name, value in self.sums.items())
        pace = (done - self.first) / max(now - self.began, 1e-9)
        print(
            f"{self.stage}: {done}/{self.total}  {means}  {self.count * samples / max(now - self.said, 1e-9):.0f} samples/s"
            f"  {now - self.began:.0f} s, {(self.total - done) / max(pace, 1e-9):.0f} s left",
            flush=True,
        )
        self.said, self.sums, self.count = now, {}, 0
