"""euler_step against the step of stock diffusers (bit for bit) and against float64."""

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
    surrounded,
)

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels.euler_step import (
    DEFAULT_CONFIG,
    _euler_step_kernel,
    euler_step,
    euler_step_reference,
    launch_euler_step,
)
from support.canaries import Canaries, between_canaries
from support.recorded_sampler import Run, random_run

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

launch = between_canaries(launch_euler_step, config=DEFAULT_CONFIG)
IMPLEMENTATIONS = [pytest.param(launch, id="launcher", marks=pytest.mark.triton), pytest.param(euler_step, id="op")]


@functools.cache
def stock_run(shape: tuple, dtype: torch.dtype, device: torch.device, magnitude: float = 1.0) -> Run:
    return random_run(shape, dtype, device, guided=False, magnitude=magnitude)


def arguments(run: Run, step: int) -> tuple[torch.Tensor, ...]:
    return run.latents[step], run.cond[step], run.sigmas, run.index(step)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_is_stocks_to_the_bit(run, shape, dtype, device):
    stock = stock_run(shape, dtype, device)
    for step in range(len(stock)):
        assert_bit_equal(run(*arguments(stock, step)), stock.latents[step + 1])


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("magnitude", [1e-6, 3e3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_and_overflowing_values_are_stocks_too(run, magnitude, dtype, device):
    stock = stock_run((1, 77, 64), dtype, device, magnitude * (10 if dtype == torch.float16 else 1))
    for step in range(len(stock)):
        assert_bit_equal(run(*arguments(stock, step)), stock.latents[step + 1])


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_a_whole_run_with_the_step_index_advanced_on_the_device(run, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    latents, step_index = stock.latents[0], stock.index(0)
    for velocity in stock.cond:
        latents = run(latents, velocity, stock.sigmas, step_index)
        step_index.add_(1)
    assert_bit_equal(latents, stock.latents[-1])


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_against_float64_is_within_budget(run, dtype, device):
    stock = stock_run((2, 77, 64), dtype, device)
    latents, velocity, sigmas, step_index = arguments(stock, 2)
    oracle = euler_step_reference(latents.double(), velocity.double(), sigmas, step_index)
    actual = run(latents, velocity, sigmas, step_index)
    assert_within_budget(actual, euler_step_reference(latents, velocity, sigmas, step_index), oracle)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_precise_sampler_keeps_the_step_in_fp32(run, dtype, device):
    stock = stock_run((2, 77, 64), dtype, device)
    latents, velocity, sigmas, step_index = arguments(stock, 1)
    latents = latents.float() + 1e-4  # not representable in `dtype`
    actual = run(latents, velocity, sigmas, step_index)
    assert actual.dtype == torch.float32
    assert_bit_equal(actual, latents + (sigmas[2] - sigmas[1]) * velocity.float())
    oracle = euler_step_reference(latents.double(), velocity.double(), sigmas, step_index)
    assert_within_budget(actual, euler_step_reference(latents, velocity, sigmas, step_index), oracle)


def test_fp64_reference_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    sigmas = torch.tensor([1.0, 0.7, 0.1, 0.0])
    actual = euler_step(latents, velocity, sigmas, torch.tensor([1], dtype=torch.int32))
    assert torch.equal(actual, latents + (sigmas[2].double() - sigmas[1].double()) * velocity)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(run, layout, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    latents, velocity, sigmas, step_index = arguments(stock, 3)
    for odd_latents, odd_velocity in [(True, True), (True, False), (False, True)]:
        actual = run(
            in_layout(latents, layout) if odd_latents else latents,
            in_layout(velocity, layout) if odd_velocity else velocity,
            sigmas,
            step_index,
        )
        assert actual.is_contiguous()
        assert_bit_equal(actual, stock.latents[4])


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_velocity_shared_by_the_batch(run, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    latents, velocity, sigmas, step_index = arguments(stock, 1)
    shared = velocity[:1].expand_as(velocity)
    assert_bit_equal(run(latents, shared, sigmas, step_index), run(latents, shared.contiguous(), sigmas, step_index))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_any_rank_and_both_index_dtypes(run, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    latents, velocity, sigmas, _ = arguments(stock, 2)
    for shape in [(-1,), (2, 77, 8, 8), (2, 1, 77, 64)]:
        actual = run(latents.view(shape), velocity.view(shape), sigmas, stock.index(2, torch.int64))
        assert_bit_equal(actual, stock.latents[3].view(shape))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_inputs_stay_and_the_output_is_new(run, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    inputs = arguments(stock, 1)
    before = [tensor.clone() for tensor in inputs]
    out = run(*inputs)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
    assert out.untyped_storage().data_ptr() not in [tensor.untyped_storage().data_ptr() for tensor in inputs]
    assert_bit_equal(run(*inputs), out)


@pytest.mark.triton
@pytest.mark.parametrize("step", STEPS_OUTSIDE)
def test_a_step_index_outside_the_schedule_gives_nan(step, device):
    stock = stock_run((1, 77, 64), torch.bfloat16, device)
    latents, velocity, sigmas, _ = arguments(stock, 0)
    assert launch(latents, velocity, surrounded(sigmas), stock.index(step)).isnan().all()


def test_the_op_on_the_cpu_refuses_a_step_index_outside_the_schedule():
    stock = stock_run((1, 1, 64), torch.bfloat16, torch.device("cpu"))
    for step in (-1, 4, 5):
        with pytest.raises(ValueError, match=f"step_index: {step} "):
            euler_step(stock.latents[0], stock.cond[0], stock.sigmas, stock.index(step))


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(1, 77, 64), (2, 13, 7), (1, 1, 1)], ids=str)
def test_nothing_outside_the_buffers_is_touched(shape, device):
    """Inputs between NaN too: what is read outside them shows in the output, what is written in the canaries."""
    stock = stock_run(shape, torch.bfloat16, device)
    latents, velocity, sigmas, step_index = arguments(stock, 0)
    canaries = Canaries()
    out = launch(canaries.copy(latents), canaries.copy(velocity), canaries.copy(sigmas), step_index)
    canaries.check()
    assert_bit_equal(out, stock.latents[1])


@pytest.mark.triton
def test_offsets_beyond_32_bits(one_far_program, device):
    """One program whose elements lie more than 2^31 elements behind the start of each tensor."""
    block, numel = DEFAULT_CONFIG["BLOCK"], 2**31 + 1000
    far = one_far_program(program=2**31 // block, numel=numel, dtype=torch.bfloat16, count=3)
    stock = stock_run((1, 1, 1000), torch.bfloat16, device)
    latents, velocity, sigmas, step_index = arguments(stock, 0)
    out, far_latents, far_velocity = far
    far_latents[2**31 :], far_velocity[2**31 :] = latents.flatten(), velocity.flatten()
    _euler_step_kernel[(1,)](out, far_latents, far_velocity, sigmas, step_index, sigmas.numel() - 1, numel, **DEFAULT_CONFIG)
    assert_bit_equal(out[2**31 :], stock.latents[1].flatten())


def good() -> dict[str, torch.Tensor]:
    return {
        "latents": torch.zeros(1, 4, 64),
        "velocity": torch.zeros(1, 4, 64),
        "sigmas": torch.tensor([1.0, 0.5, 0.0]),
        "step_index": torch.tensor([0], dtype=torch.int32),
    }


BAD = BAD_LATENTS | bad_prediction("velocity") | BAD_SCHEDULE


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        euler_step(**good() | {argument: value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype, device):
    stock = stock_run((2, 13, 7), dtype, device)
    torch.library.opcheck(torch.ops.qwen_fast.euler_step.default, arguments(stock, 1))
    transposed = arguments(stock, 1)[0].mT
    torch.library.opcheck(torch.ops.qwen_fast.euler_step.default, (transposed, stock.cond[1].mT, stock.sigmas, stock.index(1)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    torch.compiler.reset()
    compiled = torch.compile(euler_step, fullgraph=True, backend=backend)
    for step in (0, 3):
        assert_bit_equal(compiled(*arguments(stock, step)), stock.latents[step + 1])


@pytest.mark.gpu
def test_a_captured_graph_replays_every_step(device):
    stock = stock_run((2, 77, 64), torch.bfloat16, device)
    latents, velocity, step_index = stock.latents[0].clone(), stock.cond[0].clone(), stock.index(0)
    launch(latents, velocity, stock.sigmas, step_index)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latents.copy_(euler_step(latents, velocity, stock.sigmas, step_index))
        step_index.add_(1)
    for step in range(len(stock)):
        velocity.copy_(stock.cond[step])
        graph.replay()
        assert_bit_equal(latents, stock.latents[step + 1])


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    latents = torch.ones(2**31 + 1000, dtype=torch.bfloat16, device=device)
    sigmas = torch.tensor([1.0, 0.3, 0.0], device=device)
    out = euler_step(latents, latents, sigmas, torch.zeros(1, dtype=torch.int32, device=device))
    expected = euler_step_reference(latents[:1], latents[:1], sigmas, torch.zeros(1, dtype=torch.int32, device=device))
    assert (out == expected).all()
