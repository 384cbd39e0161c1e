"""A call that draws pictures of different sizes: `height`, `width` or both are lists, with an entry for each prompt.

Stock refuses such lists. Here each prompt gets what a call of stock's with that prompt and size alone would do, by the same
methods of the pipeline: its prompt encoded, its noise drawn, its schedule set, its pictures decoded. The steps between are
taken together, without padding, see denoise/sizes.py.
"""

import sys
from typing import Any

import diffusers
import numpy as np
import torch

from ..common.stages import in_stage, on_device, stage, steps
from ..common.state import logger
from ..denoise.sizes import Pictures, SizesDenoiser
from ..text.encoding import prompts_of_call
from .decoding import decoded_latents
from .foreign import note_foreign
from .inputs import check_attention, check_call, check_components, dtype_of, whole

STOCK = diffusers.QwenImagePipeline


def listed(value: Any) -> Any:
    """A list, tuple, or array or tensor of numbers as a list; anything else as it is."""
    if getattr(value, "ndim", 0):
        return value.tolist()
    return list(value) if isinstance(value, (list, tuple)) else value


def has_lists_of_sizes(arguments: dict[str, Any]) -> bool:
    """Whether `height` or `width` of a call is a list."""
    return any(isinstance(listed(arguments.get(name)), list) for name in ("height", "width"))


def draw(pipe: Any, arguments: dict[str, Any], device: torch.device, reason: str | None) -> Any:
    """A call of `pipe` with lists of sizes.

    The pictures of prompt i are those that the pipeline draws for this prompt and size alone; one generator, or the global one,
    draws the noise of one prompt after the other, as in such calls one after the other. What differs from a call of one size:

    - `images` is a list, of pictures or of tensors and arrays without a batch dimension: `images[i]` is what it always is.
    - `latents` is a list of one `[S_img, C]` or `[1, S_img, C]` for each picture.
    - `callback_on_step_end` gets the timesteps of all pictures, `[pictures]`, and `latents` as a list of one `[1, S_img, C]`
      for each, which it may edit or give back; it cannot ask for other tensors.
    - No CUDA graph is captured, and nothing runs on stock: what would have to is refused.

    Args:
        pipe: an accelerated pipeline.
        arguments: of its `__call__`, by name, defaults filled in.
        reason: why a call would run on stock, or None.
    Raises:
        ValueError: an argument that does not fit, or why these steps cannot be taken; before any work.
    """
    if pipe.STANDS_FOR is not STOCK:
        raise ValueError(
            f"`height` or `width` is a list, but a {pipe.STANDS_FOR.__name__} draws one size a call; "
            f"a {STOCK.__name__} takes lists."
        )
    state = pipe.fast_state  # which a callback may take off it
    check_call(pipe, arguments | {"height": None, "width": None, "latents": None})
    sizes = _sizes(pipe, arguments)
    _check_callback_inputs(arguments)
    noise = _noise(pipe, arguments, sizes)
    check_components(pipe, arguments)
    check_attention(state.options.attention, device)
    _check_by_stock(pipe, arguments, sizes)
    denoiser = _denoiser(pipe, arguments, device, reason)
    note_foreign(pipe, STOCK, state)
    pipe.require_kernels(denoiser.proved, device)
    state.calls["call of several sizes"] += 1
    try:
        state.device = device
        with prompts_of_call(pipe, arguments, apart=True), on_device(device), pipe._images(), denoiser.running():
            images = _images(pipe, denoiser, arguments, sizes, noise, device)
    finally:
        state.device = None
    return sys.modules[STOCK.__module__].QwenImagePipelineOutput(images=images) if arguments["return_dict"] else (images,)


def _sizes(pipe: Any, arguments: dict[str, Any]) -> list[tuple[int, int]]:
    """(height, width) of each prompt's pictures."""
    prompt, patch = arguments["prompt"], 2 * pipe.vae_scale_factor
    prompts = len(arguments["prompt_embeds"]) if prompt is None else len(prompt) if isinstance(prompt, list) else 1
    columns = []
    for name in ("height", "width"):
        given = listed(arguments[name])
        if given is None:
            given = pipe.default_sample_size * pipe.vae_scale_factor
        if not isinstance(given, list):
            given = [given] * prompts
        if len(given) != prompts:
            raise ValueError(
                f"`{name}` is a list of {len(given)} for {prompts} prompts; one for each prompt is needed, or a number for all."
            )
        for value in given:
            if isinstance(value, (bool, np.bool_)) or not isinstance(whole(value), int):
                raise ValueError(f"`{name}` holds {value!r}; whole numbers of pixels are needed.")
            if value < patch:
                raise ValueError(f"`{name}` holds {value}; one patch is {patch} pixels, so use multiples of {patch}.")
        columns.append([whole(value) for value in given])
    return list(zip(*columns, strict=True))


