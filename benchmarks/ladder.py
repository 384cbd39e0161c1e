"""The rungs: stock diffusers first, then ways to be faster, each adding one thing to the one before.

A rung changes a stock pipeline in place while it is entered and leaves it as it was. A mode that is new is a `Rung` more in
`OURS` or `LOSSY`.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

import qwen_fast
from qwen_fast.reporting import logger

from .ceilings import sustained
from .grid import Case
from .measure import Difference

_PROBE_SECONDS = 0.05
# Exact implementations that diffusers can dispatch to. The hub's are downloads, and no part of a measurement.
_BACKENDS = ("_native_flash", "_native_cudnn", "_native_efficient", "flash", "_flash_3", "xformers")


class NotMeasured(Exception):
    """A rung that does not apply here; its message says why."""


@dataclass(frozen=True)
class Rung:
    """One row of the ladder.

    Attributes:
        name: as the table shows it.
        enter: (pipe, case) to a context in which calls of the stock pipeline `pipe` run this way; it yields a detail for the
            row. Raises NotMeasured where it does not apply.
        lossy: another picture is no fault; its distance from stock's stands beside the time.
        steady: ms per step is the same from the second step on, so that a few steps are enough.
    """

    name: str
    enter: Callable[[Any, Case], AbstractContextManager[str]]
    lossy: bool = False
    steady: bool = True


@contextlib.contextmanager
def _stock(pipe: Any, case: Case) -> Iterator[str]:
    yield ""


@contextlib.contextmanager
def compiled_blocks(pipe: Any, case: Case) -> Iterator[str]:
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


@contextlib.contextmanager
def _fastest_backend(pipe: Any, case: Case) -> Iterator[str]:
    name = pipe.__dict__.setdefault("_benchmark_backends", {}).get(case)
    if name is None:
        name = pipe.__dict__["_benchmark_backends"][case] = fastest_backend(pipe, case)
    with attention_backend(name):
        yield name


def fastest_backend(pipe: Any, case: Case) -> str:
    """The fastest of diffusers' exact attention backends that run here, its own default aside, at the case's shape.

    Raises:
        NotMeasured: naming why each does not run.
    """
    dtype, device, shape = pipe.transformer.dtype, pipe.device, case.shape
    tokens, batch = case.image_tokens + max(case.text_lengths), case.batch
    generator = torch.Generator(device).manual_seed(0)
    size = (batch, tokens, shape.heads, shape.head_dim)
    rows = [torch.randn(*size, generator=generator, device=device).to(dtype) for _ in range(3)]
    mask = None
    if len(set(case.text_lengths)) > 1:  # stock's path for prompts of different lengths
        text = torch.arange(max(case.text_lengths)) < torch.tensor(case.text_lengths)[:, None]
        image = torch.ones(batch, case.image_tokens, dtype=torch.bool)
        mask = torch.cat([text, image], dim=1)[:, None, None].to(device)
    expected = dispatch_attention_fn(*rows, attn_mask=mask)
    rates, refused = {}, {}
    for name in _BACKENDS:
        if name not in {backend.value for backend in AttentionBackendName}:
            continue

        def call(name: str = name) -> torch.Tensor:
            return dispatch_attention_fn(*rows, attn_mask=mask, backend=AttentionBackendName(name))

        try:
            if not Difference.between(call(), expected).largest <= 8 * torch.finfo(dtype).eps:
                refused[name] = "another result"
                continue
            rates[name] = sustained([call], _PROBE_SECONDS, device)[0]
        except Exception as error:  # a library that is missing, or refuses shape, mask, dtype or GPU, in its own way
            refused[name] = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
    if not rates:
        raise NotMeasured("no other attention backend runs: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
    return max(rates, key=rates.get)


def ours(*, fused: bool = True, packed: bool = True, cuda_only: bool = False, guided_only: bool = False, **options: Any):
    """`enable` with `options`; `fused=False` leaves stock's transformer in, `packed=False` forwards one prompt at a time."""

    @contextlib.contextmanager
    def enter(pipe: Any, case: Case) -> Iterator[str]:
        if cuda_only and pipe.device.type != "cuda":
            raise NotMeasured("needs a CUDA device")
        if guided_only and not case.cfg:
            raise NotMeasured("there is one prediction a step")
        with ExitStack() as stack:
            if not packed:
                stack.enter_context(mock.patch("qwen_fast.forwards.fits_in_memory", lambda *_: False))
            if not fused:
                # What a transformer that cannot be fused makes the pipeline do, without its warning.
                stack.enter_context(mock.patch.object(logger, "warning"))
                pipe.install_transformer = lambda: "left out by the benchmark"
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


def weights_stay():
    """Context in which modulation weights that a table makes idle are left where they are.

    Moving 13.6 GB to the host and back between two measurements takes longer than the measurements. Times of steps do not
    change; memory and the first image are measured without it.
    """
    return mock.patch("qwen_fast.transformer.keep_on_host", lambda transformer: {})


STOCK = Rung("stock diffusers", _stock)
OURS = (
    Rung("qwen_fast: schedule, sampler", ours(fused=False, modulation="layers", cuda_graph=False, vae="diffusers")),
    Rung("+ fused transformer", ours(packed=False, modulation="layers", cuda_graph=False, vae="diffusers")),
    Rung("+ modulation table", ours(packed=False, cuda_graph=False, vae="diffusers")),
    Rung("+ packed CFG", ours(cuda_graph=False, vae="diffusers", guided_only=True)),
    Rung("+ VAE of pictures", ours(cuda_graph=False)),
    Rung("+ CUDA graph", ours(cuda_graph=True, cuda_only=True)),
    Rung("qwen_fast as enabled", ours()),
)
LOSSY: tuple[Rung, ...] = ()  # no lossy mode exists yet
COMPARED = (
    Rung("stock + regional compile", compiled_blocks),
    Rung("stock + fastest attention", _fastest_backend),
)


def all_rungs() -> list[Rung]:
    """The whole ladder in its order, peers last."""
    from .peers import PEERS

    return [STOCK, *COMPARED, *OURS, *LOSSY, *PEERS]


def chosen_rungs() -> list[Rung]:
    """What a case gets that does not get the whole ladder."""
    return [STOCK, OURS[-1]]
