"""A call of an accelerated pipeline: stock's own `__call__`, with our schedule, steps, transformer, text and VAE below it."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..common.hardware import unsupported_reason
from ..common.own import foreign_methods
from ..common.stages import on_device, staged
from ..common.state import STATE
from ..denoise.denoiser import Denoiser
from ..text.encoding import prompts_of_call
from ..transformer.adapters import TOGETHER, SampleAdapters, refuse
from . import cache_dit, sizes
from .foreign import note_foreign
from .inputs import (
    adapters_of_pictures,
    check_adapters,
    check_attention,
    check_call,
    check_callback_inputs,
    check_components,
    dtype_of,
    shared_noise,
    whole,
)
from .stock_call import with_own_steps

_signature = functools.lru_cache(maxsize=32)(inspect.signature)


def accelerated_call(stock: type) -> Callable[..., Any]:
    """`__call__` of the accelerated pipeline that stands for `stock`."""

    @torch.no_grad()
    @functools.wraps(stock.__call__)
    def call(self, *args, **kwargs):
        if STATE not in self.__dict__:  # kept from before `disable`
            return without_no_grad(type(self).__call__)(self, *args, **kwargs)
        return _called(self, stock, args, kwargs)

    return call


def reason_for_stock(pipe: Any, device: torch.device) -> str | None:
    """Why a call would be stock's throughout, or None."""
    if "prompt" not in _signature(pipe.STANDS_FOR.__call__).parameters:
        return f"the arguments of {pipe.STANDS_FOR.__name__}.__call__ are not known"
    return unsupported_reason(device)


def _called(pipe: Any, stock: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state = pipe.fast_state
    device = pipe._execution_device  # asks every module for its hooks: once a call
    call, own = _function(pipe, stock)
    signature = _signature(stock.__call__)
    arguments = None
    if "prompt" in signature.parameters:
        bound = signature.bind(pipe, *args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if sizes.has_lists_of_sizes(arguments):
            reason = "gradients are asked for" if torch.is_grad_enabled() else reason_for_stock(pipe, device)
            if call is not with_own_steps(stock):
                reason = reason or "`__call__` is not diffusers' own"
            return sizes.draw(pipe, arguments, device, reason)
        if not torch.is_grad_enabled():
            check_call(pipe, arguments)
            check_components(pipe, arguments)
            check_attention(state.options.attention, device)
            note_foreign(pipe, stock, state)
            reason = shared_noise(arguments) if state.options.batch_invariant else None
            if reason is not None:
                state.not_invariant(reason)
    adapters = SampleAdapters.of(kwargs.get("attention_kwargs")) if arguments is None else adapters_of_pictures(arguments)
    # Gradients: not by a call, but by the function under its torch.no_grad.
    reason = "gradients are asked for" if torch.is_grad_enabled() else reason_for_stock(pipe, device)
    if reason is not None:
        if adapters is not None:
            refuse(reason)
        state.fall_back(reason)
        pipe.remove_scheduler()  # whose step is a kernel
        pipe.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
        with staged(pipe):
            return without_no_grad(stock.__call__)(pipe, *args, **kwargs)
    if not own:
        state.fall_back(f"{stock.__name__}.__call__ is not diffusers' own")
    for name in {"height", "width"} & arguments.keys():
        arguments[name] = whole(arguments[name])
    for install in (pipe.install_scheduler, functools.partial(pipe.install_transformer, device)):
        reason = install()
        if reason is not None:
            state.fall_back(reason)
    if adapters is not None:
        if state.options.batch_invariant:
            refuse(TOGETHER)
        check_adapters(pipe, adapters, reason, device, dtype_of(pipe.transformer))
    if arguments.get("callback_on_step_end") is not None:
        check_callback_inputs(arguments.get("callback_on_step_end_tensor_inputs") or (), call)
    dtype = dtype_of(pipe.transformer)
    pipe.require_kernels(dtype, device)
    names, known = arguments.get("callback_on_step_end_tensor_inputs") or (), call is with_own_steps(stock)
    denoiser = Denoiser(pipe, names, known_loop=known, proved=dtype)
    if arguments.get("callback_on_step_end") is not None:
        arguments["callback_on_step_end"] = denoiser.outside(arguments["callback_on_step_end"])
    stages = contextlib.nullcontext() if known else staged(pipe)
    try:
        state.device = device
        with prompts_of_call(pipe, arguments), on_device(device), pipe._images(), denoiser.running(), stages:
            return call(*bound.args, **bound.kwargs)
    finally:
        state.device = None


def _function(pipe: Any, stock: type) -> tuple[Callable[..., Any], bool]:
    """What draws, and whether it is diffusers' own: where somebody has replaced `__call__`, it is the replacement.

    cache-dit's, which sits on diffusers' class, counts as known: of a pipeline that it does not cache, it is gone around.
    """
    replaced = bool(foreign_methods(stock, ("__call__",)))
    if replaced and not cache_dit.wraps(stock):
        return without_no_grad(stock.__call__), False
    if replaced and cache_dit.is_cached(pipe):
        return without_no_grad(stock.__call__), True
    return with_own_steps(stock) or without_no_grad(stock.__call__), True


def without_no_grad(call: Callable[..., Any]) -> Callable[..., Any]:
    """`__call__` of a pipeline as it runs where gradients are on: reward tuning takes it from under its torch.no_grad."""
    return getattr(call, "__wrapped__", call) if torch.is_grad_enabled() else call
