"""What of a pipeline and its scheduler is not diffusers' own: our loop goes around it, so it has to be known before a call.

All of it is called as it is, in stock's way, with stock's arguments and as often as in stock; the fused transformer stays.
`report` names it, and strict=True raises.
"""

import sys
from typing import Any

from ..common.own import foreign_functions, foreign_methods, foreign_on
from ..common.state import State
from . import scheduler as fast_scheduler

# What stock's loops use to compute a picture. Names that a pipeline or a version of diffusers lacks are passed over. What only
# looks on or steers (progress_bar, check_inputs, interrupt, maybe_free_model_hooks) is called by our loop as by stock's,
# whoever wrote it, and is no fallback.
HELPERS = (
    "encode_prompt",
    "_get_qwen_prompt_embeds",
    "_extract_masked_hidden",
    "prepare_latents",
    "prepare_mask_latents",
    "get_timesteps",
    "_encode_vae_image",
    "_pack_latents",
    "_unpack_latents",
    "attention_kwargs",
)
FUNCTIONS = ("calculate_shift", "retrieve_timesteps", "randn_tensor")
SCHEDULER = (
    "set_timesteps",
    "step",
    "set_begin_index",
    "begin_index",
    "step_index",
    "_init_step_index",
    "index_for_timestep",
    "scale_noise",
    "shift",
    "time_shift",
    "_time_shift_exponential",
    "_time_shift_linear",
    "stretch_shift_to_terminal",
    "_convert_to_karras",
    "_convert_to_exponential",
    "_convert_to_beta",
    "_sigma_to_t",
)
_VAE = ("encode", "decode", "_encode", "_decode")


def note_foreign(pipe: Any, stock: type, state: State) -> None:
    """Count what of `pipe` itself and around its VAE is called in the place of diffusers' own.

    Args:
        stock: class of diffusers that `pipe` accelerates; its module's functions are asked about too.
    Raises:
        RuntimeError: there is any, and `strict`.
    """
    found = foreign_methods(type(pipe), HELPERS) + foreign_on(pipe, HELPERS)
    found += foreign_functions(sys.modules[stock.__module__], FUNCTIONS)
    for part, names in ((pipe.image_processor, ("postprocess",)), (pipe.vae, _VAE)):
        if part is not None:
            found += foreign_methods(type(part), names) + foreign_on(part, names)
    for name in dict.fromkeys(found):
        state.fall_back(f"{name} is not diffusers' own, and is called as it is")


def scheduler_reason(scheduler: Any) -> str | None:
    """Why the steps are taken by `scheduler` itself, in stock's way, or None."""
    if type(scheduler) not in (fast_scheduler.STOCK, fast_scheduler.FlowMatchEulerDiscreteScheduler):
        return f"scheduler is a {type(scheduler).__name__}, not a FlowMatchEulerDiscreteScheduler"
    if scheduler.config.get("stochastic_sampling", False):
        return "stochastic_sampling"
    found = foreign_methods(type(scheduler), SCHEDULER) + foreign_on(scheduler, SCHEDULER)
    return f"{', '.join(dict.fromkeys(found))}: not diffusers' own" if found else None
