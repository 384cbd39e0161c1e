"""Where the modulations of a forward come from: a table of the whole schedule, or the model's own layers."""

from typing import Protocol

import diffusers
import torch

from ..common.stages import stage
from .modulation import BlockModulation, ModulationTable, TableCache


class Conditions(Protocol):
    """Rows of modulations for one forward.

    Attributes:
        step_index (Tensor): `[1]` on the device, the row of tokens that have none of their own.
        samples (int): 1, or B where each sample has its own row.
        zero_row (int | None): first row of timestep 0, for reference pictures (`zero_cond_t`).
    """

    step_index: torch.Tensor
    samples: int
    zero_row: int | None

    def begin(self, timestep: torch.Tensor) -> bool:
        """Called at the beginning of a forward with its timestep `[B]`, rounded as the model sees it. False: these
        conditions cannot serve it."""

    def block(self, index: int) -> BlockModulation:
        """Views `[T, 2, C]` for block `index`."""

    def out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale `[T, 1, C]` of the output norm."""

    def temb(self, batch: int) -> torch.Tensor:
        """Timestep embedding `[B, C]`, twice that with `zero_cond_t`, as stock hands it to its blocks."""


class LayerConditions:
    """Computed by the model's own layers from the timestep of one forward, as stock does.

    Args:
        model: the transformer.
        blocks: its blocks.
        timestep: `[B]` in the model's dtype, over 1000.
        hidden_states: for its dtype and device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        blocks: list[torch.nn.Module],
        timestep: torch.Tensor,
        hidden_states: torch.Tensor,
        additional_t_cond: torch.Tensor | None,
    ):
        self.samples = timestep.shape[0]
        self.zero_row = self.samples if model.zero_cond_t else None
        if model.zero_cond_t:
            timestep = torch.cat([timestep, timestep * 0])
        self._temb = model.time_text_embed(timestep, hidden_states, additional_t_cond)
        self._model, self._blocks, self._computed = model, blocks, (None, None)
        self.step_index = torch.zeros(1, dtype=torch.int32, device=hidden_states.device)

    def begin(self, timestep: torch.Tensor) -> bool:
        return True

    def block(self, index: int) -> BlockModulation:
        if self._computed[0] != index:
            block = self._blocks[index]
            image, text = block.img_mod(self._temb), block.txt_mod(self._temb[: self.samples])
            if self.zero_row is not None:
                text = torch.cat([text, text])  # no text token takes the rows of timestep 0
            rows = torch.stack([image, text], dim=1).unflatten(-1, (6, -1))
            self._computed = index, BlockModulation(*rows.unbind(2))
        return self._computed[1]

    def out(self) -> tuple[torch.Tensor, torch.Tensor]:
        norm = self._model.norm_out
        rows = norm.linear(norm.silu(self._temb).to(self._temb.dtype))
        scale, shift = rows[:, None].chunk(2, dim=-1)
        return shift, scale

    def temb(self, batch: int) -> torch.Tensor:
        if self.samples == batch:
            return self._temb
        return self._temb.repeat_interleave(batch, dim=0)


class TableConditions:
    """Rows of a table of the whole schedule, which the first forward computes or finds in the cache.

    Args:
        model: the transformer.
        timesteps: `[T]` on the CPU, in the model's dtype and over 1000.
        step_index: `[1]` int32 on the device; whoever advances it moves all forwards to the next row.
    """

    samples = 1
    table: ModulationTable | None = None

    def __init__(self, model: torch.nn.Module, tables: TableCache, timesteps: torch.Tensor, step_index: torch.Tensor):
        self._model, self._tables = model, tables
        self.timesteps, self.step_index = timesteps, step_index

    @property
    def zero_row(self) -> int | None:
        return self.table.zero_row

    def refresh(self) -> None:
        """Look the table up again at the next forward: someone may have touched the weights."""
        self.table = None

    def begin(self, timestep: torch.Tensor) -> bool:
        if self.table is None:
            # Here and not earlier: before its first forward the weights of an offloaded model are not on the device.
            with stage("modulation"):
                self.table = self._tables.get(self._model, self.timesteps, device=timestep.device)
        return True

    def block(self, index: int) -> BlockModulation:
        return self.table.block(index)

    def out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table.out()

    def temb(self, batch: int) -> torch.Tensor:
        # An index of -1 shows in the output norm, whose rows are NaN then; here it would be a device-side assertion.
        rows = self.table.temb.index_select(0, self.step_index.clamp(min=0)).expand(batch, -1)
        if self.zero_row is None:
            return rows
        return torch.cat([rows, self.table.temb[self.zero_row].expand(batch, -1)])


class ScheduledConditions(TableConditions):
    """A table that follows a scheduler, for the pipelines that keep diffusers' own loop.

    The row is where the scheduler stands, which the host knows. The timestep of the forward has to be the one of that
    row: where it is not, the row index becomes -1 and the prediction NaN, rather than a picture of another timestep.
    """

    def __init__(self, model: torch.nn.Module, tables: TableCache, pipe: diffusers.DiffusionPipeline, changing: bool):
        self._model, self._tables, self._pipe, self._changing = model, tables, pipe, changing
        self._scheduled: torch.Tensor | None = None
        self._index: int | None = None

    def begin(self, timestep: torch.Tensor) -> bool:
        scheduler = self._pipe.scheduler
        if self._scheduled is not scheduler.timesteps:
            self._scheduled, self.table = scheduler.timesteps, None
            self._known = (scheduler.timesteps.to(timestep.dtype) / 1000).to(timestep.device)
            self.timesteps = self._known.cpu()  # the key of the table: the one time that the host reads the device
        index = scheduler.begin_index or 0 if scheduler.step_index is None else scheduler.step_index
        if self._changing and index != self._index:
            self.refresh()  # a callback came in between
        self._index = index
        super().begin(timestep)
        fits = (timestep == self._known[index]).all()
        self.step_index = torch.where(fits, index, -1).to(torch.int32).reshape(1)
        return True
