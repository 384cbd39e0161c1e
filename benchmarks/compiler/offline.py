"""Machine code without a GPU: run an unmodified launcher on fake CUDA tensors and look at what the compiler made.

Needs a process without TRITON_INTERPRET. Nothing is executed; no driver is needed.
"""

import collections
import contextlib
import os
import re
import subprocess
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

# Compute capability -> multiprocessors of a card that has it: A100, RTX 3090, RTX 4090, H100/H200, B200, RTX 5090.
MULTIPROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_BASE_ADDRESS = 1 << 20  # of every fake allocation: aligned as the CUDA allocator aligns


@dataclass
class Compiled:
    """One kernel as a launch specialised it."""

    name: str
    grid: tuple
    kernel: triton.compiler.CompiledKernel

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    @property
    def ttir(self) -> str:
        return self.kernel.asm["ttir"]

    @property
    def ttgir(self) -> str:
        return self.kernel.asm["ttgir"]

    def inspect(self) -> dict:
        return inspect(self.kernel.asm["cubin"])


class _Driver:
    """The four questions that Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps one cache of kernels per device: one per capability here

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def _index(tensor: torch.Tensor, index) -> torch.Tensor:
    """`tensor[index]` through operators that a CPU-only torch build accepts for fake CUDA tensors."""
    index = list(index) if isinstance(index, tuple) else [index]
    if any(entry is Ellipsis for entry in index):
        place = next(i for i, entry in enumerate(index) if entry is Ellipsis)
        dims = sum(entry is not None and entry is not Ellipsis for entry in index)
        index[place : place + 1] = [slice(None)] * (tensor.dim() - dims)
    dim = 0
    for entry in index:
        if entry is None:
            tensor, dim = tensor.unsqueeze(dim), dim + 1
        elif isinstance(entry, int):
            tensor = tensor.select(dim, entry)
        elif isinstance(entry, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, entry.start, entry.stop, entry.step or 1)
            dim += 1
        else:
            raise TypeError(f"index {entry!r} on a fake CUDA tensor; use integers, slices, None and Ellipsis")
    return tensor


class _FakeCudaTensors(TorchFunctionMode):
    """Addresses for fake tensors, and what a CPU-only torch build refuses to do with fake CUDA ones."""

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name == "data_ptr":
            return _BASE_ADDRESS + args[0].storage_offset() * args[0].element_size()
        if name == "__getitem__" and args[0].device.type == "cuda":
            return _index(*args)
        if name == "contiguous" and args[0].device.type == "cuda":
            tensor = args[0]
            return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def active_driver(one) -> Iterator[None]:
    """Inside, Triton asks this driver."""
    slot = "_active" if "_active" in vars(driver) else "active"  # the name up to Triton 3.4
    before = vars(driver)[slot]
    driver.set_active(one)
    try:
        yield
    finally:
        vars(driver)[slot] = before


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[Compiled]]:
    """Inside, launches on CUDA tensors (all of them fake) compile for `capability` and execute nothing.

    Call launchers, not operators: an operator would run its fake kernel. Yields the list of kernels, in launch order.
    """
    log: list[Compiled] = []

    def launcher_of(kernel, grid):
        def launch(*args, **kwargs):
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
            # An autotuned kernel answers with all its configurations.
            for one in compiled if isinstance(compiled, list) else [compiled]:
                log.append(Compiled(getattr(kernel, "__name__", type(kernel).__name__), grid, one))
            return compiled

        return launch

    properties = types.SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=MULTIPROCESSORS.get(capability, 128),
        name=f"fake sm_{capability}",
    )
    patches = (
        mock.patch.object(triton.runtime.jit.KernelInterface, "__getitem__", launcher_of),
        mock.patch.object(torch.cuda, "device", lambda _device: contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "get_device_capability", lambda _device=None: divmod(capability, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _device=None: properties),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
    )
    with contextlib.ExitStack() as stack:
        for patch in (active_driver(_Driver(capability)), *patches):
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_FakeCudaTensors())
        yield log


def _tool(name: str, *args: str) -> str:
    return subprocess.run([os.path.join(_TOOLS, name), *args], capture_output=True, text=True, check=True).stdout


def inspect(cubin: bytes) -> dict:
    """Registers, stack bytes (spills show there; LOCAL is always 0), static shared bytes, SASS, opcode counts."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _tool("cuobjdump", "--dump-resource-usage", "-sass", file.name)  # one call: the tool itself starts slowly
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", sass)
    opcodes = collections.Counter()
    for line in sass.splitlines():
        # /*0010*/  @!P0 LDG.E R2, desc[UR4][R2.64] ;  /* 0x... */
        code = re.match(r"\s*(?:/\*[0-9a-f]+\*/)?\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\.[\w.]+)?[\s;]", line)
        if code and "/*" in line:
            opcodes[code.group(1)] += 1
    registers, stack, shared, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "shared": shared, "local": local, "opcodes": opcodes, "sass": sass}
