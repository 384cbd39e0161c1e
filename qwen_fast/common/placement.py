"""Modules called on a device on which their weights are not, and moves between device and host memory."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from .state import logger


def to_host(module: nn.Module) -> None:
    """Move the weights of `module` to host memory, pinned where CUDA is available."""
    module._apply(functools.partial(_apply_on_host, _to_cpu))


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move the weights of `module` to `device`, unpinned if that is the CPU."""
    module._apply(functools.partial(_release, device))


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
