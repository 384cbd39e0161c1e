"""How a projection computes: the one place that knows kinds of linear layers."""

import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn

from qwen_fast_kernels import linear_gelu

from ..common.hooks import is_plain_linear


def linear_into(module: nn.Module, rows: torch.Tensor, out: torch.Tensor) -> None:
    """`out[:] = module(rows)`; a plain linear layer writes there itself."""
    if rows.shape[0] == 0:
        return
    if not is_plain_linear(module) or module.weight.dtype != rows.dtype:
        out.copy_(module(rows))
    elif module.bias is None:
        torch.mm(rows, module.weight.t(), out=out)
    else:
        torch.addmm(module.bias, rows, module.weight.t(), out=out)


def feed_forward_into(module: FeedForward, rows: torch.Tensor, out: torch.Tensor) -> None:
    """`out[:] = module(rows)`, for a feed-forward with tanh-approximated GELU."""
    if rows.shape[0] == 0:
        return
    up, down = module.net[0].proj, module.net[2]
    if is_plain_linear(up) and up.weight.dtype == rows.dtype:
        hidden = linear_gelu(rows, up.weight, up.bias)
    else:
        hidden = F.gelu(up(rows), approximate="tanh")
    linear_into(down, hidden, out)
