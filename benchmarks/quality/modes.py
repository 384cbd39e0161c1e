"""What the quality harness draws with. A mode is one entry of `MODES`: another option of `enable` needs one line there."""

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch

import qwen_fast
from qwen_fast.common.family import image_tokens
from qwen_fast.demo import LIGHTNING
from qwen_fast.schedule.comparison import historical_errors
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG


@dataclass(frozen=True)
class Setting:
    """Size and steps that all modes of a comparison share."""

    width: int
    height: int
    steps: int

    @property
    def name(self) -> str:
        """For people and folders."""
        return f"{self.width}x{self.height}-{self.steps}"


@dataclass(frozen=True)
class Mode:
    """One way to draw.

    Args:
        about (str): what it is, in a few words.
        prepare: a function of (pipeline of stock diffusers, Setting) that gives a context; inside, the pipeline draws in
            this mode, after it, it is stock again.
        dtype (torch.dtype): of the weights.
        reference (str): the mode whose pictures of the same seeds this one is compared with.
        lossless (bool): whether it claims to keep the numerical contract towards its reference; `--check` holds it to that.
        call (dict): arguments of the pipeline in place of the setting's.
        batch (int): most pictures in a call, where that is what the mode is about.
        needs (str): a folder that the checkpoint must have.
    """

    about: str
    prepare: Callable[[Any, Setting], AbstractContextManager]
    dtype: torch.dtype = torch.float32
    reference: str = "stock"
    lossless: bool = False
    call: dict[str, Any] = field(default_factory=dict)
    batch: int | None = None
    needs: str | None = None


@contextlib.contextmanager
def stock(pipe: diffusers.QwenImagePipeline, setting: Setting):
    """As it is."""
    yield


def enabled(**options: Any) -> Callable[[Any, Setting], AbstractContextManager]:
    """`prepare` of a mode of ours. Strict: a picture that stock drew in its place would pass every comparison."""

    @contextlib.contextmanager
    def prepare(pipe: diffusers.QwenImagePipeline, setting: Setting):
        try:
            qwen_fast.enable(pipe, strict=True, **options)
            yield
        finally:
            qwen_fast.disable(pipe)

    return prepare


def few_steps(
    prepare: Callable[[Any, Setting], AbstractContextManager], lora: bool = True
) -> Callable[[Any, Setting], AbstractContextManager]:
    """`prepare` of a mode on the schedule of the checkpoint's own few-step LoRA, with that LoRA or, to compare, without."""

    @contextlib.contextmanager
    def prepared(pipe: diffusers.QwenImagePipeline, setting: Setting):
        right = pipe.scheduler
        if lora:
            pipe.load_lora_weights(f"{pipe.name_or_path}/{LIGHTNING}")
        pipe.scheduler = type(right).from_config(LIGHTNING_SCHEDULER_CONFIG)
        try:
            with prepare(pipe, setting):
                yield
        finally:
            pipe.scheduler = right
            if lora:
                pipe.unload_lora_weights()

    return prepared


ALL_ERRORS = "all three"


def wrong_schedule(error: str) -> Callable[[Any, Setting], AbstractContextManager]:
    """`prepare` of stock diffusers with a schedule that has `error`, a name of `historical_errors`, or all of them."""

    @contextlib.contextmanager
    def prepare(pipe: diffusers.QwenImagePipeline, setting: Setting):
        right = pipe.scheduler
        tokens = image_tokens(setting.width, setting.height)
        schedules = historical_errors(right.config, setting.steps, tokens)
        if len(schedules) == 3:
            schedules[ALL_ERRORS] = qwen_fast.Schedule.from_config(
                {**right.config, "shift_terminal": None},
                mu=schedules["mu through ln/exp"].mu,
                sigmas=np.linspace(1.0, right.config.shift_terminal, setting.steps),
            )
        if error not in schedules:
            raise ValueError(
                f"the scheduler of this model cannot show {error!r}: it needs use_dynamic_shifting, two different shifts "
                f"above 0 and a shift_terminal; it shows {', '.join(schedules) or 'none'}"
            )
        pipe.scheduler = FixedSchedule.of(right, schedules[error])
        try:
            yield
        finally:
            pipe.scheduler = right

    return prepare


class FixedSchedule(diffusers.FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler, whatever it is asked for with the same sigmas and timesteps."""

    @classmethod
    def of(cls, scheduler: diffusers.FlowMatchEulerDiscreteScheduler, schedule: qwen_fast.Schedule) -> "FixedSchedule":
        """A copy of `scheduler` with `schedule`; the original is left alone."""
        fixed = copy.copy(scheduler)
        fixed.__class__ = cls
        fixed._schedule = schedule
        return fixed

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """ValueError when asked for another number of steps than it has."""
        asked = num_inference_steps if sigmas is None else len(sigmas)
        if asked != self._schedule.num_inference_steps:
            raise ValueError(f"{asked} steps asked of a schedule of {self._schedule.num_inference_steps}")
        self.num_inference_steps = asked
        self.sigmas, self.timesteps = self._schedule.sigmas.to(device), self._schedule.timesteps.to(device)
        self._step_index = self._begin_index = None


BF16 = torch.bfloat16
_FOUR_STEPS = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "negative_prompt": None}
MODES: dict[str, Mode] = {
    "stock": Mode("stock diffusers, fp32", stock),
    # The same arithmetic in tensors of other shapes: how far stock in fp32 is from itself.
    "stock-alone": Mode("stock diffusers, fp32, one picture a call", stock, batch=1),
    # Compared with that: in a batch stock moves by nearly as much as the contract allows, and not towards ours.
    "ours": Mode("qwen_fast, fp32", enabled(), reference="stock-alone", lossless=True),
    "stock-bf16": Mode("stock diffusers, bf16", stock, BF16),
    "ours-bf16": Mode("qwen_fast, bf16", enabled(), BF16, reference="stock-bf16", lossless=True),
    "precise-bf16": Mode("qwen_fast, bf16, precise_sampler", enabled(precise_sampler=True), BF16),
    "steps-8": Mode("8 steps", stock, call={"num_inference_steps": 8}),
    "steps-4": Mode("4 steps", stock, call={"num_inference_steps": 4}),
    "lightning-4": Mode("few-step LoRA, 4 steps", few_steps(stock), call=_FOUR_STEPS, needs=LIGHTNING),
    "ours-lightning-4": Mode(
        "qwen_fast, few-step LoRA, 4 steps",
        few_steps(enabled()),
        reference="lightning-4",
        lossless=True,
        call=_FOUR_STEPS,
        needs=LIGHTNING,
    ),
    "bare-lightning-4": Mode("the same schedule and steps without the LoRA", few_steps(stock, lora=False), call=_FOUR_STEPS),
    "no-cfg": Mode("CFG off", stock, call={"true_cfg_scale": 1.0, "negative_prompt": None}),
    "error-mu": Mode("mu through ln/exp", wrong_schedule("mu through ln/exp")),
    "error-linspace": Mode("linspace to shift_terminal", wrong_schedule("linspace to shift_terminal")),
    "error-stretch": Mode("no stretch", wrong_schedule("no stretch")),
    "error-all": Mode("all three errors", wrong_schedule(ALL_ERRORS)),
}
