"""cache-dit wraps `__call__` on the class of a pipeline, and `enable` gives the pipeline another class: both have to fit.

Its wrapper opens the contexts of its cache and calls what it found. Of a pipeline that was cached before it was enabled the
wrapper sits on diffusers' class, and is called there with the transformer fused; of one that was enabled before, on ours.
Nothing here imports cache-dit.
"""

from typing import Any

_MANAGER, _ORIGINAL, _MARK = "_context_manager", "_original_call", "_is_cached"  # cache-dit's names


def is_cached(pipe: Any) -> bool:
    """Whether cache-dit is on for this pipeline."""
    return _MANAGER in vars(pipe)


def wraps(cls: type) -> bool:
    """Whether the `__call__` of a class is cache-dit's."""
    call = vars(cls).get("__call__")
    return getattr(call, "__globals__", {}).get("__name__", "").partition(".")[0] == "cache_dit"


def enabled(pipe: Any, ours: type) -> None:
    """Behind `enable`: let `cache_dit.disable_cache` find on our class what it left on diffusers'."""
    if is_cached(pipe) and _ORIGINAL not in vars(ours):
        setattr(ours, _ORIGINAL, ours.__call__)
        setattr(ours, _MARK, True)


def disabled(pipe: Any, ours: type, stock: type) -> None:
    """Behind `disable`: take away what cache-dit has left on our class, and what it could not find on diffusers'."""
    if _ORIGINAL in vars(ours):
        ours.__call__ = getattr(ours, _ORIGINAL)
        _remove_marks(ours)
    if wraps(stock) and _ORIGINAL in vars(stock) and not is_cached(pipe):
        stock.__call__ = getattr(stock, _ORIGINAL)
        _remove_marks(stock)


def _remove_marks(cls: type) -> None:
    for name in (_ORIGINAL, _MARK):
        if name in vars(cls):
            delattr(cls, name)
