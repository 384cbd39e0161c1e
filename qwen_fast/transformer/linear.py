"""How a projection computes: the one place that knows kinds of linear layers."""

import functools
import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qwen_fast_kernels import linear_gelu

from ..common.hooks import attached

# Weight, bias, and of each adapter down, up and scale: all that a plain layer computes with, for `compiled.py`.
Operands = tuple[torch.Tensor, torch.Tensor | None, tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]]
Places = list[tuple[slice, torch.Tensor, slice]]  # rows of the layer's own, and a tensor with the rows where they lie there

# Held where adapters of modulation layers are switched for a moment, and where others compute modulations or look at a model:
# pipelines of several threads may share it.
SWITCHING = threading.RLock()


class LowRank(NamedTuple):
    """A LoRA adapter of a linear layer, `scaling[name] * (x @ down.T) @ up.T`, as PEFT's layer holds it now."""

    down: dict[str, Any]
    up: dict[str, Any]
    scaling: dict[str, float]
    name: str

    def add(self, rows: torch.Tensor, out: torch.Tensor, scale: float = 1.0, to: torch.Tensor | None = None) -> None:
        """Its products `[R, C_out]` added to what is in `out`, or to `to`, and put into `out`."""
        down, up = F.linear(rows, self.down["weight"]), self.up["weight"].t()
        torch.addmm(out if to is None else to, down, up, alpha=scale * self.scaling[self.name], out=out)

    def low_into(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`out[:]` = its first product, scaled, `[R, rank]`: rounded once, where a scaling of its own would round again."""
        torch.addmm(out, rows, self.down["weight"].t(), beta=0, alpha=self.scaling[self.name], out=out)

    def operands(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Down, up, and the scale as it is now, on the device: as a number it would be a constant of what is compiled."""
        return self.down["weight"], self.up["weight"], _scale(float(self.scaling[self.name]), device)


class AdapterRows(NamedTuple):
    """Which rows get which adapters, where the samples of a batch have adapters of their own.

    Attributes:
        spans: names of adapters, each with rows that lie one behind the other.
        scale: of all of them, times their own.
    """

    spans: tuple[tuple[str, slice], ...]
    scale: float

    def within(self, own: slice) -> "AdapterRows":
        """Those of the rows `own`, counted from its first one."""
        cut = ((name, max(rows.start, own.start), min(rows.stop, own.stop)) for name, rows in self.spans)
        spans = ((name, slice(start - own.start, stop - own.start)) for name, start, stop in cut if start < stop)
        return AdapterRows(tuple(spans), self.scale)


class Projection:
    """A layer in the place of an nn.Linear, as it was found.

    Attributes:
        parameters: of a plain linear layer, `x @ weight.T + bias` and nothing else, also of one under LoRA adapters: it is read
            and not called. None for any other. Quantised layers keep codes under `.weight`, and DoRA, LoHa and LoKr are no
            additions: reading would drop in silence what they do.
        adapters: plain LoRA adapters that are on.
        named: all plain LoRA adapters of a layer that is read, whether they are on or not.
    """

    __slots__ = ("module", "parameters", "adapters", "named")

    def __init__(self, module: nn.Module, readable: bool = True):
        self.module = module
        self.adapters: list[LowRank] = []
        self.named: dict[str, LowRank] = {}
        plain = readable and type(module) is nn.Linear and attached(module) is None
        self.parameters = module.__dict__["_parameters"] if plain else None
        adapters = _adapters(module) if readable and not plain else None
        if adapters is not None:
            self.parameters, self.adapters = module.base_layer.__dict__["_parameters"], adapters
            self.named = {name: found for name in module.lora_A if (found := _low_rank(module, name)) is not None}

    def weight_for(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The weight, if `rows` may be multiplied by it and its adapters; torchao and tensor parallelism put tensors of their
        own there, and adapters may have another dtype than the model."""
        weight = None if self.parameters is None or "bias" not in self.parameters else self.parameters.get("weight")
        if type(weight) is not nn.Parameter or weight.dtype != rows.dtype or weight.layout is not torch.strided:
            return None
        for adapter in self.adapters:
            if not (adapter.down["weight"].dtype == adapter.up["weight"].dtype == rows.dtype):
                return None
        return weight

    def operands(self, rows: torch.Tensor) -> Operands | None:
        """What the layer multiplies `rows` with; None where it has to be called."""
        weight = self.weight_for(rows)
        if weight is None:
            return None
        return weight, self.parameters["bias"], tuple(adapter.operands(rows.device) for adapter in self.adapters)

    def __call__(self, rows: torch.Tensor, batch: int | None) -> torch.Tensor:
        """The layer called, `[R, C_out]`: with rows in one piece or, as stock would, with `[batch, S, C_in]`."""
        return called(self.module, rows, batch)


def linear_into(
    layer: Projection,
    rows: torch.Tensor,
    out: torch.Tensor,
    batch: int | None = None,
    adapted: AdapterRows | None = None,
) -> None:
    """`out[:] = layer(rows)`; a plain linear layer writes there itself.

    Args:
        rows: `[R, C_in]`.
        batch: how many samples the rows are, if a layer that is called has to get them apart; see `Projection.__call__`.
        adapted: which rows get which adapters; None: all get those that are on.
    """
    if rows.shape[0] == 0:
        return
    weight = layer.weight_for(rows)
    if weight is None:
        out.copy_(layer(rows, batch))
    elif layer.adapters or adapted is not None:
        _products_into(layer, weight, rows, out, adapted)
    else:
        torch._C._nn.linear(rows, weight, layer.parameters["bias"], out=out)


def _products_into(
    layer: Projection, weight: torch.Tensor, rows: torch.Tensor, out: torch.Tensor, adapted: AdapterRows | None
) -> None:
    """`out[:]` = the product with the layer's own weight, and those of its adapters.

    Adapters of all rows write theirs first, and the large product, which reads them beside its arithmetic, is added: 263 ms a
    step of 1024x1024 with guidance on an H100, where the other order takes 271. In bf16 it is nearer to float64 too, for what
    is rounded first is small: RMS 1.8e-3, the other order 2.4e-3, PEFT's layer 2.5e-3.
    """
    bias, adapters = layer.parameters["bias"], layer.adapters if adapted is None else ()
    if adapters and bias is not None:
        for n, adapter in enumerate(adapters):
            adapter.add(rows, out, to=None if n else bias)
        out.addmm_(rows, weight.t())
        return
    torch._C._nn.linear(rows, weight, bias, out=out)
    for adapter in adapters:
        adapter.add(rows, out)
    for name, own in () if adapted is None else adapted.spans:
        if name in layer.named:
            layer.named[name].add(rows[own], out[own], adapted.scale)


def linear(layer: Projection, rows: torch.Tensor, batch: int | None, adapted: AdapterRows | None) -> torch.Tensor:
    """`layer(rows)` `[R, C_out]`, of a layer that is called where nothing is named."""
    if adapted is None or not layer.named:
        return layer(rows, batch)
    out = rows.new_empty(rows.shape[0], layer.parameters["weight"].shape[0])
    linear_into(layer, rows, out, batch, adapted)
    return out


def scatter_linear(
    layer: Projection, rows: torch.Tensor, places: Places, batch: int | None, adapted: AdapterRows | None = None
) -> None:
    """`linear_into` where the results lie in several places; what is not a plain linear layer is called once."""
    if layer.parameters is not None or (len(places) == 1 and batch is None):
        for own, out, there in places:
            linear_into(layer, rows[own], out[there], adapted=adapted and adapted.within(own))
        return
    results = layer(rows, batch)
    for own, out, there in places:
        out[there] = results[own]


def gather_linear(
    layer: Projection, places: Places, out: torch.Tensor, batch: int | None, adapted: AdapterRows | None = None
) -> None:
    """`linear_into` where the rows lie in several places; what is not a plain linear layer is called once."""
    if layer.parameters is not None or (len(places) == 1 and batch is None):
        for own, rows, there in places:
            linear_into(layer, rows[there], out[own], adapted=adapted and adapted.within(own))
        return
    linear_into(layer, torch.cat([rows[there] for _, rows, there in places]), out, batch)


def feed_forward_into(
    up: Projection,
    down: Projection,
    rows: torch.Tensor,
    out: torch.Tensor,
    batch: int | None = None,
    adapted: AdapterRows | None = None,
) -> None:
    """`out[:] = down(gelu(up(rows)))`, GELU in its tanh approximation."""
    if rows.shape[0] == 0:
        return
    weight = up.weight_for(rows)
    if weight is None:
        hidden = F.gelu(up(rows, batch), approximate="tanh")
    elif adapted is not None and up.named:
        hidden = rows.new_empty(rows.shape[0], weight.shape[0])
        linear_into(up, rows, hidden, adapted=adapted)
        torch._C._nn.gelu_(hidden, approximate="tanh")
    else:
        low_rank = _factors(up.adapters, rows) if up.adapters else (None, None)
        hidden = linear_gelu(rows, weight, up.parameters["bias"], *low_rank)
    linear_into(down, hidden, out, batch, adapted)


def _factors(adapters: list[LowRank], rows: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Two matrices `[R, ranks]` and `[C_out, ranks]`, of which the first times the second's transpose is the sum of all
    adapters' products; None twice where there are none."""
    adapters = [adapter for adapter in adapters if adapter.up["weight"].shape[1]]
    ups = [adapter.up["weight"] for adapter in adapters]
    ranks = [up.shape[1] for up in ups]
    if not ranks:
        return None, None
    low = rows.new_empty(rows.shape[0], sum(ranks))
    for adapter, part in zip(adapters, low.split(ranks, dim=1), strict=True):
        adapter.low_into(rows, part)
    return low, side_by_side(ups)


def side_by_side(factors: list[torch.Tensor]) -> torch.Tensor | None:
    """Matrices with as many rows each as one, contiguous; None of none. A single one is not copied."""
    if len(factors) > 1:
        return torch.cat(factors, dim=1)
    return factors[0].contiguous() if factors else None


def _adapters(module: nn.Module) -> list[LowRank] | None:
    """The adapters of a LoRA layer of PEFT that adds low-rank products to a plain linear layer; None for any other layer."""
    if (type(module).__module__, type(module).__qualname__) != ("peft.tuners.lora.layer", "Linear"):
        return None
    base, names = module.base_layer, [] if module.disable_adapters else module.active_adapters
    if type(base) is not nn.Linear or module.fan_in_fan_out or attached(module) or attached(base):
        return None
    if module.merged:  # the adapters are in the weight; switched off, the layer takes them out again when it is called
        return None if module.disable_adapters else []
    found = [_low_rank(module, name) for name in names if name in module.lora_A]
    return None if None in found else found


def _low_rank(module: nn.Module, name: str) -> LowRank | None:
    """An adapter of a LoRA layer of PEFT; None where it is more than two products."""
    down, up, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    plain = type(down) is type(up) is nn.Linear and type(dropout) is nn.Identity
    if not plain or up.bias is not None or any(attached(part) for part in (down, up, dropout)):
        return None
    if module.use_dora.get(name) or name in getattr(module, "lora_variant", ()) or name in module.lora_embedding_A:
        return None
    return LowRank(down.__dict__["_parameters"], up.__dict__["_parameters"], module.scaling, name)


@functools.cache  # never dropped: a CUDA graph reads it where it lies
def _scale(value: float, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((1,), value, device=device)


def called(module: nn.Module, rows: torch.Tensor, batch: int | None) -> torch.Tensor:
    """`module(rows)` `[R, C_out]`, of rows in one piece or, as stock would, of `[batch, S, C_in]`."""
    if batch is None:
        return module(rows)
    return module(rows.unflatten(0, (batch, -1))).flatten(0, 1)
