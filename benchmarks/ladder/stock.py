"""The rungs of stock diffusers: as it is, with other attention, compiled."""

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers.models.attention_dispatch import attention_backend

from ..shared.shapes import PictureCase
from .rung import NotMeasured, Rung


@contextlib.contextmanager
def _stock(pipe: Any, case: PictureCase) -> Iterator[str]:
    yield ""


@contextlib.contextmanager
def compiled_blocks(pipe: Any, case: PictureCase) -> Iterator[str]:
    """diffusers' regional compilation; entered again, the blocks take up what was compiled before."""
    blocks = list(pipe.transformer.transformer_blocks)
    kept = pipe.__dict__.setdefault("_benchmark_compiled", {})
    if not kept:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
        kept.update({id(block): block._compiled_call_impl for block in blocks})
    try:
        for block in blocks:
            block._compiled_call_impl = kept[id(block)]
        yield ""
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _stock_attention(name: str):
    """Stock with one of diffusers' attention backends, by its name there."""

    @contextlib.contextmanager
    def enter(pipe: Any, case: PictureCase) -> Iterator[str]:
        with _backend(name, pipe, case):
            yield name

    return enter


@contextlib.contextmanager
def _backend(name: str, pipe: Any, case: PictureCase) -> Iterator[None]:
    """That backend of diffusers for all attention inside.

    Raises:
        NotMeasured: torch has it for GPUs only, or it takes no mask, which prompts of different lengths need in stock.
    """
    if name == "_native_cudnn" and pipe.device.type != "cuda":
        raise NotMeasured("needs a CUDA device")
    if name == "_native_flash" and len(set(case.text_lengths)) > 1:
        raise NotMeasured(f"{name} takes no mask, which prompts of different lengths need in stock")
    with attention_backend(name):
        yield


STOCK = Rung("stock diffusers", _stock)
COMPILED = Rung("stock + regional compile", compiled_blocks)
COMPARED = (
    Rung("stock + cuDNN attention", _stock_attention("_native_cudnn")),
    Rung("stock + flash attention", _stock_attention("_native_flash")),
    COMPILED,
)
