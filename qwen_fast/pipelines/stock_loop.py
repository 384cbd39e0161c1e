"""Pipelines that keep diffusers' denoising loop and get their speed from our scheduler and transformer."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers

from ..common.hardware import unsupported_reason
from ..common.stages import staged
from ..text.encoding import of_call as texts_of_call
from ..transformer.call import ATTACHED, accelerated
from ..transformer.modulation import FromScheduledTable
from ..transformer.modulation_weights import table_reason
from . import scheduler as fast_scheduler
from .base import AcceleratedPipeline
from .inputs import check_attention, check_call


def _stock_loop(stock: type) -> Callable[..., Any]:
    """`__call__` of a pipeline that keeps diffusers' denoising loop and gets its speed from our scheduler."""
    signature = inspect.signature(stock.__call__)

    def in_stages(self, *args, **kwargs):
        with staged(self):
            return stock.__call__(self, *args, **kwargs)

    @functools.wraps(stock.__call__)
    def call(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        check_call(self, bound.arguments)
        device = self._execution_device
        check_attention(self.fast_state.options.attention, device)
        reason = unsupported_reason(device)
        if reason is None:
            reason = self.install_scheduler()
        else:
            self.remove_scheduler()  # its step would launch a kernel where none can run
        if reason is not None:
            self.fast_state.fall_back(reason)
            self.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
            return in_stages(self, *args, **kwargs)
        reason = self.install_transformer(device)
        if reason is not None:
            self.fast_state.fall_back(reason)
            return in_stages(self, *args, **kwargs)
        if self.transformer.dtype.is_floating_point:  # else it is known in the forward, which asks too
            self.require_kernels(self.transformer.dtype, self._execution_device)
        texts = texts_of_call(self, bound.arguments)
        with texts, self._images(), accelerated(self.transformer, self.fast_state) as forwards:
            forwards.changing = bound.arguments.get("callback_on_step_end") is not None
            self.fast_state.no_table = table_reason(self.transformer)
            if self.fast_state.options.modulation != "layers" and self.fast_state.no_table is None:
                tables = self.transformer.__dict__[ATTACHED].tables
                forwards.conditions = FromScheduledTable(self.transformer, tables, self, forwards.changing)
            return in_stages(self, *args, **kwargs)

    return call


class _SchedulerPipeline(AcceleratedPipeline):
    def install_scheduler(self) -> str | None:
        """Also adopts a scheduler that the user put in since; returns why it cannot, or None."""
        current = self.scheduler
        if type(current) is fast_scheduler.FlowMatchEulerDiscreteScheduler and current._qwen_fast_state is self.fast_state:
            return None
        if type(current) not in (fast_scheduler.STOCK, fast_scheduler.FlowMatchEulerDiscreteScheduler):
            self.fast_state.stock_scheduler = None
            return f"scheduler is a {type(current).__name__}, not a FlowMatchEulerDiscreteScheduler"
        self.fast_state.stock_scheduler = current
        self.scheduler = fast_scheduler.FlowMatchEulerDiscreteScheduler.adopt(current, self.fast_state)
        return None

    def remove_scheduler(self) -> None:
        ours = type(self.scheduler) is fast_scheduler.FlowMatchEulerDiscreteScheduler
        if ours and self.fast_state.stock_scheduler is not None:
            self.scheduler = self.fast_state.stock_scheduler


class QwenImageImg2ImgPipeline(_SchedulerPipeline, diffusers.QwenImageImg2ImgPipeline):
    __call__ = _stock_loop(diffusers.QwenImageImg2ImgPipeline)


class QwenImageInpaintPipeline(_SchedulerPipeline, diffusers.QwenImageInpaintPipeline):
    __call__ = _stock_loop(diffusers.QwenImageInpaintPipeline)
