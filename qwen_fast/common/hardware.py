"""Which devices the kernels run on."""

import torch

from qwen_fast_kernels import HAS_TRITON

from .options import DTYPES

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


def device_and_dtype(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: no such device; use cuda, cuda:N or cpu.") from None
    check_device(chosen)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices here, counted from 0.")
    if dtype == "auto":
        dtype = "bf16" if chosen.type == "cuda" else "fp32"
    return chosen, getattr(torch, DTYPES[dtype])


def free_bytes(device: torch.device) -> int | None:
    """Bytes that PyTorch can still allocate on a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_device(device: torch.device | str) -> torch.device:
    """`device` as a torch.device, or a ValueError when it is a CUDA device that this machine does not have."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {device}, but PyTorch {torch.__version__} sees no CUDA GPU here; use 'cpu'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"`device` is {device}, but there are {torch.cuda.device_count()} CUDA GPUs here, counted from 0.")
    return device
