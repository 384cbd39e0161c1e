"""The noise schedule of a run, computed once on the device that samples."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .flow_match import Schedule, calculate_mu, check_num_inference_steps, check_sigmas, layered_mu, layered_sigmas

__all__ = ["Schedule", "calculate_mu", "check_num_inference_steps", "check_sigmas", "layered_mu", "layered_sigmas"]


def __getattr__(name: str) -> Any:
    # Imported at first use: `qwen-fast schedule` reads a config, and refuses a wrong one, without waiting for torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.flow_match"), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