def _shape(pipe: Any, size: tuple[int, int]) -> tuple[int, int, int]:
    """(frames, height, width) in patches, rounded down as in stock."""
    height, width = (side // pipe.vae_scale_factor // 2 for side in size)
    return 1, height, width


def _noise(pipe: Any, arguments: dict[str, Any], sizes: list[tuple[int, int]]) -> list[torch.Tensor] | None:
    """The caller's own latents, `[num_images_per_prompt, S_img, C]` of each prompt, or None."""
    given, each = arguments["latents"], arguments["num_images_per_prompt"]
    if given is None:
        return None
    if not isinstance(given, (list, tuple)) or len(given) != len(sizes) * each:
        what = f"a list of {len(given)}" if isinstance(given, (list, tuple)) else f"a {type(given).__name__}"
        raise ValueError(f"`latents` is {what} for pictures of several sizes; a list of {len(sizes) * each} is needed.")
    channels = pipe.transformer.config.in_channels
    for n, latents in enumerate(given):
        _, height, width = _shape(pipe, sizes[n // each])
        wanted = (height * width, channels)
        if not isinstance(latents, torch.Tensor) or latents.shape not in (wanted, (1, *wanted)):
            found = tuple(latents.shape) if isinstance(latents, torch.Tensor) else latents
            raise ValueError(f"`latents[{n}]` is {found}; {wanted} is needed, or with a batch dimension of 1.")
    own = [latents.reshape(1, *latents.shape[-2:]) for latents in given]
    return [torch.cat(own[start : start + each]) for start in range(0, len(own), each)]


def _check_callback_inputs(arguments: dict[str, Any]) -> None:
    names = arguments["callback_on_step_end_tensor_inputs"] or []
    others = [name for name in names if name != "latents"]
    if others and arguments["callback_on_step_end"] is not None:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` names {others[0]!r}, but with lists of sizes the loop has 'latents' alone."
        )


def _check_by_stock(pipe: Any, arguments: dict[str, Any], sizes: list[tuple[int, int]]) -> None:
    """Stock's own errors and warnings: of sizes that will be rounded, of embeddings without a mask, of guidance."""
    names = ("negative_prompt", "prompt_embeds", "negative_prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds_mask")
    names += ("callback_on_step_end_tensor_inputs", "max_sequence_length")
    patch = 2 * pipe.vae_scale_factor
    odd = [size for size in dict.fromkeys(sizes) if any(side % patch for side in size)]
    for height, width in odd or sizes[:1]:
        pipe.check_inputs(arguments["prompt"], height, width, **{name: arguments[name] for name in names})
    scale, negative = arguments["true_cfg_scale"], _has_negative(arguments)
    if negative != (scale > 1):
        logger.warning("no guidance: `true_cfg_scale` is %s and %s negative prompt is given.", scale, "a" if negative else "no")
    if arguments["guidance_scale"] is not None:
        logger.warning("`guidance_scale` is ignored: the model is not guidance-distilled.")


def _has_negative(arguments: dict[str, Any]) -> bool:
    return arguments["negative_prompt"] is not None or arguments["negative_prompt_embeds"] is not None


def _denoiser(pipe: Any, arguments: dict[str, Any], device: torch.device, reason: str | None) -> SizesDenoiser:
    """What takes the steps, or a ValueError that says why they cannot be taken together."""
    reason = reason or pipe.install_scheduler() or pipe.install_transformer(device)
    if reason is None and pipe.transformer.config.guidance_embeds:
        reason = "guidance embeddings"
    if pipe.fast_state.options.batch_invariant:
        reason = "batch_invariant=True, for which each picture is drawn as if alone"
    if reason is None:
        pipe._attention_kwargs = arguments["attention_kwargs"] or {}
        denoiser = SizesDenoiser(pipe, proved=dtype_of(pipe.transformer))
        reason = denoiser.reason_against(device)
    if reason is not None:
        raise ValueError(
            "`height` or `width` is a list, and pictures of several sizes can only be drawn together on the fast path, which "
            f"this call cannot take: {reason}. Call the pipeline once for each size."
        )
    return denoiser


def _images(
    pipe: Any,
    denoiser: SizesDenoiser,
    arguments: dict[str, Any],
    sizes: list[tuple[int, int]],
    noise: list[torch.Tensor] | None,
    device: torch.device,
) -> list[Any]:
    """The pictures, those of the first prompt first."""
    pipe._guidance_scale, pipe._current_timestep, pipe._interrupt = arguments["guidance_scale"], None, False
    guided = arguments["true_cfg_scale"] > 1 and _has_negative(arguments)
    drawn = _begun(pipe, arguments, sizes, noise, device, guided)
    latents = denoiser.begin(drawn, arguments["true_cfg_scale"] if guided else None)
    latents = _denoised(pipe, denoiser, arguments, drawn, latents)
    pipe._current_timestep = None
    images, output_type = [], arguments["output_type"]
    for size, own in zip(sizes, latents[0].split([one.latents[..., 0].numel() for one in drawn]), strict=True):
        own = own.unflatten(0, (arguments["num_images_per_prompt"], -1))
        with stage("vae"):
            images.extend(own if output_type == "latent" else decoded_latents(pipe, own, *size, output_type))
    pipe.maybe_free_model_hooks()
    return images


def _begun(pipe, arguments, sizes, noise, device, guided: bool) -> list[Pictures]:
    """Prompts, noise and schedule of each prompt's pictures, made in this order as in stock."""
    module, scheduler, each = sys.modules[STOCK.__module__], pipe.scheduler, arguments["num_images_per_prompt"]
    config, generator = scheduler.config, arguments["generator"]
    count = arguments["num_inference_steps"]
    sigmas = arguments["sigmas"]
    sigmas = np.linspace(1.0, 1 / count, count) if sigmas is None else sigmas
    schedules: dict[float | None, tuple[torch.Tensor, torch.Tensor]] = {}
    drawn = []
    for n, size in enumerate(sizes):
        prompts = [_encoded(pipe, arguments, prefix, n, device) for prefix in ("", "negative_")[: 1 + guided]]
        own = generator[n * each : (n + 1) * each] if isinstance(generator, list) else generator
        channels, given = pipe.transformer.config.in_channels // 4, None if noise is None else noise[n]
        latents = pipe.prepare_latents(each, channels, *size, prompts[0][0].dtype, device, own, given)
        mu = module.calculate_shift(
            latents.shape[1],
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        key = mu if config.get("use_dynamic_shifting") else None  # all that a size changes in a schedule
        if key not in schedules:
            in_stage("schedule", module.retrieve_timesteps, scheduler, count, device, sigmas=sigmas, mu=mu)
            schedules[key] = scheduler.timesteps, scheduler.sigmas
        drawn.append(Pictures(latents, _shape(pipe, size), prompts, *schedules[key]))
    scheduler.set_begin_index(0)
    return drawn


def _encoded(
    pipe: Any, arguments: dict[str, Any], prefix: str, n: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings and mask of prompt `n`, or of the negative one that goes with it: one for all, or one for each."""
    prompt, embeds, mask = (arguments[f"{prefix}{name}"] for name in ("prompt", "prompt_embeds", "prompt_embeds_mask"))
    if isinstance(prompt, list):
        prompt = prompt[n % len(prompt)]
    if embeds is not None:
        own = slice(n % len(embeds), n % len(embeds) + 1)
        embeds, mask = embeds[own], None if mask is None else mask[own]
    return in_stage(
        "text",
        pipe.encode_prompt,
        prompt=prompt,
        prompt_embeds=embeds,
        prompt_embeds_mask=mask,
        device=device,
        num_images_per_prompt=arguments["num_images_per_prompt"],
        max_sequence_length=arguments["max_sequence_length"],
    )


def _denoised(
    pipe: Any, denoiser: SizesDenoiser, arguments: dict[str, Any], drawn: list[Pictures], latents: torch.Tensor
) -> torch.Tensor:
    """Stock's loop, over latents `[1, R, C]` of all pictures."""
    timesteps = torch.stack([one.timesteps for one in drawn for _ in one.latents], dim=1)  # [T, pictures]
    pipe._num_timesteps = len(timesteps)
    callback = arguments["callback_on_step_end"]
    callback = None if callback is None else denoiser.outside(callback)
    with stage("denoise"), pipe.progress_bar(total=len(timesteps)) as bar:
        for i, t in enumerate(steps(timesteps)):
            if pipe.interrupt:
                continue
            pipe._current_timestep = t
            latents = denoiser.advance(i, latents)
            if callback is not None:
                shown = list(latents.split(denoiser.lengths, dim=1))
                names = arguments["callback_on_step_end_tensor_inputs"] or []
                outputs = callback(pipe, i, t, {"latents": shown} if "latents" in names else {})
                latents = _joined(outputs.pop("latents", shown), shown)
            bar.update()
            denoiser.behind(i, latents)
    return latents


def _joined(given: Any, shown: list[torch.Tensor]) -> torch.Tensor:
    """`[1, R, C]` of what a callback gave back for the list that it was shown."""
    found, wanted = (
        [(tuple(one.shape), one.dtype) for one in latents] if isinstance(latents, (list, tuple)) else type(latents).__name__
        for latents in (given, shown)
    )
    if found != wanted:
        raise ValueError(f"a callback gave back `latents` {found}; with lists of sizes a list is needed: {wanted}.")
    return torch.cat(list(given), dim=1)
