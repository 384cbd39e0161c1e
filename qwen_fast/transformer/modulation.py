"""The modulations of a whole schedule, computed at once: what img_mod, txt_mod and norm_out give for each of its timesteps.

They depend on the timestep alone. Stock computes them again at every step and for both CFG branches, which reads 13.6 GB of
weights each time; here every module is called once with all timesteps, and its results are the rows of a table of 4.4 MB a
step. With the weights on the device it is computed anew in each call, which takes milliseconds; where they have to be fetched
from host memory the last tables are kept.

A forward does not know where its modulations come from. It asks a `ModulationSource`: the model's own layers, a table, or one
row of a table.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import diffusers
import torch
from torch import nn

from ..common.fingerprint import Signature, modules_signature
from ..common.hardware import indexed
from ..common.placement import lies_elsewhere, on_device, on_device_in_turn
from ..common.recent import Recent
from ..common.stages import stage
from .by_rows import of_rows
from .linear import SWITCHING
from .modulation_weights import disk_reason, modulation_modules, table_modules


class BlockModulation(NamedTuple):
    """Views `[T, 2, C]` of a modulation table: what a block shifts, scales and gates with, per stream (image, text)."""

    shift1: torch.Tensor
    scale1: torch.Tensor
    gate1: torch.Tensor
    shift2: torch.Tensor
    scale2: torch.Tensor
    gate2: torch.Tensor


@dataclass(frozen=True, eq=False)
class ModulationTable:
    """All modulations of a schedule of T timesteps; T + 1 rows where timestep 0 has one too.

    Attributes:
        values (Tensor): `[T(+1), (12 * L + 3) * C]`, a row for each timestep: of every block the image's and the text's shift1,
            scale1, gate1, shift2, scale2, gate2; of norm_out scale and shift, as stock cuts them; the timestep embedding.
            That of a ControlNet has no norm_out, and 2 * C columns less.
        width (int): C.
        zero_row (int | None): row of timestep 0, which a transformer with zero_cond_t gives to reference images; else None.
    """

    values: torch.Tensor
    width: int
    zero_row: int | None = None

    def block(self, index: int) -> BlockModulation:
        """What block `index` needs, as views: nothing is copied."""
        start = 12 * self.width * index
        return BlockModulation(*self.values[:, start : start + 12 * self.width].unflatten(1, (2, 6, -1)).unbind(2))

    def out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(shift, scale) of norm_out, views `[T(+1), 1, C]`."""
        scale, shift = self.values[:, None, -3 * self.width : -self.width].chunk(2, dim=-1)
        return shift, scale

    @property
    def temb(self) -> torch.Tensor:
        """`[T(+1), C]`, the timestep embeddings, a view."""
        return self.values[:, -self.width :]

    def row_buffer(self) -> "ModulationTable":
        """A table of one row, and that of timestep 0 where there is one, for `row_into`; its address may be kept."""
        rows = 1 if self.zero_row is None else 2
        return ModulationTable(self.values.new_empty(rows, self.values.shape[1]), self.width, rows - 1 or None)

    def row_into(self, buffer: "ModulationTable", step_index: torch.Tensor) -> None:
        """Copy the row of `step_index` (`[1]` on the device, which the host does not read) into one of `row_buffer`."""
        torch.index_select(self.values, 0, step_index, out=buffer.values[:1])
        if self.zero_row is not None:
            buffer.values[1:].copy_(self.values[self.zero_row :])


def compute_table(
    transformer: nn.Module, timesteps: torch.Tensor, device: torch.device | str, condition: torch.Tensor | None = None
) -> ModulationTable:
    """The table of a schedule, on `device`.

    The modules are called as stock calls them, hooks, LoRA layers and all; once with all timesteps if that cannot make one
    row depend on another, else once for each. A product of T rows rounds otherwise than T products of one: no better and no
    worse, against float64. Weights that are elsewhere are brought one module after the other, and no module is changed.

    Args:
        timesteps (Tensor): `[T]` in the model's dtype: what stock's forward gets as `timestep`, 1 for pure noise.
        condition (Tensor): `[1]`, what it gets as `additional_t_cond`, of Layered.
    Raises:
        ValueError: timesteps of another shape or type, weights that are on disk, or a module that gives another dtype than
            the model's.
    """
    if timesteps.dim() != 1 or len(timesteps) == 0 or not timesteps.is_floating_point():
        shape = f"{tuple(timesteps.shape)} {timesteps.dtype}"
        raise ValueError(f"`timesteps` is {shape}; [T] in the model's floating-point dtype is needed, T at least 1.")
    reason = disk_reason(transformer)
    if reason is not None:
        raise ValueError(f"no modulation table can be computed: {reason}.")
    with torch.inference_mode(False), torch.no_grad():
        timesteps = timesteps.to(device)
        device, dtype, zero_row = timesteps.device, timesteps.dtype, None
        if _zero_cond(transformer):
            zero_row, timesteps = len(timesteps), torch.cat([timesteps, timesteps[:1] * 0])
        embed, norm = transformer.time_text_embed, getattr(transformer, "norm_out", None)
        # After the timesteps stand the hidden states, of which only the dtype counts.
        others = () if condition is None else (condition.to(device),)
        temb = of_rows(embed, on_device(embed, device), timesteps, timesteps.new_empty(0), *others)
        width, modules = temb.shape[1], [module for _, module in modulation_modules(transformer)]
        values = temb.new_empty(len(temb), (6 * len(modules) + (1 if norm is None else 3)) * width)

        def fill(start: int, found: torch.Tensor) -> None:
            if found.dtype != values.dtype:
                raise ValueError(f"a modulation is {found.dtype} in a model of {values.dtype}: the table would round it.")
            values[:, start : start + found.shape[1]] = found

        for place, call in enumerate(on_device_in_turn(modules, device)):
            fill(6 * width * place, of_rows(modules[place], call, temb))
        if norm is not None:
            fill(6 * width * len(modules), of_rows(norm.linear, on_device(norm.linear, device), norm.silu(temb).to(dtype)))
        fill(values.shape[1] - width, temb)
    return ModulationTable(values, width, zero_row)


