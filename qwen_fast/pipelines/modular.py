"""Modular pipelines: diffusers' own blocks, with the steps of their denoising loops taken by ours.

A modular pipeline is a tree of blocks, and its denoising loop one of them, whose own blocks run once a step: something
before the denoiser, the denoiser (its predictions and their guidance), the scheduler's step, and perhaps a mask behind it.
For the time of a call the loops of the tree have a class of ours, whose turn puts one block in the place of two, the denoiser
and the scheduler's step. All others, and whatever a user has put in, are called as they stand there. Behind the call the tree
is what it was, so that copies of it, and what a user does to it between two calls, are diffusers'.
"""

import ast
import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks

from ..common.hardware import unsupported_reason
from ..common.options import Options
from ..common.own import foreign_methods, foreign_on
from ..common.rewritten import Unknown, rewritten, text
from ..common.stages import on_device, stage
from ..common.state import STATE
from ..denoise.denoiser import Denoiser
from ..denoise.loop import current, take_step
from ..denoise.step import SHOWN
from ..schedule import check_num_inference_steps
from ..transformer.call import ATTACHED, Call, entered
from .base import AcceleratedModels
from .call import dtype_of
from .inputs import check_attention

# What the packed path goes around of a guider. Names that a version of diffusers lacks are passed over.
_GUIDER = ("set_state", "prepare_inputs", "_prepare_batch", "prepare_models", "cleanup_models", "__call__", "forward")
_GUIDER += ("num_conditions", "_is_cfg_enabled")
_FORWARDS = "_qwen_fast_forwards"


