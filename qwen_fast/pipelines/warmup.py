"""What the first calls of a size pay for, paid before the first request: compilation, proofs, timings, capture."""

import inspect
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from ..common.family import PIXELS_PER_TOKEN
from ..common.state import STATE, logger

_CALLS = 3  # compile and prove, capture, and one as all others will be
_OURS = ("height", "width", "num_inference_steps", "output_type")


class Warmup(NamedTuple):
    """Seconds of the calls of one size: the first compiles and proves, the second captures, `later` is as those to come."""

    width: int
    height: int
    first: float
    second: float
    later: float


def warmup(
    pipe: Any, sizes: Iterable[tuple[int, int]], *, steps: int = 2, prompt: str = "a cat", **settings: Any
) -> list[Warmup]:
    """Draw each size three times, so that the first request finds its kernels compiled and proved and its CUDA graph captured.

    Each step of a size runs the same kernels, so a few steps do for any number of them. What a graph has to be made anew for is
    another size, batch, kind of guidance or LoRA, and a prompt of more tokens than 128, 256, 512, 768 or 1024.

    Args:
        pipe: an enabled pipeline, on the device that it will draw on.
        sizes: (width, height) of the pictures, multiples of 16.
        steps: of each call, at least 2: a capture takes two.
        prompt: as long as those to come.
        settings: other arguments of the pipeline's call, as those to come: guidance, negative prompt, an edit's picture.
    Returns:
        list[Warmup]: what it took, in the order of `sizes`. Each is logged too. The CPU's random state is as it was.
    Raises:
        ValueError: a pipeline that is not enabled or takes no size; sizes, steps or settings that cannot be; before any work.
    """
    state = getattr(pipe, "__dict__", {}).get(STATE)
    if state is None or isinstance(pipe, torch.nn.Module):
        raise ValueError(f"`pipe` is a {type(pipe).__name__} that is not enabled; call qwen_fast.enable(pipe) first.")
    parameters = inspect.signature(pipe.STANDS_FOR.__call__).parameters
    if not {"height", "width"} <= parameters.keys():
        raise ValueError(f"`pipe` is a {type(pipe).__name__}, which takes no size; draw one picture with it instead.")
    sizes = [_checked(size) for size in sizes]
    if not sizes:
        raise ValueError("`sizes` is empty; give the (width, height) of the pictures to come.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"`steps` is {steps!r}; a whole number of at least 2 is needed: a capture takes two steps.")
    for name in settings:
        if name in _OURS:
            raise ValueError(f"`{name}` is given, but is the warm-up's own; use `sizes` and `steps`.")
    given = "prompt_embeds" in settings
    if state.options.text_encoder_mode == "free" and pipe.text_encoder is not None and not given:
        raise ValueError(
            "`text_encoder_mode` is 'free', which would drop the text encoder after the warm-up's prompt; encode your prompts "
            "first, or give `prompt_embeds`."
        )
    prompts = {} if given else {"prompt": prompt}
    return [_warmed(pipe, size, prompts | settings | {"num_inference_steps": steps}) for size in sizes]


def _checked(size: Any) -> tuple[int, int]:
    try:
        width, height = size
        whole = all(int(side) == side and side > 0 and side % PIXELS_PER_TOKEN == 0 for side in (width, height))
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"`sizes` holds {size!r}; (width, height) in multiples of {PIXELS_PER_TOKEN} is needed.")
    return int(width), int(height)


def _warmed(pipe: Any, size: tuple[int, int], arguments: dict[str, Any]) -> Warmup:
    device, seconds = pipe._execution_device, []
    config = getattr(pipe, "_progress_bar_config", None)
    with torch.random.fork_rng(devices=[]):  # noise comes from a generator; some pipelines sample references without it
        pipe.set_progress_bar_config(**{**(config or {}), "disable": True})
        try:
            for _ in range(_CALLS):
                begin = time.perf_counter()
                pipe(width=size[0], height=size[1], **{"generator": torch.Generator().manual_seed(0), **arguments})
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds.append(time.perf_counter() - begin)
        finally:
            pipe.set_progress_bar_config(**(config or {}))
    found = Warmup(*size, *seconds)
    logger.info("warm-up, %dx%d: the first call took %.2f s, the second %.2f s, a later one %.2f s.", *found)
    return found
