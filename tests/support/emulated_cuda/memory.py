"""Memory of the emulated device: blocks of host memory in tensors that say cuda, who lives, and how much is taken.

A CUDA tensor here is a plain torch.Tensor whose storage says cuda:0 and points to host memory, so that its type, its views,
its address and its parameters are what they are on a GPU. Such a tensor comes from a DLPack capsule of a numpy array in
which the kind of device is overwritten. What is allocated is filled with NaN (integers: their largest value), so that
whatever is read before it is written shows.
"""

import ctypes
import mmap
import os
import threading
import weakref
from dataclasses import dataclass, field

import numpy as np
import torch

_ALIGNMENT = 512  # as the CUDA allocator aligns
_LARGE = 2**30  # bytes from which on memory is only reserved: it is there to be counted, and is not poisoned
_DL_CUDA = 2
_CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class _DLTensorHead(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("index", ctypes.c_int32)]


@dataclass(eq=False)
class Block:
    """One allocation.

    Attributes:
        address, nbytes: where it lies and how much was asked for.
        stream: on which it was allocated, see streams.Stream.
        graph: the graph whose pool it belongs to, or None.
        alive: whether any tensor still holds it.
        written: the last work that wrote to it, as (stream's id, its count); read: by stream, the last that read it.
        shared_with: ids of the streams that `record_stream` named.
    """

    address: int
    nbytes: int
    stream: object = None
    graph: object = None
    alive: bool = True
    written: tuple[int, int] | None = None
    read: dict[int, int] = field(default_factory=dict)
    shared_with: set[int] = field(default_factory=set)


class Memory:
    """All blocks of a device.

    Args:
        total: bytes that the device has; one more raises torch.OutOfMemoryError.
        freed: called with each block that no tensor holds any more.
    Attributes:
        allocated, peak: bytes now and at most.
    """

    def __init__(self, total: int, freed=lambda block: None):
        self.total, self.allocated, self.peak = total, 0, 0
        self.blocks: dict[int, Block] = {}
        self._freed, self._lock = freed, threading.RLock()

    def allocate(self, size, stride, dtype: torch.dtype, index: int, stream: object, graph: object) -> torch.Tensor:
        """A poisoned tensor on cuda:`index`."""
        elements = 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if 0 not in size else 0
        nbytes = elements * dtype.itemsize
        if self.allocated + nbytes > self.total:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes; the emulated device has {self.total - self.allocated} "
                f"of {self.total} left."
            )
        room = _room(max(-(-nbytes // 16) * 16, 16))
        block = Block(room.ctypes.data, nbytes, stream, graph)
        with self._lock:
            self.blocks[block.address] = block
            self.allocated += nbytes
            self.peak = max(self.peak, self.allocated)
        weakref.finalize(room, self._free, block).atexit = False
        capsule = room.__dlpack__()
        head = _DLTensorHead.from_address(_capsule_pointer(capsule, b"dltensor"))
        head.kind, head.index = _DL_CUDA, index
        flat = torch.ops.aten.view.dtype.redispatch(_CPU_KEYS, torch._C._from_dlpack(capsule), dtype)
        tensor = torch.ops.aten.as_strided.default.redispatch(_CPU_KEYS, flat, size, stride, 0)
        if nbytes < _LARGE:
            poison(on_host(tensor))
        return tensor

    def block(self, tensor: torch.Tensor) -> Block:
        """The allocation that a CUDA tensor lies in."""
        return self.blocks[tensor.untyped_storage().data_ptr()]

    def _free(self, block: Block) -> None:
        with self._lock:
            block.alive = False
            self.blocks.pop(block.address, None)
            self.allocated -= block.nbytes
        self._freed(block)


def _room(nbytes: int) -> np.ndarray:
    """Aligned host memory."""
    if nbytes >= _LARGE:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        return np.frombuffer(mmap.mmap(-1, nbytes, flags=flags), np.uint8)
    room = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + nbytes]


def poison(tensor: torch.Tensor) -> None:
    """NaN into all of a host tensor, the largest value where there is no NaN."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype in _INTEGERS:
        tensor.fill_(torch.iinfo(tensor.dtype).max)
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a CPU tensor; it does not keep the memory alive."""
    return view_of(tensor.untyped_storage(), tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())


def view_of(storage, dtype: torch.dtype, offset: int, size, stride) -> torch.Tensor:
    """A CPU tensor over the memory of a CUDA storage."""
    host = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    return torch.empty(0, dtype=dtype).set_(host, offset, size, stride)


def redispatch(op, *args, **kwargs):
    """An operator's CPU kernel on CUDA tensors, for those that only make views or move storages."""
    return op.redispatch(_CPU_KEYS, *args, **kwargs)


class DeviceGuard:
    """Torch's own C++ code asks a guard which CUDA device is current; a CPU build has none and throws. Inside, it has one.

    The guard is an object all of whose virtual methods are `Py_IsInitialized`, which returns 1: as a kind of device that is
    CUDA, as a device cuda:0, as a number of devices 1, as an answer yes.
    """

    def __enter__(self) -> None:
        table = ctypes.c_void_p.in_dll(ctypes.CDLL(_library("c10")), "_ZN3c104impl26device_guard_impl_registryE")
        self._guards = (ctypes.c_void_p * 2).from_address(ctypes.addressof(table))  # by kind of device: CPU, CUDA
        self._before = self._guards[1]
        yes = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value
        self._methods = (ctypes.c_void_p * 64)(*[yes] * 64)
        self._guard = (ctypes.c_void_p * 1)(ctypes.addressof(self._methods))
        self._guards[1] = ctypes.addressof(self._guard)

    def __exit__(self, *_) -> None:
        self._guards[1] = self._before


def _library(name: str) -> str:
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    found = [os.path.join(folder, f"lib{name}{ending}") for ending in (".so", ".dylib")]
    return next(filter(os.path.exists, found))
