"""The ladder: stock diffusers, ours as enabled, and what lies between them, each adding one thing to the one before.

A rung changes a stock pipeline in place while it is entered and leaves it as it was. A mode that is new is a `Rung` more in
`STEPS` or `LOSSY`.
"""

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import qwen_fast
from qwen_fast.common.state import logger

from ..shared.shapes import PictureCase
from .peers import PEERS
from .rung import NotMeasured, Rung
from .stock import COMPARED, COMPILED, STOCK, compiled_blocks


def ours(
    *,
    fused: bool = True,
    packed: bool = True,
    cuda_only: bool = False,
    guided_only: bool = False,
    batches_only: bool = False,
    **options: Any,
):
    """`enable` with `options`.

    `fused=False` leaves stock's transformer in, `packed=False` forwards one prompt at a time. Modulation weights stay on the
    device unless an option says otherwise: stock, with which every rung is interleaved, has them there, and moving 13.6 GB to
    and fro takes longer than what is measured.
    """
    options = {"modulation": "device"} | options

    @contextlib.contextmanager
    def enter(pipe: Any, case: PictureCase) -> Iterator[str]:
        if cuda_only and pipe.device.type != "cuda":
            raise NotMeasured("needs a CUDA device")
        if guided_only and not case.cfg:
            raise NotMeasured("there is one prediction a step")
        if batches_only and case.batch == 1:
            raise NotMeasured("one picture a call")
        with ExitStack() as stack:
            if not packed:
                stack.enter_context(mock.patch("qwen_fast.denoise.packing.fits_in_memory", lambda *_: False))
            if not fused:
                # What a transformer that cannot be fused makes the pipeline do, without its warning.
                stack.enter_context(mock.patch.object(logger, "warning"))
                pipe.install_transformer = lambda *_: "left out by the benchmark"
                stack.callback(pipe.__dict__.pop, "install_transformer", None)
            stack.callback(qwen_fast.disable, pipe)
            qwen_fast.enable(pipe, **options)

            def refuse_fallbacks() -> None:
                reasons = qwen_fast.report(pipe).fallbacks
                if fused and reasons:
                    raise RuntimeError(f"stock diffusers ran instead: {', '.join(reasons)}")

            try:
                yield ""
            except Exception:
                refuse_fallbacks()  # the better reason
                raise
            refuse_fallbacks()

    return enter


@contextlib.contextmanager
def _enabled_and_compiled(pipe: Any, case: PictureCase) -> Iterator[str]:
    """What a user does who has compiled the blocks and enables the pipeline then."""
    with compiled_blocks(pipe, case), ENABLED.enter(pipe, case):
        yield ""


_PACKED = {"cuda_graph": False, "vae_mode": "diffusers", "guided_only": True}
ENABLED = Rung("qwen_fast as enabled", ours(modulation="auto"))
# Packing with each attention: what packing gains can be told from what the attention does.
PACKED = (
    Rung("packed, diffusers' attention", ours(attention="diffusers", **_PACKED)),
    Rung("packed, cuDNN attention", ours(attention="cudnn", cuda_only=True, **_PACKED)),
    Rung("packed, flash attention", ours(attention="flash", **_PACKED)),
    Rung("packed, our attention", ours(attention="triton", **_PACKED)),
)
GRAPH = Rung("+ CUDA graph", ours(cuda_graph=True, cuda_only=True))
# To be held against the row of `ENABLED`: what it costs that no picture depends on its batch. Strict: kept, or no row.
INVARIANT = Rung("+ batch_invariant", ours(modulation="auto", batch_invariant=True, strict=True, batches_only=True))
# Each adds one thing to the one before.
STEPS = (
    Rung("qwen_fast: schedule, sampler", ours(fused=False, modulation="layers", cuda_graph=False, vae_mode="diffusers")),
    Rung("+ fused transformer", ours(packed=False, modulation="layers", cuda_graph=False, vae_mode="diffusers")),
    Rung("+ modulation table", ours(packed=False, cuda_graph=False, vae_mode="diffusers")),
    Rung("+ packed CFG", ours(**_PACKED)),
    Rung("+ VAE of pictures", ours(cuda_graph=False)),
)
ENABLED_AND_COMPILED = Rung("qwen_fast + regional compile", _enabled_and_compiled)
OURS = (*STEPS, GRAPH, *PACKED, ENABLED, INVARIANT, ENABLED_AND_COMPILED)
LOSSY: tuple[Rung, ...] = ()  # no lossy mode exists yet


def all_rungs() -> list[Rung]:
    """The whole ladder in the order of its worth: a run that is cut short has its most telling rows. What compiles is last."""
    ours = [STOCK, ENABLED, INVARIANT, *PACKED, GRAPH, *STEPS]
    return [*ours, *COMPARED[:-1], *LOSSY, *PEERS, COMPILED, ENABLED_AND_COMPILED]


def chosen_rungs() -> list[Rung]:
    """What a case gets that does not get the whole ladder."""
    return [STOCK, ENABLED]
