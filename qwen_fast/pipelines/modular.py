"""Modular pipelines: diffusers' own blocks, with the steps of their denoising loops taken by ours.

A modular pipeline is a tree of blocks, and its denoising loop one of them, whose own blocks run once a step: something
before the denoiser, the denoiser (its predictions and their guidance), the scheduler's step, and perhaps a mask behind it.
For the time of a call the loops of the tree have a class of ours, whose turn puts one block in the place of two, the denoiser
and the scheduler's step. All others, and whatever a user has put in, are called as they stand there. Behind the call the tree
is what it was, so that copies of it, and what a user does to it between two calls, are diffusers'.
"""

import contextlib
import functools
import itertools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks

from ..common.hardware import unsupported_reason
from ..common.options import Options
from ..common.own import foreign_methods, foreign_on
from ..common.stages import on_device, stage
from ..common.state import STATE
from ..denoise.denoiser import Denoiser
from ..denoise.loop import current
from ..denoise.step import SHOWN, Step
from ..schedule import check_num_inference_steps
from ..transformer.adapters import SampleAdapters, refuse
from ..transformer.call import ATTACHED, Call, entered
from . import guiders
from .base import AcceleratedModels
from .denoiser_blocks import code_of, is_own, is_update
from .guiders import alone_reason, is_plain
from .inputs import check_attention, dtype_of


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
            if SampleAdapters.of(kwargs.get("attention_kwargs")) is not None:
                refuse(reason)
            state.fall_back(reason)
            self.remove_scheduler()  # whose step is a kernel
            self.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
            return super().__call__(*args, **kwargs)
        for install in (self.install_scheduler, functools.partial(self.install_transformer, device)):
            reason = install()
            if reason is not None:
                state.fall_back(reason)
        state.not_invariant("the blocks of a modular pipeline encode and guide all pictures of a call together")
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
    """Put before the class of a loop for the time of a call; for a pipeline that is not enabled it is what it was."""

    def __call__(self, components: Any, state: Any) -> Any:
        fast = components.__dict__.get(STATE)
        if fast is None:
            return super().__call__(components, state)
        reasons = _reasons(self, components.guider)
        for reason in reasons:
            fast.fall_back(reason)
        names = SHOWN[:1] if reasons or _foreign(self) else ()  # code that is not ours may read the velocity
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
    """The block that stands in a turn of a loop for the denoiser, and for the scheduler's step where that is right behind it.

    A plain guider's step is ours throughout. Of another guider of diffusers, or where the scheduler's step stands elsewhere,
    the predictions are ours, in one forward, and what stock does with them is stock's. One that changes the model between two
    predictions, or that is not diffusers', asks for each of them alone.
    """

    def __init__(self, denoiser: Denoiser, predict: ModularPipelineBlocks, update: ModularPipelineBlocks | None):
        self._denoiser, self._predict, self._update = denoiser, predict, update

    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        rest = (self._predict, self._update)
        ours = self._is_ours(components)
        if not ours and SampleAdapters.of(getattr(block_state, "attention_kwargs", None)) is not None:
            refuse("the transformer is not qwen_fast's")
        if ours and alone_reason(components.guider) is None and self._is_at(t, block_state):
            rest = self._taken(components, block_state, i, t)
        for block in rest:
            if block is not None:
                components, block_state = _as_it_is(block, self._denoiser)(components, block_state, i=i, t=t)
        return components, block_state

    def _is_ours(self, components: Any) -> bool:
        """Whether the transformer, or the one that a block has put in, is ours."""
        if components.transformer is not self._denoiser.model:
            reason = components.install_transformer()
            if reason is not None:
                self._denoiser.state.fall_back(reason)
        return ATTACHED in getattr(components.transformer, "__dict__", {})

    def _is_at(self, t: torch.Tensor, block_state: Any) -> bool:
        """Whether the transformer is asked at the scheduler's timestep. Only code of a user's can have changed that."""
        expected = t.expand(block_state.latents.shape[0]).to(block_state.latents.dtype)
        if not self._denoiser.watched or torch.equal(block_state.timestep, expected):
            return True
        self._denoiser.state.fall_back("a block of the loop gives the transformer another timestep than the scheduler's")
        return False

    def _taken(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[ModularPipelineBlocks | None, ...]:
        """Do as much of the step as is ours; returns the blocks that are still to be called."""
        guider, code, denoiser = components.guider, code_of(self._predict), self._denoiser
        asked = code.run(self._predict, components, block_state, i, t)
        forwards = tuple(next(asked))
        for forward in forwards:
            del forward["timestep"], forward["return_dict"]
        if any(forward.get("img_shapes") is None for forward in forwards):
            pass  # the transformer's forward was replaced by one that names no such argument, and gets none
        elif self._update is not None and code.rescales and is_plain(guider):
            scale = guider.guidance_scale if len(forwards) == 2 else None
            found = denoiser.step(Step(t, block_state.latents, block_state.timestep, forwards, scale, True))
            if found is not None:
                block_state.latents = found.latents
                if found.noise_pred is not None:
                    block_state.noise_pred = found.noise_pred
                return ()
        elif len(forwards) <= 2:
            # The guider gets the rows of references too: its norms and deviations are over all of them.
            step = Step(t, forwards[0]["hidden_states"], block_state.timestep, forwards, None, True)
            predictions = denoiser.predictions(step)
            if predictions is not None:
                with contextlib.suppress(StopIteration):
                    asked.send(predictions)
                return (self._update,)
        asked.close()
        return self._predict, self._update


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
    """The blocks of a turn, with our step in the place of the denoiser, and of the scheduler's step right behind it."""
    found = {name: _as_it_is(block, denoiser) for name, block in blocks.items()}
    first, second = _places(blocks)
    if first is not None:
        found[first] = _OwnStep(denoiser, blocks[first], None if second is None else blocks[second])
        found.pop(second, None)
    return found


def _places(blocks: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Names of the denoiser of diffusers' own, and of the scheduler's step if that is right behind it."""
    own = {name: is_own(block) for name, block in blocks.items()}
    for first, second in itertools.zip_longest(blocks, list(blocks)[1:]):
        if own[first] and code_of(blocks[first]) is not None:
            return first, second if second is not None and own[second] and is_update(blocks[second]) else None
    return None, None


def _as_it_is(block: Any, denoiser: Denoiser) -> Callable[..., Any]:
    """`block`, with the transformer's forwards in it fused, as the model is by then."""

    def called(components: Any, block_state: Any, **kwargs: Any) -> Any:
        call = Call(components.transformer, denoiser.state)
        if not is_own(block):
            return denoiser.outside(block, call)(components, block_state, **kwargs)
        with entered(call):
            return block(components, block_state, **kwargs)

    return called


def _foreign(loop: LoopSequentialPipelineBlocks) -> list[str]:
    """What a loop runs that is not diffusers' own, by name."""
    found = foreign_methods(type(loop), ("__call__", "loop_step")) + foreign_on(loop, ("loop_step",))
    return found + [type(block).__name__ for block in loop.sub_blocks.values() if not is_own(block)]


def _reasons(loop: LoopSequentialPipelineBlocks, guider: Any) -> list[str]:
    """What of the steps of a loop is stock's, and why."""
    found = foreign_methods(type(loop), ("loop_step",)) + foreign_on(loop, ("loop_step",))
    found = [f"{name} is not diffusers' own, and is called as it is" for name in found]
    first, second = _places(loop.sub_blocks)
    names = ", ".join(type(block).__name__ for block in loop.sub_blocks.values())
    if first is None:
        return [*found, f"no denoiser of diffusers' own among the blocks {names}"]
    if second is None or not code_of(loop.sub_blocks[first]).rescales:
        found.append(f"no scheduler step of diffusers' own right behind the denoiser among the blocks {names}")
    if not is_plain(guider):
        found.append(alone_reason(guider) or f"{guiders.described(guider)} guides with torch's operators")
    return found
