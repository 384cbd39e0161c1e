"""Operators that a GPU runs otherwise than a CPU: allocations, copies, products, and those for which the host waits."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from support.emulated_cuda import notes as kinds
from support.emulated_cuda.memory import on_host, poison, redispatch

_aten = torch.ops.aten
# The device's answer decides the size of the result, or the host gets it: it has to wait.
WAITING = {
    "aten::_local_scalar_dense": "item",
    "aten::equal": "equal",
    "aten::nonzero": "nonzero",
    "aten::masked_select": "masked_select",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
    "aten::unique_consecutive": "unique_consecutive",
    "aten::repeat_interleave.Tensor": "repeat_interleave",
    "aten::bincount": "bincount",
    "aten::nonzero_static": "nonzero_static",
}
# By operator, which argument is the left factor.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::_addmm_activation": 1, "aten::bmm": 0, "aten::baddbmm": 1}
# torch has kernels of these for all devices, which would go before a fallback.
BEFORE_COMPOSITES = ("copy_", "_to_copy", "convolution", "scaled_dot_product_attention")


def waits(name: str, args: tuple) -> bool:
    """Whether the host waits for an operator's result."""
    if name.startswith(("aten::index.Tensor", "aten::index_put", "aten::_index_put_impl_")):
        masks = [index for index in args[1] if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)]
        filled = len(args) > 2 and args[2].numel() == 1  # what torch does by masked_fill
        return bool(masks) and not filled
    return name in WAITING or ("_assert" in name and "async" not in name)


def _empty(backend: Any, op, size, *, dtype=None, device=None, memory_format=None, **_ignored) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    stride = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format).stride()
    return backend.empty(size, stride, dtype, device)


def _empty_strided(backend: Any, op, size, stride, *, dtype=None, device=None, **_ignored) -> torch.Tensor:
    return backend.empty(size, stride, dtype or torch.get_default_dtype(), device)


def _resize(backend: Any, op, tensor, size, *, memory_format=None) -> torch.Tensor:
    stride = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format).stride()
    needed = (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0) * tensor.element_size()
    storage = tensor.untyped_storage()
    if needed > backend.memory.block(tensor).nbytes - tensor.storage_offset() * tensor.element_size():
        storage = backend.empty(size, stride, tensor.dtype, tensor.device).untyped_storage()
    redispatch(_aten.set_.source_Storage_storage_offset, tensor, storage, 0, size, stride)
    return tensor


def _copy(backend: Any, op, target, source, non_blocking: bool = False) -> torch.Tensor:
    """Within the device, or across: there the host waits, unless it said that it would not and its memory is pinned."""
    if target.is_cuda and source.is_cuda:
        return backend.run(op, (target, source), {})
    shape = f"{str(target.dtype).removeprefix('torch.')}{list(target.shape)}"
    if target.numel() == 0:
        return target
    kind, host = (kinds.TO_DEVICE, source) if target.is_cuda else (kinds.TO_HOST, target)
    pinned = backend.is_pinned(host)
    waits = not non_blocking
    timeline = backend.timeline
    if waits or not pinned:
        timeline.refuse(f"{kind} of {shape}, {'blocking' if waits else 'from or to memory that is not pinned'}")
    how = f"{'pinned' if pinned else 'pageable'}, {'non-blocking' if non_blocking else 'blocking'}"
    backend.notes.add(kind, f"{shape}, {how}", waits=waits, capturing=timeline.graph is not None)
    blocks = [backend.memory.block(tensor) for tensor in (target, source) if tensor.is_cuda]
    graph = timeline.work("copy_", *((), blocks) if target.is_cuda else (blocks, ()))
    if waits:
        timeline.warn(kind)
        timeline.host_arrives()
    if graph is not None:
        again, outside = backend.keep(graph, target if target.is_cuda else source)
        step = (lambda: again().copy_(source)) if target.is_cuda else (lambda: target.copy_(again()))
        graph.record("copy_", outside, step, blocks if target.is_cuda else ())
        return target
    if target.is_cuda:
        on_host(target).copy_(source)
        if pinned and not waits:
            timeline.leaves_later(shape, source)
    elif pinned and not waits:
        arriving = on_host(source).clone()
        poison(target)  # until the host has waited
        timeline.arrives_later(lambda: target.copy_(arriving))
    else:
        target.copy_(on_host(source))
    return target


def _to_copy(backend: Any, op, tensor, *, dtype=None, device=None, non_blocking=False, memory_format=None, **_ignored):
    """A non-blocking copy to the host lands in pinned memory, and the host goes on before it has arrived."""
    if device is None or device.type != "cpu" or not non_blocking:
        return redispatch(
            op, tensor, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format, **_ignored
        )
    target = backend.pin(torch.empty_like(tensor, device="cpu", dtype=dtype, memory_format=memory_format))
    return target.copy_(tensor, non_blocking=True)


def _view_only(backend: Any, op, *args, **kwargs) -> Any:
    return redispatch(op, *args, **kwargs)


def _as_one(backend: Any, op, *args, **kwargs) -> Any:
    """One kernel, where torch would take it apart for a device that it does not know."""
    return backend.run(op, args, kwargs)


def _attention(backend: Any, op, *args, **kwargs) -> Any:
    """Any of torch's kernels may be asked for by name; the CPU has one for all of them."""

    def compute(*own_args, **own_kwargs):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            return op(*own_args, **own_kwargs)

    return backend.run(op, args, kwargs, compute)


def product(backend: Any, op, *args, **kwargs) -> torch.Tensor:
    """A matrix product whose summation starts at another place for another number of rows."""
    place = PRODUCTS[op.name().split(".")[0]]
    a, b = args[place : place + 2]
    depth = a.shape[-1]
    if backend.products_vary and depth > 1 and a.is_floating_point():
        start = a.shape[-2] * 7 % depth
        a, b = a.roll(start, -1), b.roll(start, -2)
    args = (*args[:place], a, b, *args[place + 2 :])
    if op.name().startswith("aten::_addmm_activation"):  # on CUDA its GELU is that with tanh
        out, use_gelu = kwargs.pop("out", None), kwargs.pop("use_gelu", False)
        found = torch.addmm(*args, **kwargs)
        found = F.gelu(found, approximate="tanh") if use_gelu else F.relu(found)
        return found if out is None else out.resize_(found.shape).copy_(found)
    return op(*args, **kwargs)


SPECIAL = {
    "aten::empty.memory_format": _empty,
    "aten::empty_strided": _empty_strided,
    "aten::resize_": _resize,
    "aten::copy_": _copy,
    "aten::_to_copy": _to_copy,
    "aten::convolution": _as_one,
    "aten::scaled_dot_product_attention": _attention,
    "aten::set_.source_Storage_storage_offset": _view_only,
    "aten::set_.source_Tensor": _view_only,
    "aten::set_.source_Storage": _view_only,
}
