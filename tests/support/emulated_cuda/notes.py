"""What an emulated device saw: each event with the place in the source that caused it.

A place is `file:line` of the innermost frame of the project, and behind a `>` that of a library the project called, if the
event happened there. A phase is whatever the test says is under way, such as "step 1".
"""

import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SYNC = "the host waits"  # for the device: its values, a stream, all of it
EVENT = "the host waits for an event"  # which may lie far back: pacing
TO_DEVICE = "copy to the device"
TO_HOST = "copy to the host"
MIXED = "tensors of different devices"
LAUNCH = "launch"  # of a Triton kernel
FIRST = "first launch, in a capture"  # it loads code, which a capture may not allow
CAPTURE = "capture"
REPLAY = "replay"
ILLEGAL = "illegal in a capture"
RACE = "streams that do not wait for each other"
QUERY = "question about free memory"  # asks the driver; cheap, but not free

_ROOT = Path(__file__).resolve().parents[3]
# This package, and the helper that launches for the operators: the one to be named is its caller.
_OWN = str(Path(__file__).resolve().parent), str(_ROOT / "kernels/qwen_fast_kernels/_launch.py")
_PROJECT = tuple(str(_ROOT / name) + "/" for name in ("qwen_fast", "kernels", "benchmarks", "tests", "examples"))
_LIBRARY = re.compile(r".*/(?:site|dist)-packages/(?!torch/|triton/|_pytest/|pluggy/)(.*)")


@dataclass(frozen=True)
class Note:
    """One event.

    Attributes:
        kind: one of this module's constants.
        what: the operator or function, with shapes where they tell something.
        where: the place, see above.
        phase: what was under way.
        waits: whether the host waited for the device.
        capturing: whether the current stream was being captured.
    """

    kind: str
    what: str
    where: str
    phase: str
    waits: bool = False
    capturing: bool = False

    def __str__(self) -> str:
        return f"[{self.phase}{', in a capture' if self.capturing else ''}] {self.kind}: {self.what} at {self.where}"


@dataclass
class Notes:
    """The events of one emulated device, in order.

    Attributes:
        phase: what is under way; a test sets it, or uses `during`.
    """

    phase: str = "before"
    _all: list[Note] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, kind: str, what: str, *, waits: bool = False, capturing: bool = False) -> None:
        note = Note(kind, what, place(), self.phase, waits, capturing)
        with self._lock:
            self._all.append(note)

    def of(self, *kinds: str, phase: str | None = None) -> list[Note]:
        """Those of these kinds, all if none is named; of phases that begin with `phase`."""
        return [
            note for note in self._all if (not kinds or note.kind in kinds) and (phase is None or note.phase.startswith(phase))
        ]

    def waits(self, phase: str | None = None) -> list[Note]:
        """Where the host waited for the device: synchronisations and copies, without waits for an event."""
        return [note for note in self.of(phase=phase) if note.waits and note.kind != EVENT]

    def counted(self, *kinds: str, phase: str | None = None) -> Counter:
        """How often which event happened where, for a test's message or a print."""
        return Counter(map(str, self.of(*kinds, phase=phase)))

    def clear(self) -> None:
        with self._lock:
            self._all.clear()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Note]:
        return iter(list(self._all))


class StepsBar:
    """In place of a pipeline's `progress_bar`: tells the notes which step is under way, and shows nothing."""

    def __init__(self, notes: Notes):
        self._notes, self._step = notes, 0

    def __call__(self, iterable: Any = None, total: int | None = None) -> "StepsBar":
        return self

    def __enter__(self) -> "StepsBar":
        self._step = 0
        self._notes.phase = "step 0"
        return self

    def __exit__(self, *_) -> None:
        self._notes.phase = "after"

    def update(self, count: int = 1) -> None:
        self._step += count
        self._notes.phase = f"step {self._step}"


def place() -> str:
    """Where in the project, and in which library that it called, this thread is."""
    frame, library = sys._getframe(1), None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_PROJECT) and not file.startswith(_OWN):
            own = f"{file.removeprefix(str(_ROOT) + '/')}:{frame.f_lineno}"
            return own if library is None else f"{own} > {library}"
        found = _LIBRARY.fullmatch(file) if library is None else None
        if found is not None:
            library = f"{found.group(1)}:{frame.f_lineno}"
        frame = frame.f_back
    return library or "outside the project"
