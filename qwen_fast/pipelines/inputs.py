"""Checks of a pipeline call's arguments, all before any GPU work; each message names the argument, its value and what works."""

import operator
from collections.abc import Iterable
from typing import Any

import torch

from ..schedule import check_num_inference_steps, check_sigmas
from ..transformer.adapters import NAMES, SampleAdapters, has_adapters, refuse
from ..transformer.block_module import context_reason


def adapters_of_pictures(arguments: dict[str, Any]) -> SampleAdapters | None:
    """`attention_kwargs={"adapter_names": [...]}`, an entry for each prompt, made one for each picture in `arguments`.

    Raises:
        ValueError: another number of entries than of prompts, or one that is neither a name nor a list of names.
    """
    given = arguments.get("attention_kwargs")
    adapters = SampleAdapters.of(given)
    if adapters is None:
        return None
    prompts, copies = _check_prompt(arguments, "prompt", "prompt_embeds") or 1, arguments["num_images_per_prompt"]
    if len(adapters.names) != prompts:
        raise ValueError(f"`{NAMES}` has {len(adapters.names)} entries for {prompts} prompts; one for each is needed.")
    arguments["attention_kwargs"] = given | {NAMES: [entry for entry in given[NAMES] for _ in range(copies)]}
    return SampleAdapters.of(arguments["attention_kwargs"])


