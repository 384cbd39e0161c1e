"""`enable` and `disable`: put the acceleration into a pipeline that exists, in place, and take it out again."""

from typing import Any, TypeVar

import diffusers

from .hardware import unsupported_reason
from .pipeline import ACCELERATED
from .reporting import STATE, State, logger

Pipeline = TypeVar("Pipeline")


def enable(pipe: Pipeline, *, precise_sampler: bool = False, strict: bool = False) -> Pipeline:
    """Accelerate `pipe` in place. Calling it again changes the options.

    Only this object changes: no class of diffusers, no global setting, no other pipeline, and no weight.

    Args:
        pipe: a QwenImagePipeline, QwenImageImg2ImgPipeline or QwenImageInpaintPipeline of diffusers.
        precise_sampler: keep latents and step size in fp32 between steps, instead of the model's dtype as stock does
            (QwenImagePipeline only; nearer to the exact solution, no longer bit-equal to stock in bf16).
        strict: raise where a call would run on stock diffusers, instead of running it there and saying so.
    Returns:
        The same object.
    Raises:
        ValueError: a pipeline that is not (yet) accelerated, by name; an option that does not apply to it.
        RuntimeError: `strict` on hardware that Triton does not support.
    """
    stock, ours = type(pipe), ACCELERATED.get(type(pipe))
    if stock in ACCELERATED.values():
        stock, ours = next((s, o) for s, o in ACCELERATED.items() if o is stock)
    if ours is None:
        raise ValueError(_refusal(pipe))
    if precise_sampler and not ours.supports_precise_sampler:
        raise ValueError(
            f"`precise_sampler` is True, but {stock.__name__} keeps diffusers' own loop and latents; "
            "it applies to QwenImagePipeline."
        )
    reason = unsupported_reason(pipe.device)
    if reason is not None:
        if strict:
            raise RuntimeError(f"strict=True, and this pipeline cannot be accelerated: {reason}.")
        logger.warning("the pipeline stays on stock diffusers: %s.", reason)
        return pipe
    state = pipe.__dict__.get(STATE)
    if state is None:
        state = pipe.__dict__[STATE] = State()
        pipe.__class__ = ours
    state.precise_sampler, state.strict = precise_sampler, strict
    pipe.install_scheduler()
    return pipe


def disable(pipe: Pipeline) -> Pipeline:
    """Make `pipe` the plain diffusers pipeline it was before `enable`; a pipeline that is not enabled is left as it is.

    Returns:
        The same object.
    """
    state = getattr(pipe, "__dict__", {}).get(STATE)
    if state is not None:
        pipe.remove_scheduler()
        del pipe.__dict__[STATE]
        pipe.__class__ = next(stock for stock, ours in ACCELERATED.items() if ours is type(pipe))
    return pipe


def _refusal(pipe: Any) -> str:
    name, known = type(pipe).__name__, ", ".join(stock.__name__ for stock in ACCELERATED)
    if isinstance(pipe, tuple(ACCELERATED)):
        return f"`pipe` is a {name}, a subclass with code of its own, which enable would replace. It takes exactly: {known}."
    if name.startswith("QwenImage") and isinstance(pipe, diffusers.DiffusionPipeline):
        return f"`pipe` is a {name}, which is not accelerated yet and was left unchanged. Accelerated: {known}."
    return f"`pipe` is a {name}, not a pipeline of the Qwen-Image family. Accelerated: {known}."
