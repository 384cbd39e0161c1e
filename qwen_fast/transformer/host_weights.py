"""Modulation weights that stay in host memory, and modules called on a device on which their weights are not.

With a modulation table no step reads the weights of `img_mod` and `txt_mod`: 13.6 of the 40.9 GB of Qwen-Image in bf16.
`keep_on_host` leaves them on the host whatever moves the model, `return_to_device` undoes it. Parameters, names and order
stay diffusers' own; a forward of diffusers still works, and brings the weights along for that one call.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..common.hardware import free_bytes
from ..common.pickled import PickledAsStock
from ..common.placement import (
    _apply_on_host,
    _offload_group,
    _release,
    _tensors,
    _to_cpu,
    group_keeps_on_disk,
    on_device,
    weights_reason,
)
from ..common.state import logger

_GROUP_MODULES = "_qwen_fast_modules"  # on a group of diffusers' group offloading: the modules it had before


class HostSequential(PickledAsStock, nn.Sequential):
    """The class of an `img_mod` or `txt_mod` whose weights stay in host memory: `.to()` changes their dtype only."""

    STANDS_FOR = nn.Sequential

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "HostSequential":
        return super()._apply(functools.partial(_apply_on_host, fn), recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Sequential's, on the input's device."""
        for module in self:
            input = on_device(module, input.device)(input)
        return input

    def _get_name(self) -> str:
        return nn.Sequential.__name__  # a printed model looks as before


def keep_on_host(transformer: nn.Module) -> dict[str, str]:
    """Move the weights of every block's `img_mod` and `txt_mod` to host memory, and make them stay there.

    They stay under `.to()`, `.cuda()`, accelerate's model offload and diffusers' block-level group offload; a change of
    dtype still applies. Pinned where CUDA is available, which takes host memory in powers of two (128 MiB for one weight
    of 108). Calling it again is cheap and brings home what strayed: a LoRA loaded since, weights that
    `load_state_dict(assign=True)` put elsewhere, a group offload enabled since.

    Args:
        transformer (QwenImageTransformer2DModel): changed in place; parameter objects, names and order stay.
    Returns:
        dict[str, str]: the modules left as they are, by name, and why; empty when all are on the host.
    """
    left = {}
    for name, module in modulation_modules(transformer):
        reason = disk_reason(transformer) or _reason_to_leave(module)
        if reason is not None:
            left[name] = reason
            continue
        module.__class__ = HostSequential
        module._apply(_to_cpu)
    for group in filter(None, map(_offload_group, transformer.transformer_blocks)):
        _leave_out(group)
    return left


def return_to_device(transformer: nn.Module, device: torch.device | str | None = None) -> int:
    """Undo `keep_on_host`: classes as before, the weights where the rest of the model is.

    Args:
        transformer (QwenImageTransformer2DModel): changed in place.
        device: where the weights go. Default: the device of the model's other parameters; the host where those are on
            meta, as under sequential offload.
    Returns:
        int: bytes that this takes on the device; 0 when the weights stay on the host.
    Raises:
        RuntimeError: the device has less free memory than that; nothing has moved.
    """
    modules = [module for _, module in modulation_modules(transformer) if isinstance(module, HostSequential)]
    if not modules:
        return 0
    if device is None:  # the first parameters are those of the timestep embedding
        device = next((parameter.device for parameter in transformer.parameters() if not parameter.is_meta), "cpu")
    device = torch.device(device)
    needed = 0 if device.type == "cpu" else host_bytes(transformer)
    free = free_bytes(device)
    logger.info("modulation weights return to %s: %d bytes are needed there.", device, needed)
    if free is not None and needed > free:
        raise RuntimeError(
            f"the modulation weights need {needed} bytes on {device}, which has {free} free; nothing was moved. "
            "Free memory there, or keep them on the host."
        )
    for module in modules:
        module.__class__ = nn.Sequential
        module._apply(functools.partial(_release, device))
    for group in filter(None, map(_offload_group, transformer.transformer_blocks)):
        group.modules = group.__dict__.pop(_GROUP_MODULES, group.modules)
    return needed


def host_bytes(transformer: nn.Module) -> int:
    """Bytes of modulation weights that `keep_on_host` keeps in host memory: what the device does not have to hold."""
    modules = (module for _, module in modulation_modules(transformer) if isinstance(module, HostSequential))
    return sum(tensor.nbytes for module in modules for tensor in _tensors(module).values() if tensor.device.type == "cpu")


def disk_reason(transformer: nn.Module) -> str | None:
    """Why the weights cannot be read between forwards, or None: group offloading to disk leaves uninitialised memory."""
    if any(map(group_keeps_on_disk, (transformer, *transformer.transformer_blocks))):
        return "diffusers' group offload keeps its weights on disk"
    return None


def modulation_modules(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every block's `img_mod` and `txt_mod`, in the order of the model."""
    for index, block in enumerate(transformer.transformer_blocks):
        for name in ("img_mod", "txt_mod"):
            yield f"transformer_blocks.{index}.{name}", getattr(block, name)


def _leave_out(group: Any) -> None:
    """Let a group of blocks move all but the modulation weights: it assigns `.data`, past any `.to()`.

    The group keeps lists of modules, whose parameters it moves. A block has no parameters but those of its children.
    """
    whole = group.__dict__.setdefault(_GROUP_MODULES, group.modules)
    group.modules = [child for block in whole for child in block.children() if not isinstance(child, HostSequential)]


def _reason_to_leave(module: nn.Module) -> str | None:
    if type(module) not in (nn.Sequential, HostSequential):
        return f"it is a {type(module).__name__}, not a plain nn.Sequential"
    return weights_reason(module)
