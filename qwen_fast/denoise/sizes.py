"""The steps of pictures of different sizes, whose rows share each forward without padding.

The latents of a call of stock's are one tensor with one schedule, so stock's loop cannot ask for these steps: the one that does
is in pipelines/sizes.py. Each picture is a sequence as it would be alone: its rotary rows, its attention, its modulations and
its sigmas are its own, for another size is another schedule.
"""

from typing import Any, NamedTuple

import torch

from ..common.state import STATE, logger
from ..transformer.adapters import NAMES
from ..transformer.call import ATTACHED
from ..transformer.compiled import without_compiler
from ..transformer.modulation import FromTable, ModulationTable, TableCache
from .denoiser import Denoiser
from .inputs import Held
from .packing import forwarded, packed_rows, reason_against_rows, rows_of
from .step import sampler_step, without_references
from .watch import FiniteCheck, Pace


class Pictures(NamedTuple):
    """The pictures of one prompt, N of one size.

    Attributes:
        latents: `[N, S_img, C]`, noise.
        shape: (frames, height, width) in patches.
        prompts: embeddings `[N, S_txt, C_txt]` and mask `[N, S_txt]` or None, of the prompt, with guidance of the negative one.
        timesteps, sigmas: `[T]` and `[T + 1]`, fp32; those of the same schedule are the same tensors.
    """

    latents: torch.Tensor
    shape: tuple[int, int, int]
    prompts: list[tuple[torch.Tensor, torch.Tensor | None]]
    timesteps: torch.Tensor
    sigmas: torch.Tensor


