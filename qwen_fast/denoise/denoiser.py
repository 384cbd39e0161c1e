"""One denoising step: the predictions, guidance, and the Euler update.

diffusers' own loop asks for it, see loop.py, so that whatever a pipeline or a callback does between two steps happens as in
stock. At each step the loop hands over what it would have called the transformer with; what differs from the step before is
followed.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ..common.state import STATE, logger
from ..transformer.adapters import TOGETHER, FromEach, SampleAdapters, adapters_of, refuse
from ..transformer.call import ATTACHED, Call, PromptBatch, entered, lora_scale
from ..transformer.compiled import compiler_of, without_compiler
from ..transformer.layout import check_image_shapes
from ..transformer.modulation import FromScheduledTable, FromTable
from ..transformer.modulation_weights import table_reason
from . import apart, graph
from .control import Control
from .inputs import Held, Inputs
from .packing import packed_predictions, packed_prompts, takes_rows
from .step import RESIDUALS, SHOWN, Found, Step, by_picture, drew, guided, row_of, sampler_step, scheduling
from .watch import FiniteCheck, Pace

CURRENT: ContextVar["Denoiser | None"] = ContextVar("qwen_fast_denoiser", default=None)


class Denoiser:
    """Takes the steps of one call of a pipeline.

    Where the model is stock's own throughout, or has what is known to compute by rows, the predictions of a step are packed
    into one forward. Where something of the user's has to be called, each prediction is asked of the transformer as stock
    asks, one after the other, and what can be fused inside still is.

    Args:
        pipe: whose transformer, where it is not attached, is called as it is.
        names: variables of stock's loop that a callback asks for.
        proved: dtype whose kernels have proved themselves.
    Attributes:
        call: what the transformer is told.
        source: modulations of our own forwards, see `_find_source`.
        packs: the prompts of a step, of one forward or of one each; None: forwards as stock asks for them.
        places: `[2]` int32 on the device, which sigma and which row of the timesteps come next.
        timesteps: `[T]` of the schedule, in the model's dtype and over 1000.
        guidance: `[1]`, the scale on the device, so that a graph can read another one; None without.
        apart: each picture is computed by itself (`batch_invariant`).
        shapes: of the pictures of each sample.
        loaded: graphs that had inputs of this call.
        adapters: of each sample, where the call names them.
    """

    def __init__(self, pipe: Any, names: Iterable[str] = (), *, known_loop: bool = True, proved: torch.dtype | None = None):
        self.pipe, self.state, self.model = pipe, pipe.fast_state, without_compiler(pipe.transformer)
        self.call = Call(self.model, self.state)
        self.control = Control(RESIDUALS in names)
        self.watched, self.known_loop, self.proved = not set(SHOWN).isdisjoint(names), known_loop, proved
        self.scheduled: torch.Tensor | None = None
        self.source: FromTable | FromEach | None = None
        self.packs: list[PromptBatch] | None = None
        self.graph: graph.StepGraph | apart.InTurn | None = None
        self.guidance: torch.Tensor | None = None
        self.own_step: str | None = None
        self.index, self.row = 0, None
        self.lora_scale, self.apart = 1.0, False
        self.loaded: weakref.WeakSet[graph.StepGraph] = weakref.WeakSet()
        self.adapters: SampleAdapters | None = None
        self.dirty = True  # code of the user's has run
        self.step_before: Step | None = None
        self.inputs: Inputs | None = None
        self._context = contextlib.ExitStack()
        self._schedule: Held | None = None
        self._held: tuple[int, int | None] | None = None
        self._check: FiniteCheck | None = None
        self._pace: Pace | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, steps can be taken, and forwards of the transformer are fused."""
        if not self.known_loop:
            self.state.not_invariant("the pipeline's loop is not known, and calls the transformer with the whole batch")
            self.look()
            if self.wants_table:
                self.call.source = FromScheduledTable(self.model, self.model.__dict__[ATTACHED].tables, self.pipe)
        token = CURRENT.set(self)
        try:
            with self._context, entered(self.call):
                yield
            if isinstance(self.call.source, FromScheduledTable):
                self.call.source.check()
            if self._check is not None:
                self.state.nan_note = self._check.told()
        finally:
            CURRENT.reset(token)
            self._leave_graph()

    def outside(self, callback: Callable[..., Any], call: Call | None = None) -> Callable[..., Any]:
        """`callback_on_step_end`, or a block, outside the call, since it may run anything; then all is looked at again.

        Args:
            call: of the transformer's forwards inside; None: they are stock's.
        """

        def called(pipe, *args, **kwargs):
            scheduler = pipe.scheduler
            before, device = scheduling(scheduler), self.state.device
            own = {name: pipe.__dict__[name] for name in ("_attention_kwargs",) if name in pipe.__dict__}
            token = CURRENT.set(None)
            self.state.device = None  # it may move the pipeline
            self._leave_scale()  # it may read, set, fuse or save the layers
            try:
                with entered(call):
                    result = callback(pipe, *args, **kwargs)
            finally:
                CURRENT.reset(token)
                self.state.device = device
            if pipe.scheduler is scheduler and drew(scheduler, before):
                vars(scheduler).update(before)
                pipe.__dict__.update(own)  # the loop reads it at each step
            self.dirty = True
            if not self.known_loop and pipe.__dict__.get(STATE) is self.state:
                self.look()
            return result

        return called

    # What there is -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read what of the model is stock's own: before the first step, and after code of the user's has run."""
        if not self.attached:
            return
        self.call.compiler = compiler_of(self.pipe.transformer)
        before, self.call.survey = self.call.survey, self.model.look()
        found = self.call.survey
        if found is before:
            return
        for reason in found.foreign:
            self.state.fall_back(reason)
        # Only a hook can forbid one.
        self.state.no_table = found.modulation or (table_reason(self.model) if found.touched else None)
        self._schedule = None

    @property
    def attached(self) -> bool:
        """Whether the transformer is ours."""
        return ATTACHED in self.model.__dict__

    @property
    def wants_table(self) -> bool:
        """Whether the modulations of the whole schedule are computed at once."""
        return self.attached and self.state.options.modulation != "layers" and self.state.no_table is None

    def _follow(self, step: Step) -> bool:
        """Take over what the loop hands over now; False: stock's own statements have to take this step."""
        if STATE not in self.pipe.__dict__ or torch.is_grad_enabled():  # a callback disabled it, or asks for gradients
            self.call.model = None  # whose forwards are stock's
            self.dirty = True
            return False
        if without_compiler(self.pipe.transformer) is not self.model or self.pipe.fast_state is not self.state:
            self._begin_anew()  # a callback put another in, or enabled the pipeline anew
        self.call.model = self.model
        dtype = step.latents.dtype
        if self.step_before is None:
            self._pace = Pace(step.latents.device)
            if self.state.options.check_nan and self.scheduled is not None:
                self._check = FiniteCheck(step.latents, self.scheduled)
        elif self.state.options.precise_sampler and self.own_step is None:
            dtype = self.dtype
        if self.step_before is None or dtype != self.dtype:
            self.dtype, self.device, self._schedule = dtype, step.latents.device, None
            if dtype != self.proved:
                self.pipe.require_kernels(dtype, self.device)
        if self.dirty:
            self.look()
            if step.control is not None:
                self.control.look(self)
            self.own_step = self.pipe.steps_itself()
            if self.own_step is not None and self.step_before is not None:
                self.state.fall_back("a callback changed the scheduler, which takes the steps from there on")
        self._find_place(step)
        inputs = Inputs.of(self, step)
        changed = self.inputs is None or not inputs.same(self.inputs)
        self.step_before, self.inputs, self.dirty = step, inputs, self.own_step is not None
        if changed:
            self.control.forget()
            self._take_over(step)
        elif self.packs is not None:
            self._apply_lora_scale()
        return True

    def _begin_anew(self) -> None:
        self._leave_graph()
        self._leave_scale()
        self.state = self.call.state = self.pipe.fast_state
        for install in (self.pipe.install_scheduler, self.pipe.install_transformer):
            reason = install()
            if reason is not None:
                self.state.fall_back(reason)
        self.model, self.dirty = without_compiler(self.pipe.transformer), True
        self.packs, self.call.survey = None, None
        self.inputs = self._schedule = None

    def _take_over(self, step: Step) -> None:
        self._leave_graph("a callback changed the model, its LoRA scale or the prompt")
        self.batch = step.latents.shape[0]
        self.guidance = None
        if step.true_cfg_scale is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            self.guidance = torch.full((1,), float(step.true_cfg_scale), dtype=dtype, device=self.device)
        self.adapters = adapters_of(self.model, self.call.survey, self.attention_kwargs, self.batch)
        if self.adapters is not None and self.state.options.batch_invariant:
            refuse(TOGETHER)
        self._find_source(step)
        rows, self.packs = takes_rows(self, step), None
        self.apart = apart.keeps_apart(self, step, rows)
        if rows:
            self.shapes = check_image_shapes(step.shapes, self.batch)
            self.packs = packed_prompts(self, step)
            self._apply_lora_scale()  # before a graph bakes it in
        else:
            self._leave_scale()  # stock's forward scales LoRA layers itself
        reason = "the scheduler takes the steps itself" if self.own_step is not None else None
        reason = reason or ("a callback or a block gets the predictions" if self.watched else graph.reason_against(self, step))
        self.state.graph = reason
        if reason is None:
            self.graph = apart.InTurn(self, step) if len(self.packs) > 1 else graph.take(self, step, self.packs[0])

    def _find_place(self, step: Step) -> None:
        """Which sigma and which timestep of the scheduler's come next."""
        scheduler, scheduled = self.pipe.scheduler, getattr(self.pipe.scheduler, "timesteps", None)
        scheduled = scheduled if isinstance(scheduled, torch.Tensor) else None
        if self._schedule is None or not self._schedule.same(scheduled, self.dirty):
            self._schedule = Held.of(scheduled)
            self.timesteps = None if scheduled is None else scheduled.to(self.device, self.dtype) / 1000
            self.places = torch.zeros(2, dtype=torch.int32, device=self.device)
            self._held = self.inputs = None
        self.row = None if scheduled is None else row_of(step.t, scheduled)
        self.index = 0
        if self.own_step is None:
            if scheduler.step_index is None:
                scheduler._init_step_index(step.t)
            self.index = scheduler.step_index

    def _put_place(self) -> None:
        """On the device, where it is not what the step before has left there."""
        if self._held != (self.index, self.row):
            for n, place in enumerate((self.index, self.row)):
                self.places[n : n + 1].fill_(place or 0)

    def _find_source(self, step: Step) -> None:
        """Where our forwards have their modulations: from one table of the schedule wherever there can be one.

        Forwards of others, such as of a sampler that takes a step between two, compute them from their own timestep.
        """
        self.source, condition = None, step.shared("additional_t_cond")
        if condition is not None:
            values = set(condition.tolist())  # the host waits, once a call
            condition = condition[:1] if len(values) == 1 else None
            if condition is None:
                return
        if self.wants_table and self.row is not None:
            tables = self.model.__dict__[ATTACHED].tables
            arguments = self.model, tables, self.timesteps, self.places[1:], condition
            self.source = FromTable(*arguments) if self.adapters is None else self.adapters.source(*arguments)

    # One step ----------------------------------------------------------------------------------------------------------

    def step(self, step: Step) -> Found | None:
        """The step, or None where stock's own statements have to take it."""
        latents = step.latents
        if not self._follow(step) or (self.own_step is None and self.index + 1 >= len(self.pipe.scheduler.sigmas)):
            self._leave_graph()
            self._leave_scale()
            self.state.not_invariant("stock's own statements take a step")
            if self.adapters is not None:
                refuse("a step that stock has to take, behind a callback")
            return None  # a step beyond the last sigma fails there
        scheduler, index, row = self.pipe.scheduler, self.index, self.row
        if self.graph is not None:
            latents = self.graph.run(index, row, latents)
            scheduler._step_index += 1
            return Found(latents)
        self._put_place()
        precise = self.state.options.precise_sampler and self.own_step is None
        latents = latents.float() if precise else latents
        if step.control is not None:
            step = self.control.added(self, step)
        predictions = self.predict(step)
        shown = {}
        if self.watched or not step.normalize:
            shown = by_picture(self.apart, lambda *own: guided(own, step), *predictions)
        if self.own_step is not None or (predictions[0].dtype != latents.dtype and not precise):
            if self.own_step is None:  # as by autocast
                self.state.fall_back(f"predictions in {predictions[0].dtype} for latents in {latents.dtype}")
            self._leave_scale()
            shown = shown or guided(predictions, step)
            latents = scheduler.step(shown["noise_pred"], step.t, latents, return_dict=False)[0]
        else:
            if not step.normalize:
                predictions = (shown["noise_pred"],)
            guidance = self.guidance if len(predictions) == 2 else None
            place = scheduler.sigmas, self.places[:1], guidance
            latents = by_picture(
                self.apart, lambda latents, *own: sampler_step(self.state, latents, own, *place), latents, *predictions
            )
            scheduler._step_index += 1
        self.places.add_(1)  # in stream order, so no program of this step can see the next index
        self._held = index + 1, None if row is None else row + 1
        return Found(latents, shown.get("noise_pred"), tuple(shown.get(name) for name in SHOWN[1:]), step.shared(RESIDUALS))

    def predictions(self, step: Step) -> tuple[torch.Tensor, ...] | None:
        """Those of a step whose guidance and update its loop takes itself, or None where it has to ask for them itself too."""
        follows = self._follow(step)
        self._leave_graph("the guidance is not ours")
        if not follows:
            self._leave_scale()
            return None
        self._put_place()
        return self.predict(step)

    def behind(self, i: int, latents: torch.Tensor) -> None:
        """The end of turn `i` of the loop."""
        if self._check is not None:
            self._check.look(i, latents)
        if self._pace is not None:
            self._pace.step()

    def predict(self, step: Step) -> tuple[torch.Tensor, ...]:
        """The prediction for the prompt, and with guidance the one for the negative prompt, each `[B, S_img, C]`."""
        hidden, timestep = self.given(step)
        others, self.call.source = self.call.source, self.source
        if self.packs is None and self.attached and self.call.survey.model is not None:
            self.call.source = None  # what is around the forward may give it another timestep
        try:
            if self.packs is None:
                with entered(self.call):
                    return tuple(self._as_stock(step, hidden, timestep / 1000, n) for n in range(len(step.forwards)))
            timestep = self.timesteps.index_select(0, self.places[1:]) if self.row is not None else timestep[:1] / 1000
            try:
                return packed_predictions(self, step, hidden, timestep)
            except torch.OutOfMemoryError:
                if self.packs[0].copies == 1:
                    raise
                self.state.not_invariant("memory was too short for one forward of both predictions")
                logger.warning("memory was too short for one forward of both predictions: they come one after the other.")
                self.state.calls["packed transformer out of memory"] += 1
                self.packs = packed_prompts(self, step, together=False)
            torch.cuda.empty_cache()
            return packed_predictions(self, step, hidden, timestep)
        finally:
            self.call.source = others

    def given(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and timestep `[B]` of a step, in the model's dtype."""
        hidden, timestep = step.shared("hidden_states"), step.timestep
        if self.state.options.precise_sampler and hidden.dtype != self.dtype:
            return hidden.to(self.dtype), step.t.expand(len(hidden)).to(self.dtype)
        return hidden, timestep

    def _as_stock(self, step: Step, hidden: torch.Tensor, timestep: torch.Tensor, n: int) -> torch.Tensor:
        model = self.model if self.attached else self.pipe.transformer
        with model.cache_context(("cond", "uncond")[n]):
            arguments = step.forwards[n] | {"hidden_states": hidden, "timestep": timestep, "img_shapes": step.shapes}
            return model(**arguments, return_dict=False)[0][:, : step.latents.shape[1]]

    def _leave_graph(self, why: str | None = None) -> None:
        if self.graph is not None:
            self.graph.release()
            self.graph, self._held = None, None
            if why is not None:
                self.state.graph = why

    def _apply_lora_scale(self) -> None:
        """`attention_kwargs={"scale": ...}`: on the layers while steps are taken, and not while code of the user's runs. Beside
        adapters of each sample it is theirs (`SampleAdapters`), on or not."""
        scale = 1.0 if self.adapters is not None else (self.attention_kwargs or {}).get("scale", 1.0)
        if scale != self.lora_scale:
            self._leave_scale()
            self._context.enter_context(lora_scale(self.model, {"scale": scale}))
            self.lora_scale = scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Of the call, as the last step has them."""
        return self.step_before.shared("attention_kwargs")

    def _leave_scale(self) -> None:
        self._context.close()
        self.lora_scale = 1.0
