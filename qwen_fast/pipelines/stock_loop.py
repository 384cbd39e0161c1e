"""Pipelines that keep diffusers' denoising loop and get their speed from our scheduler and transformer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from ..common.hardware import unsupported_reason
from ..common.own import foreign_methods, foreign_on
from ..common.stages import on_device, staged
from ..text.encoding import of_call as texts_of_call
from ..transformer.call import ATTACHED, accelerated
from ..transformer.conditions import TableConditions
from ..transformer.modulation import TableCache, table_reason
from . import scheduler as fast_scheduler
from .base import AcceleratedPipeline, without_no_grad
from .foreign import SCHEDULER, note_foreign, scheduler_reason
from .inputs import check_attention, check_call, check_components, whole


def _stock_loop(stock: type) -> Callable[..., Any]:
    """`__call__` of a pipeline that keeps diffusers' denoising loop and gets its speed from our scheduler."""
    signature = inspect.signature(stock.__call__)

    def in_stages(self, *args, **kwargs):
        with staged(self):
            return without_no_grad(stock.__call__)(self, *args, **kwargs)

    def on_stock(self, reason, *args, **kwargs):
        self.fast_state.fall_back(reason)
        self.remove_scheduler()  # whose step is a kernel
        self.give_transformer_back()  # stock's forward needs all its weights on the device
        return in_stages(self, *args, **kwargs)

    @torch.no_grad()
    @functools.wraps(stock.__call__)
    def call(self, *args, **kwargs):
        if torch.is_grad_enabled():  # not by a call, but by the function under its torch.no_grad
            return on_stock(self, "gradients are asked for", *args, **kwargs)
        if foreign_methods(stock, ("__call__",)):
            return on_stock(self, f"{stock.__name__}.__call__ is not diffusers' own", *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        check_call(self, bound.arguments)
        check_components(self, bound.arguments)
        device = self._execution_device
        check_attention(self.fast_state.attention, device)
        note_foreign(self, stock, self.fast_state)
        reason = unsupported_reason(device)
        if reason is not None:
            return on_stock(self, reason, *args, **kwargs)
        for name in {"height", "width"} & kwargs.keys():
            kwargs[name] = whole(kwargs[name])
        reason = self.install_scheduler()
        if reason is not None:
            self.fast_state.fall_back(reason)
        reason = self.install_transformer()
        if reason is not None:
            self.fast_state.fall_back(reason)
            return in_stages(self, *args, **kwargs)
        if self.transformer.dtype.is_floating_point:  # else it is known in the forward, which asks too
            self.require_kernels(self.transformer.dtype, self._execution_device)
        texts = texts_of_call(self, bound.arguments)
        with texts, on_device(device), self._images(), accelerated(self.transformer, self.fast_state) as forwards:
            forwards.changing = bound.arguments.get("callback_on_step_end") is not None
            self.fast_state.no_table = table_reason(self.transformer)
            if self.fast_state.modulation != "table" or self.fast_state.no_table is not None:
                return in_stages(self, *args, **kwargs)
            tables = self.transformer.__dict__[ATTACHED].tables
            forwards.conditions = _ConditionsOfTimesteps(self.transformer, tables, self, forwards.changing)
            result = in_stages(self, *args, **kwargs)
            forwards.conditions.check()
            return result

    return call


class _ConditionsOfTimesteps(TableConditions):
    """A table of the scheduler's timesteps, for the pipelines that keep diffusers' own loop.

    The row is found by the timestep of the forward, on the device, so it does not matter how a scheduler counts its steps.
    """

    def __init__(self, model: torch.nn.Module, tables: TableCache, pipe: diffusers.DiffusionPipeline, changing: bool):
        self._model, self._tables, self._pipe, self._changing = model, tables, pipe, changing
        self._scheduled: torch.Tensor | None = None
        self._index: int | None = None
        self._found: torch.Tensor | None = None

    def begin(self, timestep: torch.Tensor) -> bool:
        scheduler = self._pipe.scheduler
        scheduled, index = scheduler.timesteps, getattr(scheduler, "step_index", None)
        if self._scheduled is not scheduled:
            self._scheduled, self.table = scheduled, None
            self._known = (scheduled.to(timestep.dtype) / 1000).to(timestep.device)
            self.timesteps = self._known.cpu()  # the key of the table: the one time that the host reads the device
        if self._changing and (index is None or index != self._index):
            self.refresh()  # a callback came in between
        self._index = index
        same = self._known == timestep[0]
        found = same.any() & (timestep == timestep[0]).all()
        if timestep.device.type == "cpu" and not found:
            return False
        self._found = found if self._found is None else self._found & found
        super().begin(timestep)
        # A row of -1 makes the output NaN; `check` says so after the loop, for the host does not wait for each step.
        self.step_index = torch.where(found, same.to(torch.int8).argmax(), -1).to(torch.int32).reshape(1)
        return True

    def check(self) -> None:
        """After the loop: was every forward's timestep one of the scheduler's?

        Raises:
            RuntimeError: it was not, and the picture is NaN.
        """
        if self._found is not None and not self._found:
            raise RuntimeError(
                "the transformer was called with a timestep that `pipe.scheduler.timesteps` does not hold, so there was no "
                "row of modulations for it; use modulation='layers', which computes them in each forward."
            )


class _SchedulerPipeline(AcceleratedPipeline):
    def install_scheduler(self) -> str | None:
        """Also adopts a scheduler that the user put in since; returns why it cannot, or None."""
        state, current = self.fast_state, self.scheduler
        reason = scheduler_reason(current)
        ours = type(current) is fast_scheduler.FlowMatchEulerDiscreteScheduler and current._qwen_fast_state is state
        if ours and reason is None:
            return None
        if reason is not None:
            self.remove_scheduler()  # ours goes around the method that somebody replaced
            state.stock_scheduler = None
            return reason
        state.stock_scheduler = current
        self.scheduler = fast_scheduler.FlowMatchEulerDiscreteScheduler.adopt(current, state)
        return None

    def remove_scheduler(self) -> None:
        if type(self.scheduler) is not fast_scheduler.FlowMatchEulerDiscreteScheduler:
            return
        if self.fast_state.stock_scheduler is None or foreign_on(self.scheduler, SCHEDULER):
            self.scheduler.release()  # somebody's wrapper is on it, which would be lost
        else:
            self.scheduler = self.fast_state.stock_scheduler


class QwenImageImg2ImgPipeline(_SchedulerPipeline, diffusers.QwenImageImg2ImgPipeline):
    STANDS_FOR = diffusers.QwenImageImg2ImgPipeline
    __call__ = _stock_loop(diffusers.QwenImageImg2ImgPipeline)


class QwenImageInpaintPipeline(_SchedulerPipeline, diffusers.QwenImageInpaintPipeline):
    STANDS_FOR = diffusers.QwenImageInpaintPipeline
    __call__ = _stock_loop(diffusers.QwenImageInpaintPipeline)
