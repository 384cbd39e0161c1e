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
from ..text.encoding import prompts_of_call
from ..transformer.call import ATTACHED, Call, accelerated, entered
from ..transformer.modulation import FromScheduledTable
from ..transformer.modulation_weights import table_reason
from . import cache_dit
from . import scheduler as fast_scheduler
from .base import AcceleratedPipeline, without_no_grad
from .foreign import SCHEDULER, note_foreign, scheduler_reason
from .inputs import check_attention, check_call, check_components, whole


def in_stocks_loop(pipe: Any, stock: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of `pipe` by the `__call__` of diffusers' class, with our schedule, step, transformer, text and VAE below it.

    Where somebody has replaced that `__call__`, it is the replacement that is called.
    """
    state = pipe.fast_state

    def run(*args: Any, **kwargs: Any) -> Any:
        with staged(pipe):
            return without_no_grad(stock.__call__)(*args, **kwargs)

    def on_stock(reason: str) -> Any:
        state.fall_back(reason)
        pipe.remove_scheduler()  # whose step is a kernel
        pipe.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
        return run(pipe, *args, **kwargs)

    if torch.is_grad_enabled():  # not by a call, but by the function under its torch.no_grad
        return on_stock("gradients are asked for")
    if foreign_methods(stock, ("__call__",)) and not cache_dit.wraps(stock):
        state.fall_back(f"{stock.__name__}.__call__ is not diffusers' own")
    signature = inspect.signature(stock.__call__)
    if "prompt" not in signature.parameters:
        return on_stock(f"the arguments of {stock.__name__}.__call__ are not known")
    bound = signature.bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    check_call(pipe, bound.arguments)
    check_components(pipe, bound.arguments)
    device = pipe._execution_device
    check_attention(state.options.attention, device)
    note_foreign(pipe, stock, state)
    reason = unsupported_reason(device)
    if reason is not None:
        return on_stock(reason)
    for name in ("height", "width"):
        bound.arguments[name] = whole(bound.arguments[name])
    reason = pipe.install_scheduler()
    if reason is not None:
        state.fall_back(reason)
    reason = pipe.install_transformer(device)
    if reason is not None:
        state.fall_back(reason)
        return run(*bound.args, **bound.kwargs)
    if pipe.transformer.dtype.is_floating_point:  # else it is known in the forward, which asks too
        pipe.require_kernels(pipe.transformer.dtype, device)
    texts = prompts_of_call(pipe, bound.arguments)
    with texts, on_device(device), pipe._images(), accelerated(pipe.transformer, state) as call:
        _settle(pipe, call)
        callback = bound.arguments.get("callback_on_step_end")
        if callback is not None:
            bound.arguments["callback_on_step_end"] = _watched(callback, call)
        result = run(*bound.args, **bound.kwargs)
        if call.source is not None:
            call.source.check()
        return result


def _stock_loop(stock: type) -> Callable[..., Any]:
    """`__call__` of a pipeline that keeps diffusers' denoising loop."""

    @torch.no_grad()
    @functools.wraps(stock.__call__)
    def call(self, *args, **kwargs):
        return in_stocks_loop(self, stock, args, kwargs)

    return call


def _settle(pipe: Any, call: Call) -> None:
    """What follows from what of the transformer is stock's own now."""
    state, model = pipe.fast_state, call.model
    for reason in call.survey.foreign:
        state.fall_back(reason)
    state.no_table = call.survey.modulation or (table_reason(model) if call.survey.touched else None)
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
