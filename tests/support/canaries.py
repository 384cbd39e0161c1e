"""Buffers with NaN on both sides: a write outside one is seen, and stays within the allocation."""

import functools
from collections.abc import Callable
from unittest import mock

import torch

PADDING = 4096  # elements; more than one block of any op's default configuration


class Canaries:
    """Inside the context, what torch.empty and torch.empty_like give is filled with NaN and lies between canaries."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []

    def __enter__(self) -> "Canaries":
        self._patches = [
            mock.patch.object(torch, "empty", self._empty),
            mock.patch.object(torch, "empty_like", lambda like, **_: self.new(like.shape, like.dtype, like.device)),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()

    def _empty(self, *size, dtype: torch.dtype = torch.float32, device="cpu", **_) -> torch.Tensor:
        return self.new(size if isinstance(size[0], int) else size[0], dtype, device)

    def new(self, shape, dtype: torch.dtype, device) -> torch.Tensor:
        numel = torch.Size(shape).numel()
        buffer = torch.full((numel + 2 * PADDING,), float("nan"), dtype=dtype, device=device)
        self._buffers.append(buffer)
        return buffer[PADDING : PADDING + numel].view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.new(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)

    def check(self) -> None:
        assert self._buffers, "nothing was allocated between canaries"
        for buffer in self._buffers:
            assert buffer[:PADDING].isnan().all(), "something was written before a buffer"
            assert buffer[-PADDING:].isnan().all(), "something was written behind a buffer"


def between_canaries(launch: Callable, **keywords) -> Callable:
    """`launch` with some keywords given, whose outputs lie between canaries that every call checks."""

    @functools.wraps(launch)
    def guarded(*args, **kwargs):
        with Canaries() as canaries:
            outputs = launch(*args, **keywords, **kwargs)
        canaries.check()
        return outputs

    return guarded
