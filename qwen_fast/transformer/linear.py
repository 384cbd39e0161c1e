"""How a projection computes: the one place that knows kinds of linear layers."""

import torch
import torch.nn.functional as F
from torch import nn

from qwen_fast_kernels import linear_gelu

from ..common.hooks import attached

Places = list[tuple[slice, torch.Tensor, slice]]  # rows of the layer's own, and a tensor with the rows where they lie there


class Projection:
    """A layer in the place of an nn.Linear, as it was found.

    Attributes:
        parameters: of a plain linear layer, `x @ weight.T + bias` and nothing else: it is read and not called. None for any
            other. A LoRA layer of PEFT keeps the base weight under `.weight`, quantised layers keep codes there: reading
            would drop what they add in silence.
    """

    __slots__ = ("module", "parameters")

    def __init__(self, module: nn.Module, readable: bool = True):
        self.module = module
        plain = readable and type(module) is nn.Linear and attached(module) is None
        self.parameters = module.__dict__["_parameters"] if plain else None

    def weight_for(self, rows: torch.Tensor) -> torch.Tensor | None:
        """The weight, if `rows` may be multiplied by it; torchao and tensor parallelism put tensors of their own there."""
        weight = None if self.parameters is None else self.parameters["weight"]
        return weight if type(weight) is nn.Parameter and weight.dtype == rows.dtype else None

    def __call__(self, rows: torch.Tensor, batch: int | None) -> torch.Tensor:
        """The layer called, `[R, C_out]`: with rows in one piece or, as stock would, with `[batch, S, C_in]`."""
        return called(self.module, rows, batch)


def linear_into(layer: Projection, rows: torch.Tensor, out: torch.Tensor, batch: int | None = None) -> None:
    """`out[:] = layer(rows)`; a plain linear layer writes there itself.

    Args:
        rows: `[R, C_in]`.
        batch: how many samples the rows are, if a layer that is called has to get them apart; see `Projection.__call__`.
    """
    if rows.shape[0] == 0:
        return
    weight = layer.weight_for(rows)
    if weight is None:
        out.copy_(layer(rows, batch))
    else:
        torch._C._nn.linear(rows, weight, layer.parameters["bias"], out=out)


def scatter_linear(layer: Projection, rows: torch.Tensor, places: Places, batch: int | None) -> None:
    """`linear_into` where the results lie in several places; what is not a plain linear layer is called once."""
    if layer.parameters is not None or (len(places) == 1 and batch is None):
        for own, out, there in places:
            linear_into(layer, rows[own], out[there])
        return
    results = layer(rows, batch)
    for own, out, there in places:
        out[there] = results[own]


def gather_linear(layer: Projection, places: Places, out: torch.Tensor, batch: int | None) -> None:
    """`linear_into` where the rows lie in several places; what is not a plain linear layer is called once."""
    if layer.parameters is not None or (len(places) == 1 and batch is None):
        for own, rows, there in places:
            linear_into(layer, rows[there], out[own])
        return
    linear_into(layer, torch.cat([rows[there] for _, rows, there in places]), out, batch)


def feed_forward_into(
    up: Projection, down: Projection, rows: torch.Tensor, out: torch.Tensor, batch: int | None = None
) -> None:
    """`out[:] = down(gelu(up(rows)))`, GELU in its tanh approximation."""
    if rows.shape[0] == 0:
        return
    weight = up.weight_for(rows)
    if weight is None:
        hidden = F.gelu(up(rows, batch), approximate="tanh")
    else:
        hidden = linear_gelu(rows, weight, up.parameters["bias"])
    linear_into(down, hidden, out, batch)


def called(module: nn.Module, rows: torch.Tensor, batch: int | None) -> torch.Tensor:
    """`module(rows)` `[R, C_out]`, of rows in one piece or, as stock would, of `[batch, S, C_in]`."""
    if batch is None:
        return module(rows)
    return module(rows.unflatten(0, (batch, -1))).flatten(0, 1)
