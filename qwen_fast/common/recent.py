"""What was used last, within a number of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch


class Recent:
    """Values by key; the least recently used ones go first. A copy starts empty. Several threads may ask.

    Args:
        max_bytes: of all values. A larger one is not kept.
    Attributes:
        hits, misses: keys found and not found so far.
    """

    def __init__(self, max_bytes: int = 2**26):
        self.max_bytes = max_bytes
        self.__setstate__({})

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        with self._lock:
            return sum(nbytes for _, nbytes in self._kept.values())

    def get(self, key: Hashable) -> Any | None:
        """The value of `key`, counted as a hit or a miss."""
        found = self._find(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        return found

    def put(self, key: Hashable, value: Any, nbytes: int | None = None) -> None:
        """Keep `value`, of so many bytes: its own `nbytes` by default."""
        with self._lock:
            self._kept[key] = value, value.nbytes if nbytes is None else nbytes
            self._kept.move_to_end(key)
            while self._kept and self.nbytes > self.max_bytes:
                self._kept.popitem(last=False)

    def leave(self, device: torch.device) -> None:
        """Forget all but what is on `device`, which is the last part of each key."""
        with self._lock:
            for key in [key for key in self._kept if key[-1] != device]:
                del self._kept[key]

    def _find(self, key: Hashable) -> Any | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_kept", "hits", "misses")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.RLock()
