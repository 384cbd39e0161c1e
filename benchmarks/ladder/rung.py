"""A rung of the ladder: one way to run a stock pipeline."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..shared.shapes import PictureCase


class NotMeasured(Exception):
    """A rung that does not apply here; its message says why."""


@dataclass(frozen=True)
class Rung:
    """One row of the ladder.

    Attributes:
        name: as the table shows it.
        enter: (pipe, case) to a context in which calls of the stock pipeline `pipe` run this way; it yields a detail for the
            row. Raises NotMeasured where it does not apply.
        lossy: another picture is no fault; its distance from stock's stands beside the time.
        steady: ms per step is the same from the second step on, so that a few steps are enough.
    """

    name: str
    enter: Callable[[Any, PictureCase], AbstractContextManager[str]]
    lossy: bool = False
    steady: bool = True
