"""Complete small checkpoints, made offline: what the tests, the demo and the command line draw with."""

from ..schedule.configs import LIGHTNING_SCHEDULER_CONFIG, QWEN_IMAGE_SCHEDULER_CONFIG
from .checkpoint import build_checkpoint, small_text_encoder
from .tokenizer import write_tokenizer
from .weights import initialize

__all__ = ["LIGHTNING_SCHEDULER_CONFIG", "QWEN_IMAGE_SCHEDULER_CONFIG", "build_checkpoint", "initialize"]
__all__ += ["small_text_encoder", "write_tokenizer"]
