"""Stateless operators for Qwen-Image sampling, registered as `torch.ops.qwen_fast.*`: Triton on CUDA, PyTorch on the CPU."""

from ._triton import HAS_TRITON
from .ada_layer_norm import ada_layer_norm
from .cfg_euler_step import cfg_euler_step
from .euler_step import euler_step
from .flow_match_schedule import flow_match_schedule
from .gated_residual import gated_residual
from .gated_residual_ada_layer_norm import gated_residual_ada_layer_norm
from .joint_attention import joint_attention
from .linear_gated_residual import linear_gated_residual
from .linear_gelu import linear_gelu
from .qk_norm_rope import qk_norm_rope
from .rms_norm_silu import rms_norm_silu

__all__ = [
    "HAS_TRITON",
    "ada_layer_norm",
    "cfg_euler_step",
    "euler_step",
    "flow_match_schedule",
    "gated_residual",
    "gated_residual_ada_layer_norm",
    "joint_attention",
    "linear_gated_residual",
    "linear_gelu",
    "qk_norm_rope",
    "rms_norm_silu",
]
