"""Modulation tables: what img_mod, txt_mod and norm_out give for every step of a schedule, computed once.

The modulation of a block depends on the timestep alone. Stock computes it again at every step and for both CFG branches
from 13.6 GB of weights; here it is one table of 4.4 MB a step, kept as long as timesteps and weights are the same.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

from ..common.files import read_checked, write_whole
from ..common.fingerprint import Signature, modules_signature
from ..common.options import writable_folder
from ..common.placement import bringing_hook, on_device, on_device_in_turn
from .host_weights import disk_reason, modulation_modules


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
        rows (Tensor): `[T(+1), L, 2, 6, C]` in the model's dtype; streams image, text; shift1, scale1, gate1, shift2,
            scale2, gate2 as stock cuts them.
        norm_out (Tensor): `[T(+1), 1, 2, C]`, scale before shift, as stock cuts it.
        temb (Tensor): `[T(+1), C]`, the timestep embeddings.
        zero_row (int | None): row of timestep 0, which a transformer with zero_cond_t gives to reference images; else None.
    """

    rows: torch.Tensor
    norm_out: torch.Tensor
    temb: torch.Tensor
    zero_row: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.rows.nbytes + self.norm_out.nbytes + self.temb.nbytes

    def block(self, layer: int) -> BlockModulation:
        """What block `layer` needs, as views `[T(+1), 2, C]` with adjacent channels: nothing is copied."""
        return BlockModulation(*self.rows[:, layer].unbind(2))

    def out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(shift, scale) of norm_out, views `[T(+1), 1, C]`."""
        return self.norm_out[:, :, 1], self.norm_out[:, :, 0]


def table_reason(transformer: nn.Module) -> str | None:
    """Why a table costs more than it saves, or cannot be computed, with the hooks on `transformer` now; None: it can."""
    modules = (module for _, module in _modules(transformer))
    return disk_reason(transformer) or next(filter(None, map(bringing_hook, modules)), None)


def compute_table(
    transformer: nn.Module,
    model_timesteps: torch.Tensor,
    *,
    device: torch.device | str,
    guidance: float | torch.Tensor | None = None,
    additional_t_cond: int | torch.Tensor | None = None,
) -> ModulationTable:
    """The table of a schedule, every row equal to the bit to what a stock forward of batch 1 computes on `device`.

    The modules are called as stock calls them, hooks, LoRA layers and all, one row at a time. Weights that are elsewhere
    are brought to `device` one layer after the other, and no module is changed.

    Args:
        transformer (QwenImageTransformer2DModel): LoRA layers are taken at their present scale: `attention_kwargs` with
            a scale has to be applied before, as its forward does.
        model_timesteps (Tensor): `[T]` in the model's dtype: what stock's forward gets as `timestep`, 1 for pure noise.
        device: where the table is computed and stays.
        guidance: embedded guidance scale of a guidance-distilled model, one for all rows.
        additional_t_cond: index of the additional condition (QwenImageLayeredPipeline), one for all rows.
    Raises:
        ValueError: timesteps of another shape or type, a condition that is not one value, weights that are on disk, or
            a module that gives another dtype than the model's.
        TypeError: guidance where the embedding takes none; that of diffusers 0.42.1 never does, so stock raises it too.
    """
    if model_timesteps.dim() != 1 or len(model_timesteps) == 0 or not model_timesteps.is_floating_point():
        shape = f"{tuple(model_timesteps.shape)} {model_timesteps.dtype}"
        raise ValueError(f"`model_timesteps` is {shape}; [T] in the model's floating-point dtype is needed, T at least 1.")
    reason = disk_reason(transformer)
    if reason is not None:
        raise ValueError(f"no modulation table can be computed: {reason}.")
    with torch.inference_mode(False), torch.no_grad():
        timesteps = model_timesteps.to(device)
        device, dtype = timesteps.device, timesteps.dtype
        conditions = [timesteps.new_empty(0)]  # the hidden states, of which only the dtype counts
        if guidance is not None:
            conditions.insert(0, _one("guidance", guidance, torch.float32, device).to(dtype) * 1000)
        index = additional_t_cond
        conditions.append(None if index is None else _one("additional_t_cond", index, torch.long, device))
        embed = on_device(transformer.time_text_embed, device)
        # `[1, C]`, or `[2, C]` with zero_cond_t: the step's embedding and that of timestep 0 in one product, as in stock.
        tembs = [embed(torch.cat([t, t * 0]) if transformer.zero_cond_t else t, *conditions) for t in timesteps.split(1)]
        steps, width = len(tembs), tembs[0].shape[-1]
        temb = torch.cat([step[:1] for step in tembs] + [tembs[0][1:]])
        rows = temb.new_empty(len(temb), len(transformer.transformer_blocks), 2, 6, width)
        norm_out = temb.new_empty(len(temb), 1, 2, width)

        blocks = ((block.img_mod, block.txt_mod) for block in transformer.transformer_blocks)
        for layer, (image, text) in enumerate(on_device_in_turn(blocks, device)):
            for row, step in enumerate(tembs):
                both = image(step)
                _fill(rows[row, layer, 0], both[:1])
                _fill(rows[row, layer, 1], text(step[:1]))
            if transformer.zero_cond_t:  # stock gives text no such row; here no row of the table is left undefined
                _fill(rows[steps, layer, 0], both[1:])
                _fill(rows[steps, layer, 1], text(step[1:]))
        linear = on_device(transformer.norm_out.linear, device)
        for row, step in enumerate(temb.split(1)):
            _fill(norm_out[row, 0], linear(transformer.norm_out.silu(step).to(dtype)))
    return ModulationTable(rows, norm_out, temb, steps if transformer.zero_cond_t else None)


def weights_signature(transformer: nn.Module) -> Signature:
    """A fingerprint of every module that a table depends on: types, tensors, adapters and sampled content.

    Of each tensor its type, shape, dtype and at least 128 elements (all, if it has fewer than 512), spread over its
    memory by a stride that passes through rows and columns, are read; on CUDA with one copy to the host. `_version` is
    not asked: it does not see writes through `.data`, which is how PEFT fuses a LoRA.

    What a sample can miss: an edit of some elements that leaves every sampled one as it was; in practice one of less
    than a few hundredths of one single tensor. A fused LoRA changes all tensors it targets, each nearly everywhere. It
    sees neither attributes of a quantised layer that are no tensors nor what a hook does.
    """
    return modules_signature(_modules(transformer), readable=disk_reason(transformer) is None)


class TableCache:
    """The last few tables, by timesteps and weights; also on disk where a folder is given. A copy starts empty.

    Args:
        max_bytes: of the tables kept; a larger one is returned, but not kept. 50 steps of Qwen-Image take 221 MB in bf16.
        max_entries: tables kept, the least recently used goes first.
        folder: keep tables there too, one file each, for other processes. Files are never removed.
    Attributes:
        hits, misses: calls of `get` so far; a table read from the folder is a hit.
    Raises:
        ValueError: a folder that cannot be made or written.
    """

    def __init__(self, *, max_bytes: int = 2**30, max_entries: int = 4, folder: Path | str | None = None):
        self.max_bytes, self.max_entries = max_bytes, max_entries
        self.folder = writable_folder("folder", folder)
        self.hits = self.misses = 0
        self._tables: OrderedDict[tuple[str, torch.device], ModulationTable] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the tables in memory."""
        return sum(table.nbytes for table in self._tables.values())

    def clear(self) -> None:
        """Forget the tables in memory."""
        self._tables.clear()

    def get(
        self,
        transformer: nn.Module,
        model_timesteps: torch.Tensor,
        *,
        device: torch.device | str,
        guidance: float | torch.Tensor | None = None,
        additional_t_cond: int | torch.Tensor | None = None,
    ) -> ModulationTable:
        """`compute_table` of these arguments, or a table kept since an equal call.

        The key holds the weights by content and not by address, so that offloading, which moves them, does not miss.
        Arguments on the CPU cost no synchronisation; the signature of weights on CUDA costs one.
        """
        device = torch.empty(0, device=device).device  # with its index
        conditions = {"guidance": guidance, "additional_t_cond": additional_t_cond}
        content = weights_signature(transformer).content
        if content is None or device.type == "meta":
            self.misses += 1
            return compute_table(transformer, model_timesteps, device=device, **conditions)
        digest = _digest(content, model_timesteps, device, bool(transformer.zero_cond_t), *conditions.values())
        table = self._tables.get((digest, device))
        if table is None and self.folder is not None:
            table = _read(self.folder / f"{digest}.safetensors", device)
        self.hits += table is not None
        if table is None:
            self.misses += 1
            table = compute_table(transformer, model_timesteps, device=device, **conditions)
            if self.folder is not None:
                _write(table, self.folder / f"{digest}.safetensors")
        self._tables[digest, device] = table
        self._tables.move_to_end((digest, device))
        while len(self._tables) > self.max_entries or self.nbytes > self.max_bytes:
            self._tables.popitem(last=False)
        return table

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_tables": OrderedDict(), "hits": 0, "misses": 0}


