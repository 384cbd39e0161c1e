"""Named stages of a picture's way, from loading to PNG: seconds for a table, ranges for a profiler.

with record() as recorder:
    pipe("a cat")
print(stage_table(recorder, recorder.wall))

The accelerated pipelines have their stages; `staged` gives them to diffusers' own for a while.
"""

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch

STAGES = (
    "import",
    "load",
    "text",
    "schedule",
    "modulation",
    "denoise",
    "vae",
    "png",
)  # in a picture's order; a table shows them so
STEP = "step"  # one denoising step, inside "denoise": recorded only where it is asked for

Item = TypeVar("Item")


class Span(NamedTuple):
    """One stage that ran: its name, begin and end in seconds of `time.perf_counter`, and the thread it ran in."""

    name: str
    begin: float
    end: float
    thread: int


class Recorder:
    """What `record` gives.

    Attributes:
        spans (list[Span]): in the order in which they ended. Stages nest ("modulation" lies in "denoise" on the first call
            of a schedule) and, from several threads, overlap.
        steps (bool): whether the steps of the denoising loop are recorded too.
        thread (int): the one that records; stages of others run beside its own.
        outer (Recorder | None): the one of the `record` around this one; it gets the same spans.
    """

    def __init__(self, steps: bool = False, outer: "Recorder | None" = None) -> None:
        self.spans: list[Span] = []
        self.outer, self.thread = outer, threading.get_ident()
        self.steps = steps or (outer is not None and outer.steps)
        self._begin = time.perf_counter()
        self._end: float | None = None

    @property
    def wall(self) -> float:
        """Seconds from the beginning of `record` to its end, or to now inside it."""
        return (self._end or time.perf_counter()) - self._begin

    def seconds(self) -> dict[str, float]:
        """Total of each stage, nested ones included, in the order of `STAGES`, then of others as they first ended."""
        totals: dict[str, float] = {}
        for span in self.spans:
            totals[span.name] = totals.get(span.name, 0.0) + span.end - span.begin
        return _in_order(totals)

    def own_seconds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Seconds of each stage without those nested in it, as `seconds` orders them: of the recording thread, where
        they add up, and of the other threads, which ran beside it. Steps belong to the stage around them."""
        here: dict[str, float] = {}
        beside: dict[str, float] = {}
        for thread in {span.thread for span in self.spans}:
            totals, open_spans = here if thread == self.thread else beside, []
            own = [span for span in self.spans if span.thread == thread and span.name != STEP]
            for span in sorted(own, key=lambda span: (span.begin, -span.end)):
                while open_spans and open_spans[-1].end <= span.begin:
                    open_spans.pop()
                totals[span.name] = totals.get(span.name, 0.0) + span.end - span.begin
                if open_spans:
                    totals[open_spans[-1].name] -= span.end - span.begin
                open_spans.append(span)
        return _in_order(here), _in_order(beside)


_RECORDER: ContextVar[Recorder | None] = ContextVar("qwen_fast_recorder", default=None)


@contextlib.contextmanager
def record(*, steps: bool = False) -> Iterator[Recorder]:
    """Record the stages that run inside, in this context; threads take part if they run in a copy of it.

    A `record` inside another gives its spans to both.

    Args:
        steps: record every denoising step of the accelerated pipelines as a stage "step" too. The host then waits for the
            device after each, which it otherwise does not.
    """
    recorder = Recorder(steps, _RECORDER.get())
    token = _RECORDER.set(recorder)
    try:
        yield recorder
    finally:
        _RECORDER.reset(token)
        recorder._end = time.perf_counter()


_DEVICE: ContextVar[torch.device | None] = ContextVar("qwen_fast_stage_device", default=None)


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """One stage: a range "qwen_fast::name" for profilers, and a span for the recorder if there is one.

    A recorder waits where the stage ends for the current CUDA stream, that of `on_device`'s device if there is one, so that
    a span holds the work it started; without a recorder nothing waits.
    """
    recorder = _RECORDER.get()
    with _range(name):
        if recorder is None:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.current_stream(_DEVICE.get()).synchronize()
            span = Span(name, begin, time.perf_counter(), threading.get_ident())
            while recorder is not None:
                recorder.spans.append(span)
                recorder = recorder.outer


def in_stage(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives, called as a stage."""
    with stage(name):
        return function(*args, **kwargs)


