"""Pictures of many prompts, one after the other; on a GPU the VAE of one works while the next denoises."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import diffusers
import torch

from ..common.hooks import is_hooked
from ..common.stages import Recorder, on_device, record, stage
from .call import reason_for_stock
from .decoding import decoded_latents
from .sizes import listed
from .text_to_image import QwenImagePipeline

# Stock's decode takes 5.25 GiB at 1024x1024 in bf16 (reported by users): more than ours, which is the room to spare.
_DECODE_BYTES = 5.25 * 2**30 / 1024**2 / 2  # per pixel and byte of an element
_OURS = ("prompt", "generator", "latents", "num_images_per_prompt", "return_dict")


class Picture(NamedTuple):
    """What `generate` yields: which prompt, the picture, and the seconds of its stages (see `qwen_fast.common.stages`)."""

    index: int
    image: Any
    seconds: dict[str, float]


def generate(pipe: diffusers.QwenImagePipeline, prompts: Sequence[str], *, seed: int = 0, **settings: Any) -> Iterator[Picture]:
    """The picture of each prompt, in order, each the one that `pipe(prompts[i], ..., **settings)` alone would draw.

    Picture i has its noise from `torch.Generator().manual_seed(seed + i)`. On CUDA, where memory allows, a picture is
    decoded on a second stream while the next one denoises, and comes when that is done. After an error or an interrupt in
    the next one it still comes, and then the error.

    Args:
        pipe: a QwenImagePipeline, ours or diffusers'.
        prompts: one for each picture; for several of one prompt it stands there several times.
        seed: of the first picture.
        settings: arguments of the pipeline's call, the same for all; but `height` and `width` may be lists, of one for each.
            Its progress bar says which picture it is.
    Returns:
        Iterator[Picture]: nothing is drawn before its first `next`.
    Raises:
        TypeError: a pipeline of another kind; prompts that are no list of str.
        ValueError: a setting that differs from picture to picture, or a seed that leaves too few; before any work.
    """
    if not isinstance(pipe, diffusers.QwenImagePipeline):
        raise TypeError(f"`pipe` is a {type(pipe).__name__}; pictures from prompts alone need a QwenImagePipeline.")
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"`prompts` is {prompts!r}; a list of str is needed, one for each picture.")
    for name in _OURS:
        if name in settings:
            raise ValueError(f"`{name}` is given, but is different or fixed for each picture; use `prompts` and `seed`.")
    if not 0 <= seed <= 2**63 - max(1, len(prompts)):
        raise ValueError(f"`seed` is {seed}; with {len(prompts)} pictures it is one of 0 to 2**63 - {max(1, len(prompts))}.")
    each = _of_each(settings, len(prompts))
    draw = _beside if len(prompts) > 1 and _reason_against(pipe, each) is None else _in_turn
    return draw(pipe, list(prompts), seed, each)


def _of_each(settings: dict[str, Any], pictures: int) -> list[dict[str, Any]]:
    """The settings of every picture, `height` and `width` its own."""
    sizes = {name: listed(settings[name]) for name in ("height", "width") if name in settings}
    lists = {name: sides for name, sides in sizes.items() if isinstance(sides, list)}
    for name, sides in lists.items():
        if len(sides) != pictures:
            raise ValueError(f"`{name}` is a list of {len(sides)} for {pictures} prompts; one for all, or one for each.")
    return [settings | {name: sides[index] for name, sides in lists.items()} for index in range(pictures)]


def _in_turn(pipe: Any, prompts: list[str], seed: int, each: list[dict[str, Any]]) -> Iterator[Picture]:
    for index, settings in enumerate(each):
        with record() as recorder:
            image = _call(pipe, prompts, index, seed, settings)
        yield _picture(index, image[0], recorder)


def _beside(pipe: Any, prompts: list[str], seed: int, each: list[dict[str, Any]]) -> Iterator[Picture]:
    """As `_in_turn`, but decoded in a second thread, on CUDA on a second stream."""
    device = pipe._execution_device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def decode(latents: torch.Tensor, settings: dict[str, Any], user: Any, written: Any) -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())  # which is each thread's own
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
                stream.wait_event(written)
                latents.record_stream(stream)
            stack.enter_context(on_device(device))
            stack.enter_context(stage("vae"))
            stack.enter_context(pipe._images())
            images = decoded_latents(pipe, latents, *_size(pipe, settings), settings.get("output_type", "pil"))
            if stream is not None and isinstance(images, torch.Tensor):
                images.record_stream(user)
                stream.synchronize()
            return images

    def decoded(index: int, future: Future, recorder: Recorder) -> Picture:
        with on_device(device), stage("vae"):  # as far as it has to be waited for
            images = future.result()
        return _picture(index, images[0], recorder)

    with ThreadPoolExecutor(1, thread_name_prefix="qwen_fast_vae") as worker:
        waiting = None
        for index, settings in enumerate(each):
            try:
                with record() as recorder:
                    latents = _call(pipe, prompts, index, seed, {**settings, "output_type": "latent"})
                    user = written = None
                    if stream is not None:
                        user = torch.cuda.current_stream(device)
                        written = user.record_event()
                    context = contextvars.copy_context()
            except BaseException:
                if waiting is not None:
                    yield decoded(index - 1, *waiting)
                raise
            before, waiting = waiting, (worker.submit(context.run, decode, latents, settings, user, written), recorder)
            if before is not None:
                yield decoded(index - 1, *before)
        yield decoded(len(prompts) - 1, *waiting)


def _call(pipe: Any, prompts: list[str], index: int, seed: int, settings: dict[str, Any]) -> Any:
    config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(config or {}), "desc": f"{index + 1}/{len(prompts)}"})
    try:
        # Noise from the CPU's generator is the same on every GPU.
        return pipe(prompts[index], generator=torch.Generator().manual_seed(seed + index), **settings).images
    finally:
        pipe.set_progress_bar_config(**(config or {}))


def _picture(index: int, image: Any, recorder: Recorder) -> Picture:
    here, beside = recorder.own_seconds()
    return Picture(index, image, here | beside)


def _size(pipe: Any, settings: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of a picture."""
    side = pipe.default_sample_size * pipe.vae_scale_factor
    return settings.get("height") or side, settings.get("width") or side


def _reason_against(pipe: Any, each: list[dict[str, Any]]) -> str | None:
    """Why pictures are decoded before the next one begins, or None. The CPU's cores are busy with the one."""
    device = pipe._execution_device
    if device.type != "cuda":
        return f"the device is {device}"
    if type(pipe) is not QwenImagePipeline or reason_for_stock(pipe, device) is not None:
        return "the loop is diffusers'"
    if each[0].get("output_type", "pil") == "latent":
        return "nothing is decoded"
    if any(is_hooked(module) for module in pipe.components.values() if isinstance(module, torch.nn.Module)):
        return "hooks move the models"
    pixels = max(math.prod(_size(pipe, settings)) for settings in each)
    # Of the driver's alone: what PyTorch keeps in reserve is what the next picture's forwards will take.
    if torch.cuda.mem_get_info(device)[0] < _DECODE_BYTES * pixels * pipe.vae.dtype.itemsize:
        return "memory is too short"
    return None