def check_adapters(pipe: Any, adapters: SampleAdapters, against: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Before any work: can each picture have its own adapters? See `SampleAdapters.check`.

    Args:
        against: why the transformer is not ours, or None.
    """
    if against is not None:
        refuse(against)
    controlnet = getattr(pipe, "controlnet", None)
    if controlnet is not None and any(map(has_adapters, controlnet.modules())):
        refuse("the ControlNet has adapters of its own, which all pictures would get")
    found = pipe.transformer.look()
    against = found.whole or context_reason(found, torch.empty(0, device=device, dtype=dtype))
    adapters.check(pipe.transformer, found, len(adapters.names), against)


_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """What the model computes in; `model.dtype` asks every module."""
    weight = next(iter(getattr(model, "img_in", torch.nn.Module()).parameters()), None)
    return weight.dtype if weight is not None and weight.dtype in _PLAIN else model.dtype


def check_attention(option: str, device: torch.device) -> None:
    """A ValueError where the attention that was named is not there on the device of a call."""
    if option in ("cudnn", "efficient") and device.type != "cuda":
        raise ValueError(f"`attention` is {option!r}, which torch has for CUDA devices only, not for {device}; use 'auto'.")


def whole(value: Any) -> Any:
    """A whole number of numpy's or torch's as Python's; anything else as it is."""
    try:
        return operator.index(value)
    except TypeError:
        return value


def check_components(pipe: Any, arguments: dict[str, Any]) -> None:
    """Before any work: are the parts there that this call draws with? A pipeline may be loaded without some, to encode only.

    Raises:
        AttributeError: as stock, which finds out when it comes to the part; it names the part.
    """
    for name in ("transformer", "scheduler", *(() if arguments["output_type"] == "latent" else ("vae",))):
        if getattr(pipe, name) is None:
            other = ", or output_type='latent'" if name == "vae" else ""
            raise AttributeError(
                f"`pipe.{name}` is None, and a picture cannot be drawn without it: give the pipeline one{other}."
            )


def check_callback_inputs(names: Iterable[str], call: Any) -> None:
    """`callback_on_step_end_tensor_inputs` against the variables of `call`, in whose loop stock looks them up after a step.

    Stock allows those of `_callback_tensor_inputs`, a list of the class that users extend.
    """
    known = getattr(getattr(call, "__code__", None), "co_varnames", None)
    for name in names:
        if known is not None and name not in known:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` names {name!r}, but the loop has nothing by that name; it has latents, "
                "prompt_embeds, noise_pred and the other variables of the pipeline's __call__."
            )


def check_call(pipe: Any, arguments: dict[str, Any]) -> None:
    """Check the arguments of `pipe.__call__` that diffusers lets through, or fails on late and unclearly.

    Args:
        pipe: a pipeline of the Qwen-Image family.
        arguments: the call's arguments by name, defaults filled in.
    Raises:
        ValueError: naming the argument.
    """
    if arguments.get("sigmas") is None:
        check_num_inference_steps(arguments["num_inference_steps"])
    else:
        check_sigmas(arguments["sigmas"])
    patch = pipe.vae_scale_factor * 2
    for name in ("height", "width"):
        value = arguments.get(name)  # Layered has a `resolution`
        if value is not None and value < patch:
            raise ValueError(f"`{name}` is {value}; one patch is {patch} pixels, so use a multiple of {patch}.")
    per_prompt = arguments["num_images_per_prompt"]
    if per_prompt < 1:
        raise ValueError(f"`num_images_per_prompt` is {per_prompt}; at least 1 is needed.")

    _check_latents(pipe, arguments.get("latents"))
    batch = _check_prompt(arguments, "prompt", "prompt_embeds")
    if batch is None and type(pipe).__name__ == "QwenImageLayeredPipeline":
        batch = 1  # which then describes the picture itself
    if batch is None:
        raise ValueError("`prompt` and `prompt_embeds` are both None; pass one of the two.")
    negative_batch = _check_prompt(arguments, "negative_prompt", "negative_prompt_embeds")
    if negative_batch not in (None, 1, batch):
        raise ValueError(f"`negative_prompt` holds {negative_batch} prompts for {batch}; pass one for all, or one for each.")
    generator, pictures = arguments["generator"], batch * per_prompt
    if isinstance(generator, list) and len(generator) != pictures:
        raise ValueError(
            f"`generator` is a list of {len(generator)} for {pictures} pictures ({batch} prompts x {per_prompt}); "
            "pass one generator for all, or one for each picture."
        )


def shared_noise(arguments: dict[str, Any]) -> str | None:
    """Why a picture of a checked call has not the noise that it has alone, for `batch_invariant`, or None.

    Stock draws a batch from one generator as one tensor, and samples the latents of a picture that is given for several prompts
    from the first of several generators.
    """
    prompt, embeds, image = arguments["prompt"], arguments["prompt_embeds"], arguments.get("image")
    batch = len(embeds) if embeds is not None else len(prompt) if isinstance(prompt, list) else 1
    pictures = batch * arguments["num_images_per_prompt"]
    if pictures == 1 or arguments.get("latents") is not None:
        return None
    if not isinstance(arguments["generator"], list):
        return f"{pictures} pictures draw their noise from one random stream; give a list of generators, or `latents`"
    several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) > 3
    if "strength" in arguments and (len(image) if several else 1) != pictures:
        return f"the latents of `image` are sampled by fewer than {pictures} generators; give a list of {pictures} pictures"
    return None


def _check_latents(pipe: Any, latents: Any) -> None:
    """Packed latents of one frame are the only ones that a pipeline of pictures can go on from."""
    if latents is None:
        return
    channels = pipe.transformer.config.in_channels
    if latents.dim() != 3 or latents.shape[-1] != channels:
        raise ValueError(
            f"`latents` has shape {tuple(latents.shape)}; [batch, tokens, {channels} channels] is needed: those of one frame, "
            "packed as `output_type='latent'` gives them."
        )


def _check_prompt(arguments: dict[str, Any], text_name: str, embeds_name: str) -> int | None:
    """Number of prompts that the pair of arguments gives, None when neither is given."""
    text, embeds, mask = arguments[text_name], arguments[embeds_name], arguments[f"{embeds_name}_mask"]
    if text is not None and embeds is not None:
        raise ValueError(f"`{text_name}` and `{embeds_name}` are both given; pass one of the two.")
    if embeds is not None:
        if embeds.dim() != 3:
            raise ValueError(f"`{embeds_name}` has shape {tuple(embeds.shape)}; [batch, tokens, channels] is needed.")
        if mask is not None and mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"`{embeds_name}_mask` has shape {tuple(mask.shape)}; the embeddings need {tuple(embeds.shape[:2])}."
            )
        return embeds.shape[0]
    if text is None:
        return None
    if not isinstance(text, (str, list)):
        raise ValueError(f"`{text_name}` is a {type(text).__name__}; a string or a list of strings is needed.")
    if not text and isinstance(text, list):
        raise ValueError(f"`{text_name}` is an empty list; at least one prompt is needed.")
    return 1 if isinstance(text, str) else len(text)
