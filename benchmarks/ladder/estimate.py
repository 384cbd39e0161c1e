"""How long a plan takes on an H200, by arithmetic from published rates; nothing is measured."""

import importlib.util

from ..shared.shapes import COMPARED_STEPS, STEPS_MEASURED, PictureCase
from .rung import Rung
from .rungs import ENABLED, ENABLED_AND_COMPILED, GRAPH, INVARIANT, OURS
from .stock import STOCK

_PRODUCTS, _ATTENTION, _FP32 = 790e12, 500e12, 45e12  # FLOP/s in bf16, and of everything in fp32
_BANDWIDTH = 4.3e12  # bytes/s, read and written
_STOCK_BYTES = 137e9 / (60 * 4126 * 3072)  # of eager elementwise operators, for each row, channel and layer of a forward
_LAUNCH_SECONDS = 29e-3 / 60  # host time of a block of stock
_DECODE_FLOPS = 11.7e12  # of one megapixel, at a tenth of the rate of dense products: convolutions of few channels
_START, _COMPILE, _CAPTURE, _ENTER = 20.0, 60.0, 2.0, 0.3
_PEERS = {"cache-dit": "cache_dit", "torchao": "torchao", "SageAttention": "sageattention"}


def step_seconds(case: PictureCase, *, stock: bool) -> float:
    """One step's forwards and sampler."""
    work = case.work()
    seconds = work.product_flops / _PRODUCTS + work.attention_flops / _ATTENTION
    if not stock:
        return seconds * 1.05
    forwards = 2 if case.cfg else 1
    rows = forwards * case.batch * (case.image_tokens + max(case.text_lengths))
    seconds += _STOCK_BYTES * rows * case.shape.width * case.shape.layers / _BANDWIDTH
    return max(seconds, forwards * case.shape.layers * _LAUNCH_SECONDS)


def rung_seconds(case: PictureCase, rung: Rung, repeats: int, whole: bool) -> float:
    """One row: first image, comparison, pairs with stock."""
    stock = rung not in OURS
    decode = case.batch * case.width * case.height / 2**20 * _DECODE_FLOPS / (0.1 * _PRODUCTS)
    steps = case.steps if whole or not rung.steady else min(case.steps, STEPS_MEASURED)
    step, reference = step_seconds(case, stock=stock), step_seconds(case, stock=True)
    seconds = (steps + COMPARED_STEPS) * step + decode
    pairs = steps * step + decode
    if rung is not STOCK:
        pairs += steps * reference + 2 * decode + step + _ENTER
    if "compile" in rung.name or rung.name == "torchao":
        seconds += _COMPILE
    if rung in (GRAPH, ENABLED, ENABLED_AND_COMPILED, INVARIANT):
        pairs += _CAPTURE
    return seconds + repeats * pairs


def case_seconds(case: PictureCase, rungs: list[Rung], repeats: int, whole: bool, random: bool) -> float:
    """All rows of a case, and the exact latents that they are compared with; `random`: of weights."""
    work = case.work()
    exact = COMPARED_STEPS * (work.product_flops + work.attention_flops) / _FP32
    return exact + sum(rung_seconds(case, rung, repeats, whole) for rung in rungs if _runs(case, rung, random))


def changing_seconds(cases: list[PictureCase], rungs: list[Rung]) -> float:
    """Each of the cases once and the last one twice by every rung, without the VAE."""
    seconds = 0.0
    for rung in rungs:
        seconds += _ENTER + len(cases) * (_CAPTURE if rung is ENABLED else 0.0)
        for case in (*cases, cases[-1]):
            seconds += min(case.steps, STEPS_MEASURED) * step_seconds(case, stock=rung not in OURS)
    return seconds


def start_seconds(ceiling_seconds: float) -> float:
    """Imports, the model, four ceilings."""
    return _START + 4 * 1.5 * ceiling_seconds


def _runs(case: PictureCase, rung: Rung, random: bool) -> bool:
    """Not a peer that is not installed, nor a step cache, which random weights make idle, nor what is of batches alone."""
    if rung is INVARIANT and case.batch == 1:
        return False
    package = _PEERS.get(rung.name)
    return package is None or (importlib.util.find_spec(package) is not None and (rung.steady or not random))
