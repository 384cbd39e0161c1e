"""Which devices the kernels run on, what is free there, and the stream beside the work."""

import functools
import math

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
    try:
        check_device(chosen)
    except ValueError as error:
        raise ValueError(str(error).replace("`device` is", "--device", 1)) from None
    if dtype == "auto":
        dtype = "bf16" if chosen.type == "cuda" else "fp32"
    return chosen, getattr(torch, DTYPES[dtype])


def free_bytes(device: torch.device, *, enough: float = math.inf) -> int | None:
    """Bytes that can still be allocated on a CUDA device, rather too few than too many; None elsewhere.

    Whoever plans with memory asks here, and plans again where it was too much all the same: the largest piece may be smaller.
    Counted is what the driver has, and what PyTorch has freed and keeps for the current stream. What it keeps for other
    streams, or for graphs with a pool of their own, is out of this stream's reach.

    Args:
        enough: where the driver alone has so many, PyTorch is not asked to list all that it keeps. 0: only the driver is asked.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if free >= enough:
        return free
    index, stream = indexed(device).index, torch.cuda.current_stream(device).cuda_stream
    own = [one for one in torch.cuda.memory_snapshot() if (one["device"], one["stream"]) == (index, stream)]
    blocks = (block for one in own if tuple(one["segment_pool_id"]) == (0, 0) for block in one["blocks"])
    return free + sum(block["size"] for block in blocks if block["state"] == "inactive")


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device on which copies travel beside the work: memory that PyTorch keeps belongs to a stream, so
    that each new one would take new memory.

    Args:
        device: with its index, as `indexed` gives it.
    """
    return torch.cuda.Stream(device)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which graphs of a device are captured: no other, since what somebody else sends there would be in them."""
    return torch.cuda.Stream(device)


def indexed(device: torch.device | str) -> torch.device:
    """`device` with its index: "cuda" alone is the current one."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def check_device(device: torch.device | str) -> torch.device:
    """`device` as a torch.device, or a ValueError when it is a CUDA device that this machine does not have."""
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`device` is {device}, but PyTorch {torch.__version__} sees no CUDA GPU here; use 'cpu'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"`device` is {device}, but there are {torch.cuda.device_count()} CUDA GPUs here, counted from 0.")
    return device
