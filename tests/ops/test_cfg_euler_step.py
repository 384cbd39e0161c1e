"""cfg_euler_step against the denoising loop of stock diffusers (bit for bit in bf16 and fp16) and against float64."""

import functools

import pytest
import torch
from sampler_cases import (
    BAD_LATENTS,
    BAD_SCHEDULE,
    DTYPES,
    HALF,
    LAYOUTS,
    SHAPES,
    STEPS_OUTSIDE,
    bad_prediction,
    in_layout,
    scale_of,
    surrounded,
    with_a_float,
)

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget, differing, rounding_distance
from qwen_fast_kernels.cfg_euler_step import (
    DEFAULT_CONFIG,
    _cfg_euler_step_kernel,
    cfg_euler_step,
    cfg_euler_step_reference,
    launch_cfg_euler_step,
)
from support.canaries import Canaries, between_canaries
from support.recorded_sampler import Run, play, random_run

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

launch_tensor = between_canaries(launch_cfg_euler_step, config=DEFAULT_CONFIG)
launch, reference = with_a_float(launch_tensor), with_a_float(cfg_euler_step_reference)
IMPLEMENTATIONS = [
    pytest.param(launch, id="launcher", marks=pytest.mark.triton),
    pytest.param(cfg_euler_step, id="op"),
    pytest.param(with_a_float(cfg_euler_step), id="op of a tensor"),
]
# How far an fp32 sum of squares in another order may move a norm: a few roundings of 2^-24 each, with room to spare.
NORM_TOLERANCE = 64 * torch.finfo(torch.float32).eps


@functools.cache
def stock_run(shape: tuple, dtype: torch.dtype, device: torch.device, scale: float = 4.0, magnitude: float = 1.0) -> Run:
    return random_run(shape, dtype, device, true_cfg_scale=scale, magnitude=magnitude)


def arguments(run: Run, step: int) -> tuple:
    return run.latents[step], run.cond[step], run.uncond[step], run.sigmas, run.index(step), run.true_cfg_scale


def oracle(latents, cond, uncond, sigmas, step_index, true_cfg_scale) -> torch.Tensor:
    return reference(latents.double(), cond.double(), uncond.double(), sigmas, step_index, true_cfg_scale)


def norm_is_on_a_rounding_boundary(cond, uncond, true_cfg_scale) -> torch.Tensor:
    """Per token `[B, S]`: does rounding one of its two norms depend on the order in which the squares are added?"""
    combined = uncond + true_cfg_scale * (cond - uncond)  # its roundings do not depend on any order
    norms = torch.stack([tensor.double().norm(dim=-1) for tensor in (cond, combined)])
    return (rounding_distance(norms, cond.dtype) < NORM_TOLERANCE).any(dim=0)