def _zero_cond(model: nn.Module) -> bool:
    """Whether references are at timestep 0; a ControlNet has none."""
    return bool(vars(model).get("zero_cond_t", False))


def weights_signature(transformer: nn.Module) -> Signature:
    """A fingerprint of every module that a table depends on, see `modules_signature`; on CUDA one copy to the host."""
    return modules_signature(table_modules(transformer), readable=disk_reason(transformer) is None)


class TableCache(Recent):
    """Tables of weights that rest in host memory, by all that they depend on; 50 steps of Qwen-Image take 221 MB in bf16.

    Two threads may ask: one computes at a time, and a table that another stream has computed is waited for on the device.
    """

    def __init__(self, max_bytes: int = 2**30):
        super().__init__(max_bytes)

    def table(
        self,
        transformer: nn.Module,
        timesteps: torch.Tensor,
        device: torch.device | str,
        condition: torch.Tensor | None = None,
    ) -> ModulationTable:
        """`compute_table` of these arguments, or the table kept since an equal call.

        The key holds the weights by content and not by address, so that offloading, which moves them, does not miss. Timesteps
        and weights that are on CUDA cost a synchronisation each.
        """
        device = indexed(device)
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        with self._lock:
            key = self._key(transformer, timesteps, device, condition)
            kept = self.get(key)
            if kept is None:
                table = compute_table(transformer, timesteps, device, condition)
                kept = table, stream, None if stream is None else stream.record_event()
                if key is not None:
                    self.put(key, kept, table.values.nbytes)
            elif kept[1] != stream:
                stream.wait_event(kept[2])
                kept[0].values.record_stream(stream)
        return kept[0]

    def _key(self, transformer: nn.Module, timesteps: torch.Tensor, device: torch.device, condition) -> tuple | None:
        content = weights_signature(transformer).content
        if content is None or device.type == "meta":
            return None
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        schedule = tuple(timesteps.tolist()), timesteps.dtype, _zero_cond(transformer)
        schedule += (None if condition is None else tuple(condition.tolist()),)
        return content, schedule, autocast, torch.get_float32_matmul_precision(), device


class ModulationSource(Protocol):
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
        """Called at the beginning of a forward with its timestep `[B]`, rounded as the model sees it. False: this source
        cannot serve it."""

    def block(self, index: int) -> BlockModulation: ...

    def out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Shift and scale `[T, 1, C]` of the output norm."""

    def temb(self, batch: int) -> torch.Tensor:
        """Timestep embedding `[B, C]`, twice that with `zero_cond_t`, as stock hands it to its blocks."""


class FromLayers:
    """Computed by the model's own layers from the timestep of one forward, as stock does.

    Args:
        model: the transformer.
        blocks: its blocks.
        timestep: `[B]` in the model's dtype, over 1000.
        hidden_states: `[B, S_img, C]`, of which only dtype and device count.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        timestep: torch.Tensor,
        hidden_states: torch.Tensor,
        additional_t_cond: torch.Tensor | None,
    ):
        self.samples = timestep.shape[0]
        self.zero_row = self.samples if _zero_cond(model) else None
        if self.zero_row is not None:
            timestep = torch.cat([timestep, timestep * 0])
        self._temb = model.time_text_embed(timestep, hidden_states, additional_t_cond)
        self._model, self._blocks, self._computed = model, blocks, (None, None)
        self.step_index = torch.zeros(1, dtype=torch.int32, device=hidden_states.device)

    def begin(self, timestep: torch.Tensor) -> bool:
        return True

    def block(self, index: int) -> BlockModulation:
        if self._computed[0] != index:
            block = self._blocks[index]
            with SWITCHING:
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
        return self._temb if self.samples == batch else self._temb.repeat_interleave(batch, dim=0)


