"""`enable` and `disable`: put the acceleration into a pipeline that exists, in place, and take it out again."""

from typing import TYPE_CHECKING, Any, TypeVar

import diffusers

from ..common.hardware import unsupported_reason
from ..common.options import Options, takes_options
from ..common.state import STATE, State, logger
from . import cache_dit
from .family import ACCELERATED

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..common.options import OptionsGiven

Pipeline = TypeVar("Pipeline")


@takes_options
def enable(pipe: Pipeline, **options: "Unpack[OptionsGiven]") -> Pipeline:
    """Accelerate `pipe` in place. Calling it again changes the options.

    Only this pipeline's calls change: no class of diffusers, no global setting, no other pipeline, even one that shares
    the transformer, and no value of a weight.

    Args:
        pipe: any Qwen-Image pipeline of diffusers, modular ones too, but those of 2.1. Modular ones keep diffusers' text
            encoding, so that `prompt_cache` and `text_encoder_mode` do not apply to them.
        precise_sampler: keep latents and step size in fp32 between steps, instead of the model's dtype as stock does (nearer
            to the exact solution, no longer bit-equal to stock in bf16).
        modulation: where the layers rest that compute the modulations, a third of the transformer's parameters. "auto": on the
            device where they fit beside all else, in host memory where they would not. "device": wherever the model is. "host":
            in host memory. In all three the modulations of a whole schedule are computed at once, before its first step.
            "layers": in each forward, as in stock, on weights that stay where they are.
        attention: "auto": the fastest lossless implementation, measured once on the GPU at hand. "triton": the joint
            attention kernel. "cudnn", "flash", "efficient": torch's scaled_dot_product_attention by that name, sequence by
            sequence. "diffusers": diffusers' dispatcher. A backend chosen in diffusers itself is always used.
        cuda_graph: capture a whole step in a CUDA graph: True wherever nothing forbids it, False never. "auto": where
            launches limit the speed, up to 3072 image tokens a step.
        vae_mode: "image": single frames through 2-D convolutions, which is what the VAE's causal 3-D ones are for them.
            "diffusers": as it is.
        vae_memory: bytes that the VAE's activations may take beyond the weights; larger pictures are coded in bands of rows,
            with the same result. "auto": what is free on a CUDA device, no limit elsewhere. None: no limit.
        prompt_cache: "memory": the last prompts stay encoded, up to 64 MiB, for as long as the text encoder's weights are
            the same. A folder: there too, for other processes; its files are named by hashes and hold no text. None: off.
        text_encoder_mode: "keep": it stays where it is. "offload": after encoding it goes to host memory, and its weights are
            copied to the device while it encodes a new prompt. "free": after encoding it is dropped (`pipe.text_encoder`
            is None, also after `disable`), and a prompt that is not in the cache raises a RuntimeError.
        batch_invariant: a picture is the same to the bit whether it is drawn alone or in any batch, at any place in it and
            beside any others, on one card with the same software and options: everything that would compute with several
            pictures or prompts takes them one by one, which costs what a batch gains. Its noise has to be its own: a list of
            generators, or `latents`. `report` says what could not be kept so, and why; `strict` raises.
        check_nan: look after each step, on the device, whether latents are finite; a warning at the end and `report` name the
            first step after which they were not, for each picture.
        strict: raise where a call would run on stock diffusers, instead of running it there and saying so.
    Returns:
        The same object.
    Raises:
        ValueError: a pipeline that is not (yet) accelerated, by name; an option that does not apply to it, or a value that it
            does not have.
        TypeError: an option that there is not.
        RuntimeError: `strict` on hardware that Triton does not support.
    """
    stock, ours = type(pipe), ACCELERATED.get(type(pipe))
    if stock in ACCELERATED.values():
        stock, ours = next((s, o) for s, o in ACCELERATED.items() if o is stock)
    if ours is None:
        raise ValueError(_refusal(pipe))
    chosen = Options.of(dict(options))
    reason = unsupported_reason(pipe.device)
    if reason is not None:
        if chosen.strict:
            raise RuntimeError(f"strict=True, and this pipeline cannot be accelerated: {reason}.")
        logger.warning("the pipeline stays on stock diffusers: %s.", reason)
        return pipe
    before = pipe.__dict__[STATE].options if STATE in pipe.__dict__ else None
    try:
        if before is None:
            pipe.__dict__[STATE] = State()
            pipe.__class__ = ours
        cache_dit.enabled(pipe, ours)
        pipe.put_in(chosen)
    except BaseException:
        if before is None:
            disable(pipe)
        else:
            pipe.put_in(before)
        raise
    return pipe


def disable(pipe: Pipeline) -> Pipeline:
    """Make `pipe` the plain diffusers pipeline it was before `enable`; a pipeline that is not enabled is left as it is.

    Returns:
        The same object.
    Raises:
        TypeError: what is no pipeline.
    """
    state = getattr(pipe, "__dict__", {}).get(STATE)
    if state is None and not isinstance(pipe, _pipelines()):
        raise TypeError(f"`pipe` is a {type(pipe).__name__}, not a pipeline{_hint(pipe, 'disable_vae')}.")
    if state is not None:
        pipe.take_out()
        del pipe.__dict__[STATE]
        ours = type(pipe)
        pipe.__class__ = next(stock for stock, one in ACCELERATED.items() if one is ours)
        cache_dit.disabled(pipe, ours, type(pipe))
    return pipe


def _refusal(pipe: Any) -> str:
    name, known = type(pipe).__name__, ", ".join(stock.__name__ for stock in ACCELERATED)
    if isinstance(pipe, tuple(ACCELERATED)):
        return f"`pipe` is a {name}, a subclass with code of its own, which enable would replace. It takes exactly: {known}."
    if name.startswith("QwenImage") and isinstance(pipe, _pipelines()):
        return f"`pipe` is a {name}, which is not accelerated yet and was left unchanged. Accelerated: {known}."
    return f"`pipe` is a {name}, not a pipeline of the Qwen-Image family{_hint(pipe, 'enable_vae')}. Accelerated: {known}."


def _pipelines() -> tuple[type, ...]:
    modular = getattr(diffusers, "ModularPipeline", None)  # newer than the oldest diffusers we take
    return (diffusers.DiffusionPipeline,) if modular is None else (diffusers.DiffusionPipeline, modular)


def _hint(part: Any, for_vae: str) -> str:
    """What to do with a part of a pipeline."""
    name = type(part).__name__
    if name.startswith("QwenImageTransformer"):
        return "; a transformer alone is fused as a qwen_fast.QwenImageTransformer2DModel"
    return f"; for a VAE alone there is qwen_fast.{for_vae}" if name.startswith("Autoencoder") else ""