class SizesDenoiser(Denoiser):
    """Takes the steps of a call that draws pictures of different sizes.

    Its latents are the rows of all pictures, `[1, R, C]`, one after the other. A step is one forward of all predictions, or of
    one after the other where memory is short, and an update for every run of pictures that share a schedule. No CUDA graph is
    captured: it would hold for just these sizes in this order, and rows of several pictures keep a device busy without one.
    """

    def reason_against(self, device: torch.device) -> str | None:
        """Why these steps cannot be taken with the model as it is now, or None. Nothing is counted."""
        if NAMES in (self.attention_kwargs or ()):
            return f"attention_kwargs {NAMES}"
        self.call.survey = self.model.look() if self.attached else None
        reason = reason_against_rows(self, device, self.attention_kwargs)
        self.call.survey = None  # `look` takes it for new, and counts
        return reason

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self.pipe.attention_kwargs

    def begin(self, drawn: list[Pictures], true_cfg_scale: float | None) -> torch.Tensor:
        """Prepare the steps of these pictures.

        Args:
            true_cfg_scale: None without guidance.
        Returns:
            Tensor: their latents, `[1, R, C]`.
        """
        latents = torch.cat([one.latents.flatten(0, 1) for one in drawn])[None]
        self.dtype, self.device = latents.dtype, latents.device
        if self.dtype != self.proved:
            self.pipe.require_kernels(self.dtype, self.device)
        self.state.graph = "pictures of several sizes in one call"
        self.shapes = tuple((one.shape,) for one in drawn for _ in one.latents)
        self.lengths = [one.latents.shape[1] for one in drawn for _ in one.latents]
        prompts = [[rows_of(*prompt, len(one.latents)) for prompt in one.prompts] for one in drawn]
        self.prompts = [
            (torch.cat([embeds for embeds, _ in own]), [position for _, positions in own for position in positions])
            for own in zip(*prompts, strict=True)
        ]
        self.guidance = None
        if true_cfg_scale is not None:
            dtype = torch.promote_types(self.dtype, torch.float32)
            self.guidance = torch.full((1,), float(true_cfg_scale), dtype=dtype, device=self.device)
        self._put_schedules(drawn)
        self._scheduled = Held.of(self.pipe.scheduler.sigmas)
        self._pace = Pace(self.device)
        if self.state.options.check_nan:
            timesteps = torch.stack([one.timesteps for one in drawn for _ in one.latents])
            self._check = FiniteCheck(self._largest(latents), timesteps)
        return latents

    def _put_schedules(self, drawn: list[Pictures]) -> None:
        """Timesteps of all schedules in one tensor, for each step the places of the pictures' own there, and the runs."""
        schedules = {id(one.sigmas): one for one in drawn}
        order = list(schedules)
        timesteps = torch.cat([schedules[key].timesteps for key in order])
        self.timesteps = timesteps.to(self.device, self.dtype) / 1000  # rounded before the division, as in stock
        # One for all where there is one schedule, else one for each picture.
        own = [0] if len(order) == 1 else [order.index(id(one.sigmas)) for one in drawn for _ in one.latents]
        steps = len(drawn[0].timesteps)
        self.own_places = torch.tensor([[place * steps + i for place in own] for i in range(steps)], device=self.device)
        self.places = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.runs: list[tuple[slice, torch.Tensor]] = []
        for one in drawn:
            start = self.runs[-1][0].stop if self.runs else 0
            end = start + one.latents.shape[0] * one.latents.shape[1]
            if self.runs and self.runs[-1][1] is one.sigmas:
                start = self.runs.pop()[0].start
            self.runs.append((slice(start, end), one.sigmas))

    def advance(self, i: int, latents: torch.Tensor) -> torch.Tensor:
        """Step `i`, from latents `[1, R, C]` to the next ones.

        Raises:
            RuntimeError: a callback has changed something so that the step would be stock's.
        """
        if self.dirty:
            self._follow_changes()
        if self.state.options.precise_sampler:
            latents = latents.float()
        predictions = self._predictions(latents.to(self.dtype), self.own_places[i])
        following = []
        for own, sigmas in self.runs:
            present, *found = (rows[0, own][None] for rows in (latents, *predictions))
            following.append(sampler_step(self.state, present, tuple(found), sigmas, self.places, self.guidance))
        self.places.add_(1)  # in stream order, so no program of this step can see the next index
        self.pipe.scheduler._step_index = i + 1  # for callbacks, and so that it is seen to be at the end of a run
        return torch.cat(following, dim=1)

    def behind(self, i: int, latents: torch.Tensor) -> None:
        """The end of step `i`, behind a callback."""
        super().behind(i, latents if self._check is None else self._largest(latents))

    def _predictions(self, hidden: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[1, R, C]` for the prompts, and with guidance for the negative ones."""
        timestep = self.timesteps.index_select(0, places)
        if self.call.source is not None:
            self.call.source.places = places
        try:
            return self._forwards(hidden, timestep)
        except torch.OutOfMemoryError:
            if len(self.packs) == len(self.prompts):
                raise
            logger.warning("memory was too short for one forward of both predictions: they come one after the other.")
            self.state.calls["packed transformer out of memory"] += 1
            self.packs = packed_rows(self, self.prompts, together=False)
        torch.cuda.empty_cache()
        return self._forwards(hidden, timestep)

    def _forwards(self, hidden: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = ((pack, forwarded(self, pack, hidden, timestep)) for pack in self.packs)
        return tuple(one for pack, output in outputs for one in without_references(output, pack.copies, hidden.shape[1]))

    def _follow_changes(self) -> None:
        """Before the first step, and after code of the user's has run."""
        pipe, before = self.pipe, self.call.survey
        if (
            STATE not in pipe.__dict__
            or pipe.fast_state is not self.state
            or without_compiler(pipe.transformer) is not self.model
        ):
            reason = "the pipeline is another one"
        elif torch.is_grad_enabled():
            reason = "gradients are asked for"
        elif not self._scheduled.same(getattr(pipe.scheduler, "sigmas", None), True):
            reason = "the scheduler has other sigmas"
        else:
            reason = pipe.steps_itself()
            if reason is None:
                self.look()
                reason = reason_against_rows(self, self.device, self.attention_kwargs)
        if reason is not None:
            raise RuntimeError(
                f"pictures of several sizes cannot go on behind this callback: {reason}. Call the pipeline once for each size."
            )
        if self.call.survey is not before:
            tables = self.model.__dict__[ATTACHED].tables
            self.call.source = FromPlaces(self.model, tables, self.timesteps) if self.wants_table else None
        self.packs = packed_rows(self, self.prompts, None if self.packs is None else len(self.packs) == 1)
        self._apply_lora_scale()
        self.dirty = False

    def _largest(self, latents: torch.Tensor) -> torch.Tensor:
        """`[N, 1]`, of each picture: not finite where one of its latents is not."""
        return torch.stack([one.abs().amax() for one in latents[0].split(self.lengths)])[:, None]


class FromPlaces(FromTable):
    """Rows of one table of several schedules, gathered for each step: one for all pictures, or one for each.

    Args:
        timesteps: `[T]`, of all schedules, otherwise as `FromTable`'s.
    Attributes:
        places: `[1]` or `[N]` int64 on the device, the rows of this step.
    """

    def __init__(self, model: Any, tables: TableCache, timesteps: torch.Tensor):
        super().__init__(model, tables, timesteps, torch.zeros(1, dtype=torch.int32, device=timesteps.device))
        self.places: torch.Tensor | None = None
        self._whole: ModulationTable | None = None

    @property
    def samples(self) -> int:
        return len(self.places)

    def begin(self, timestep: torch.Tensor) -> bool:
        if self._whole is None:
            super().begin(timestep)
            self._whole = self.table
        # Without the row of timestep 0: there are no reference pictures.
        self.table = ModulationTable(self._whole.values.index_select(0, self.places), self._whole.width)
        return True
