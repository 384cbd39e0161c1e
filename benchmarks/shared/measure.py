"""Clocks, medians, and how far two latents lie apart."""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging


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


class StepClock:
    """Takes the place of a pipeline's progress bar: the seconds of every step, and an end after a few of them.

    Stock's loop and ours both update the bar once a step and skip the steps after `interrupt`; the schedule, its table and
    whatever depends on the number of steps stay those of the whole picture.

    Args:
        pipe: a Qwen-Image pipeline; whoever uses the clock takes `progress_bar` off it again (see `clocked`).
        stop_after: steps that are done.
    Attributes:
        steps: seconds of each step of the last call, between CUDA events on a GPU.
        stamps: before the first step and after each one; `stamp` takes another, `seconds` are those between two.
    """

    def __init__(self, pipe: Any, stop_after: int):
        self._pipe, self._stop_after, self.stamps = pipe, stop_after, []
        self._cuda = pipe.device.type == "cuda"
        self._clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def __call__(self, iterable: object = None, total: int | None = None) -> "StepClock":
        return self

    def __enter__(self) -> "StepClock":
        self.stamps = [self.stamp()]
        return self

    def __exit__(self, *_) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self.stamps.append(self.stamp())
        if len(self.stamps) > self._stop_after:
            self._pipe._interrupt = True

    def stamp(self) -> Any:
        if not self._cuda:
            return self._clock()
        with torch.cuda.device(self._pipe.device):
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return event

    def seconds(self, first: Any, second: Any) -> float:
        if not self._cuda:
            return second - first
        second.synchronize()
        return first.elapsed_time(second) / 1e3

    @property
    def steps(self) -> list[float]:
        return [self.seconds(*pair) for pair in itertools.pairwise(self.stamps)]


@contextlib.contextmanager
def clocked(pipe: Any, stop_after: int) -> Iterator[StepClock]:
    """A StepClock in the pipeline's calls inside."""
    pipe.progress_bar = StepClock(pipe, stop_after)
    try:
        yield pipe.progress_bar
    finally:
        pipe.__dict__.pop("progress_bar", None)


@torch.no_grad()
def exact_latents(pipe: Any, arguments: dict, steps: int) -> torch.Tensor:
    """What stock gives after `steps` steps with the same weights, noise and timesteps, but computed in fp32.

    One child of the transformer at a time is widened, so that a model of 41 GB needs 1.4 GB more. Parameters come back to
    the same memory.
    """
    model, dtype = pipe.transformer, pipe.transformer.dtype
    parts = [child for child in model.children() if child is not model.transformer_blocks]
    parts += list(model.transformer_blocks)
    kept: dict[torch.nn.Module, list[torch.Tensor]] = {}

    def widen(part: torch.nn.Module, *_) -> None:
        kept[part] = [parameter.data for parameter in part.parameters()]
        for parameter in part.parameters():
            parameter.data = parameter.data.float()

    def narrow(part: torch.nn.Module, *_) -> None:
        for parameter, data in zip(part.parameters(), kept.pop(part), strict=True):
            parameter.data = data

    def same_timestep(_model: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rounded = (kwargs["timestep"] * 1000).to(dtype) / 1000
        return args, kwargs | {"timestep": rounded.float()}

    wide = {name: value.float() if _is_floating(value) else value for name, value in arguments.items()}
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [narrow(part) for part in list(kept)])
        for part in parts:
            stack.callback(part.register_forward_pre_hook(widen).remove)
            stack.callback(part.register_forward_hook(narrow).remove)
        stack.callback(model.register_forward_pre_hook(same_timestep, with_kwargs=True).remove)
        with clocked(pipe, steps):
            return pipe(**wide, output_type="latent").images


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """diffusers' warnings about embeddings without masks, once a call, and its progress bars."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
