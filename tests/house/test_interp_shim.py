"""Every repaired piece of the interpreter against torch: a Triton that moves what the shim patches fails here."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is interpreted")

BLOCK = 1024
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def _cast_kernel(out_ptr, x_ptr, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _arithmetic_kernel(out_ptr, x_ptr, y_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offsets), tl.load(y_ptr + offsets)
    if OP == "+":
        result = x + y
    elif OP == "-":
        result = x - y
    elif OP == "*":
        result = x * y
    elif OP == "neg":
        result = -x
    elif OP == "max":
        result = tl.maximum(x, y)
    elif OP == "where":
        result = tl.where(x > y, x, y)
    elif OP == "half":
        result = x * 0.5
    tl.store(out_ptr + offsets, result)


@triton.jit
def _reduce_kernel(sum_ptr, max_ptr, x_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(sum_ptr, tl.sum(x, axis=0))
    tl.store(max_ptr, tl.max(x, axis=0))


@triton.jit
def _dot_kernel(out_ptr, a_ptr, b_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), out_dtype=tl.float32))


@triton.jit
def _loop_kernel(out_ptr, count):
    total = 0.0
    for _ in range(0, tl.load(count)):
        total += 1.0
    tl.store(out_ptr, total)


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.zeros(values.shape, dtype=dtype)
    _cast_kernel[(triton.cdiv(values.numel(), BLOCK),)](out, values, values.numel(), BLOCK=BLOCK)
    return out


def _floats(count: int) -> torch.Tensor:
    """Values of every size: ordinary, tiny, huge, halfway between neighbours, and the special ones."""
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn(count // 2, generator=generator)
    bits = torch.randint(-(2**31), 2**31, (count // 4,), generator=generator).to(torch.int32).view(torch.float32)
    ties = (torch.randint(0, 2**15, (count - count // 2 - count // 4 - 6,), generator=generator) * 2**16 + 2**15).to(
        torch.int32
    )
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45])
    return torch.cat([ordinary, bits, ties.view(torch.float32), special])


def _same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(torch.nan_to_num(actual.double(), 1e300), torch.nan_to_num(expected.double(), 1e300))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_from_fp32_round_to_nearest_even(dtype):
    values = _floats(44_000)
    assert values.numel() == 44_000
    assert _same(_cast(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_casts_to_fp8_saturate_and_round_as_the_hardware(dtype):
    values = _floats(44_000)
    largest = torch.finfo(dtype).max
    expected = torch.where(values.isnan(), values, values.clamp(-largest, largest)).to(dtype)
    assert _same(_cast(values, dtype), expected)


def test_every_bf16_pattern_survives_the_way_to_fp32_and_back():
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    assert _same(_cast(patterns, torch.float32), patterns.float())
    assert _same(_cast(patterns.float(), torch.bfloat16), patterns)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_every_fp8_pattern_is_read_right(dtype):
    patterns = torch.arange(256).to(torch.uint8).view(dtype)
    assert _same(_cast(patterns, torch.float32), patterns.float())


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("+", torch.add),
        ("-", torch.sub),
        ("*", torch.mul),
        ("neg", lambda x, y: -x),
        ("max", torch.maximum),
        ("where", lambda x, y: torch.where(x > y, x, y)),
        ("half", lambda x, y: x * 0.5),
    ],
)
def test_bf16_arithmetic_rounds_once(op, expected):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(BLOCK, generator=generator).bfloat16() for _ in range(2))
    out = torch.zeros_like(x)
    _arithmetic_kernel[(1,)](out, x, y, OP=op, BLOCK=BLOCK)
    assert torch.equal(out, expected(x, y))


def test_bf16_reductions_accumulate_in_fp32():
    x = torch.randn(BLOCK, generator=torch.Generator().manual_seed(2)).bfloat16()
    total, largest = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](total, largest, x, BLOCK=BLOCK)
    assert largest.item() == x.max().item()
    assert abs(total.item() - x.double().sum().item()) <= 2**-8 * abs(total.item())


def test_bf16_dot_accumulates_in_fp32():
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(32, 32, generator=generator).bfloat16() for _ in range(2))
    out = torch.zeros(32, 32)
    _dot_kernel[(1,)](out, a, b, N=32)
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() <= 32 * 2**-24 * exact.abs().max()


def test_a_loop_may_run_to_a_bound_read_from_memory():
    out = torch.zeros(1)
    _loop_kernel[(1,)](out, torch.tensor([5], dtype=torch.int32))
    assert out.item() == 5.0


@triton.jit
def _tail_kernel(out_ptr, x_ptr, numel, FILLED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if FILLED:
        value = tl.load(x_ptr + offsets, mask=offsets < numel, other=0)
    else:
        value = tl.load(x_ptr + offsets, mask=offsets < numel)
    tl.store(out_ptr + offsets, value)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32, torch.bool], ids=str
)
def test_lanes_that_a_load_leaves_undefined_are_no_zeros(dtype):
    """On a GPU they are whatever a register held; with `other` they are that."""
    x, out = torch.zeros(8, dtype=dtype), torch.zeros(8, dtype=dtype)
    _tail_kernel[(1,)](out, x, 5, FILLED=False, BLOCK=8)
    assert not out[:5].any() and (out[5:].isnan().all() if dtype.is_floating_point else out[5:].all())
    _tail_kernel[(1,)](out, x, 5, FILLED=True, BLOCK=8)
    assert not out.any()
