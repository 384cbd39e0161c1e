"""The emulated device: what torch.cuda answers while it is there, and the pieces behind it."""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from support.emulated_cuda import notes as kinds
from support.emulated_cuda.backend import Backend, install
from support.emulated_cuda.launches import Launches
from support.emulated_cuda.memory import DeviceGuard, Memory
from support.emulated_cuda.notes import Notes
from support.emulated_cuda.project import answered
from support.emulated_cuda.streams import Event, Graph, Stream, Timeline

_OWN_GENERATOR = torch.Generator
_PAGE = 4096  # bytes


class Generator(_OWN_GENERATOR):
    """torch.Generator that may be said to be on the device; its numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        return _OWN_GENERATOR.__new__(cls, device="cpu")

    def __init__(self, device="cpu"):
        kind = torch.device(device)
        self._said = torch.device("cuda", kind.index or 0) if kind.type == "cuda" else kind

    @property
    def device(self) -> torch.device:
        return self._said


class EmulatedCuda:
    """One emulated CUDA device. Made by `emulated_cuda`.

    Attributes:
        notes: what it saw.
        lockable: bytes of host memory that `cudaHostRegister` pins before it fails.
        memory: its blocks, with `allocated`, `peak` and `total` bytes.
        launches: of Triton kernels.
        timeline: its streams.
    """

    def __init__(self, launches: str, capability: int, name: str, total: int, products_vary: bool, shapes_show: bool):
        self.notes = Notes()
        self.memory = Memory(total, lambda block: self.timeline.freed(block))
        self.timeline = Timeline(self.notes, self.memory)
        self.backend = Backend(self.memory, self.timeline, products_vary, shapes_show)
        self.launches = Launches(self.backend, launches, capability)
        self.lockable = 2**62  # bytes of host memory that may be pinned
        self.properties = types.SimpleNamespace(
            name=name,
            major=capability // 10,
            minor=capability % 10,
            multi_processor_count=132,
            total_memory=total,
            L2_cache_size=50 * 2**20,
            shared_memory_per_block_optin=232448,
            warp_size=32,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            uuid="00000000-0000-0000-0000-000000000000",
            is_integrated=0,
            pci_bus_id=0,
        )

    @property
    def free(self) -> int:
        return self.memory.total - self.memory.allocated

    def _answers(self) -> dict[str, Any]:
        """What replaces the functions of torch.cuda of the same names."""
        memory, timeline, properties = self.memory, self.timeline, self.properties

        def mem_get_info(device=None) -> tuple[int, int]:
            self.notes.add(kinds.QUERY, "mem_get_info")
            return self.free, memory.total

        def stream_context(stream):
            return contextlib.nullcontext() if stream is None else stream

        def reset_peak(device=None) -> None:
            memory.peak = memory.allocated

        def synchronize(device=None) -> None:
            every: dict[int, int] = {}
            for block in list(memory.blocks.values()):
                for stream, count in (*block.read.items(), *([block.written] if block.written else ())):
                    every[stream] = max(every.get(stream, 0), count)
            timeline.host_waits("torch.cuda.synchronize", {**every, **timeline.stream.clock})

        def register(address: int, nbytes: int, flags: int) -> int:
            registered, own = self.backend.registered, range(address // _PAGE, (address + nbytes - 1) // _PAGE + 1)
            pages = (range(one // _PAGE, (one + size - 1) // _PAGE + 1) for one, size in registered.items())
            if any(max(own[0], other[0]) <= min(own[-1], other[-1]) for other in pages):
                return 712  # cudaErrorHostMemoryAlreadyRegistered: it pins whole pages
            if sum(registered.values()) + nbytes > self.lockable:
                return 2  # cudaErrorMemoryAllocation
            registered[address] = nbytes
            return 0

        def unregister(address: int) -> int:
            return 713 if self.backend.registered.pop(address, None) is None else 0

        cudart = types.SimpleNamespace(
            cudaError=types.SimpleNamespace(success=0), cudaHostRegister=register, cudaHostUnregister=unregister
        )

        def seed(value: int) -> None:
            self.backend.generator.manual_seed(value)

        def set_sync_debug_mode(mode: int | str) -> None:
            timeline.sync_debug_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)

        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "is_bf16_supported": lambda *_: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "device": lambda device: contextlib.nullcontext(),
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "get_device_properties": lambda device=None: properties,
            "get_device_name": lambda device=None: properties.name,
            "mem_get_info": mem_get_info,
            "memory_snapshot": lambda *_, **__: [],  # nothing that is freed is kept
            "cudart": lambda: cudart,
            "memory_allocated": lambda device=None: memory.allocated,
            "memory_reserved": lambda device=None: memory.allocated,
            "max_memory_allocated": lambda device=None: memory.peak,
            "max_memory_reserved": lambda device=None: memory.peak,
            "reset_peak_memory_stats": reset_peak,
            "empty_cache": lambda: timeline.refuse("empty_cache"),
            "ipc_collect": lambda: None,
            "synchronize": synchronize,
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
            "current_stream": lambda device=None: timeline.stream,
            "default_stream": lambda device=None: timeline.default,
            "set_stream": timeline.set,
            "stream": stream_context,
            "is_current_stream_capturing": lambda: timeline.graph is not None,
            "graph_pool_handle": lambda: (0, 1),
            "manual_seed": seed,
            "manual_seed_all": seed,
            "get_sync_debug_mode": lambda: timeline.sync_debug_mode,
            "set_sync_debug_mode": set_sync_debug_mode,
            "_sleep": lambda cycles: None,
        }

    @contextlib.contextmanager
    def _present(self) -> Iterator[None]:
        """Inside, torch sees the device."""
        install()
        backend, cuda = self.backend, torch.cuda

        def pin(tensor: torch.Tensor, device=None) -> torch.Tensor:
            if tensor.is_cuda:
                raise RuntimeError(f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned")
            if backend.is_pinned(tensor):
                return tensor
            return backend.pin(tensor)

        def is_pinned(tensor: torch.Tensor, device=None) -> bool:
            return tensor.device.type == "cpu" and backend.is_pinned(tensor)

        def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
            self.memory.block(tensor).shared_with.add(stream.id)

        original_clone = torch.storage._StorageBase.clone

        def clone(storage):  # what copy.deepcopy of a tensor does
            if storage.device.type != "cuda":
                return original_clone(storage)
            return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()

        profiler = torch.profiler._KinetoProfile
        original_init = profiler.__init__

        @functools.wraps(original_init)
        def profile_of_the_host(own, *, activities=None, **kwargs) -> None:
            host = None if activities is None else [kind for kind in activities if kind.name == "CPU"]
            original_init(own, activities=host, **kwargs)

        others = [
            (profiler, "__init__", profile_of_the_host),
            (torch.storage._StorageBase, "clone", clone),
            (torch, "Generator", Generator),
            (torch.Tensor, "pin_memory", pin),
            (torch.Tensor, "is_pinned", is_pinned),
            (torch.Tensor, "record_stream", record_stream),
            (torch._C, "_host_emptyCache", lambda: None),
            (torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")),
            (cuda.graphs.graph, "default_capture_stream", None),
            (torch.backends.cuda, "SDPAParams", lambda *values: values),
            (torch.backends.cuda, "can_use_flash_attention", lambda *_: True),
            (torch.backends.cuda, "can_use_efficient_attention", lambda *_: True),
            (torch.backends.cuda, "can_use_cudnn_attention", lambda *_: True),
            (torch.backends.cuda, "is_built", lambda: True),
            (cuda.memory, "_record_memory_history", lambda *_, **__: None),
            (cuda.memory, "_snapshot", lambda *_: {"segments": [], "device_traces": [[]]}),
            (cuda.profiler, "start", lambda: None),
            (cuda.profiler, "stop", lambda: None),
        ]
        before = Backend.current, Timeline.current
        with contextlib.ExitStack() as stack:
            stack.enter_context(DeviceGuard())
            for name, answer in self._answers().items():
                stack.enter_context(mock.patch.object(cuda, name, answer, create=True))
            for owner, name, answer in others:
                stack.enter_context(mock.patch.object(owner, name, answer, create=True))
            stack.enter_context(self.launches.replaced())
            Backend.current, Timeline.current = backend, self.timeline
            try:
                yield
            finally:
                Backend.current, Timeline.current = before


@contextlib.contextmanager
def emulated_cuda(
    *,
    launches: str = "reference",
    capability: int = 90,
    name: str = "an emulated GPU",
    total: int = 80 * 2**30,
    products_vary: bool = True,
    shapes_show: bool = False,
    attention: str = "flash",
) -> Iterator[EmulatedCuda]:
    """Inside, this process has a CUDA device `cuda:0` of ours.

    Args:
        launches: what a launch of a Triton kernel does: "reference", "interpret" or "compile", see launches.py.
        capability: compute capability as one number.
        name: that torch.cuda.get_device_name gives.
        total: bytes of memory that the device has.
        products_vary: let the last digits of a matrix product depend on its number of rows, as cuBLAS's do.
        shapes_show: let the last digits of all that is computed by more than elements depend on all sizes, see shapes.py.
        attention: that the project finds to be the fastest, see project.py.
    Raises:
        RuntimeError: the process has a real CUDA device, or already an emulated one.
    """
    if Backend.current is not None:
        raise RuntimeError("there is an emulated CUDA device already.")
    if torch.cuda.is_available():
        raise RuntimeError("there is a real CUDA device: nothing to emulate.")
    device = EmulatedCuda(launches, capability, name, total, products_vary, shapes_show)
    with device._present(), answered(attention):
        yield device
