"""The operators of the emulated device: torch's CUDA backend, written in Python over the CPU's kernels.

A CPU build of torch has no kernel under the dispatch key CUDA, so that one fallback there sees every operator that reaches
a device, in every thread, below autograd and views. It runs the CPU's kernel on the same memory, or, in a capture, records
it. What a GPU does otherwise than a CPU is done here too: the host waits where it asks for values, copies cross, tensors of
two devices do not mix, and a product depends a little on how many rows it has.
"""

import functools
import weakref
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

from . import notes as kinds
from .memory import Block, Memory, on_host, poison, redispatch, view_of
from .streams import Graph, Timeline

_aten = torch.ops.aten
# The device's answer decides the size of the result, or the host gets it: it has to wait.
_WAITING = {
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
_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
_PRODUCTS = {"aten::mm": 0, "aten::addmm": 1, "aten::_addmm_activation": 1, "aten::bmm": 0, "aten::baddbmm": 1}


class Backend:
    """The operators of one device.

    Args:
        memory, timeline: of the device.
        products_vary: let the last digits of a matrix product depend on its number of rows, as cuBLAS's do.
    """

    current: "Backend | None" = None

    def __init__(self, memory: Memory, timeline: Timeline, products_vary: bool = True):
        self.memory, self.timeline, self.notes = memory, timeline, timeline.notes
        self.products_vary = products_vary
        self.generator = torch.Generator()  # of the device; the CPU's own is not touched by work on CUDA
        self._pinned = weakref.WeakValueDictionary()  # by address, numpy arrays that hold the memory

    # Tensors ----------------------------------------------------------------------------------------------------------

    def empty(self, size, stride, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
        graph = self.timeline.graph
        self.timeline.allocated("an allocation")
        index = 0 if device is None or device.index is None else device.index
        tensor = self.memory.allocate(size, stride, dtype, index, self.timeline.stream, graph)
        if graph is not None:
            graph.held.append(tensor)
        return tensor

    def like(self, host: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """A new CUDA tensor of a host tensor's size, strides and dtype; not its values."""
        if host.is_meta or host.layout == torch.strided:
            return self.empty(host.shape, _dense(host), host.dtype, device)
        raise NotImplementedError(f"{host.layout} tensors on the emulated device")

    # Work -------------------------------------------------------------------------------------------------------------

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """An operator of torch on tensors of which one at least is on the device, or that makes one there."""
        name = op.name()
        special = _SPECIAL.get(name)
        if special is not None:
            return special(self, op, *args, **kwargs)
        if _is_view(op):
            return redispatch(op, *args, **kwargs)
        if name in _WAITING or ("_assert" in name and "async" not in name):
            self.timeline.warn(name)
            self.timeline.host_waits(_WAITING.get(name, name))
        return self.run(op, args, kwargs)

    def run(self, op: Any, args: tuple, kwargs: dict, compute: Any = None) -> Any:
        """Run `compute`, by default the operator on the CPU, on the same memory; in a capture, record it."""
        schema, name = op._schema, op.name()
        if name.split(".")[0] in _PRODUCTS:
            compute = functools.partial(_product, self, op)
        compute = compute or op
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        args = _numbers_as_tensors(schema, args)
        kwargs, device = self._device(kwargs, args)
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        self._refuse_mixed(name, tensors)
        written = _written(schema, args, kwargs)
        # An empty `out=` takes the size of what is computed.
        fresh = [] if kwargs.get("out") is None else [kwargs["out"]]
        fresh = [tensor for tensor in fresh if tensor.is_cuda and tensor.shape == (0,)]
        kwargs = self._own_generator(schema, args, kwargs)
        blocks = {id(block): block for block in map(self.memory.block, filter(_on_device, tensors))}.values()
        changed = {id(block): block for block in map(self.memory.block, filter(_on_device, written))}.values()
        graph = self.timeline.work(name, blocks, changed)
        if graph is not None:
            return self._record(graph, op, compute, args, kwargs, written, fresh, device)
        values = _on_host(args, kwargs, fresh)
        result = compute(*values[0], **values[1])
        for tensor in fresh:
            self._resize(tensor, values[2][id(tensor)])
        return self._returned(schema, result, args, kwargs, device)

    def _record(self, graph: Graph, op, compute, args, kwargs, written, fresh, device) -> Any:
        """Its results, without values, and a step of the graph that computes them."""
        result = None
        if fresh or len(written) < _tensor_results(op._schema):
            shapes = _shapes_of(op, args, kwargs, fresh)
            result = shapes[0]
            for tensor in fresh:
                self._resize(tensor, shapes[1][id(tensor)])
        returned = self._returned(op._schema, result, args, kwargs, device, poisoned=True)
        again, outside = self.keep(graph, (args, kwargs))
        outputs = _tensors(returned)
        new = [all(output is not tensor for tensor in written) for output in outputs]

        def step() -> None:
            own_args, own_kwargs = again()
            found = compute(*own_args, **own_kwargs)
            for output, value, is_new in zip(outputs, _tensors(found), new, strict=False):
                if is_new:
                    on_host(output).copy_(value)

        own = map(self.memory.block, (*filter(_on_device, written), *outputs))
        graph.record(op.name(), outside, step, own)
        return returned

    def keep(self, graph: Graph, values: Any) -> tuple[Any, list[Block]]:
        """A function that gives `values` with host views in place of CUDA tensors, and the blocks it does not hold."""
        outside: list[Block] = []

        def kept(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if not value.is_cuda:
                return value.clone()  # a number, baked into the graph
            block = self.memory.block(value)
            if block.graph is graph:
                return _Kept(value, None)
            outside.append(block)
            return _Kept(None, (block, value.dtype, value.storage_offset(), value.shape, value.stride()))

        held = tree_map(kept, values)
        return lambda: tree_map(lambda value: value.host() if isinstance(value, _Kept) else value, held), outside

    def _returned(self, schema, result, args, kwargs, device, poisoned: bool = False) -> Any:
        """What the caller gets: his own tensors where the operator writes to them, new CUDA tensors for the others."""
        own = iter(_written(schema, args, kwargs, returned=True))
        if len(schema.returns) == 0:
            return None
        results = result if isinstance(result, tuple | list) else (result,)
        if len(schema.returns) == 1:
            if schema.returns[0].alias_info is not None and schema.returns[0].alias_info.is_write:
                return next(own)
            return tree_map(lambda value: self._adopt(value, device, poisoned), result)
        found = []
        for position, described in enumerate(schema.returns):
            if described.alias_info is not None and described.alias_info.is_write:
                found.append(next(own))
            else:
                found.append(tree_map(lambda value: self._adopt(value, device, poisoned), results[position]))
        return tuple(found)

    def _adopt(self, value: Any, device, poisoned: bool) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensor = self.like(value, device)
        if not poisoned:
            on_host(tensor).copy_(value)
            self.memory.block(tensor).written = (self.timeline.stream.id, self.timeline.stream.clock[self.timeline.stream.id])
        return tensor

    def _resize(self, tensor: torch.Tensor, found: torch.Tensor) -> None:
        """An empty `out=` becomes what was computed for it."""
        if found.numel() == 0 and tensor.shape == found.shape:
            return
        new = self.like(found, tensor.device)
        if not found.is_meta:
            on_host(new).copy_(found)
        redispatch(_aten.set_.source_Storage_storage_offset, tensor, new.untyped_storage(), 0, new.shape, new.stride())

    def _device(self, kwargs: dict, args: tuple) -> tuple[dict, torch.device | None]:
        wanted = kwargs.get("device")
        if wanted is not None:
            return {**kwargs, "device": torch.device("cpu")}, wanted
        first = next((v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor) and v.is_cuda), None)
        return kwargs, None if first is None else first.device

    def _own_generator(self, schema, args: tuple, kwargs: dict) -> dict:
        names = [argument.name for argument in schema.arguments]
        if "generator" not in names:
            return kwargs
        place = names.index("generator")
        given = args[place] if place < len(args) else kwargs.get("generator")
        return kwargs if given is not None else {**kwargs, "generator": self.generator}

    def _refuse_mixed(self, name: str, tensors: list[torch.Tensor]) -> None:
        on_cpu = [tuple(tensor.shape) for tensor in tensors if not tensor.is_cuda and tensor.dim() > 0]
        if on_cpu:
            self.notes.add(kinds.MIXED, f"{name} with CPU tensors {on_cpu}")
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
            )

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a CPU tensor in memory that is known as pinned for as long as it lives."""
        room = np.empty(max(tensor.nbytes, 1) + 16, np.uint8)
        self._pinned[room.ctypes.data] = room
        flat = torch.from_numpy(room)[: tensor.nbytes].view(tensor.dtype)
        stride = torch.empty_like(tensor, device="meta").stride()
        return flat.as_strided(tensor.shape, stride).copy_(tensor)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        storage = tensor.untyped_storage()
        return storage.nbytes() > 0 and storage.data_ptr() in self._pinned


class _Kept:
    """A CUDA tensor as a graph keeps it: itself if it is of the graph's pool, else its place in memory."""

    def __init__(self, tensor: torch.Tensor | None, place: tuple | None):
        self.tensor, self.place = tensor, place

    def host(self) -> torch.Tensor:
        if self.tensor is not None:
            return on_host(self.tensor)
        block, dtype, offset, shape, stride = self.place
        return view_of(_Bytes(block), dtype, offset, shape, stride)


class _Bytes:
    """A block, as the storage that `view_of` asks."""

    def __init__(self, block: Block):
        self._block = block

    def data_ptr(self) -> int:
        return self._block.address

    def nbytes(self) -> int:
        return max(-(-self._block.nbytes // 16) * 16, 16)


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _tensor_results(schema) -> int:
    return sum("Tensor" in str(described.type) for described in schema.returns)


def _dense(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a copy of `tensor`: its own where they leave no holes."""
    return torch.empty_like(tensor, device="meta").stride()


@functools.cache
def _is_view(op: Any) -> bool:
    aliases = [described.alias_info for described in op._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _written(schema, args: tuple, kwargs: dict, *, returned: bool = False) -> list[torch.Tensor]:
    """The tensors that the operator writes to, in the order of its arguments."""
    found = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        found += [value] if returned and value is not None else _tensors(value)
    return found


def _numbers_as_tensors(schema, args: tuple) -> tuple:
    """A number that torch wrapped into a tensor arrives here as a number again; the operator takes a tensor."""
    return tuple(
        torch.scalar_tensor(value, dtype=_NUMBERS[type(value)])
        if type(value) in _NUMBERS and "Tensor" in str(described.type)
        else value
        for value, described in zip(args, schema.arguments, strict=False)
    )


def _on_host(args: tuple, kwargs: dict, fresh: list[torch.Tensor]) -> tuple[tuple, dict, dict[int, torch.Tensor]]:
    """Host views of all CUDA tensors; for the empty ones that are written, new tensors that an operator may resize."""
    new = {id(tensor): torch.empty(0, dtype=tensor.dtype) for tensor in fresh}

    def host(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return new[id(value)] if id(value) in new else on_host(value)
        return value

    return tree_map(host, args), tree_map(host, kwargs), new


def _shapes_of(op: Any, args: tuple, kwargs: dict, fresh: list[torch.Tensor]) -> tuple[Any, dict[int, torch.Tensor]]:
    """What the operator would give, on meta: a capture runs nothing."""
    new = {id(tensor): torch.empty(0, dtype=tensor.dtype, device="meta") for tensor in fresh}

    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in new:
                return new[id(value)]
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    return op(*tree_map(meta, args), **tree_map(meta, kwargs)), new


# What the CUDA backend does in its own way ----------------------------------------------------------------------------


def _empty(backend: Backend, op, size, *, dtype=None, device=None, memory_format=None, **_ignored) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    stride = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format).stride()
    return backend.empty(size, stride, dtype, device)


def _empty_strided(backend: Backend, op, size, stride, *, dtype=None, device=None, **_ignored) -> torch.Tensor:
    return backend.empty(size, stride, dtype or torch.get_default_dtype(), device)


def _resize(backend: Backend, op, tensor, size, *, memory_format=None) -> torch.Tensor:
    stride = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format).stride()
    needed = (1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0) * tensor.element_size()
    storage = tensor.untyped_storage()
    if needed > backend.memory.block(tensor).nbytes - tensor.storage_offset() * tensor.element_size():
        storage = backend.empty(size, stride, tensor.dtype, tensor.device).untyped_storage()
    redispatch(_aten.set_.source_Storage_storage_offset, tensor, storage, 0, size, stride)
    return tensor


def _copy(backend: Backend, op, target, source, non_blocking: bool = False) -> torch.Tensor:
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
    elif pinned and not waits:
        arriving = on_host(source).clone()
        poison(target)  # until the host has waited
        timeline.arrives_later(lambda: target.copy_(arriving))
    else:
        target.copy_(on_host(source))
    return target


def _to_copy(backend: Backend, op, tensor, *, dtype=None, device=None, non_blocking=False, memory_format=None, **_ignored):
    """A non-blocking copy to the host lands in pinned memory, and the host goes on before it has arrived."""
    if device is None or device.type != "cpu" or not non_blocking:
        return redispatch(
            op, tensor, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format, **_ignored
        )
    target = backend.pin(torch.empty_like(tensor, device="cpu", dtype=dtype, memory_format=memory_format))
    return target.copy_(tensor, non_blocking=True)


def _view_only(backend: Backend, op, *args, **kwargs) -> Any:
    return redispatch(op, *args, **kwargs)


def _as_one(backend: Backend, op, *args, **kwargs) -> Any:
    """One kernel, where torch would take it apart for a device that it does not know."""
    return backend.run(op, args, kwargs)


def _product(backend: Backend, op, *args, **kwargs) -> torch.Tensor:
    """A matrix product whose summation starts at another place for another number of rows."""
    place = _PRODUCTS[op.name().split(".")[0]]
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


_SPECIAL = {
    "aten::empty.memory_format": _empty,
    "aten::empty_strided": _empty_strided,
    "aten::resize_": _resize,
    "aten::copy_": _copy,
    "aten::_to_copy": _to_copy,
    "aten::convolution": _as_one,
    "aten::scaled_dot_product_attention": _as_one,
    "aten::set_.source_Storage_storage_offset": _view_only,
    "aten::set_.source_Tensor": _view_only,
    "aten::set_.source_Storage": _view_only,
}
# These have kernels for all devices, which go before a fallback.
_BEFORE_COMPOSITES = ("copy_", "_to_copy", "convolution", "scaled_dot_product_attention")


@functools.cache
def install() -> None:
    """Put the emulated operators under the dispatch key CUDA, once a process; without an emulated device they raise."""
    libraries.append(torch.library.Library("_", "IMPL"))
    libraries[-1].fallback(_enter, "CUDA")
    libraries.append(torch.library.Library("aten", "IMPL"))
    for name in _BEFORE_COMPOSITES:
        libraries[-1].impl(name, functools.partial(_enter, getattr(_aten, name).default), "CUDA")


libraries: list[torch.library.Library] = []


def _enter(op: Any, *args: Any, **kwargs: Any) -> Any:
    backend = Backend.current
    if backend is None:
        raise RuntimeError(f"{op.name()} on a tensor of an emulated device that is gone.")
    return backend.call(op, *args, **kwargs)
