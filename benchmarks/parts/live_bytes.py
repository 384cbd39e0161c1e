"""Bytes of tensors alive at once, counted at every operation: what an allocator would have to give, without one to ask."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside the context, counts the storages that operations return, from then until nothing refers to them.

    Attributes:
        peak (int): the most at any time. Inputs that were there before, and what an operation takes and frees inside, are not
            in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        outputs = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(outputs):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key not in known and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._freed, key)
        return outputs

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)