class FromRow:
    """One row of a table, in a buffer that somebody else fills: see `ModulationTable.row_into`.

    Attributes:
        of_each: the rows are of each sample's own adapters, see adapters.py.
    """

    of_each = False

    def __init__(self, table: ModulationTable, samples: int = 1, of_each: bool = False):
        self.table, self.samples, self.of_each = table, samples, of_each
        self.step_index = torch.zeros(1, dtype=torch.int32, device=table.values.device)

    @property
    def zero_row(self) -> int | None:
        return self.table.zero_row

    def begin(self, timestep: torch.Tensor) -> bool:
        return True

    def block(self, index: int) -> BlockModulation:
        return self.table.block(index)

    def out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.table.out()

    def temb(self, batch: int) -> torch.Tensor:
        # An index of -1 shows in the output norm, whose rows are NaN then; here it would be a device-side assertion.
        if self.samples > 1:
            return self.table.temb  # in the order that is asked for
        rows = self.table.temb.index_select(0, self.step_index.clamp(min=0)).expand(batch, -1)
        return rows if self.zero_row is None else torch.cat([rows, self.table.temb[self.zero_row].expand(batch, -1)])


class FromTable(FromRow):
    """Rows of a table of the whole schedule, which is computed, or found in the cache, at the first forward.

    Args:
        model: the transformer.
        tables: of the model; asked where its modulation weights are not on the device.
        timesteps: `[T]` in the model's dtype and over 1000. On the device's own tensor stock's division was made: in fp32 it
            differs from the host's, by a last digit.
        step_index: `[1]` int32 on the device; whoever advances it moves all forwards to the next row.
        condition: `[1]`, the same `additional_t_cond` of all samples, or None.
    """

    table: ModulationTable | None = None
    samples = 1

    def __init__(
        self,
        model: nn.Module,
        tables: TableCache,
        timesteps: torch.Tensor,
        step_index: torch.Tensor,
        condition: torch.Tensor | None = None,
    ):
        self._model, self._tables, self._condition = model, tables, condition
        self.timesteps, self.step_index = timesteps, step_index

    def begin(self, timestep: torch.Tensor) -> bool:
        if self.table is None:
            # Here and not earlier: before its first forward the weights of an offloaded model are not on the device.
            with stage("modulation"), SWITCHING:
                self.table = self._computed(timestep.device)
        return True

    def buffer(self) -> FromRow:
        """A row for `copy_row`; its address may be kept."""
        return FromRow(self.table.row_buffer())

    def copy_row(self, buffer: FromRow, row: int) -> None:
        """The modulations of timestep `row` into one of `buffer`."""
        buffer.table.values[:1].copy_(self.table.values[row : row + 1])
        if self.zero_row is not None:
            buffer.table.values[1:].copy_(self.table.values[self.zero_row :])

    def _computed(self, device: torch.device) -> ModulationTable:
        if any([lies_elsewhere(module, device) for _, module in modulation_modules(self._model)]):
            return self._tables.table(self._model, self.timesteps, device, self._condition)
        return compute_table(self._model, self.timesteps, device, self._condition)


class FromScheduledTable(FromTable):
    """A table of a scheduler's timesteps, for the pipelines that keep diffusers' own loop.

    The row is found by the timestep of the forward, on the device, so it does not matter how a scheduler counts its steps.
    """

    def __init__(self, model: nn.Module, tables: TableCache, pipe: diffusers.DiffusionPipeline):
        super().__init__(model, tables, None, None)
        self._pipe = pipe
        self._scheduled: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    def begin(self, timestep: torch.Tensor) -> bool:
        scheduled = self._pipe.scheduler.timesteps
        if self._scheduled is not scheduled:
            self._scheduled, self.table = scheduled, None
            self.timesteps = scheduled.to(timestep.device, timestep.dtype) / 1000
        same = self.timesteps == timestep[0]
        found = same.any() & (timestep == timestep[0]).all()
        if timestep.device.type == "cpu" and not found:
            return False
        self._found = found if self._found is None else self._found & found
        super().begin(timestep)
        # A row of -1 makes the output NaN; `check` says so after the loop, for the host does not wait for each step.
        self.step_index = torch.where(found, same.to(torch.int8).argmax(), -1).to(torch.int32).reshape(1)
        return True

    def check(self) -> None:
        """After the loop: was every forward's timestep one of the scheduler's?

        Raises:
            RuntimeError: it was not, and the picture is NaN.
        """
        if self._found is not None and not self._found:
            raise RuntimeError(
                "the transformer was called with a timestep that `pipe.scheduler.timesteps` does not hold, so there was no "
                "row of modulations for it; use modulation='layers', which computes them in each forward."
            )