class AcceleratedModularPipeline(AcceleratedModels):
    """A modular pipeline whose denoising loops take our steps, with our scheduler, transformer and VAE among its components.

    The text encoder is called as diffusers' blocks call it.
    """

    scheduler = transformer = vae = guider = None  # where the blocks of a pipeline ask for no such component

    def put_in(self, options: Options) -> None:
        """Put everything in as the options say.

        Raises:
            ValueError: an option about the text encoder, which stays diffusers' own here.
        """
        if options.text_encoder_mode != "keep":
            raise ValueError(f"`text_encoder_mode` is {options.text_encoder_mode!r}; modular pipelines have 'keep' only.")
        if options.prompt_cache not in ("memory", None):
            raise ValueError(f"`prompt_cache` is {str(options.prompt_cache)!r}; modular pipelines keep no prompts: use None.")
        super().put_in(options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', with our steps in its denoising loops."""
        if STATE not in self.__dict__:  # kept from before `disable`
            return type(self).__call__(self, *args, **kwargs)
        if kwargs.get("num_inference_steps") is not None:
            check_num_inference_steps(kwargs["num_inference_steps"])
        state, device = self.fast_state, self._execution_device
        check_attention(state.options.attention, device)
        reason = unsupported_reason(device)
        if reason is not None:
            state.fall_back(reason)
            self.remove_scheduler()  # whose step is a kernel
            self.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
            return super().__call__(*args, **kwargs)
        for install in (self.install_scheduler, functools.partial(self.install_transformer, device)):
            reason = install()
            if reason is not None:
                state.fall_back(reason)
        model = self.transformer
        if model is not None and self.scheduler is not None:
            self.require_kernels(dtype_of(model), device)
        try:
            state.device = device
            with on_device(device), self._images(), entered(Call(model, state)), _own_loops(self._blocks):
                return super().__call__(*args, **kwargs)
        finally:
            state.device = None


class _OwnLoop:
    """Put before the class of a loop for the time of a call; for a pipeline that is in no call of ours it is what it was."""

    def __call__(self, components: Any, state: Any) -> Any:
        fast = components.__dict__.get(STATE)
        if fast is None or fast.device is None:
            return super().__call__(components, state)
        for reason in _reasons(self, components.guider):
            fast.fall_back(reason)
        names = SHOWN[:1] if _foreign(self) else ()  # code that is not diffusers' may read the velocity
        model = components.transformer
        denoiser = Denoiser(components, names, proved=None if model is None else dtype_of(model))
        with stage("denoise"), denoiser.running():
            return super().__call__(components, state)

    def loop_step(self, components: Any, state: Any, **kwargs: Any) -> Any:
        denoiser = current(components)
        if denoiser is None or foreign_methods(type(self), ("loop_step",)):
            return super().loop_step(components, state, **kwargs)
        denoiser.scheduled = getattr(state, "timesteps", None)
        # A loop of the user's own runs its code between two steps.
        denoiser.dirty = denoiser.dirty or bool(foreign_methods(type(self), ("__call__",)))
        turn = types.SimpleNamespace(sub_blocks=_with_own_step(self.sub_blocks, denoiser))
        components, state = LoopSequentialPipelineBlocks.loop_step(turn, components, state, **kwargs)
        if "i" in kwargs:
            denoiser.behind(kwargs["i"], state.latents)
        return components, state


class _OwnStep:
    """The block that stands in a turn of a loop for the denoiser and the scheduler's step."""

    def __init__(self, denoiser: Denoiser, predict: ModularPipelineBlocks, update: ModularPipelineBlocks):
        self._denoiser, self._predict, self._update = denoiser, predict, update

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        if not self._takes(components, block_state, i, t):
            for block in (self._predict, self._update):
                components, block_state = _as_it_is(block, self._denoiser)(components, block_state, i=i, t=t)
        return components, block_state

    def _takes(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> bool:
        """Take the step, if it is one of ours."""
        guider = components.guider
        if _guider_reason(guider) is not None or ATTACHED not in components.transformer.__dict__:
            return False
        latents, timestep = block_state.latents, block_state.timestep
        if self._denoiser.watched and not torch.equal(timestep, t.expand(latents.shape[0]).to(latents.dtype)):
            self._denoiser.state.fall_back("a block of the loop gives the transformer another timestep than the scheduler's")
            return False
        forwards = _asking(self._predict)(self._predict, components, block_state, i, t)
        for forward in forwards:
            del forward["timestep"], forward["return_dict"]
        cond, uncond = forwards if len(forwards) == 2 else (*forwards, None)
        found = take_step(
            components, t, latents, timestep, cond, uncond, None if uncond is None else guider.guidance_scale, True
        )
        if found is None:
            return False
        block_state.latents = found.latents
        if found.noise_pred is not None:
            block_state.noise_pred = found.noise_pred
        return True


def described(pipe: AcceleratedModularPipeline) -> str:
    """For `report`: the loops, and the blocks in them that are not diffusers' own."""
    names = list(dict.fromkeys(name for loop in _loops(pipe._blocks) for name in _foreign(loop)))
    return f"denoising loops of blocks (called as they are: {', '.join(names)})" if names else "denoising loops of blocks"


def _loops(block: Any) -> Iterator[LoopSequentialPipelineBlocks]:
    if isinstance(block, LoopSequentialPipelineBlocks):
        yield block
    else:
        for one in getattr(block, "sub_blocks", {}).values():
            yield from _loops(one)


@contextlib.contextmanager
def _own_loops(blocks: Any) -> Iterator[None]:
    """Inside, the loops of a tree of blocks have our class."""
    before = [(loop, type(loop)) for loop in _loops(blocks) if not isinstance(loop, _OwnLoop)]
    try:
        for loop, cls in before:
            loop.__class__ = _own_class(cls)
        yield
    finally:
        for loop, cls in before:
            loop.__class__ = cls


@functools.lru_cache(maxsize=64)
def _own_class(cls: type) -> type:
    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_OwnLoop, cls), named)


def _with_own_step(blocks: Mapping[str, Any], denoiser: Denoiser) -> dict[str, Callable[..., Any]]:
    """The blocks of a turn, with our step in the place of the denoiser and the scheduler's step."""
    found = {name: _as_it_is(block, denoiser) for name, block in blocks.items()}
    pair = _pair(blocks)
    if pair is not None:
        first, second = pair
        found[first] = _OwnStep(denoiser, blocks[first], blocks[second])
        del found[second]
    return found


def _pair(blocks: Mapping[str, Any]) -> tuple[str, str] | None:
    """Names of a denoiser of diffusers' own and of the scheduler's step right behind it."""
    names = list(blocks)
    for first, second in zip(names, names[1:], strict=False):
        predict, update = blocks[first], blocks[second]
        if _is_own(predict) and _is_own(update) and _asking(predict) is not None and _is_update(update):
            return first, second
    return None


def _as_it_is(block: Any, denoiser: Denoiser) -> Callable[..., Any]:
    """`block`, with the transformer's forwards in it fused, as the model is by then."""

    @functools.wraps(type(block).__call__)
    def called(components: Any, block_state: Any, **kwargs: Any) -> Any:
        call = Call(components.transformer, denoiser.state)
        if not _is_own(block):
            return denoiser.outside(block, call)(components, block_state, **kwargs)
        with entered(call):
            return block(components, block_state, **kwargs)

    return called


