"""Modules called on a device on which their weights are not, and moves between device and host memory."""

import contextlib
import functools
import itertools
import mmap
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from .hardware import indexed, side_stream
from .state import logger

_ALIGNMENT = 512  # bytes, as the CUDA allocator aligns
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


def to_host(module: nn.Module) -> None:
    """Move the weights of `module` to host memory, pinned where CUDA is available."""
    module._apply(functools.partial(apply_on_host, _to_cpu))


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move the weights of `module` to `device`, unpinned if that is the CPU."""
    module._apply(functools.partial(release, device))


def group_keeps_on_disk(module: nn.Module) -> bool:
    """Whether diffusers' group offloading has put `module` into a group whose weights are on disk between forwards."""
    group = offload_group(module)
    return group is not None and group.offload_to_disk_path is not None


def bringing_hook(module: nn.Module) -> str | None:
    """The kind of hook inside `module` that brings its weights to the device for each call, or None."""
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        if any(getattr(one, "execution_device", None) is not None for one in getattr(hook, "hooks", (hook,))):
            return "accelerate places its weights at each call (sequential offload or a device map)"
        if offload_group(part) is not None:
            return "diffusers' leaf-level group offload places its weights at each call"
    return None


def weights_reason(module: nn.Module) -> str | None:
    """Why the weights of `module` are not ours to move, or None."""
    hook = bringing_hook(module)
    if hook is not None:
        return hook
    for name, tensor in tensors_of(module).items():
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
    if not is_elsewhere(module, device):
        return module
    tensors = {name: tensor for name, tensor in tensors_of(module).items() if not name.startswith(skip)}
    # To the host a copy has to have arrived: nothing makes the CPU wait for one that has not.
    copies = {name: tensor.to(device, non_blocking=device.type != "cpu") for name, tensor in tensors.items()}
    return functools.partial(_with_tensors, module, copies)


def on_device_in_turn(modules: Sequence[nn.Module], device: torch.device) -> Iterator[Callable[..., Any]]:
    """`on_device` for one module after the other; on CUDA the next one's weights travel while the one before is used.

    They arrive in two buffers of the largest module's size, by turns, on the device's side stream; neither the host nor
    PyTorch's allocator has a part in it, and when the last module was used the buffers go back to where they came from.
    Enqueue a module's work before taking the next one, on the stream that is current at the start.
    """
    travelling = [device.type == "cuda" and is_elsewhere(module, device) and _is_plain(module) for module in modules]
    if not any(travelling):
        for module in modules:
            yield on_device(module, device)
        return
    user, side = torch.cuda.current_stream(device), side_stream(indexed(device))
    size = max(sum(map(_aligned, tensors_of(module).values())) for module, far in zip(modules, travelling, strict=True) if far)
    buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)]
    used: list[torch.cuda.Event | None] = [None, None]
    side.wait_stream(user)  # whose work may still be reading what lay where the buffers are

    def send(turn: int) -> tuple[Callable[..., Any], torch.cuda.Event | None]:
        module = modules[turn]
        if not travelling[turn]:
            return on_device(module, device), None
        with torch.cuda.stream(side):
            if used[turn % 2] is not None:
                side.wait_event(used[turn % 2])
            copies, start = {}, 0
            for name, tensor in tensors_of(module).items():
                copies[name] = buffers[turn % 2][start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                copies[name].copy_(tensor, non_blocking=True)
                start += _aligned(tensor)
            return functools.partial(_with_tensors, module, copies), side.record_event()

    try:
        following = send(0)
        for turn in range(len(modules)):
            call, arrived = following
            if turn + 1 < len(modules):
                following = send(turn + 1)
            if arrived is not None:
                user.wait_event(arrived)
            yield call
            used[turn % 2] = user.record_event()
    finally:
        user.wait_stream(side)  # whoever stops early gives the buffers back while a copy is still under way


def host_copy(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`tensor` in host memory: itself if it is there, pinned where CUDA is available.

    torch pins in powers of two, 128 MiB for a weight of 108, and only what is in host memory already. Here exactly as many
    bytes are pinned, a page more at most, and what comes from a device goes straight into them.
    """
    dtype = tensor.dtype if dtype is None else dtype
    on_host = tensor.device.type == "cpu"
    if not torch.cuda.is_available() or not tensor.numel() or (on_host and tensor.dtype == dtype and tensor.is_pinned()):
        return tensor.to("cpu", dtype)
    nbytes = tensor.numel() * dtype.itemsize
    room = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    cudart, address = torch.cuda.cudart(), room.ctypes.data
    if cudart.cudaHostRegister(address, nbytes, _PORTABLE) == cudart.cudaError.success:
        released = weakref.finalize(room, _unregister, cudart.cudaHostUnregister, torch.cuda.synchronize, address)
        released.atexit = False
    else:
        _say_not_pinned()
        if on_host and tensor.dtype == dtype:
            return tensor
    stride = torch.empty_like(tensor, device="meta").stride()
    return torch.from_numpy(room).view(dtype).as_strided(tensor.shape, stride).copy_(tensor)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def lies_elsewhere(module: nn.Module, device: torch.device) -> bool:
    """Whether a tensor of `module` is not on `device` now."""
    parts = [module]
    for part in parts:  # which grows meanwhile; a call asks 120 modules, so no generator of torch's
        own = part.__dict__
        for held in (own["_parameters"], own["_buffers"]):
            for tensor in held.values():
                if tensor is not None and tensor.device != device:
                    return True
        parts += [child for child in own["_modules"].values() if child is not None]
    return False


def is_elsewhere(module: nn.Module, device: torch.device) -> bool:
    """Whether it has to be brought there: nothing of its own will."""
    return lies_elsewhere(module, device) and bringing_hook(module) is None


def offload_group(module: nn.Module) -> Any:
    """The group of diffusers' group offloading that `module` belongs to, or None."""
    registry = module.__dict__.get("_diffusers_hook")
    hook = None if registry is None else registry.get_hook("group_offloading")
    return None if hook is None else hook.group


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu()


def apply_on_host(fn: Callable[[torch.Tensor], torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    """What `fn`, which moves or casts, makes of `tensor`, but in host memory."""
    if tensor.is_meta:
        return fn(tensor)  # no weights: a sequential offload enabled since holds them
    probe = fn(tensor.new_empty(0))
    moves = probe.device != tensor.device
    return host_copy(tensor, probe.dtype) if moves else host_copy(fn(tensor))


def _unregister(unregister: Callable[[int], Any], synchronize: Callable[[], None], address: int) -> None:
    """Give pinned memory back that nothing refers to any more; a copy from it may still be under way."""
    if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
        synchronize()
    unregister(address)


@functools.cache
def _say_not_pinned() -> None:
    """Once: the system's limit for locked memory. Slower to copy, otherwise the same."""
    logger.warning("weights in host memory could not be pinned, `ulimit -l` shows the limit: they are copied more slowly.")
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)  # CUDA reports the failed call once more, to whoever launches next


def _with_tensors(module: nn.Module, tensors: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, tensors, args, kwargs)


def _is_plain(module: nn.Module) -> bool:
    """Whether its tensors are nothing but their elements: a wrapper's are not to be copied one by one."""
    return all(type(tensor) in (nn.Parameter, torch.Tensor) for tensor in tensors_of(module).values())


def _aligned(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def release(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    if device.type == "cpu" and tensor.is_pinned():
        return tensor.clone()
    return tensor.to(device)
