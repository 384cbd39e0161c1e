"""Named stages of a picture's way, from loading to PNG: seconds for a table, ranges for a profiler.

    with record() as recorder:
        pipe("a cat")
    print(recorder.seconds())  # {"text": 0.1, "schedule": ..., "denoise": ..., "vae": ...}
"""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar

import torch

STAGES = ("load", "text", "schedule", "modulation", "denoise", "vae", "png")  # in a picture's order; a table shows them so


class Recorder:
    """What `record` gives.

    Attributes:
        spans (list[tuple[str, float, float]]): stage, begin and end in seconds of `time.perf_counter`, as they ended.
            Stages nest ("modulation" lies in "denoise" on the first call of a schedule) and, from several threads, overlap.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float]] = []

    def seconds(self) -> dict[str, float]:
        """Total of each stage, in the order of `STAGES`, then of others as they first ended."""
        totals: dict[str, float] = {}
        for name, begin, end in self.spans:
            totals[name] = totals.get(name, 0.0) + end - begin
        return {name: totals[name] for name in (*STAGES, *totals) if name in totals}


_RECORDER: ContextVar[Recorder | None] = ContextVar("qwen_fast_recorder", default=None)


@contextlib.contextmanager
def record() -> Iterator[Recorder]:
    """Record the stages that run inside, in this context; threads take part if they run in a copy of it."""
    recorder = Recorder()
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """One stage: a range "qwen_fast::name" for profilers, and a span for the recorder if there is one.

    A recorder waits for the current CUDA stream where the stage ends, so that a span holds the work it started; without
    one nothing waits.
    """
    recorder = _RECORDER.get()
    with torch.profiler.record_function(f"qwen_fast::{name}"):
        if recorder is None:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.current_stream().synchronize()
            recorder.spans.append((name, begin, time.perf_counter()))