def assert_stocks_but_for_the_order_of_a_sum(actual: torch.Tensor, run: Run, step: int) -> None:
    """Equal bits; in bf16 and fp16 a token may differ if float64 proves that one of its norms lies on a boundary."""
    if actual.dtype == torch.float32:
        assert_within_budget(actual, run.latents[step + 1], oracle(*arguments(run, step)))
        return
    tokens = differing(actual, run.latents[step + 1]).any(dim=-1)
    unproven = tokens & ~norm_is_on_a_rounding_boundary(run.cond[step], run.uncond[step], run.true_cfg_scale)
    assert not unproven.any(), f"step {step}: tokens {unproven.nonzero().tolist()} differ from stock without a reason"


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [4.0, 3.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_stocks(run, shape, dtype, scale, device):
    stock = stock_run(shape, dtype, device, scale)
    for step in range(len(stock)):
        assert_stocks_but_for_the_order_of_a_sum(run(*arguments(stock, step)), stock, step)


@pytest.mark.parametrize("run", [cfg_euler_step, with_a_float(cfg_euler_step)], ids=["float", "tensor"])
@pytest.mark.parametrize("scale", [3.7, 1 + 2**-12], ids=str)  # neither is a number of bf16 or fp16
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_op_on_the_cpu_is_stocks_to_the_bit(run, shape, dtype, scale):
    stock = stock_run(shape, dtype, torch.device("cpu"), scale)
    for step in range(len(stock)):
        assert_bit_equal(run(*arguments(stock, step)), stock.latents[step + 1])


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_recorded_run_of_20_steps_ends_in_stocks_latents(run, dtype, device):
    """Each step starts from our own latents, and the step index is advanced on the device.

    On the CPU no token is excused. A GPU adds squares in another order than torch: there a token leaves the comparison at
    the step at which it differs, if float64 proves that one of its norms lies on a boundary.
    """
    stock = random_run((1, 64, 64), dtype, device, steps=20, true_cfg_scale=3.7)
    latents, step_index = stock.latents[0], stock.index(0)
    excused = torch.zeros(1, 64, dtype=torch.bool, device=device)
    for step, (cond, uncond) in enumerate(zip(stock.cond, stock.uncond, strict=True)):
        latents = run(latents, cond, uncond, stock.sigmas, step_index, 3.7)
        differs = differing(latents, stock.latents[step + 1]).any(dim=-1) & ~excused
        assert not (differs & ~norm_is_on_a_rounding_boundary(cond, uncond, 3.7)).any(), f"step {step}"
        excused |= differs
        step_index.add_(1)
    assert excused.sum() <= (4 if device.type == "cuda" else 0)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("magnitude", [1e-30, 1e-4, 1e4], ids=str)
def test_norms_that_vanish_or_overflow_are_stocks_too(run, magnitude, dtype, device):
    stock = stock_run((1, 77, 64), dtype, device, 3.7, magnitude)
    for step in range(len(stock)):
        assert_stocks_but_for_the_order_of_a_sum(run(*arguments(stock, step)), stock, step)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_rows_are_what_stock_makes_of_them(run, dtype, device):
    plain = stock_run((2, 17, 64), dtype, device)
    cond, uncond = [t.clone() for t in plain.cond], [t.clone() for t in plain.uncond]
    for step in range(len(plain)):
        cond[step][0, 1 + step] = uncond[step][0, 1 + step] = 0  # 0 / 0: NaN
        cond[step][0, 6 + step], uncond[step][0, 6 + step] = 3, 4  # combined: 4 + 4 (3 - 4) = 0: 0 * inf, NaN
        cond[step][0, 11 + step] = 0  # |cond| / |combined| = 0: the velocity is 0
    stock = play(plain.latents[0], cond, uncond, 4.0)
    for step in range(len(stock)):
        actual = run(*arguments(stock, step))
        assert_stocks_but_for_the_order_of_a_sum(actual, stock, step)
        assert actual[0, [1 + step, 6 + step]].isnan().all()
        assert_bit_equal(actual[0, 11 + step], stock.latents[step][0, 11 + step])
        assert actual[1].isfinite().all()


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64_is_within_budget(run, dtype, device):
    stock = stock_run((2, 77, 64), dtype, device, 3.7)
    for step in range(len(stock)):
        inputs = arguments(stock, step)
        assert_within_budget(run(*inputs), reference(*inputs), oracle(*inputs))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_precise_sampler_keeps_everything_in_fp32(run, dtype, device):
    stock = stock_run((2, 77, 64), dtype, device, 3.7)
    latents, *rest = arguments(stock, 1)
    inputs = (latents.float() + 1e-4, *rest)  # not representable in `dtype`
    actual = run(*inputs)
    assert actual.dtype == torch.float32
    assert_within_budget(actual, reference(*inputs), oracle(*inputs))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_layouts(run, layout, position, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    inputs = list(arguments(stock, 3))
    plain = run(*inputs)
    inputs[position] = in_layout(inputs[position], layout)
    actual = run(*inputs)
    assert actual.is_contiguous()
    assert_bit_equal(actual, plain)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_predictions_shared_by_the_batch(run, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    latents, cond, uncond, *rest = arguments(stock, 1)
    shared = uncond[:1].expand_as(uncond)
    assert_bit_equal(run(latents, cond, shared, *rest), run(latents, cond, shared.contiguous(), *rest))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_a_64_bit_step_index(run, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    *front, _, scale = arguments(stock, 2)
    assert_bit_equal(run(*front, stock.index(2, torch.int64), scale), run(*arguments(stock, 2)))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_inputs_stay_and_the_output_is_new(run, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    *tensors, scale = arguments(stock, 1)
    before = [tensor.clone() for tensor in tensors]
    out = run(*tensors, scale)
    assert out.dtype == tensors[0].dtype
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
    assert out.untyped_storage().data_ptr() not in [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert_bit_equal(run(*tensors, scale), out)


@pytest.mark.triton
@pytest.mark.parametrize("step", STEPS_OUTSIDE)
def test_a_step_index_outside_the_schedule_gives_nan(step, device):
    stock = stock_run((1, 77, 64), torch.bfloat16, device)
    latents, cond, uncond, sigmas, _, scale = arguments(stock, 0)
    assert launch(latents, cond, uncond, surrounded(sigmas), stock.index(step), scale).isnan().all()


def test_the_op_on_the_cpu_refuses_a_step_index_outside_the_schedule():
    stock = stock_run((1, 1, 64), torch.bfloat16, torch.device("cpu"))
    *front, _, scale = arguments(stock, 0)
    for step in (-1, 4, 5):
        with pytest.raises(ValueError, match=f"step_index: {step} "):
            cfg_euler_step(*front, stock.index(step), scale)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(1, 77, 64), (2, 13, 7), (1, 1, 1)], ids=str)
def test_nothing_outside_the_buffers_is_touched(shape, device):
    """Inputs between NaN too: what is read outside them shows in the output, what is written in the canaries."""
    stock = stock_run(shape, torch.bfloat16, device)
    latents, cond, uncond, sigmas, step_index, scale = arguments(stock, 0)
    canaries = Canaries()
    inputs = [canaries.copy(tensor) for tensor in (latents, cond, uncond, sigmas)]
    out = launch_tensor(*inputs, step_index, canaries.copy(torch.tensor([scale], device=device)))
    canaries.check()
    assert_stocks_but_for_the_order_of_a_sum(out, stock, 0)


@pytest.mark.triton
def test_offsets_beyond_32_bits(one_far_program, device):
    """One program whose elements lie more than 2^31 elements behind the start of each tensor."""
    rows = DEFAULT_CONFIG["BLOCK_TOKENS"]
    numel = 2**31 + 8 * 64
    far = one_far_program(program=2**31 // 64 // rows, numel=numel, dtype=torch.bfloat16, count=4)
    stock = stock_run((1, 8, 64), torch.bfloat16, device)
    *tensors, sigmas, step_index, scale = arguments(stock, 0)
    for place, tensor in zip(far[1:], tensors, strict=True):
        place[2**31 :] = tensor.flatten()
    _cfg_euler_step_kernel[(1,)](
        *far,
        sigmas,
        step_index,
        torch.tensor([scale], device=device),
        numel // 64,
        sigmas.numel() - 1,
        64,
        BLOCK_CHANNELS=64,
        **DEFAULT_CONFIG,
    )
    assert_stocks_but_for_the_order_of_a_sum(far[0][2**31 :].view(1, 8, 64), stock, 0)


def good() -> dict:
    return {
        "latents": torch.zeros(1, 4, 64),
        "cond": torch.ones(1, 4, 64),
        "uncond": torch.ones(1, 4, 64),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "step_index": torch.tensor([0], dtype=torch.int32),
        "true_cfg_scale": 4.0,
    }


BAD = (
    BAD_LATENTS
    | bad_prediction("cond")
    | bad_prediction("uncond")
    | BAD_SCHEDULE
    | {
        "matrix of latents": ("latents", torch.zeros(4, 64), r"latents: shape \(4, 64\)"),
        "two prediction dtypes": ("uncond", torch.ones(1, 4, 64).bfloat16(), r"uncond: dtype torch.bfloat16"),
        "scale not a number": ("true_cfg_scale", float("nan"), "true_cfg_scale: nan"),
        "infinite scale": ("true_cfg_scale", float("inf"), "true_cfg_scale: inf"),
        "scale beyond fp32": ("true_cfg_scale", -1e39, r"true_cfg_scale: -1e\+39 is not finite in torch.float32"),
        "scalar scale": ("true_cfg_scale", torch.tensor(4.0), r"true_cfg_scale: got \(\) torch.float32"),
        "two scales": ("true_cfg_scale", torch.ones(2), r"true_cfg_scale: got \(2,\)"),
        "bf16 scale": ("true_cfg_scale", torch.ones(1).bfloat16(), r"true_cfg_scale: .*torch.bfloat16"),
        "fp64 scale": ("true_cfg_scale", torch.ones(1).double(), r"true_cfg_scale: got \(1,\) torch.float64"),
        "integer scale": ("true_cfg_scale", torch.ones(1, dtype=torch.int64), r"true_cfg_scale: .*torch.int64"),
        "scale elsewhere": ("true_cfg_scale", torch.ones(1, device="meta"), "true_cfg_scale: on meta"),
    }
)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        cfg_euler_step(**good() | {argument: value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype, device):
    stock = stock_run((2, 13, 7), dtype, device)
    op = torch.ops.qwen_fast.cfg_euler_step.default
    latents, cond, uncond, *rest, scale = arguments(stock, 1)
    rest.append(scale_of(latents, scale))
    torch.library.opcheck(op, (latents, cond, uncond, *rest))
    torch.library.opcheck(op, (latents.mT, cond.mT, uncond.mT, *rest))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("form", ["float", "tensor"])
def test_compiled_equals_eager(form, backend, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device, 3.7)
    torch.compiler.reset()
    compiled = torch.compile(cfg_euler_step, fullgraph=True, backend=backend)
    for step, scale in ((0, 3.7), (3, 3.7), (3, 2.5), (1, 4.0)):
        *front, _ = arguments(stock, step)
        given = scale if form == "float" else scale_of(front[0], scale)
        assert_bit_equal(compiled(*front, given), cfg_euler_step(*front, scale))


@pytest.mark.gpu
def test_a_captured_graph_replays_every_step(device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    latents, cond, uncond = (tensor.clone() for tensor in arguments(stock, 0)[:3])
    step_index, scale = stock.index(0), scale_of(latents, 4.0)
    launch(latents, cond, uncond, stock.sigmas, step_index, 4.0)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents.copy_(cfg_euler_step(latents, cond, uncond, stock.sigmas, step_index, scale))
        step_index.add_(1)
    eager = stock.latents[0]
    for step in range(len(stock)):
        cond.copy_(stock.cond[step])
        uncond.copy_(stock.uncond[step])
        scale.fill_(4.0 - 0.3 * step)
        graph.replay()
        eager = cfg_euler_step(eager, *arguments(stock, step)[1:-1], 4.0 - 0.3 * step)
        assert_bit_equal(latents, eager)
