"""Launches of Triton kernels on the emulated device, and the values that they give.

The operators' CUDA implementations run as they are: checks, choice of the configuration, launcher. Only the launch itself
is replaced, in one of three ways:

- "reference": the kernel is not run; the operator's results get the values of its CPU implementation. Fast. A launcher
  that is called outside an operator is interpreted.
- "interpret": Triton's interpreter runs the kernel (TRITON_INTERPRET=1 has to be set before Triton is imported).
- "compile": Triton compiles the kernel for the device's architecture, without a driver, and the results get the values of
  the reference (TRITON_INTERPRET must not be set).
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from support.emulated_cuda import notes as kinds
from support.emulated_cuda.arguments import is_on_device, tensors_in, written_by
from support.emulated_cuda.backend import Backend
from support.emulated_cuda.memory import on_host
from support.emulated_cuda.shapes import by_shape

MODES = ("reference", "interpret", "compile")


@dataclass(frozen=True)
class Compiled:
    """A kernel as a launch specialised it."""

    name: str
    grid: tuple
    kernel: Any


class _Running(threading.local):
    """What each thread is at: the operator whose implementation runs, and whether it has launched a kernel."""

    operator: str | None = None
    launched = False


class Launches:
    """All launches of one emulated device.

    Args:
        backend: of the device.
        mode: one of MODES.
        capability: compute capability as one number, 90 for sm_90.
    Attributes:
        compiled: in the mode "compile", each kernel once.
    """

    def __init__(self, backend: Backend, mode: str, capability: int):
        if mode not in MODES:
            raise ValueError(f"launches={mode!r}; one of {MODES}.")
        self.backend, self.mode, self.capability = backend, mode, capability
        self.compiled: list[Compiled] = []
        self._known: set[int] = set()
        self._loaded: set[tuple] = set()
        self._thread = _Running()

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Inside, launches go through here."""
        try:
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import KernelInterface
        except ImportError:
            yield
            return
        with contextlib.ExitStack() as stack:
            # Triton 3.4 launches what is interpreted in a way of its own.
            for cls in (cls for cls in (KernelInterface, InterpretedFunction) if "__getitem__" in vars(cls)):
                replacement = self._launcher(cls.__getitem__)
                stack.enter_context(mock.patch.object(cls, "__getitem__", replacement))
            if self.mode == "compile":
                stack.enter_context(_driver(self.capability))
            library = torch.library.Library("qwen_fast", "IMPL")
            stack.callback(library._destroy)
            if self.mode != "interpret":
                self._give_operators_values(library)
            yield

    def _launcher(self, original: Callable) -> Callable:
        def getitem(kernel, grid):
            name = getattr(kernel, "__name__", None) or kernel.fn.__name__

            def launch(*args, **kwargs):
                counts = grid(kwargs) if callable(grid) else grid
                self._check(name, counts, (*args, *kwargs.values()))
                self.backend.notes.add(kinds.LAUNCH, f"{name}{list(counts)}", capturing=self.backend.timeline.graph is not None)
                self._thread.launched = True
                self._load(name, args, kwargs)
                if self.mode == "interpret" or (
                    self.mode == "reference" and self._thread.operator is None and _interprets(kernel)
                ):
                    return self._interpret(name, original, kernel, grid, args, kwargs)
                if self._thread.operator is None:
                    raise RuntimeError(f"{name} is launched outside an operator, and nothing gives it values.")
                if self.mode == "compile":
                    return self._compile(name, kernel, counts, args, kwargs)
                return None

            return launch

        return getitem

    def _check(self, name: str, counts: tuple, values: tuple) -> None:
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise TypeError(f"{name}: grid {counts} is not made of whole numbers.")
        if any(count > limit for count, limit in zip(counts, (2**31 - 1, 65535, 65535), strict=False)):
            raise RuntimeError(f"Triton Error [CUDA]: invalid argument: {name} with grid {counts}")
        for value in values:
            tensor = getattr(value, "base", value)  # of a descriptor
            if isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
                self.backend.notes.add(kinds.MIXED, f"{name} gets a CPU tensor {tuple(tensor.shape)}")
                raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    def _load(self, name: str, args: tuple, kwargs: dict) -> None:
        """Code is loaded at the first launch of each specialisation: by dtypes, numbers that are 1, multiples of 16."""
        key = (name, *map(_specialisation, args), *((key, _specialisation(value, True)) for key, value in kwargs.items()))
        if key not in self._loaded and self.backend.timeline.graph is not None:
            self.backend.notes.add(kinds.FIRST, name, capturing=True)
        self._loaded.add(key)

    def _interpret(self, name, original, kernel, grid, args, kwargs) -> None:
        backend = self.backend
        values = _bases((args, kwargs))
        blocks = {id(block): block for block in map(backend.memory.block, filter(is_on_device, values))}.values()
        graph = backend.timeline.work(name, blocks, ())  # which of them it writes is not known here
        if graph is None:
            return original(kernel, grid)(*map(_as_host, args), **{key: _as_host(value) for key, value in kwargs.items()})
        again, outside = backend.keep(graph, values)

        def step() -> None:
            hosts = iter(again())
            own = [_as_host(value, hosts) for value in args]
            original(kernel, grid)(*own, **{key: _as_host(value, hosts) for key, value in kwargs.items()})

        graph.record(name, outside, step)
        return None

    def _compile(self, name, kernel, grid, args, kwargs) -> None:
        found = kernel.warmup(*args, grid=grid, **kwargs)
        for one in found if isinstance(found, list) else [found]:
            if id(one) not in self._known:
                self._known.add(id(one))
                self.compiled.append(Compiled(name, tuple(grid), one))

    def _give_operators_values(self, library: torch.library.Library) -> None:
        import qwen_fast_kernels

        for name in filter(lambda name: hasattr(torch.ops.qwen_fast, name), qwen_fast_kernels.__all__):
            packet = getattr(torch.ops.qwen_fast, name)
            for op in (getattr(packet, overload) for overload in packet.overloads()):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that there is one already
                    name = op.name().removeprefix("qwen_fast::")
                    library.impl(name, self._operator_of(op), "CUDA", allow_override=True)

    def _operator_of(self, op: Any) -> Callable:
        """Its own implementation for CUDA, and the reference's values into its results."""
        implementation, keys = torch.library.get_kernel(op, "CUDA"), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

        def run(*args, **kwargs):
            self.backend.refuse_mixed(op.name(), tensors_in((args, kwargs)))
            thread = self._thread
            before, thread.operator, thread.launched = (thread.operator, thread.launched), op.name(), False
            try:
                found = implementation.call_boxed(keys, *args, **kwargs)
            finally:
                launched = thread.launched
                thread.operator, thread.launched = before
            if launched:  # else torch's own operators gave the values
                self._fill(op, args, kwargs, found)
            return found

        return run

    def _fill(self, op: Any, args: tuple, kwargs: dict, found: Any) -> None:
        """The reference's values into what the launcher allocated, now or when the graph is replayed."""
        backend = self.backend
        outputs = tensors_in(found)
        written = written_by(op._schema, args, kwargs)
        inputs = tensors_in((args, kwargs))
        changed = list(map(backend.memory.block, (*written, *outputs)))
        graph = backend.timeline.work(op.name(), map(backend.memory.block, inputs), changed)

        def compute(own_args, own_kwargs, hosts) -> None:
            own = by_shape(op) if backend.shapes_show else op
            values = tensors_in(own(*own_args, **own_kwargs))
            for host, value in zip(hosts, values, strict=True):
                if (host.shape, host.dtype, host.stride()) != (value.shape, value.dtype, value.stride()):
                    raise AssertionError(
                        f"{op.name()}: the launcher gives {tuple(host.shape)} {host.dtype} {host.stride()}, "
                        f"the reference {tuple(value.shape)} {value.dtype} {value.stride()}."
                    )
                host.copy_(value)

        if graph is None:
            compute(*torch.utils._pytree.tree_map(_as_host, (args, kwargs)), [on_host(output) for output in outputs])
            return
        again, outside = backend.keep(graph, (args, kwargs, outputs))
        graph.record(op.name(), outside, lambda: compute(*again()), changed)


