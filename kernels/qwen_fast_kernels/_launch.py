"""Launches of the kernels without matrix products: through Triton the first time, afterwards straight to what it compiled.

Triton's own launch binds the arguments by name, derives a key from each, and compares settings and globals: 9 to 15 us of
Python for kernels of 10 to 25 us, and a block has seven of them.
"""

from collections.abc import Sequence

import torch

from ._triton import on_device, triton

# What decides on the machine code -> how to launch it, where to launch it, and the constants as arguments.
_COMPILED: dict[tuple, tuple] = {}


def launch(
    kernel, grid: tuple[int, ...], tensors: Sequence[torch.Tensor], varying: tuple, fixed: tuple = (), **constants
) -> None:
    """`kernel[grid](*tensors, *varying, *fixed, **constants)` on the device of the first tensor.

    Args:
        kernel: a Triton function, kept for as long as the process lives.
        grid: one to three numbers of programs.
        tensors: its first parameters.
        varying: numbers behind them that the machine code does not depend on, since they are floats or not specialised on.
        fixed: integers behind them on which it may depend, such as strides.
        constants: its constexpr parameters, all of which come last, and options of the compiler; hashable.
    """
    first = tensors[0]
    addresses = [tensor.data_ptr() for tensor in tensors]
    aligned = tuple([address % 16 == 0 for address in addresses])
    key = (id(kernel), first.device.index, tuple([each.dtype for each in tensors]), aligned, fixed, *constants.values())
    own = max(varying) < 2**31 and not _watched()  # a larger integer is of another type, which Triton compiles for
    known = _COMPILED.get(key) if own else None
    if known is not None:
        run, function, metadata, current_device, current_stream, constexprs = known
        device = current_device()
        if device == first.device.index:
            x, y, z = (*grid, 1, 1)[:3]
            stream = current_stream(device)
            run(x, y, z, stream, function, metadata, None, None, None, *addresses, *varying, *fixed, *constexprs)
            return
    with on_device(first):
        compiled = kernel[grid](*tensors, *varying, *fixed, **constants)
    # None comes from the interpreter, and AMD's compiler looks at more than the key does.
    if own and compiled is not None and torch.version.hip is None:
        driver = triton.runtime.driver.active
        places = driver.get_current_device, driver.get_current_stream
        constexprs = tuple(constants[name] for name in kernel.arg_names if name in constants)
        _COMPILED[key] = (compiled.run, compiled.function, compiled.packed_metadata, *places, constexprs)


def _watched() -> bool:
    """Whether somebody takes launches into his own hands, or asked Triton for them: a hook is None where nobody did, or a
    chain without calls since Triton 3.5."""
    if triton.runtime.jit.KernelInterface.__getitem__.__module__ != "triton.runtime.jit":
        return True
    settings = triton.knobs.runtime
    enter, leave = settings.launch_enter_hook, settings.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
