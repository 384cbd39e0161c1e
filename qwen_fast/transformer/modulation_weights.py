"""Where the weights of `img_mod` and `txt_mod` rest: a third of the transformer, 13.6 of the 40.9 GB of Qwen-Image in bf16.

With a modulation table no step reads them. `settle` decides by the memory at hand; `keep_on_host` leaves them in host memory
whatever moves the model, `return_to_device` undoes it. Parameters, names and order stay diffusers' own; a forward of diffusers
still works, and brings the weights along for that one call.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import nn

from ..common.hardware import free_bytes, indexed
from ..common.pickled import PickledAsStock
from ..common.placement import (
    apply_on_host,
    bringing_hook,
    group_keeps_on_disk,
    is_elsewhere,
    offload_group,
    on_device,
    release,
    tensors_of,
    to_host,
    weights_reason,
)
from ..common.state import logger

_GROUP_MODULES = "_qwen_fast_modules"  # on a group of diffusers' group offloading: the modules it had before
# Beside the weights a picture of Qwen-Image in bf16 takes, by arithmetic: 0.7 GiB for both predictions at 1024x1024 and 2.9 at
# 2048x2048, then the VAE 0.6 or 2.3, a modulation table 0.2. What CUDA and its libraries keep comes to it.
ROOM = 4 * 2**30
HYSTERESIS = 2**30


class HostSequential(PickledAsStock, nn.Sequential):
    """The class of an `img_mod` or `txt_mod` whose weights stay in host memory: `.to()` changes their dtype only."""

    STANDS_FOR = nn.Sequential
    said = False  # once a process

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "HostSequential":
        return super()._apply(functools.partial(apply_on_host, fn), recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As nn.Sequential's, on the input's device."""
        for module in self:
            if not HostSequential.said and is_elsewhere(module, input.device):
                HostSequential.said = True
                logger.warning(
                    "a forward without a modulation table brings the modulation weights from host memory, where a pipeline "
                    "with a table has put them: it waits for all of them, each time. modulation='device' leaves them."
                )
            input = on_device(module, input.device)(input)
        return input

    def _get_name(self) -> str:
        return nn.Sequential.__name__  # a printed model looks as before


def settle(transformer: nn.Module, wish: str, device: torch.device, coming: Callable[[], int]) -> None:
    """Put the modulation weights where the option says, when their model has come to `device` or is about to go there.

    "device" and "layers" bring them back to the model, "host" takes them off it. "auto" leaves them on a CUDA device if ROOM
    bytes stay free there for a picture after all weights have come, and takes them off it if not. Once off, they come back
    only where there is HYSTERESIS more: a few bytes more or less never move them to and fro. Where an offload hook moves the
    model, they rest on the host too: there they need not travel each time. On a CPU nothing moves.

    It is decided when a pipeline arrives (`enable`, `.to`, loading, the first call under other hooks), not at each call.

    Args:
        coming: tells how many bytes of the pipeline's weights, these included, are not on `device` yet.
    Raises:
        RuntimeError: they do not fit where they have to go; nothing has moved.
    """
    resting = rests_on_host(transformer)
    if wish == "auto":
        if device.type != "cuda":
            return
        missing = ROOM + resting * HYSTERESIS + coming()
        short = offloaded(transformer) or missing > free_bytes(device, enough=missing)
        wish = "host" if short else "device"
    if wish == "host":
        keep_on_host(transformer)
    elif resting:
        return_to_device(transformer, device)


def rests_on_host(transformer: nn.Module) -> bool:
    """Whether `keep_on_host` keeps any of the modulation weights."""
    return any(isinstance(module, HostSequential) for _, module in modulation_modules(transformer))


def offloaded(transformer: nn.Module) -> bool:
    """Whether a hook of accelerate or diffusers moves the model, or its blocks, to the device for a call and away after it."""
    hook = transformer.__dict__.get("_hf_hook")
    moves = any(getattr(one, "execution_device", None) is not None for one in getattr(hook, "hooks", (hook,)))
    return moves or any(offload_group(part) is not None for part in (transformer, transformer.transformer_blocks[0]))


def keep_on_host(transformer: nn.Module) -> dict[str, str]:
    """Move the weights of every block's `img_mod` and `txt_mod` to host memory, and make them stay there.

    They stay under `.to()`, `.cuda()`, accelerate's model offload and diffusers' block-level group offload; a change of
    dtype still applies. Pinned where CUDA is available. Calling it again is cheap and brings home what strayed: a LoRA loaded
    since, weights that `load_state_dict(assign=True)` put elsewhere, a group offload enabled since.

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
        to_host(module)
        module.__class__ = HostSequential
    for group in filter(None, map(offload_group, transformer.transformer_blocks)):
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
    device = indexed(device)
    needed = 0 if device.type == "cpu" else host_bytes(transformer)
    free = free_bytes(device, enough=needed)
    logger.info("modulation weights return to %s: %d bytes are needed there.", device, needed)
    if free is not None and needed > free:
        raise RuntimeError(
            f"the modulation weights need {needed} bytes on {device}, which has {free} free; nothing was moved. "
            "Free memory there, or keep them on the host."
        )
    for module in modules:
        module.__class__ = nn.Sequential
        module._apply(functools.partial(release, device))
    for group in filter(None, map(offload_group, transformer.transformer_blocks)):
        group.modules = group.__dict__.pop(_GROUP_MODULES, group.modules)
    return needed


def host_bytes(transformer: nn.Module) -> int:
    """Bytes of modulation weights that `keep_on_host` keeps in host memory: what the device does not have to hold."""
    modules = (module for _, module in modulation_modules(transformer) if isinstance(module, HostSequential))
    return sum(tensor.nbytes for module in modules for tensor in tensors_of(module).values() if tensor.device.type == "cpu")


def disk_reason(transformer: nn.Module) -> str | None:
    """Why the weights cannot be read between forwards, or None: group offloading to disk leaves uninitialised memory."""
    if any(map(group_keeps_on_disk, (transformer, *transformer.transformer_blocks))):
        return "diffusers' group offload keeps its weights on disk"
    return None


def table_reason(transformer: nn.Module) -> str | None:
    """Why a table costs more than it saves, or cannot be computed, with the hooks on `transformer` now; None: it can."""
    modules = (module for _, module in table_modules(transformer))
    return disk_reason(transformer) or next(filter(None, map(bringing_hook, modules)), None)


def table_modules(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that a modulation table depends on."""
    yield "time_text_embed", transformer.time_text_embed
    yield from modulation_modules(transformer)
    if hasattr(transformer, "norm_out"):  # a ControlNet has none
        yield "norm_out.linear", transformer.norm_out.linear


def modulation_modules(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every block's `img_mod` and `txt_mod`, in the order of the model."""
    blocks = transformer.transformer_blocks
    if not all(isinstance(block, QwenImageTransformerBlock) for block in blocks):
        # Blocks of somebody's own have none; a cache may have put one in the place of all, with them inside.
        blocks = [module for module in blocks.modules() if isinstance(module, QwenImageTransformerBlock)]
    for index, block in enumerate(blocks):
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
