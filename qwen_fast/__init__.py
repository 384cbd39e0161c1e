"""Qwen-Image through diffusers, its sampler fused into Triton kernels: `enable(pipe)` switches it on, `disable(pipe)` off."""

import importlib
from typing import TYPE_CHECKING, Any

from . import versions

if TYPE_CHECKING:
    from .pipelines.enable import disable, enable
    from .pipelines.generate import Picture, generate
    from .pipelines.report import Report, report
    from .pipelines.text_to_image import QwenImagePipeline
    from .pipelines.warmup import Warmup, warmup
    from .schedule import Schedule
    from .transformer.model import QwenImageTransformer2DModel
    from .vae.pictures import disable_vae, enable_vae

__version__ = "0.1.0"
__all__ = ["QwenImagePipeline", "QwenImageTransformer2DModel", "Schedule", "disable", "disable_vae", "enable", "enable_vae"]
__all__ += ["Picture", "Report", "Warmup", "generate", "report", "warmup"]

# Imported at first use: the command line answers `--help` and typing errors without waiting for torch and diffusers.
_HOMES = {
    "Picture": "pipelines.generate",
    "QwenImagePipeline": "pipelines.text_to_image",
    "QwenImageTransformer2DModel": "transformer.model",
    "Report": "pipelines.report",
    "Schedule": "schedule",
    "Warmup": "pipelines.warmup",
    "disable": "pipelines.enable",
    "disable_vae": "vae.pictures",
    "enable": "pipelines.enable",
    "enable_vae": "vae.pictures",
    "generate": "pipelines.generate",
    "report": "pipelines.report",
    "warmup": "pipelines.warmup",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    versions.check()  # here and not above: `qwen-fast doctor` has to start where a package is too old
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value  # and kept: reading the versions takes tens of milliseconds


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
