"""Repairs of Triton's interpreter, so that a kernel rounds on the CPU as it does on a GPU.

The interpreter of Triton 3.6 and 3.9 truncates fp32 -> bf16, computes on bf16 bit patterns and is off by up to a factor
of two in casts to fp8; with numpy >= 2.4 Triton 3.6 cannot loop to a runtime bound. `install()` routes those through
torch's own conversions. Lanes that a masked load leaves undefined on a GPU are zeros in the interpreter; here they are NaN.
It patches private names: test_interp_shim.py compares every repaired piece with torch, so that a Triton that moves them fails
loudly. Not covered: bf16 atomics and scans, contraction of bf16 x + y * x.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TORCH_DTYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
# By item size. Bit patterns travel as unsigned numpy integers; torch holds all but bytes as signed ones.
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}
RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FP8_MAX = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
BF16 = tl.bfloat16


def _to_torch(data: np.ndarray, dtype: tl.dtype) -> torch.Tensor:
    data = np.ascontiguousarray(data)
    return torch.from_numpy(data.view(SIGNED[data.itemsize])).view(TORCH_DTYPES[dtype])


def _bits(tensor: torch.Tensor) -> np.ndarray:
    size = tensor.element_size()
    return tensor.contiguous().view(RAW[size]).numpy().view(UNSIGNED[size])


def _repair_casts():
    original = interpreter._convert_float

    def convert(data, source, target, rounding):
        source, target = source.scalar, target.scalar
        toward_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        if source not in TORCH_DTYPES or target not in TORCH_DTYPES or toward_zero:
            return original(data, source, target, rounding)
        data = np.asarray(data)
        values = _to_torch(data, source)
        if source in FP8_MAX:
            values = values.float()
        if target in FP8_MAX:  # the hardware's cvt.rn.satfinite
            limit = FP8_MAX[target]
            values = values.float()
            values = torch.where(torch.isnan(values), values, values.clamp(-limit, limit))
        return _bits(values.to(TORCH_DTYPES[target])).reshape(data.shape)

    interpreter._convert_float = convert
    return convert


def _repair_arithmetic(upcast, to_bf16) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def wrap(name: str, arity: int) -> None:
        original = getattr(builder, name)

        def repaired(self, *args):
            operands, rest = args[:arity], args[arity:]
            selects = bool(rest) and rest[0] is np.where  # moves bit patterns, so it is right as it is
            if selects or not any(operand.dtype.scalar == BF16 for operand in operands):
                return original(self, *args)
            result = original(self, *[upcast(operand) for operand in operands], *rest)
            return result if result.data.dtype == np.bool_ else handle(to_bf16(result.data), BF16)

        setattr(builder, name, repaired)

    wrap("binary_op", 2)
    wrap("ternary_op", 3)
    wrap("unary_op", 1)
    wrap("create_fma", 3)
    original_dot = builder.create_dot
    builder.create_dot = lambda self, a, b, acc, *rest: original_dot(self, upcast(a), upcast(b), acc, *rest)
    builder.get_bf16 = lambda self, value: handle(to_bf16(np.array([value], np.float32)), BF16)


def _repair_reductions(upcast, to_bf16) -> None:
    reduce_ops = interpreter.ReduceOps
    original_sum, original_min_max = reduce_ops.sum, reduce_ops.min_max

    def lift(tensor):
        return tl.core.tensor(upcast(tensor.handle), tl.block_type(tl.float32, list(tensor.handle.data.shape)))

    def lower(tensor):
        result_type = tl.block_type(BF16, list(tensor.shape)) if tensor.type.is_block() else BF16
        return tl.core.tensor(interpreter.TensorHandle(to_bf16(tensor.handle.data), BF16), result_type)

    def repaired_sum(self, tensor):
        return lower(original_sum(self, lift(tensor))) if tensor.dtype == BF16 else original_sum(self, tensor)

    def repaired_min_max(self, tensor, *args, **kwargs):
        value = tensor[0] if isinstance(tensor, tuple) else tensor
        if value.dtype != BF16:
            return original_min_max(self, tensor, *args, **kwargs)
        result = original_min_max(self, lift(value), *args, **kwargs)
        return (lower(result[0]), result[1]) if isinstance(result, tuple) else lower(result)

    reduce_ops.sum, reduce_ops.min_max = repaired_sum, repaired_min_max


def _repair_loop_bounds() -> None:
    original = interpreter._patch_lang_tensor

    def repaired(tensor, *scope):  # Triton 3.4 has no scope
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    interpreter._patch_lang_tensor = repaired


def _spoil_undefined_lanes() -> None:
    """What a masked load leaves undefined is NaN here, or an integer's largest value, instead of a zero that hides a fault."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_masked_load

    def spoiled(self, ptrs, mask, other, *args, **kwargs):
        of_descriptor = isinstance(mask, np.ndarray)  # in Triton 3.4, where what lies outside is zero on a GPU too
        if other is None and not of_descriptor and not mask.data.all():
            kind = ptrs.get_element_ty()
            if kind == BF16:
                filled = np.full(ptrs.data.shape, 0x7FC0, np.uint16)
            elif kind.is_floating() and kind.primitive_bitwidth >= 16:
                filled = np.full(ptrs.data.shape, np.nan, f"f{kind.primitive_bitwidth // 8}")
            else:
                number = interpreter._get_np_dtype(kind)
                filled = np.full(ptrs.data.shape, np.iinfo(number).max if number.kind in "iu" else True, number)
            other = interpreter.TensorHandle(filled, kind)
        return original(self, ptrs, mask, other, *args, **kwargs)

    builder.create_masked_load = spoiled


def install() -> None:
    """Repair the interpreter of this process, once. TRITON_INTERPRET=1 has to be set before Triton is imported."""
    if getattr(interpreter.InterpreterBuilder, "_qwen_fast_shim", False):
        return
    interpreter.InterpreterBuilder._qwen_fast_shim = True
    convert = _repair_casts()

    def upcast(handle):
        if handle.dtype.scalar != BF16:
            return handle
        return interpreter.TensorHandle(convert(handle.data, BF16, tl.float32, None).view(np.float32), tl.float32)

    def to_bf16(data):
        return convert(np.asarray(data, np.float32), tl.float32, BF16, None)

    _repair_arithmetic(upcast, to_bf16)
    _repair_reductions(upcast, to_bf16)
    _repair_loop_bounds()
    _spoil_undefined_lanes()
