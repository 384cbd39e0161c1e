"""The blocks of a denoising step in modular pipelines, read: all denoisers of diffusers' Qwen-Image are one of two.

A denoiser asks its guider for the inputs of each prediction, the transformer for the predictions, and the guider for what
comes of them. So its source is read, and becomes a generator: it yields the arguments of all forwards, is sent the predictions,
and goes on with stock's own statements.
"""

import ast
import functools
import inspect
import types
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

from ..common.own import foreign_methods
from ..common.rewritten import Unknown, rewritten, text


def is_own(block: Any) -> bool:
    """Whether calling a block runs diffusers' code."""
    return not foreign_methods(type(block), ("__call__",))


class DenoiserCode(NamedTuple):
    """`__call__` of a denoiser of diffusers', read.

    Attributes:
        run: the same as a generator, which yields the arguments of its forwards, and is sent their predictions.
        rescales: whether behind the guider it rescales to the norm of the prompt's prediction, and does no more.
    """

    run: Callable[..., Generator]
    rescales: bool


def code_of(block: Any) -> DenoiserCode | None:
    """None of blocks that are no denoisers, or none that are known."""
    return _read(inspect.unwrap(type(block).__call__))


@functools.lru_cache(maxsize=64)
def _read(original: Any) -> DenoiserCode | None:
    behind: list[str] = []
    run = rewritten(original, functools.partial(_ask, behind=behind), {}) if isinstance(original, types.FunctionType) else None
    whole = [line.format("guider_output.") for line in _GUIDED]
    cut = [line.format("") for line in _GUIDED]
    return None if run is None else DenoiserCode(run, behind in (whole, cut[:1] + _CUT + cut[1:]))


_GUIDED = [
    "guider_output = components.guider(guider_state)",
    "pred_cond_norm = torch.norm({0}pred_cond, dim=-1, keepdim=True)",
    "pred_norm = torch.norm({0}pred, dim=-1, keepdim=True)",
    "block_state.noise_pred = {0}pred * (pred_cond_norm / pred_norm)",
    "return (components, block_state)",
]
_CUT = [
    "pred = guider_output.pred[:, :block_state.latents.size(1)]",
    "pred_cond = guider_output.pred_cond[:, :block_state.latents.size(1)]",
]
_ASKING = """
for guider_state_batch, _prediction in zip(guider_state, (yield _forwards)):
    guider_state_batch.noise_pred = _prediction
"""


def _ask(function: ast.FunctionDef, behind: list[str]) -> None:
    """The loop over a guider's batches collects arguments in the place of predictions, and then asks for all of these.

    Args:
        behind: gets what comes behind that loop.
    """
    place = next((n for n, node in enumerate(function.body) if isinstance(node, ast.For) and _is_batches(node)), None)
    if place is None:
        raise Unknown
    behind += [text(node) for node in function.body[place + 1 :]]
    forward = function.body[place].body[2].value.value  # the call in `components.transformer(...)[0]`
    forward.func = ast.Name("dict", ast.Load())
    append = ast.Attribute(ast.Name("_forwards", ast.Load()), "append", ast.Load())
    function.body[place].body[2] = ast.Expr(ast.Call(append, [forward], []))
    function.body[place + 1 : place + 1] = ast.parse(_ASKING).body
    function.body[place:place] = ast.parse("_forwards = []").body


def _is_batches(node: ast.For) -> bool:
    """Whether a loop asks the transformer for one prediction after the other, and does nothing else."""
    if text(node.target) != "guider_state_batch" or text(node.iter) != "guider_state" or len(node.body) != 4:
        return False
    prepare, gather, predict, clean = (text(one) for one in node.body)
    return (
        prepare == "components.guider.prepare_models(components.transformer)"
        and gather.startswith("cond_kwargs = ")
        and predict.startswith("guider_state_batch.noise_pred = components.transformer(")
        and "timestep=block_state.timestep / 1000, " in predict
        and "return_dict=False, " in predict
        and predict.endswith(", **cond_kwargs, **block_state.additional_cond_kwargs)[0]")
        and clean == "components.guider.cleanup_models(components.transformer)"
    )


def is_update(block: Any) -> bool:
    """Whether a block is diffusers' call of the scheduler's step."""
    return _is_update_by_code(inspect.unwrap(type(block).__call__))


@functools.lru_cache(maxsize=64)
def _is_update_by_code(original: Any) -> bool:
    found: list[str] = []
    if isinstance(original, types.FunctionType):
        rewritten(original, lambda function: found.extend(map(text, function.body)), {})
    step = "components.scheduler.step(block_state.noise_pred, t, block_state.latents, return_dict=False)[0]"
    kept = "if block_state.latents.dtype != latents_dtype:"
    return (
        len(found) == 4
        and found[:2] == ["latents_dtype = block_state.latents.dtype", f"block_state.latents = {step}"]
        and found[2].startswith(kept)
        and found[3] == "return (components, block_state)"
    )