def _modules(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that a table depends on."""
    yield "time_text_embed", transformer.time_text_embed
    yield from modulation_modules(transformer)
    yield "norm_out.linear", transformer.norm_out.linear


def _one(name: str, value: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ValueError(f"`{name}` holds {tensor.numel()} values; a table has one for all its rows.")
    return tensor.reshape(1).to(device, dtype)


def _fill(row: torch.Tensor, values: torch.Tensor) -> None:
    """`values` `[1, n * C]` into `row` `[n, C]`, unrounded."""
    if values.dtype != row.dtype:
        raise ValueError(f"a modulation is {values.dtype} in a model of {row.dtype}: the table would round it.")
    row.copy_(values.view_as(row))


def _digest(content: str, timesteps: torch.Tensor, device: torch.device, *conditions: Any) -> str:
    """Name of a table: the same in every process that would compute the same bits."""
    values = timesteps.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    conditions = [value.tolist() if isinstance(value, torch.Tensor) else value for value in conditions]
    versions = torch.__version__, diffusers.__version__, torch.get_float32_matmul_precision()
    return hashlib.sha256(repr((content, values, str(timesteps.dtype), kind, conditions, versions)).encode()).hexdigest()


def _write(table: ModulationTable, path: Path) -> None:
    tensors = {"rows": table.rows, "norm_out": table.norm_out, "temb": table.temb}
    write_whole(tensors, {"zero_row": str(table.zero_row)}, path, "modulation table")


def _read(path: Path, device: torch.device) -> ModulationTable | None:
    found = read_checked(path, ("rows", "norm_out", "temb"))
    if found is None:
        return None
    tensors, metadata = found
    zero_row = None if metadata["zero_row"] == "None" else int(metadata["zero_row"])
    return ModulationTable(**{name: tensor.to(device) for name, tensor in tensors.items()}, zero_row=zero_row)
