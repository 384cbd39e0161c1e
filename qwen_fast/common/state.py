"""The state of an enabled pipeline: its options, what it counts while it runs; and the logger."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen_fast_kernels.proof import Problem, Verdict

from .options import Options

logger = logging.getLogger("qwen_fast")


STATE = "_qwen_fast_state"  # the one attribute that an enabled pipeline carries


@dataclass(eq=False)
class State:
    """Options, counters and notes of one enabled pipeline. It lives on the instance; nothing global is kept.

    Attributes:
        options: as `enable` was last told.
        texts: what is kept of prompts and of the text encoder, see text.encoding.TextState.
        pictures: moments of pictures that its VAE has encoded, see vae/kept.py.
        calls: fast calls so far, by operator.
        fallbacks: calls left to stock diffusers, by reason.
        variant: where `batch_invariant` could not be kept, by reason.
        stock_scheduler: the scheduler to give back, where ours took its place.
        device: where the call that is under way runs; None between calls.
        transformer, vae: the models that this pipeline attached to.
        graph: why the last call's steps were not captured in a CUDA graph; None: they were, or there was no call yet.
        uncompiled: why blocks that the user has compiled were not in the last forward, or None.
        vae_note: how the last picture was coded, or None.
        nan_note: what `check_nan` found in the last call, or None.
        no_table: why the last call computed its modulations in each forward all the same, or None.
        verdicts: of the kernels that it needs on a GPU, see proofs.py.
        proved: devices and dtypes for which its transformer's kernels have verdicts.
    """

    options: Options = Options()
    texts: Any = None
    pictures: Any = None
    calls: Counter = field(default_factory=Counter)
    fallbacks: Counter = field(default_factory=Counter)
    variant: Counter = field(default_factory=Counter)
    stock_scheduler: Any = None
    device: torch.device | None = None
    transformer: Any = None
    vae: Any = None
    graph: str | None = None
    uncompiled: str | None = None
    vae_note: str | None = None
    nan_note: str | None = None
    no_table: str | None = None
    verdicts: dict[Problem, Verdict] = field(default_factory=dict)
    proved: set[tuple[torch.device, torch.dtype]] = field(default_factory=set)

    def fall_back(self, reason: str) -> None:
        """Count a call that goes to stock diffusers; log the reason the first time; raise it in strict mode."""
        if self.options.strict:
            raise RuntimeError(f"strict=True and this call would run on stock diffusers: {reason}.")
        if not self.fallbacks[reason]:
            logger.warning("stock diffusers runs instead of qwen_fast: %s.", reason)
        self.fallbacks[reason] += 1
        self.not_invariant(reason)  # what runs as in stock gets the whole batch, as in stock

    def not_invariant(self, reason: str) -> None:
        """Count why pictures may depend on their batch all the same, where `batch_invariant` is on; log it the first time;
        raise it in strict mode."""
        if not self.options.batch_invariant:
            return
        if self.options.strict:
            raise RuntimeError(f"strict=True and batch_invariant=True cannot be kept: {reason}.")
        if not self.variant[reason]:
            logger.warning("batch_invariant is not kept: %s.", reason)
        self.variant[reason] += 1
