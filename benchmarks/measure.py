"""Clocks, medians, and how far two latents lie apart."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


class Stopwatch:
    """Seconds of what runs inside: between CUDA events on a GPU, of this thread's CPU time without one.

    A GPU is waited for at both ends. On a CPU other work on the machine does not count, nor do other threads of torch:
    with more than one, it is wall time.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, math.nan
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    @property
    def kind(self) -> str:
        """What its seconds are, for a row."""
        if self.device.type == "cuda":
            return "CUDA events"
        return "CPU time of one thread" if self._clock is time.thread_time else "wall time"

    def __enter__(self) -> "Stopwatch":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            with torch.cuda.device(self.device):
                self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                self._events[0].record()
        else:
            self._begin = self._clock()
        return self

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self._events[1].record()
            torch.cuda.synchronize(self.device)
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
        else:
            self.seconds = self._clock() - self._begin


def interleaved(ways: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times by turns, in alternating order, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    watch = Stopwatch(device)
    for repeat in range(-1, repeats):
        for name in sorted(ways, reverse=bool(repeat % 2)):
            with watch:
                ways[name]()
            if repeat >= 0:
                seconds[name].append(watch.seconds)
    return seconds


@dataclass(frozen=True)
class Spread:
    """20th, 50th and 80th percentile; all the same of a single value."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(values), fifths[3])


def ratio(stock: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: the median over pairs that were taken one after the other."""
    return statistics.median(s / o for s, o in zip(stock, ours, strict=True))


@dataclass(frozen=True)
class Difference:
    """How far latents lie from stock's.

    Attributes:
        largest, mean: of the absolute differences, as parts of the largest absolute latent of stock.
        psnr: in dB, against the range of stock's latents; infinite where they are equal.
    """

    largest: float
    mean: float
    psnr: float

    @classmethod
    def between(cls, actual: torch.Tensor, expected: torch.Tensor) -> "Difference":
        if actual.shape != expected.shape:
            raise ValueError(f"latents of shape {tuple(actual.shape)} where stock's are {tuple(expected.shape)}")
        actual, expected = actual.double(), expected.double()
        apart = (actual - expected).abs()
        scale = expected.abs().max().item()
        squared = apart.square().mean().item()
        span = (expected.max() - expected.min()).item()
        psnr = math.inf if squared == 0 else 10 * math.log10(span * span / squared) if squared == squared else math.nan
        return cls(apart.max().item() / scale, apart.mean().item() / scale, psnr)
