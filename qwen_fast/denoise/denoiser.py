"""One denoising step: the predictions, guidance, and the Euler update.

diffusers' own loop asks for it, see pipelines/stock_call.py, so that whatever a pipeline or a callback does between two steps
happens as in stock. At each step the loop hands over what it would have called the transformer with; what differs from the
step before is followed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from ..common.stages import steps
from ..common.state import STATE, logger
from ..transformer.call import ATTACHED, Call, PromptBatch, entered, lora_scale
from ..transformer.layout import check_image_shapes
from ..transformer.modulation import FromScheduledTable, FromTable
from ..transformer.modulation_weights import table_reason
from . import graph
from .packing import packed_prompts
from .step import (
    SHOWN,
    Found,
    Step,
    drew,
    guided,
    row_of,
    same_inputs,
    sampler_step,
    scheduling,
    version_of,
    without_references,
)
from .watch import FiniteCheck, Pace

_CURRENT: ContextVar["Denoiser | None"] = ContextVar("qwen_fast_denoiser", default=None)


def take_step(
    pipe: Any,
    t: torch.Tensor,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    cond: dict[str, Any],
    uncond: dict[str, Any] | None,
    true_cfg_scale: float | None,
    normalize: bool,
) -> Found | None:
    """A step of the call of `pipe` that is under way, see `Step`; None: stock's loop takes it."""
    denoiser = _CURRENT.get()
    if denoiser is None or denoiser.pipe is not pipe:
        return None
    forwards = (cond,) if uncond is None else (cond, uncond)
    return denoiser.step(Step(t, latents, timestep, forwards, true_cfg_scale, normalize))


def behind_step(pipe: Any, i: int, latents: torch.Tensor) -> None:
    """Where stock's loop ends its turn `i`, behind callbacks."""
    denoiser = _CURRENT.get()
    if denoiser is not None and denoiser.pipe is pipe:
        denoiser.behind(i, latents)