def _is_own(block: Any) -> bool:
    """Whether calling a block runs diffusers' code."""
    return not foreign_methods(type(block), ("__call__",))


def _foreign(loop: LoopSequentialPipelineBlocks) -> list[str]:
    """What a loop runs that is not diffusers' own, by name."""
    found = foreign_methods(type(loop), ("__call__", "loop_step")) + foreign_on(loop, ("loop_step",))
    return found + [type(block).__name__ for block in loop.sub_blocks.values() if not _is_own(block)]


def _reasons(loop: LoopSequentialPipelineBlocks, guider: Any) -> list[str]:
    """Why the predictions of a loop come one after the other, and the scheduler takes its steps."""
    steps = foreign_methods(type(loop), ("loop_step",)) + foreign_on(loop, ("loop_step",))
    found = [f"{name} is not diffusers' own, and is called as it is" for name in steps]
    if _pair(loop.sub_blocks) is None:
        names = ", ".join(type(block).__name__ for block in loop.sub_blocks.values())
        return [*found, f"no denoiser of diffusers' own with its scheduler step right behind it among the blocks {names}"]
    reason = _guider_reason(guider)
    return found if reason is None else [*found, reason]


def _guider_reason(guider: Any) -> str | None:
    """Why a guider is called as it is, or None: ours is the plain formula, followed by diffusers' rescaling to the norm."""
    if type(guider) is not ClassifierFreeGuidance:
        return f"guider is a {type(guider).__name__}, not a ClassifierFreeGuidance"
    found = foreign_methods(type(guider), _GUIDER) + foreign_on(guider, _GUIDER)
    if found:
        return f"{', '.join(dict.fromkeys(found))}: not diffusers' own"
    if guider.guidance_rescale > 0:
        return f"guider with guidance_rescale={guider.guidance_rescale}"
    return "guider with use_original_formulation" if guider.use_original_formulation else None


def _asking(block: Any) -> Callable[..., list[dict[str, Any]]] | None:
    """`__call__` of a denoiser, which returns the arguments of its forwards in the place of their predictions; None for
    other blocks."""
    return _asking_by_code(inspect.unwrap(type(block).__call__))


@functools.lru_cache(maxsize=64)
def _asking_by_code(original: Any) -> Callable[..., list[dict[str, Any]]] | None:
    return rewritten(original, _ask, {}) if isinstance(original, types.FunctionType) else None


_CUT = ["pred = {0}.pred[:, :block_state.latents.size(1)]", "pred_cond = {0}.pred_cond[:, :block_state.latents.size(1)]"]
_GUIDED = [
    "guider_output = components.guider(guider_state)",
    "pred_cond_norm = torch.norm({1}pred_cond, dim=-1, keepdim=True)",
    "pred_norm = torch.norm({1}pred, dim=-1, keepdim=True)",
    "block_state.noise_pred = {1}pred * (pred_cond_norm / pred_norm)",
    "return (components, block_state)",
]


def _ask(function: ast.FunctionDef) -> None:
    """The loop over a guider's batches collects arguments, and what comes behind it is left out, if all of it is known."""
    place = next((n for n, node in enumerate(function.body) if isinstance(node, ast.For) and _is_batches(node)), None)
    if place is None:
        raise Unknown
    loop, behind = function.body[place], [text(node) for node in function.body[place + 1 :]]
    whole = [line.format("", "guider_output.") for line in _GUIDED]
    cut = [line.format("", "") for line in _GUIDED]
    cut[1:1] = [line.format("guider_output") for line in _CUT]
    if behind not in (whole, cut):
        raise Unknown
    forward = loop.body[2].value.value  # the call in `components.transformer(...)[0]`
    forward.func = ast.Name("dict", ast.Load())
    taken = ast.Expr(ast.Call(ast.Attribute(ast.Name(_FORWARDS, ast.Load()), "append", ast.Load()), [forward], []))
    loop.body[2] = taken
    function.body[place + 1 :] = ast.parse(f"def _():\n    return {_FORWARDS}").body[0].body
    function.body.insert(place, ast.parse(f"{_FORWARDS} = []").body[0])


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


def _is_update(block: Any) -> bool:
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