@contextlib.contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Inside, stages wait for `device`, where a pipeline works, which need not be the current one."""
    token = _DEVICE.set(device if device.type == "cuda" else None)
    try:
        yield
    finally:
        _DEVICE.reset(token)


def steps(items: Iterable[Item]) -> Iterator[Item]:
    """`items`; each turn of the loop over them is a range or a stage "step" where a profiler or the recorder asks."""
    recorder = _RECORDER.get()
    recorded = recorder is not None and recorder.steps
    if not recorded and not torch.autograd._profiler_enabled():
        yield from items
        return
    for item in items:
        with stage(STEP) if recorded else _range(STEP):
            yield item


@contextlib.contextmanager
def staged(pipe: Any) -> Iterator[None]:
    """Inside, a pipeline of diffusers that runs its own loop has the stages text, schedule, denoise and vae.

    Its methods are covered on the instance, and uncovered at the end.
    """

    def covered(function: Any, name: str) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with stage(name):
                return function(*args, **kwargs)

        return call

    own_bar = pipe.progress_bar  # which the instance may have from elsewhere

    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        return _DenoisingBar(own_bar(*args, **kwargs))

    with contextlib.ExitStack() as stack:

        def cover(owner: Any, attribute: str, replacement: Any) -> None:
            # Past __setattr__, which diffusers' pipelines and schedulers make registrations of.
            before = vars(owner).get(attribute)
            vars(owner)[attribute] = replacement
            restore = vars(owner).pop if before is None else vars(owner).__setitem__
            stack.callback(restore, attribute, before)

        for owner, attribute, name in (
            (pipe, "encode_prompt", "text"),
            (pipe.scheduler, "set_timesteps", "schedule"),
            (pipe.vae, "encode", "vae"),
            (pipe.vae, "decode", "vae"),
            (pipe.image_processor, "postprocess", "vae"),
        ):
            if owner is not None:  # a pipeline that ends in latents needs no VAE
                cover(owner, attribute, covered(getattr(owner, attribute), name))
        cover(pipe, "progress_bar", progress_bar)
        yield


class _DenoisingBar:
    """A progress bar whose `with` block, which is the denoising loop, is the stage "denoise"."""

    def __init__(self, bar: Any):
        self._bar = bar

    def __enter__(self) -> Any:
        self._stage = stage("denoise")
        self._stage.__enter__()
        return self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            self._bar.__exit__(*error)
        finally:
            self._stage.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._bar)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


def stage_table(recorder: Recorder, wall: float, *, pictures: int = 1) -> str:
    """Stages, their seconds and their share of `wall`; what they leave of it is "other", so that the rows add up.

    Args:
        recorder: of the thread whose time `wall` is.
        wall: seconds.
        pictures: where there are several, a column gives the seconds of each on the average ("import" and "load" happen once).
    Returns:
        str: lines without a last newline. A nested stage is not counted twice; stages of other threads stand below the
        total, for they ran beside it.
    """
    here, beside = recorder.own_seconds()
    here["other"] = max(0.0, wall - sum(here.values()))
    several = pictures > 1
    lines = ["stage         seconds    share" + ("  per picture" if several else "")]

    def row(name: str, seconds: float, share: str, average: bool = True) -> str:
        each = f"{seconds / pictures:13.3f}" if several and average else ""
        return f"{name:10s} {seconds:10.3f}  {share:>7s}{each}".rstrip()

    for name, seconds in here.items():
        lines.append(row(name, seconds, f"{seconds / wall:.1%}" if wall else "", name not in ("import", "load", "other")))
    lines.append(row("total", wall, "100.0%", False))
    if beside:
        lines.append("meanwhile, in other threads:")
        lines += [row(name, seconds, "") for name, seconds in beside.items()]
    return "\n".join(lines)


def _range(name: str) -> contextlib.AbstractContextManager:
    return torch.profiler.record_function(f"qwen_fast::{name}")


def _in_order(totals: dict[str, float]) -> dict[str, float]:
    return {name: totals[name] for name in (*STAGES, *totals) if name in totals}