def _specialisation(value: Any, constant: bool = False) -> Any:
    tensor = getattr(value, "base", value)  # of a descriptor
    if isinstance(tensor, torch.Tensor):
        return type(value), tensor.dtype, tensor.data_ptr() % 16 == 0
    if isinstance(value, int) and not constant:
        return value == 1, value % 16 == 0
    return value if constant or value is None else type(value)


def _interprets(kernel: Any) -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1."""
    return type(kernel).__name__ == "InterpretedFunction"


def _bases(values: Any) -> list[torch.Tensor]:
    """All tensors, those of descriptors too, in a fixed order."""
    found = []
    for value in torch.utils._pytree.tree_leaves(values):
        tensor = getattr(value, "base", value)
        if isinstance(tensor, torch.Tensor):
            found.append(tensor)
    return found


def _as_host(value: Any, hosts: Iterator[torch.Tensor] | None = None) -> Any:
    """`value` with host memory in place of a CUDA tensor: the next of `hosts`, or a view made now."""
    if isinstance(value, torch.Tensor):
        if hosts is not None:
            return next(hosts)
        return on_host(value) if value.is_cuda else value
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(getattr(value, "base", None), torch.Tensor):  # a descriptor
        return type(value)(_as_host(value.base, hosts), list(value.shape), list(value.strides), list(value.block_shape))
    return value


@contextlib.contextmanager
def _driver(capability: int) -> Iterator[None]:
    """The four questions that Triton asks a driver before it compiles, answered."""
    from triton.runtime.driver import driver

    from benchmarks.compiler.offline import _Driver

    slot = "_active" if "_active" in vars(driver) else "active"  # the name up to Triton 3.4
    active = vars(driver).get(slot)
    driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        vars(driver)[slot] = active
