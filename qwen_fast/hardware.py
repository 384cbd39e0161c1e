"""Which devices the kernels run on."""

import torch

from qwen_fast_kernels import HAS_TRITON

MIN_CAPABILITY = (8, 0)


def unsupported_reason(device: torch.device) -> str | None:
    """Why a pipeline on `device` cannot be accelerated, or None. The CPU runs the reference implementations."""
    if device.type == "cpu" or device.type == "meta":
        return None
    if device.type != "cuda":
        return f"device {device} is neither CUDA nor the CPU"
    if not HAS_TRITON:
        return "Triton is not installed (`pip install triton`, Linux only)"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is sm_{capability[0]}{capability[1]}; sm_80 or newer is needed"
    return None
