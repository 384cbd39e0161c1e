"""LoRA adapters that differ between the samples of a batch: what `attention_kwargs={"adapter_names": [...]}` asks for.

diffusers hands that argument to attention processors, which ignore it. Here each sample's rows get the products of its own
adapters (`AdapterRows`), and each sample the modulations that its own give (`FromEach`).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .layout import Layout
from .linear import SWITCHING, AdapterRows, Projection
from .modulation import FromRow, FromTable, ModulationTable, TableCache
from .modulation_weights import table_modules, table_reason
from .survey import Survey

NAMES, NONE = "adapter_names", "__base__"  # PEFT's words
TOGETHER = "batch_invariant=True; call the pipeline once for each prompt, with its adapters on"  # a reason against them


class SampleAdapters(NamedTuple):
    """Which adapters each sample gets.

    Attributes:
        names: of the adapters of each sample.
        scale: `attention_kwargs["scale"]`, of all of them, times what PEFT's layers hold.
    """

    names: tuple[tuple[str, ...], ...]
    scale: float

    @classmethod
    def of(cls, attention_kwargs: dict[str, Any] | None) -> "SampleAdapters | None":
        """What the argument says, an entry for each sample; None where it does not speak of adapters.

        Raises:
            ValueError: an entry that is neither a name nor a list of different names.
        """
        entries = (attention_kwargs or {}).get(NAMES)
        if entries is None:
            return None
        if not isinstance(entries, (list, tuple)):
            raise ValueError(f"`{NAMES}` is {entries!r}; a list with an entry for each picture is needed.")
        names = []
        for entry in entries:
            own = (entry,) if isinstance(entry, str) else entry
            plain = isinstance(own, (list, tuple)) and all(isinstance(name, str) for name in own)
            if not plain or len(set(own)) < len(own) or (NONE in own and len(own) > 1):
                raise ValueError(
                    f"`{NAMES}` holds {entry!r}; each entry is the name of an adapter, a list of different names, or {NONE!r} "
                    "for none."
                )
            names.append(() if NONE in own else tuple(own))
        return cls(tuple(names), attention_kwargs.get("scale", 1.0))

    def rows(self, layout: Layout) -> tuple[AdapterRows, AdapterRows]:
        """Text rows and image rows of `layout`, counted from the first of each: the samples, once or for each of several
        predictions."""
        return self._rows(layout.txt_lengths), self._rows(layout.img_lengths)

    def _rows(self, lengths: tuple[int, ...]) -> AdapterRows:
        spans: dict[str, list[slice]] = {}
        ends = list(itertools.accumulate(lengths))
        for own, length, end in zip(itertools.cycle(self.names), lengths, ends):
            for name in own if length else ():
                before = spans.setdefault(name, [])
                begin = before.pop().start if before and before[-1].stop == end - length else end - length
                before.append(slice(begin, end))
        return AdapterRows(tuple((name, own) for name, several in spans.items() for own in several), self.scale)

    def source(self, model: nn.Module, *arguments: Any) -> "FromTable | FromEach":
        """Modulations from a table of the schedule for each set of adapters, or from one where they do not depend on them.

        Args:
            arguments: of `FromTable`, behind the model.
        """
        if not touches_modulations(model):
            return FromTable(model, *arguments)
        tables = {own: FromTable(model, *arguments) for own in self.names}
        each = self.names if len(tables) > 1 else self.names[:1]
        return FromEach(model, self._replace(names=each), [tables[own] for own in each])

    def source_of(
        self, model: nn.Module, tables: TableCache, timestep: torch.Tensor, condition: torch.Tensor | None
    ) -> "FromEach":
        """Modulations of one forward, computed for each sample: of its own adapters, at its own timestep.

        Args:
            timestep: `[1]` or `[B]`, in the model's dtype and over 1000.
            condition: `[B]`, `additional_t_cond`, or None.
        """
        first = torch.zeros(1, dtype=torch.int32, device=timestep.device)
        times = timestep.expand(len(self.names)).split(1)
        conditions = (None,) * len(times) if condition is None else condition.split(1)
        rows = (FromTable(model, tables, *own, first, other) for *own, other in zip(times, conditions, strict=True))
        return FromEach(model, self, list(rows))

    def check(self, model: nn.Module, found: Survey, samples: int, against: str | None = None) -> None:
        """Can `model` give each of `samples` these adapters? It is asked before any work.

        Args:
            against: why the forward is not ours, or None.
        Raises:
            ValueError: another number of samples, an adapter that is not there or is no plain LoRA, adapters that are merged or
                switched off, a forward that is not ours throughout; it says what.
        """
        if len(self.names) != samples:
            raise ValueError(f"`{NAMES}` has {len(self.names)} entries for {samples} samples; one for each is needed.")
        if against is not None:
            refuse(against)
        wanted = frozenset(name for own in self.names for name in own)
        if wanted in found.fit:
            return
        adapted = [module for module in found.modules if has_adapters(module)]
        known = sorted({name for module in adapted for name in _held(module)})
        for name in sorted(wanted.difference(known)):
            there = f"it has {', '.join(map(repr, known))}" if known else "it has none"
            raise ValueError(f"`{NAMES}` names {name!r}, which is no adapter of the transformer; {there}.")
        for module in adapted:
            reason = _layer_reason(module, wanted)
            if reason is not None:
                name = next(name for name, one in model.named_modules() if one is module)
                raise ValueError(f"`{NAMES}` needs plain LoRA layers, but {name} {reason}.")
        reason = _whole_reason(model, found)
        if reason is None and touches_modulations(model):
            reason = table_reason(model)
        if reason is not None:
            refuse(reason)
        found.fit.add(wanted)


def adapters_of(
    model: nn.Module, found: Survey | None, attention_kwargs: dict[str, Any] | None, samples: int
) -> SampleAdapters | None:
    """What `attention_kwargs` asks for each sample, checked; None where it does not speak of adapters.

    Args:
        found: of the transformer, None where that is not ours.
    Raises:
        ValueError: see `SampleAdapters.of` and `check`.
    """
    adapters = SampleAdapters.of(attention_kwargs)
    if adapters is not None:
        adapters.check(model, found, samples, "the transformer is not qwen_fast's" if found is None else None)
    return adapters


def rows_of(adapters: SampleAdapters | None, layout: Layout) -> tuple[AdapterRows | None, AdapterRows | None]:
    """`SampleAdapters.rows`, also of None."""
    return (None, None) if adapters is None else adapters.rows(layout)


def first_rows(adapted: AdapterRows | None, count: int) -> AdapterRows | None:
    """Those of the first `count` rows, also of None."""
    return adapted and adapted.within(slice(0, count))


def refuse(reason: str) -> None:
    """A ValueError: the call names adapters, and cannot be ours because of `reason`."""
    raise ValueError(
        f"`{NAMES}` in `attention_kwargs` needs forwards that are fused throughout (stock ignores it); against it: {reason}."
    )


def touches_modulations(model: nn.Module) -> bool:
    """Whether a layer that modulations depend on has adapters."""
    return any(has_adapters(part) for _, module in table_modules(model) for part in module.modules())


class FromEach(FromRow):
    """For each sample the modulations that its own adapters give, each from a table of its own.

    Args:
        model: the transformer.
        adapters: of each sample; one entry stands for all.
        sources: the table for each of them, computed at the first forward; equal ones may be shared.
    """

    def __init__(self, model: nn.Module, adapters: SampleAdapters, sources: list[FromTable]):
        self._model, self._adapters, self._sources = model, adapters, sources
        self.samples, self.table, self.of_each = len(sources), None, True
        self.step_index = torch.zeros_like(sources[0].step_index)

    def begin(self, timestep: torch.Tensor) -> bool:
        for own, source in zip(self._adapters.names, self._sources, strict=True):
            if source.table is None:
                with _only(self._model, own, self._adapters.scale):
                    source.begin(timestep)
        if self.table is None:
            self.table = self.buffer().table
        self._fill(self.table.values, lambda source: source.table.values.index_select(0, source.step_index))
        return True

    def buffer(self) -> FromRow:
        """Rows for `copy_row`; their address may be kept."""
        table = self._sources[0].table
        rows = self.samples if table.zero_row is None else 2 * self.samples
        values = table.values.new_empty(rows, table.values.shape[1])
        zero_row = None if table.zero_row is None else self.samples
        return FromRow(ModulationTable(values, table.width, zero_row), self.samples, of_each=True)

    def copy_row(self, buffer: FromRow, row: int) -> None:
        """The modulations of timestep `row` into one of `buffer`."""
        self._fill(buffer.table.values, lambda source: source.table.values[row : row + 1])

    def _fill(self, values: torch.Tensor, row_of: Callable[[FromTable], torch.Tensor]) -> None:
        for n, source in enumerate(self._sources):
            values[n : n + 1].copy_(row_of(source))
            if source.zero_row is not None:
                values[self.samples + n].copy_(source.table.values[source.zero_row])


@contextlib.contextmanager
def _only(model: nn.Module, names: tuple[str, ...], scale: float) -> Iterator[None]:
    """Inside, these adapters of the modulation layers of `model` are on, times `scale`, and no others."""
    layers = [part for _, module in table_modules(model) for part in module.modules() if has_adapters(part)]
    with SWITCHING:  # nobody else computes modulations or looks at the model meanwhile
        yield from _switched(layers, names, scale)


def _switched(layers: list[nn.Module], names: tuple[str, ...], scale: float) -> Iterator[None]:
    before = [(layer, layer._active_adapter, dict(layer.scaling)) for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = list(names)  # set_adapter would change what asks for gradients
            for name in layer.scaling:
                layer.scaling[name] = layer.scaling[name] * scale  # of hotswapping it is a tensor, which is kept as it is
        yield
    finally:
        for layer, active, scaling in before:
            layer._active_adapter = active
            layer.scaling.update(scaling)


def has_adapters(module: nn.Module) -> bool:
    """Whether `module` is a layer of PEFT, of whatever kind."""
    kind = type(module)
    return kind.__module__.startswith("peft.") and hasattr(kind, "adapter_layer_names")


def _held(module: nn.Module) -> Iterator[str]:
    """Names of the adapters in a layer of PEFT."""
    for attribute in module.adapter_layer_names:
        yield from getattr(module, attribute, {}).keys()


def _layer_reason(module: nn.Module, names: frozenset[str]) -> str | None:
    """Why a layer of PEFT cannot give rows adapters of their own, or None."""
    if module.merged_adapters:
        return f"has {', '.join(map(repr, module.merged_adapters))} merged into its weight: unfuse_lora() first"
    if module.disable_adapters:
        return "has its adapters switched off: enable_lora() first"
    kind = ".".join(type(module).__module__.split(".")[2:3])
    if kind != "lora" or type(module).__name__ != "Linear":
        return f"is a {type(module).__name__} of peft's {kind}"
    layer = Projection(module)
    if layer.parameters is None:
        others = f"one that is on ({', '.join(map(repr, module.active_adapters))}) is DoRA or has a bias or dropout"
        return f"is over a {type(module.base_layer).__name__} that cannot be read, has a hook, or {others}"
    for name in sorted(names.intersection(module.lora_A)):
        if name not in layer.named:
            return f"has in {name!r} more than two products: DoRA, a bias, dropout or a hook"
    kept = layer.parameters["weight"]
    used = [layer.named[name] for name in names.intersection(layer.named)]
    kinds = {part["weight"].dtype for adapter in used for part in (adapter.down, adapter.up)}
    if layer.weight_for(kept.new_empty(0)) is None or kinds - {kept.dtype}:
        return f"has adapters in {', '.join(sorted(map(str, kinds)))} over a weight in {kept.dtype}: cast them"
    return None


def _whole_reason(model: nn.Module, found: Survey) -> str | None:
    """Why a forward of `model` would not be ours throughout, or None."""
    if getattr(model, "is_cache_enabled", False):
        return "a cache of diffusers"
    if getattr(model, "_parallel_config", None) is not None:
        return "context parallelism"
    if found.whole is not None or not found.rows:
        plans = (reason for plan in found.blocks.values() for reason in (plan.called, plan.stock, plan.attention, *plan.mlps))
        reasons = (found.whole, found.model, found.rotary, found.norm_out, found.modulation, *plans, *found.foreign)
        return next(filter(None, reasons), "a layer in a linear layer's place")
    return None
