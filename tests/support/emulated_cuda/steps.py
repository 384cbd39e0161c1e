"""Which step of a picture is under way, as a phase of the notes: "step 0", "step 1", ..."""

from typing import Any

from .notes import Notes


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
