"""`enable` and `disable`: put the acceleration into a pipeline that exists, in place, and take it out again."""

from pathlib import Path
from typing import Any, TypeVar

import diffusers

from ..common.hardware import unsupported_reason
from ..common.options import check_options, check_text_options, check_vae_memory, writable_folder
from ..common.state import STATE, State, logger
from ..text.encoding import configure as configure_texts
from .family import ACCELERATED

Pipeline = TypeVar("Pipeline")


def enable(
    pipe: Pipeline,
    *,
    precise_sampler: bool = False,
    modulation: str = "table",
    modulation_cache: str | Path | None = None,
    attention: str = "auto",
    cuda_graph: bool | str = "auto",
    vae: str = "image",
    prompt_cache: str | Path | None = "memory",
    text_encoder: str = "keep",
    vae_memory: int | str | None = "auto",
    check_nan: bool = False,
    strict: bool = False,
) -> Pipeline:
    """Accelerate `pipe` in place. Calling it again changes the options.

    Only this pipeline's calls change: no class of diffusers, no global setting, no other pipeline, even one that shares
    the transformer, and no value of a weight.

    Args:
        pipe: a QwenImagePipeline, QwenImageImg2ImgPipeline or QwenImageInpaintPipeline of diffusers.
        precise_sampler: keep latents and step size in fp32 between steps, instead of the model's dtype as stock does
            (QwenImagePipeline only; nearer to the exact solution, no longer bit-equal to stock in bf16).
        modulation: "table": the modulations of a whole schedule are computed once and kept, and the layers that compute
            them, a third of the parameters, stay in host memory. "layers": they are computed in each forward, as in
            stock, on weights that stay where they are.
        modulation_cache: a folder that keeps the tables, so that other processes need not compute them: 4.4 MB a step for
            Qwen-Image. None: in memory only.
        attention: "auto": the fastest lossless implementation, measured once on the GPU at hand. "triton": the joint
            attention kernel. "cudnn", "flash", "efficient": torch's scaled_dot_product_attention by that name, sequence by
            sequence. "diffusers": diffusers' dispatcher. A backend chosen in diffusers itself is always used.
        cuda_graph: capture a whole step in a CUDA graph: True wherever nothing forbids it, False never. "auto": where
            launches limit the speed, up to 3072 image tokens a step; for now never, until a GPU has shown that pictures of
            NaN, seen on an H100 with graphs, are gone.
        vae: "image": single frames through 2-D convolutions, which is what the VAE's causal 3-D ones are for them.
            "diffusers": as it is.
        prompt_cache: "memory": the last prompts stay encoded, up to 64 MiB, for as long as the text encoder's weights are
            the same. A folder: there too, for other processes; its files are named by hashes and hold no text. None: off.
        text_encoder: "keep": it stays where it is. "offload": after encoding it goes to host memory, and its weights are
            copied to the device while it encodes a new prompt. "free": after encoding it is dropped (`pipe.text_encoder`
            is None, also after `disable`), and a prompt that is not in the cache raises a RuntimeError.
        vae_memory: bytes that the VAE's activations may take beyond the weights; larger pictures are coded in bands of rows,
            with the same result. "auto": what is free on a CUDA device, no limit elsewhere. None: no limit.
        check_nan: look after each step, on the device, whether latents are finite; a warning at the end and `report` name the
            first step after which they were not, for each picture (QwenImagePipeline only).
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
    options = check_options(modulation=modulation, attention=attention, cuda_graph=cuda_graph, vae=vae, check_nan=check_nan)
    options["vae_option"] = options.pop("vae")
    prompt_cache = check_text_options(prompt_cache, text_encoder)
    options["vae_memory"] = check_vae_memory("vae_memory", vae_memory)
    options["modulation_cache"] = writable_folder("modulation_cache", modulation_cache)
    if precise_sampler and not ours.supports_precise_sampler:
        raise ValueError(
            f"`precise_sampler` is True, but {stock.__name__} keeps diffusers' own loop and latents; "
            "it applies to QwenImagePipeline."
        )
    if check_nan and not ours.supports_check_nan:
        raise ValueError(
            f"`check_nan` is True, but {stock.__name__} keeps diffusers' own loop; it applies to QwenImagePipeline."
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
    if state.transformer is not None and state.modulation != modulation:
        pipe.remove_transformer()  # its weights move
    state.precise_sampler, state.strict = precise_sampler, strict
    for name, value in options.items():
        setattr(state, name, value)
    configure_texts(pipe, state, prompt_cache, text_encoder)
    reason = pipe.install_transformer()
    if reason is not None:
        logger.warning("the transformer stays as it is: %s.", reason)
    pipe.drop_unwanted_graphs()
    pipe.install_vae()
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
        pipe.remove_transformer()
        pipe.remove_vae()
        pipe.remove_texts()
        del pipe.__dict__[STATE]
        pipe.__class__ = next(stock for stock, ours in ACCELERATED.items() if ours is type(pipe))
    return pipe


def _refusal(pipe: Any) -> str:
    name, known = type(pipe).__name__, ", ".join(stock.__name__ for stock in ACCELERATED)
    if isinstance(pipe, tuple(ACCELERATED)):
        return f"`pipe` is a {name}, a subclass with code of its own, which enable would replace. It takes exactly: {known}."
    modular = getattr(diffusers, "ModularPipeline", ())  # newer than the oldest diffusers we take
    if name.startswith("QwenImage") and isinstance(pipe, (diffusers.DiffusionPipeline, *((modular,) if modular else ()))):
        return f"`pipe` is a {name}, which is not accelerated yet and was left unchanged. Accelerated: {known}."
    return f"`pipe` is a {name}, not a pipeline of the Qwen-Image family. Accelerated: {known}."
