"""Qwen-Image through diffusers: the same picture, faster. `enable(pipe)` switches it on, `disable(pipe)` off."""

__version__ = "0.1.0"

from .versions import check_versions

check_versions()

from .pipeline import QwenImagePipeline  # noqa: E402  (an unsupported diffusers must be named before it is imported)
from .report import report  # noqa: E402
from .schedule import Schedule  # noqa: E402
from .switch import disable, enable  # noqa: E402

__all__ = ["QwenImagePipeline", "Schedule", "disable", "enable", "report"]
