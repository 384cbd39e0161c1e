"""How a projection computes: the one place that knows kinds of linear layers."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn

from qwen_fast_kernels import linear_gelu

from ..common.hooks import is_plain_linear

Places = list[tuple[slice, torch.Tensor, slice]]  # rows of the layer's own, and a tensor with the rows where they lie there


def linear_into(module: nn.Module, rows: torch.Tensor, out: torch.Tensor, batch: int | None = None) -> None:
    """`out[:] = module(rows)`; a plain linear layer writes there itself.

    Args:
        rows: `[R, C_in]`.
        batch: how many samples the rows are, if a layer that is called has to get them apart, `[batch, S, C_in]`.
    """
    if rows.shape[0] == 0:
        return
    if not is_plain_linear(module) or module.weight.dtype != rows.dtype:
        out.copy_(called(module, rows, batch))
    elif module.bias is None:
        torch.mm(rows, module.weight.t(), out=out)
    else:
        torch.addmm(module.bias, rows, module.weight.t(), out=out)


def scatter_linear(module: nn.Module, rows: torch.Tensor, places: Places, batch: int | None) -> None:
    """`linear_into` where the results lie in several places; what is not a plain linear layer is called once."""
    if is_plain_linear(module) or len(places) == 1 and batch is None:
        for own, out, there in places:
            linear_into(module, rows[own], out[there])
        return
    results = called(module, rows, batch)
    for own, out, there in places:
        out[there] = results[own]


def gather_linear(module: nn.Module, places: Places, out: torch.Tensor, batch: int | None) -> None:
    """`linear_into` where the rows lie in several places; what is not a plain linear layer is called once."""
    if is_plain_linear(module) or len(places) == 1 and batch is None:
        for own, rows, there in places:
            linear_into(module, rows[there], out[own])
        return
    rows = torch.cat([rows[there] for _, rows, there in places])
    linear_into(module, rows, out, batch)


def feed_forward_into(module: FeedForward, rows: torch.Tensor, out: torch.Tensor, batch: int | None = None) -> None:
    """`out[:] = module(rows)`, for a feed-forward with tanh-approximated GELU."""
    if rows.shape[0] == 0:
        return
    up, down = module.net[0].proj, module.net[2]
    if is_plain_linear(up) and up.weight.dtype == rows.dtype:
        hidden = linear_gelu(rows, up.weight, up.bias)
    else:
        hidden = F.gelu(called(up, rows, batch), approximate="tanh")
    linear_into(down, hidden, out, batch)


def called(module: nn.Module, rows: torch.Tensor, batch: int | None) -> torch.Tensor:
    """`module(rows)` `[R, C_out]`, of rows in one piece or, as stock would, of `[batch, S, C_in]`."""
    if batch is None:
        return module(rows)
    return module(rows.unflatten(0, (batch, -1))).flatten(0, 1)
