"""ControlNet pipelines whose ControlNet has several blocks."""

import torch
from diffusers import QwenImageControlNetModel, QwenImageMultiControlNetModel

import qwen_fast
from qwen_fast.testing import initialize

from .family import MEMBERS

STEPS = 3


def build(checkpoint, name: str = "controlnet", layers: int = 2, dtype: torch.dtype = torch.float32):
    """A pipeline whose ControlNet has several blocks, and weights that make its residuals count."""
    pipe = MEMBERS[name].pipe(checkpoint, dtype)
    net = QwenImageControlNetModel.from_config(pipe.controlnet.config, num_layers=layers)
    initialize(net, "controlnet", 3)
    pipe.register_modules(controlnet=torch.nn.Module.to(net, dtype).eval())
    return pipe


def union(checkpoint):
    pipe = build(checkpoint)
    pipe.register_modules(controlnet=QwenImageMultiControlNetModel([pipe.controlnet]))
    return pipe


def counted(pipe) -> int:
    return qwen_fast.report(pipe).calls.get("controlnet", 0)
