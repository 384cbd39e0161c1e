"""What a callback at a step's end is handed: the values that stock's loop has by the names that it asks for."""

from collections.abc import Callable
from typing import Any

import torch

# What changes from step to step; all others are known before the loop.
OF_A_STEP = ("latents", "prompt_embeds", "noise_pred", "neg_noise_pred", "comb_pred", "cond_norm", "noise_norm")
_OF_GUIDANCE = OF_A_STEP[3:]
_OF_THE_CALL = ("i", "t", "timestep", "latents_dtype")


class Callback:
    """The user's `callback_on_step_end`. `_callback_tensor_inputs` may be extended: stock then hands any variable of its loop.

    Args:
        function: the user's.
        names: `callback_on_step_end_tensor_inputs`.
        known: values by the names of stock's loop that are the same at all steps.
        guided: whether there is classifier-free guidance.
    Attributes:
        inputs: the names that the loop has to give.
    Raises:
        ValueError: a name that neither stock's loop nor ours has.
    """

    def __init__(self, function: Callable[..., dict[str, Any]], names: list[str], known: dict[str, Any], *, guided: bool):
        self._function, self._names, self._known = function, names, known
        loop = OF_A_STEP if guided else tuple(name for name in OF_A_STEP if name not in _OF_GUIDANCE)
        for name in names:
            if name not in loop and name not in known and name not in _OF_THE_CALL:
                reason = "without guidance there is none" if name in _OF_GUIDANCE else "the loop has nothing by that name"
                raise ValueError(f"`callback_on_step_end_tensor_inputs` names {name!r}, but {reason}.")
        self.inputs = [name for name in dict.fromkeys(["latents", *names]) if name in loop]

    def __call__(self, pipe: Any, step: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        values = self._known | tensors | {"i": step, "t": t, "latents_dtype": latents.dtype}
        if "timestep" in self._names:
            values["timestep"] = t.expand(latents.shape[0]).to(latents.dtype)
        return self._function(pipe, step, t, {name: values[name] for name in self._names})
