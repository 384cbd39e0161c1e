"""Stateless operators for Qwen-Image sampling, registered as `torch.ops.qwen_fast.*`: Triton on CUDA, PyTorch on the CPU."""

from ._triton import HAS_TRITON
from .cfg_euler_step import cfg_euler_step
from .euler_step import euler_step
from .flow_match_schedule import flow_match_schedule

__all__ = ["HAS_TRITON", "cfg_euler_step", "euler_step", "flow_match_schedule"]
