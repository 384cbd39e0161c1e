"""What a stress of attention counts: launches or pictures that were wrong, and what in them was NaN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .stress import Batch

LIMIT = 0.05  # of an element; bf16 rounds outputs of up to 4 by 0.016, and what is spoilt is NaN or another row
_EXAMINED = 8  # wrong launches of a round whose sequences are looked at


@dataclass
class Found:
    """Counts of one way in one process; of pictures, where "a launch" is said, a picture.

    Attributes:
        launches, bad: how many, and how many of them were wrong.
        whole, partial: in bad launches, heads of a sequence of which all rows, or some, are NaN.
        gaps: bad launches that wrote something between the sequences.
        different: launches whose bits are others than those of the first one with the same inputs.
        sequences: the first numbers of sequences in which there was NaN.
    """

    launches: int = 0
    bad: int = 0
    whole: int = 0
    partial: int = 0
    gaps: int = 0
    different: int = 0
    sequences: list[int] = field(default_factory=list)

    def add_launches(self, outs: torch.Tensor, batch: Batch) -> None:
        """`[launches, R, H, D]`, all of the same inputs."""
        wrong = ~((outs.float() - batch.expected).abs() < LIMIT)  # NaN compares false
        bad = wrong.flatten(1).any(1)
        self.launches += len(outs)
        self.bad += int(bad.sum())
        self.different += _others(outs, outs[0])
        if bad.any():
            self.gaps += int(wrong[bad][:, ~batch.inside].flatten(1).any(1).sum())
            for nan in outs[bad][:_EXAMINED].isnan().any(-1):
                self._look(nan, batch.places)

    def _look(self, nan: torch.Tensor, places: Sequence[tuple[int, int]]) -> None:
        for number, (begin, end) in enumerate(places):
            rows = nan[begin:end].sum(0)  # [H]
            self.whole += int((rows == end - begin).sum())
            self.partial += int(((rows > 0) & (rows < end - begin)).sum())
            if rows.any():
                self._note(number)

    def add_pictures(self, latents: torch.Tensor, first: torch.Tensor) -> None:
        """`[pictures, ...]`, and the same of the first call with these prompts and this noise."""
        nan = latents.isnan().flatten(1)
        self.launches += len(nan)
        self.bad += int((~latents.isfinite()).flatten(1).any(1).sum())
        self.whole += int(nan.all(1).sum())
        self.partial += int((nan.any(1) & ~nan.all(1)).sum())
        self.different += _others(latents, first)
        for number in nan.any(1).nonzero().flatten().tolist():
            self._note(number)

    def _note(self, number: int) -> None:
        self.sequences = sorted({*self.sequences, number})[:6]


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)  # NaN equals NaN


def _others(outs: torch.Tensor, first: torch.Tensor) -> int:
    return int((_bits(outs) != _bits(first)).flatten(1).any(1).sum())
