"""Modulation weights that stay in host memory, and modules called on a device on which their weights are not.

With a modulation table no step reads the weights of `img_mod` and `txt_mod`: 13.6 of the 40.9 GB of Qwen-Image in bf16.
`keep_on_host` leaves them on the host whatever moves the model, `return_to_device` undoes it. Parameters, names and order
stay diffusers' own; a forward of diffusers still works, and brings the weights along for that one call.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .reporting import logger

_GROUP_MODULES = "_qwen_fast_modules"  # on a group of diffusers' group offloading: the modules it had before


class HostSequential(nn.Sequential):
    """The class of an `img_mod` or `txt_mod` whose weights stay in host memory: `.to()` changes their dtype only."""

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


def to_host(module: nn.Module) -> None:
    """Move the weights of `module` to host memory, pinned where CUDA is available."""
    module._apply(functools.partial(_apply_on_host, _to_cpu))


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move the weights of `module` to `device`, unpinned if that is the CPU."""
    module._apply(functools.partial(_release, device))


def disk_reason(transformer: nn.Module) -> str | None:
    """Why the weights cannot be read between forwards, or None: group offloading to disk leaves uninitialised memory."""
    if any(map(group_keeps_on_disk, (transformer, *transformer.transformer_blocks))):
        return "diffusers' group offload keeps its weights on disk"
    return None


def group_keeps_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading has put `module` into a group whose weights are on disk between forwards."""
    group = _offload_group(module)
    return group is not None and group.offload_to_disk_path is not None


def bringing_hook(module: nn.Module) -> str | None:
    """The kind of hook inside `module` that brings its weights to the device for each call, or None."""
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        if any(getattr(one, "execution_device", None) is not None for one in getattr(hook, "hooks", (hook,))):
            return "accelerate places its weights at each call (sequential offload or a device map)"
        if _offload_group(part) is not None:
            return "diffusers' leaf-level group offload places its weights at each call"
    return None


def weights_reason(module: nn.Module) -> str | None:
    """Why the weights of `module` are not ours to move, or None."""
    hook = bringing_hook(module)
    if hook is not None:
        return hook
    for name, tensor in _tensors(module).items():
        if type(tensor) not in (nn.Parameter, torch.Tensor):
            return f"{name} is a {type(tensor).__name__}, not a plain tensor"
        if tensor.is_meta:
            return f"{name} is on meta: there is nothing to keep"
    return None


def modulation_modules(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every block's `img_mod` and `txt_mod`, in the order of the model."""
    for index, block in enumerate(transformer.transformer_blocks):
        for name in ("img_mod", "txt_mod"):
            yield f"transformer_blocks.{index}.{name}", getattr(block, name)


def on_device(module: nn.Module, device: torch.device, *, skip: str | tuple[str, ...] = ()) -> Callable[..., Any]:
    """`module` as a callable on `device`; where its weights are elsewhere, with copies of them, made once.

    Weights whose names begin with `skip` are not copied: the call does not use them.

    The module is called either way, with all its hooks, and is not changed. Where a hook of its own brings the weights
    for each call (sequential offload, leaf-level group offload) that is left to the hook.
    """
    if not _is_elsewhere(module, device):
        return module
    tensors = {name: tensor for name, tensor in _tensors(module).items() if not name.startswith(skip)}
    # To the host a copy has to have arrived: nothing makes the CPU wait for one that has not.
    copies = {name: tensor.to(device, non_blocking=device.type != "cpu") for name, tensor in tensors.items()}
    return lambda *args, **kwargs: functional_call(module, copies, args, kwargs)


def on_device_in_turn(groups: Iterable[tuple[nn.Module, ...]], device: torch.device) -> Iterator[list[Callable[..., Any]]]:
    """`on_device` for one group of modules after the other; on CUDA the next group's weights travel meanwhile.

    At most two groups are on the device at a time, so the host waits for the use of a group before it sends the next but
    one. Enqueue a group's work before taking the next, on the stream that is current at the start.
    """
    groups = list(groups)
    if device.type != "cuda" or not any(_is_elsewhere(module, device) for module in itertools.chain(*groups)):
        for group in groups:
            yield [on_device(module, device) for module in group]
        return
    user, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(user)

    def send(group: tuple[nn.Module, ...]) -> tuple[list[Callable[..., Any]], torch.cuda.Event]:
        with torch.cuda.stream(side):
            return [on_device(module, device) for module in group], side.record_event()

    waiting, used = send(groups[0]), None
    for following in (*groups[1:], None):
        callables, arrived = waiting
        if used is not None:
            used.synchronize()
        if following is not None:
            waiting = send(following)
        user.wait_event(arrived)
        yield callables
        used = user.record_event()
    side.wait_stream(user)  # the copies' memory belongs to that stream: nothing is written there before it is read


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def _is_elsewhere(module: nn.Module, device: torch.device) -> bool:
    return any(tensor.device != device for tensor in _tensors(module).values()) and bringing_hook(module) is None


def _offload_group(module: nn.Module) -> Any:
    """The group of diffusers' group offloading that `module` belongs to, or None."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.group


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


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


def _apply_on_host(fn: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """What `fn`, which moves or casts, makes of `tensor`, but in host memory."""
    if tensor.is_meta:
        return fn(tensor)  # no weights: a sequential offload enabled since holds them
    probe = fn(tensor.new_empty(0))
    return _pinned(fn(tensor) if probe.device.type == "cpu" else tensor.to("cpu", probe.dtype))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    if not torch.cuda.is_available() or tensor.is_pinned():
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError as error:  # the system's limit for locked memory: slower to copy, otherwise the same
        logger.warning("%d bytes of weights could not be pinned: %s", tensor.nbytes, error)
        return tensor


def _release(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    if device.type == "cpu" and tensor.is_pinned():
        return tensor.clone()
    return tensor.to(device)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that PyTorch can still allocate on a CUDA device; None elsewhere."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