def around_steps(timesteps: torch.Tensor) -> Iterator[torch.Tensor]:
    """The timesteps that stock's loop goes through."""
    denoiser = _CURRENT.get()
    if denoiser is not None:
        denoiser.scheduled = timesteps
    return steps(timesteps)


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
        packs: the prompts of a step, of one forward or of one each; None: forwards as stock asks for them.
        places: `[2]` int32 on the device, which sigma and which row of the timesteps come next.
        timesteps: `[T]` of the schedule, in the model's dtype and over 1000.
        guidance: `[1]`, the scale on the device, so that a graph can read another one; None without.
        shapes: of the pictures of each sample.
        references: rows of each sample behind the latents'.
        loads: how often a graph was loaded.
    """

    def __init__(self, pipe: Any, names: Iterable[str] = (), proved: torch.dtype | None = None):
        self.pipe, self.state, self.model = pipe, pipe.fast_state, pipe.transformer
        self._gets_more = not {"latents"}.issuperset(names)
        self.call = Call(self.model, self.state)
        self.watched = not set(SHOWN).isdisjoint(names)
        self.scheduled: torch.Tensor | None = None
        self.proved = proved
        self.packs: list[PromptBatch] | None = None
        self.graph: graph.StepGraph | None = None
        self.guidance: torch.Tensor | None = None
        self.lora_scale, self.references, self.loads = 1.0, 0, 0
        self._context = contextlib.ExitStack()
        self._step: Step | None = None
        self._seen: tuple | None = None
        self._dirty = True  # code of the user's has run
        self._table: tuple | None = None
        self._own_step: str | None = None
        self._held: tuple[int, int | None] | None = None
        self._check: FiniteCheck | None = None
        self._pace: Pace | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, steps can be taken, and forwards of the transformer are fused."""
        self.look()
        token = _CURRENT.set(self)
        try:
            with self._context, entered(self.call):
                yield
            if isinstance(self.call.source, FromScheduledTable):
                self.call.source.check()
            if self._check is not None:
                self.state.nan_note = self._check.told()
        finally:
            _CURRENT.reset(token)
            self._leave_graph()

    def outside(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        """`callback_on_step_end` outside the call, since it may run anything; then everything is looked at again."""

        def called(pipe, *args, **kwargs):
            scheduler = pipe.scheduler
            before = scheduling(scheduler)
            token = _CURRENT.set(None)
            self.state.device = None  # it may move the pipeline
            try:
                with entered(None):
                    result = callback(pipe, *args, **kwargs)
            finally:
                _CURRENT.reset(token)
            if pipe.scheduler is scheduler and drew(scheduler, before):
                vars(scheduler).update(before)
            self._dirty = True
            if pipe.__dict__.get(STATE) is self.state and self.pipe.transformer is self.model:
                self.look()
            return result

        return called

    # What there is -----------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Read what of the model is stock's own: before the call, and after code of the user's has run."""
        if not self._attached:
            return
        call, before = self.call, self.call.survey
        call.survey = found = self.model.look()
        if found is before:
            return
        for reason in found.foreign:
            self.state.fall_back(reason)
        # Only a hook can forbid one.
        self.state.no_table = found.modulation or (table_reason(self.model) if found.touched else None)
        self._table, call.source = None, None
        if self.wants_table:  # of forwards that stock's loop asks for itself
            call.source = FromScheduledTable(self.model, self.model.__dict__[ATTACHED].tables, self.pipe)

    @property
    def _attached(self) -> bool:
        return ATTACHED in self.model.__dict__

    @property
    def wants_table(self) -> bool:
        """Whether the modulations of the whole schedule are computed at once."""
        return self._attached and self.state.options.modulation != "layers" and self.state.no_table is None

    def _follow(self, step: Step) -> bool:
        """Take over what the loop hands over now; False: stock's own statements have to take this step."""
        if self.pipe.__dict__.get(STATE) is not self.state:
            return False  # a callback disabled it
        if self.pipe.transformer is not self.model:  # a callback put another in
            self._leave_graph()
            self._context.close()
            reason = self.pipe.install_transformer()
            if reason is not None:
                self.state.fall_back(reason)
            self.model, self.lora_scale, self.packs = self.pipe.transformer, 1.0, None
            self.call.model, self.call.survey, self._dirty = self.model, None, True
            self.look()
        if self._step is None:
            self.dtype, self.device = step.latents.dtype, step.latents.device
            self._pace = Pace(self.device)
            if self.dtype != self.proved:
                self.pipe.require_kernels(self.dtype, self.device)
            if self.state.options.check_nan and self.scheduled is not None:
                self._check = FiniteCheck(step.latents, self.scheduled)
        if self._dirty:
            self._own_step = self.pipe.steps_itself()
            if self._own_step is not None and self._step is not None:
                self.state.fall_back("a callback changed the scheduler, which takes the steps from there on")
        self._schedule(step)
        seen = self._inputs(step)
        changed = self._seen is None or not same_inputs(seen, self._seen)
        self._step, self._seen, self._dirty = step, seen, False
        if changed:
            self._take_over(step)
        return True

    def _inputs(self, step: Step) -> tuple:
        """What a pack depends on: tensors with their versions, of which those of no version count as new behind a callback."""
        held = [tensor for prompt in step.prompts for tensor in prompt] + [step.shared("guidance")]
        held.append(step.shared("additional_t_cond"))
        if self._dirty:  # a callback may have written into them
            self._weights = [*self.model.txt_in.parameters(), *self.model.txt_norm.parameters()] if self._attached else []
        scale = (self.pipe.attention_kwargs or {}).get("scale", 1.0)
        others = frozenset(self.pipe.attention_kwargs or ()) - {"scale"}
        shapes, hidden = step.shared("img_shapes"), step.shared("hidden_states")
        plain = (self.call.survey, scale, others, step.true_cfg_scale, step.normalize, self._own_step is None)
        plain += (shapes, tuple(hidden.shape), tuple(step.latents.shape), step.is_shared)
        plain += (step.shared("controlnet_block_samples") is None, self._row is None)
        return held, [version_of(one, self._dirty and self._gets_more) for one in (*held, *self._weights)], plain

    def _take_over(self, step: Step) -> None:
        self._leave_graph("a callback changed the model, its LoRA scale or the prompt")
        latents, hidden = step.latents, step.shared("hidden_states")
        self.batch, self.references = latents.shape[0], hidden.shape[1] - latents.shape[1]
        self.guidance = None
        if step.true_cfg_scale is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            self.guidance = torch.full((1,), float(step.true_cfg_scale), dtype=dtype, device=self.device)
        self._source(step)
        if self._takes_rows(step):
            self.shapes = check_image_shapes(step.shared("img_shapes"), self.batch)
            self.packs = packed_prompts(self, step)
            self._apply_lora_scale()  # before a graph bakes it in
        else:
            self.packs = None
            self._context.close()  # stock's forward scales LoRA layers itself
            self.lora_scale = 1.0
        reason = "the scheduler takes the steps itself" if self._own_step is not None else None
        reason = reason or ("a callback gets the predictions" if self.watched else graph.reason_against(self, step))
        self.state.graph = reason
        if reason is None:
            self.graph = graph.take(self, step)

    def _schedule(self, step: Step) -> None:
        """Which sigma and which timestep of the scheduler's come next."""
        scheduler, t = self.pipe.scheduler, step.t
        scheduled = getattr(scheduler, "timesteps", None)
        table = (scheduled, version_of(scheduled, False)) if isinstance(scheduled, torch.Tensor) else None
        if table is None or self._table is None or not (table[0] is self._table[0] and table[1] == self._table[1]):
            self._table, self.call.source = table, None
            self.timesteps = None if table is None else scheduled.to(self.device, self.dtype) / 1000
            self.places = torch.zeros(2, dtype=torch.int32, device=self.device)
            self._held = self._seen = None
        self._row = None if table is None else row_of(t, scheduled)
        self._index = 0
        if self._own_step is None:
            if scheduler.step_index is None:
                scheduler._init_step_index(t)
            self._index = scheduler.step_index
        if self._held != (self._index, self._row):
            if self._held is None or self._held[0] != self._index:
                self.places[:1].fill_(self._index)
            if self._held is None or self._held[1] != self._row:
                self.places[1:].fill_(self._row or 0)
            self._held = self._index, self._row

    def _source(self, step: Step) -> None:
        """Where modulations come from: one table of the schedule's timesteps wherever there can be one."""
        call, condition = self.call, step.shared("additional_t_cond")
        call.source = None
        if condition is not None:
            values = set(condition.tolist())  # the host waits, once a call
            condition = condition[:1] if len(values) == 1 else None
            if condition is None:
                return
        if self.wants_table and self._row is not None:
            tables = self.model.__dict__[ATTACHED].tables
            call.source = FromTable(self.model, tables, self.timesteps, self.places[1:], condition)

    def _takes_rows(self, step: Step) -> bool:
        """Whether both predictions of a step can share a forward."""
        found, others = self.call.survey, set(self.pipe.attention_kwargs or ()) - {"scale"}
        if not self._attached or not found.rows or found.whole is not None or others or step.shared("guidance") is not None:
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self.device.type) or not step.is_shared:
            return False
        if any(embeds is None or self.batch % embeds.shape[0] for embeds, _ in step.prompts):
            return False
        return not getattr(self.model, "is_cache_enabled", False) and getattr(self.model, "_parallel_config", None) is None

    # One step ----------------------------------------------------------------------------------------------------------

    def step(self, step: Step) -> Found | None:
        """The step, or None where stock's own statements have to take it."""
        if not self._follow(step):
            self._leave_graph()
            return None
        scheduler, latents = self.pipe.scheduler, step.latents
        if self._own_step is None and self._index + 1 >= len(scheduler.sigmas):
            self._leave_graph()
            return None  # and fails there
        if self.graph is not None:
            latents = self.graph.run(self._index, self._row, latents)
            scheduler._step_index += 1
            return Found(latents)
        precise = self.state.options.precise_sampler and self._own_step is None
        if precise:
            latents = latents.float()
        predictions = self.predict(step)
        shown = guided(predictions, step) if self.watched or not step.normalize else {}
        if self._own_step is not None or (predictions[0].dtype != latents.dtype and not precise):
            if self._own_step is None:  # as by autocast
                self.state.fall_back(f"predictions in {predictions[0].dtype} for latents in {latents.dtype}")
            shown = shown or guided(predictions, step)
            latents = scheduler.step(shown["noise_pred"], step.t, latents, return_dict=False)[0]
        else:
            if not step.normalize:
                predictions = (shown["noise_pred"],)
            guidance = self.guidance if len(predictions) == 2 else None
            latents = sampler_step(self.state, latents, predictions, scheduler.sigmas, self.places[:1], guidance)
            scheduler._step_index += 1
        self.places.add_(1)  # in stream order, so no program of this step can see the next index
        self._held = self._index + 1, None if self._row is None else self._row + 1
        return Found(latents, shown.get("noise_pred"), tuple(shown.get(name) for name in SHOWN[1:]))

    def behind(self, i: int, latents: torch.Tensor) -> None:
        """The end of turn `i` of the loop."""
        if self._check is not None:
            self._check.look(i, latents)
        if self._pace is not None:
            self._pace.step()

    def predict(self, step: Step) -> tuple[torch.Tensor, ...]:
        """The prediction for the prompt, and with guidance the one for the negative prompt, each `[B, S_img, C]`."""
        hidden = step.shared("hidden_states").to(self.dtype)
        if self.packs is None:
            with entered(self.call):
                return tuple(self._as_stock(step, hidden, n) for n in range(len(step.forwards)))
        timestep = (
            self.timesteps.index_select(0, self.places[1:]) if self._row is not None else step.model_timestep(self.dtype)[:1]
        )
        try:
            return self._packed(step, hidden, timestep)
        except torch.OutOfMemoryError:
            if len(self.packs) == len(step.forwards):
                raise
            logger.warning("memory was too short for one forward of both predictions: they come one after the other.")
            self.state.calls["packed transformer out of memory"] += 1
            self.packs = packed_prompts(self, step, together=False)
        torch.cuda.empty_cache()
        return self._packed(step, hidden, timestep)

    def _packed(self, step: Step, hidden: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        predictions = []
        others = {"controlnet_block_samples": step.shared("controlnet_block_samples")}
        others["additional_t_cond"] = None if self.call.source is not None else step.shared("additional_t_cond")
        for pack in self.packs:
            if self.call.survey.placed:
                self.call.prompts = pack
                try:
                    with entered(self.call):
                        output = self.model(hidden_states=hidden, timestep=timestep, return_dict=False, **others)[0]
                finally:
                    self.call.prompts = None
            else:
                output = self.model.predict(self.call, hidden, timestep, pack, **others)
            predictions += without_references(output, pack.copies, step.latents.shape[1])
        return tuple(predictions)

    def _as_stock(self, step: Step, hidden: torch.Tensor, n: int) -> torch.Tensor:
        with self.model.cache_context(("cond", "uncond")[n]):
            arguments = step.forwards[n] | {"hidden_states": hidden, "timestep": step.model_timestep(self.dtype)}
            return self.model(**arguments, return_dict=False)[0][:, : step.latents.shape[1]]

    def _leave_graph(self, why: str | None = None) -> None:
        if self.graph is not None:
            self.graph.release()
            self.graph, self._held = None, None
            if why is not None:
                self.state.graph = why

    def _apply_lora_scale(self) -> None:
        """`attention_kwargs={"scale": ...}`: once for all steps, and again where a callback has changed it."""
        scale = (self.pipe.attention_kwargs or {}).get("scale", 1.0)
        if scale != self.lora_scale:
            self._context.close()
            self._context.enter_context(lora_scale(self.model, {"scale": scale}))
            self.lora_scale = scale
