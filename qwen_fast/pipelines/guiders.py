"""The guiders of modular pipelines: which of them a step of ours can stand for, and which have to be called as they are."""

from typing import Any

from diffusers import BaseGuidance, ClassifierFreeGuidance

from ..common.own import foreign_methods, foreign_on

# What the packed path goes around of a guider. Names that a version of diffusers lacks are passed over.
_MODELS = ("prepare_models", "cleanup_models")
GUIDER = ("set_state", "prepare_inputs", "_prepare_batch", *_MODELS, "__call__", "forward")
GUIDER += ("num_conditions", "_is_cfg_enabled")


def alone_reason(guider: Any) -> str | None:
    """Why a guider has to ask for each prediction alone, or None."""
    if not isinstance(guider, BaseGuidance):
        return f"guider is a {type(guider).__name__}"
    found = foreign_methods(type(guider), GUIDER) + foreign_on(guider, GUIDER)
    if found:
        return f"{', '.join(dict.fromkeys(found))}: not diffusers' own"
    if any(getattr(type(guider), name) is not getattr(BaseGuidance, name) for name in _MODELS):  # it puts hooks in
        return f"{described(guider)} changes the model between two predictions"
    return None


def is_plain(guider: Any) -> bool:
    """Whether guidance is the plain formula, which diffusers' denoisers rescale to the norm."""
    if type(guider) is not ClassifierFreeGuidance or alone_reason(guider) is not None:
        return False
    return guider.guidance_rescale == 0 and not guider.use_original_formulation


def described(guider: Any) -> str:
    kind = type(guider).__name__
    names = ("guidance_rescale", "use_original_formulation") if type(guider) is ClassifierFreeGuidance else ()
    values = [f"{name}={getattr(guider, name)}" for name in names if getattr(guider, name)]
    return f"guider {kind}({', '.join(values)})"
