"""The operators of the emulated device: torch's CUDA backend, written in Python over the CPU's kernels.

A CPU build of torch has no kernel under the dispatch key CUDA, so that one fallback there sees every operator that reaches
a device, in every thread, below autograd and views. It runs the CPU's kernel on the same memory, or, in a capture, records
it. What a GPU does otherwise than a CPU is done here too: the host waits where it asks for values, copies cross, tensors of
two devices do not mix, and a product depends a little on how many rows it has.
"""

import functools
import warnings
import weakref
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from support.emulated_cuda import notes as kinds
from support.emulated_cuda.arguments import (
    count_of_tensor_results,
    dense_strides,
    is_on_device,
    is_view,
    numbers_as_tensors,
    shapes_of,
    tensors_in,
    with_host_views,
    written_by,
)
from support.emulated_cuda.memory import Block, Memory, on_host, redispatch, view_of
from support.emulated_cuda.operators import BEFORE_COMPOSITES, PRODUCTS, SPECIAL, WAITING, product, waits
from support.emulated_cuda.shapes import by_shape, shaped
from support.emulated_cuda.streams import Graph, Timeline

INDEXING = "aten::index", "aten::index_put", "aten::index_put_"


class Backend:
    """The operators of one device.

    Args:
        memory, timeline: of the device.
        products_vary: let the last digits of a matrix product depend on its number of rows, as cuBLAS's do.
        shapes_show: let them depend on every size of what goes in, not of products alone, see shapes.py.
    """

    current: "Backend | None" = None

    def __init__(self, memory: Memory, timeline: Timeline, products_vary: bool = True, shapes_show: bool = False):
        self.memory, self.timeline, self.notes = memory, timeline, timeline.notes
        self.products_vary, self.shapes_show = products_vary, shapes_show
        self.generator = torch.Generator()  # of the device; the CPU's own is not touched by work on CUDA
        self._pinned = weakref.WeakValueDictionary()  # by address, numpy arrays that hold the memory
        self.registered: dict[int, int] = {}  # by address, bytes of host memory that cudaHostRegister has pinned

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
            return self.empty(host.shape, dense_strides(host), host.dtype, device)
        raise NotImplementedError(f"{host.layout} tensors on the emulated device")

    # Work -------------------------------------------------------------------------------------------------------------

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """An operator of torch on tensors of which one at least is on the device, or that makes one there."""
        name = op.name()
        special = SPECIAL.get(name)
        if special is not None:
            return special(self, op, *args, **kwargs)
        if is_view(op):
            return redispatch(op, *args, **kwargs)
        if waits(name, args):
            self.timeline.warn(name)
            self.timeline.host_waits(WAITING.get(name, name))
        return self.run(op, args, kwargs)

    def run(self, op: Any, args: tuple, kwargs: dict, compute: Any = None) -> Any:
        """Run `compute`, by default the operator on the CPU, on the same memory; in a capture, record it."""
        schema, name = op._schema, op.name()
        if name.split(".")[0] in PRODUCTS:
            compute = functools.partial(product, self, op)
        compute = compute or op
        if self.shapes_show and shaped(name):
            compute = by_shape(compute)
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        args = numbers_as_tensors(schema, args)
        kwargs, device = self._device(kwargs, args)
        tensors = tensors_in((args, kwargs))
        if name.split(".")[0] in INDEXING:  # by indices on the host too, which travel first
            for index in tensors_in(args[1]):
                if not index.is_cuda:
                    self.notes.add(kinds.TO_DEVICE, f"indices of {name}")
            self.refuse_mixed(name, tensors_in((args[:1], args[2:], kwargs)))
        else:
            self.refuse_mixed(name, tensors)
        written = written_by(schema, args, kwargs)
        # An empty `out=` takes the size of what is computed.
        fresh = [] if kwargs.get("out") is None else [kwargs["out"]]
        fresh = [tensor for tensor in fresh if tensor.is_cuda and tensor.shape == (0,)]
        kwargs = self._own_generator(schema, args, kwargs)
        blocks = {id(block): block for block in map(self.memory.block, filter(is_on_device, tensors))}.values()
        changed = {id(block): block for block in map(self.memory.block, filter(is_on_device, written))}.values()
        graph = self.timeline.work(name, blocks, changed)
        if graph is not None:
            return self._record(graph, op, compute, args, kwargs, written, fresh, device)
        values = with_host_views(args, kwargs, fresh)
        result = compute(*values[0], **values[1])
        for tensor in fresh:
            self._resize(tensor, values[2][id(tensor)])
        return self._returned(schema, result, args, kwargs, device)

    def _record(self, graph: Graph, op, compute, args, kwargs, written, fresh, device) -> Any:
        """Its results, without values, and a step of the graph that computes them."""
        result = None
        if fresh or len(written) < count_of_tensor_results(op._schema):
            shapes = shapes_of(op, args, kwargs, fresh)
            result = shapes[0]
            for tensor in fresh:
                self._resize(tensor, shapes[1][id(tensor)])
        returned = self._returned(op._schema, result, args, kwargs, device, poisoned=True)
        again, outside = self.keep(graph, (args, kwargs))
        outputs = tensors_in(returned)
        new = [all(output is not tensor for tensor in written) for output in outputs]

        def step() -> None:
            own_args, own_kwargs = again()
            found = compute(*own_args, **own_kwargs)
            for output, value, is_new in zip(outputs, tensors_in(found), new, strict=False):
                if is_new:
                    on_host(output).copy_(value)

        own = map(self.memory.block, (*filter(is_on_device, written), *outputs))
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
        own = iter(written_by(schema, args, kwargs, returned=True))
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
        redispatch(torch.ops.aten.set_.source_Storage_storage_offset, tensor, new.untyped_storage(), 0, new.shape, new.stride())

    def _device(self, kwargs: dict, args: tuple) -> tuple[dict, torch.device | None]:
        wanted = kwargs.get("device")
        if wanted is not None:
            return {**kwargs, "device": torch.device("cpu")}, wanted
        first = next(filter(is_on_device, tensors_in((args, kwargs))), None)
        return kwargs, None if first is None else first.device

    def _own_generator(self, schema, args: tuple, kwargs: dict) -> dict:
        names = [argument.name for argument in schema.arguments]
        if "generator" not in names:
            return kwargs
        place = names.index("generator")
        given = args[place] if place < len(args) else kwargs.get("generator")
        return kwargs if given is not None else {**kwargs, "generator": self.generator}

    def refuse_mixed(self, name: str, tensors: list[torch.Tensor]) -> None:
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
        return storage.nbytes() > 0 and (storage.data_ptr() in self._pinned or storage.data_ptr() in self.registered)


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


@functools.cache
def install() -> None:
    """Put the emulated operators under the dispatch key CUDA, once a process; without an emulated device they raise.

    A build for CUDA has kernels of its own there, which take the place of a fallback: each is replaced.
    """
    libraries.append(torch.library.Library("_", "IMPL"))
    libraries[-1].fallback(_enter, "CUDA")
    libraries.append(torch.library.Library("aten", "IMPL"))
    names = {f"aten::{name}" for name in BEFORE_COMPOSITES}
    names.update(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one already
        for name in sorted(name for name in names if name.startswith("aten::")):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            libraries[-1].impl(name, functools.partial(_enter, op), "CUDA")


libraries: list[torch.library.Library] = []


def _enter(op: Any, *args: Any, **kwargs: Any) -> Any:
    backend = Backend.current
    if backend is None:
        raise RuntimeError(f"{op.name()} on a tensor of an emulated device that is gone.")
    return backend.call(op, *args, **kwargs)
