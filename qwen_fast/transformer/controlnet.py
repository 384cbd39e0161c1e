"""The fused Qwen-Image ControlNet: a few of the transformer's blocks, whose image rows become residuals of its blocks.

Nothing is attached to it: its classes and its forward stay diffusers' own, and `residuals` computes from its modules what that
forward would give. Where they are not all stock's own, the ControlNet is called.
"""

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import nn

from ..common.hooks import attached
from ..common.own import foreign_methods
from .blocks import TableRows, TokenStream
from .layout import Layout
from .linear import linear_into
from .modulation import ModulationSource
from .survey import Survey

STOCK = diffusers.QwenImageControlNetModel
UNION = diffusers.QwenImageMultiControlNetModel


def whole_reason(controlnet: nn.Module) -> str | None:
    """Why what a pipeline has as its ControlNet is called, or None."""
    if type(controlnet) not in (STOCK, UNION):
        return f"the ControlNet is a {type(controlnet).__name__}"
    if type(controlnet) is UNION:
        held = attached(controlnet)
        found = [held.words] if held is not None else foreign_methods(UNION, ("forward", "__call__"))
        if not found and [*map(type, controlnet.nets)] != [STOCK]:
            found = [", ".join(type(net).__name__ for net in controlnet.nets)]
        return f"the ControlNet has {found[0]}" if found else None
    return None


def net_of(controlnet: nn.Module) -> nn.Module:
    """The one network: that of a union takes several pictures in turn."""
    return controlnet.nets[0] if isinstance(controlnet, UNION) else controlnet


def fused_net(pipe: Any) -> nn.Module | None:
    """The ControlNet of a pipeline, where it has one of diffusers'."""
    controlnet = getattr(pipe, "controlnet", None)
    return None if controlnet is None or whole_reason(controlnet) is not None else net_of(controlnet)


def stock_reason(net: nn.Module, found: Survey) -> str | None:
    """Why a ControlNet is called as diffusers wrote it, or None."""
    if found.foreign:
        return f"the ControlNet has {found.foreign[0]}"
    if found.touched:
        return "the ControlNet has hooks, such as those of offloading, casting or a cache"
    if getattr(net, "_parallel_config", None) is not None:
        return "the ControlNet has context parallelism"
    return None if found.rows else "the ControlNet has parts that are not as diffusers made them"


def embedded(found: Survey, control: torch.Tensor) -> torch.Tensor:
    """A control picture's latents `[B, S_img, C_control]` as image rows `[B * S_img, C]`; every step adds the same."""
    embedder = found.control[0]
    out = control.new_empty(control.shape[0] * control.shape[1], embedder.module.out_features)
    linear_into(embedder, control.flatten(0, 1), out)
    return out


def residuals(
    net: nn.Module,
    found: Survey,
    hidden_states: torch.Tensor,
    control: torch.Tensor,
    scale: float | torch.Tensor,
    text: torch.Tensor,
    layout: Layout,
    source: ModulationSource,
    attention: str,
) -> list[torch.Tensor]:
    """What the ControlNet adds behind the transformer's blocks.

    Args:
        net: a QwenImageControlNetModel that `found` has no `stock_reason` against.
        hidden_states: `[B, S_img, C_in]`, the latents.
        control: `[B * S_img, C]`, of `embedded`.
        scale: of the residuals; one number, or a tensor to multiply them by.
        text: `[txt_rows, C]`, the prompts after txt_norm and txt_in.
        layout: of the prompts and the latents.
        source: its modulations.
        attention: the option, see `attention.attend`.
    Returns:
        list[Tensor]: one `[B, S_img, C]` for each of its blocks.
    Source: diffusers 0.42.1, models/controlnets/controlnet_qwenimage.py, QwenImageControlNetModel.forward.
    """
    rows = hidden_states.new_empty(layout.rows, text.shape[1])
    rows[: layout.txt_rows] = text
    image = rows[layout.txt_rows :]
    linear_into(found.img_in, hidden_states.flatten(0, 1), image)
    image += control
    head_dim = net.config.attention_head_dim
    stream = TokenStream(rows, layout, TableRows(source.step_index, None), head_dim, attention)
    results, last = [], len(found.order) - 1
    for index, (block, projection) in enumerate(zip(found.order, found.control[1:], strict=True)):
        following = None if index == last else _first_norm(source, index + 1)
        stream.through(found.parts[id(block)], source.block(index), following, drop_text=index == last)
        out = torch.empty_like(image)
        linear_into(projection, stream.residual[stream.split :], out)
        results.append(out.unflatten(0, hidden_states.shape[:2]).mul_(scale))
    return results


def _first_norm(source: ModulationSource, index: int):
    return lambda: (source.block(index).shift1, source.block(index).scale1)


def summed(several: Sequence[list[torch.Tensor]]) -> list[torch.Tensor] | None:
    """The residuals of several control pictures together, in place of the first one's; None of none."""
    if not several:
        return None
    first, *others = several
    for other in others:
        for one, more in zip(first, other, strict=True):
            one += more
    return first
