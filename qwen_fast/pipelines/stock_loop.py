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
from ..transformer.call import ATTACHED, Call, accelerated, entered
from ..transformer.modulation import FromScheduledTable
from ..transformer.modulation_weights import table_reason
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
        self.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
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
        check_attention(self.fast_state.options.attention, device)
        note_foreign(self, stock, self.fast_state)
        reason = unsupported_reason(device)
        if reason is not None:
            return on_stock(self, reason, *args, **kwargs)
        for name in ("height", "width"):
            bound.arguments[name] = whole(bound.arguments[name])
        reason = self.install_scheduler()
        if reason is not None:
            self.fast_state.fall_back(reason)
        reason = self.install_transformer(device)
        if reason is not None:
            self.fast_state.fall_back(reason)
            return in_stages(*bound.args, **bound.kwargs)
        if self.transformer.dtype.is_floating_point:  # else it is known in the forward, which asks too
            self.require_kernels(self.transformer.dtype, self._execution_device)
        texts = texts_of_call(self, bound.arguments)
        with texts, on_device(device), self._images(), accelerated(self.transformer, self.fast_state) as forwards:
            _settle(self, forwards)
            callback = bound.arguments.get("callback_on_step_end")
            if callback is not None:
                bound.arguments["callback_on_step_end"] = _watched(callback, forwards)
            result = in_stages(*bound.args, **bound.kwargs)
            if forwards.source is not None:
                forwards.source.check()
            return result

    return call


def _settle(pipe: Any, call: Call) -> None:
    """What follows from what of the transformer is stock's own now."""
    state, model = pipe.fast_state, call.model
    for reason in call.survey.foreign:
        state.fall_back(reason)
    state.no_table = call.survey.modulation or table_reason(model)
    call.source = None
    if state.options.modulation != "layers" and state.no_table is None:
        call.source = FromScheduledTable(model, model.__dict__[ATTACHED].tables, pipe)


def _watched(callback: Callable[..., Any], call: Call) -> Callable[..., Any]:
    """`callback_on_step_end` outside the call, since it may run anything; then the transformer is looked at again."""

    @functools.wraps(callback)
    def called(pipe, *args, **kwargs):
        with entered(None):
            result = callback(pipe, *args, **kwargs)
        before, call.survey = call.survey, call.model.look()
        if call.survey is not before:
            _settle(pipe, call)
        return result

    return called


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
