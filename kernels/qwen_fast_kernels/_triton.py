"""Triton where it is installed, and stand-ins that let the kernel files be imported where it is not (macOS, Windows)."""

import contextlib
import types

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _plain(function=None, **_options):
        return _plain if function is None else function

    # Decorated functions stay plain: `require_triton` stops every launch before they could be called.
    triton = types.SimpleNamespace(jit=_plain)
    tl = types.SimpleNamespace(constexpr=object)


def require_triton(op: str) -> None:
    """Raise a RuntimeError that names `op` when Triton is missing: on CUDA no op runs its reference in secret."""
    if not HAS_TRITON:
        raise RuntimeError(
            f"qwen_fast::{op} on CUDA needs Triton, which is not installed. `pip install triton` (Linux only); "
            "the reference implementations run on CPU tensors without it."
        )


def on_device(tensor: torch.Tensor):
    """Context that makes the tensor's own CUDA device current: Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability(device: torch.device) -> int:
    """Compute capability as one number, 90 for sm_90; configurations are chosen by it."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
