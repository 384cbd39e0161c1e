"""A GPU whose memory is in use."""

import contextlib
from collections.abc import Iterator

import torch

from qwen_fast.common.hardware import free_bytes


@contextlib.contextmanager
def memory_taken(but: int) -> Iterator[None]:
    """All memory of the current GPU but so many bytes, or a little more.

    In pieces: part of what counts as free may lie in small ones between what tests before have left.
    """
    torch.cuda.empty_cache()
    device, pieces, size = torch.device("cuda", torch.cuda.current_device()), [], 2**36
    while size >= 2**16:
        try:
            if free_bytes(device) - but >= size:
                pieces.append(torch.empty(size, dtype=torch.uint8, device=device))
                continue
        except torch.OutOfMemoryError:
            pass
        size //= 2
    yield
