"""rms_norm_silu against the norm and activation of diffusers' VAE, and against float64."""

import importlib

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from elementwise_cases import DTYPES, both, in_layout, last_element

from benchmarks.compiler.table import read_table
from benchmarks.operators.cases import WIDTHS
from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels import rms_norm_silu as op
from qwen_fast_kernels.rms_norm_silu import (
    CPU_BLOCK,
    default_config,
    launch_rms_norm_silu,
    rms_norm_silu_reference,
)
from support.canaries import Canaries, between_canaries

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

# Pixels and channels: the VAE's widths, those of Qwen-Image-2.1, odd ones, tails of a tile.
SHAPES = [(1, 96), (67, 96), (37, 192), (33, 384), (66, 144), (9, 1152), (257, 7), (5, 1), (0, 96)]
ADDED = {"alone": (), "bias": ("x_bias",), "residual": ("residual",), "both": ("x_bias", "residual")}


def launch(*args, **kwargs):
    x = args[0] if args else kwargs["x"]
    major, minor = torch.cuda.get_device_capability(x.device) if x.is_cuda else (9, 0)
    config = default_config(10 * major + minor, x.shape[1], x.element_size())
    return between_canaries(launch_rms_norm_silu, config=config)(*args, **kwargs)


RUNS = {"launch": launch, "op": op}


def make(shape, dtype, device, added="alone", silu=True) -> dict:
    rows, channels = shape
    generator = torch.Generator().manual_seed(rows * channels)
    inputs = {
        "x": torch.randn(rows, channels, generator=generator),
        "gamma": 1 + 0.3 * torch.randn(channels, generator=generator),
        "x_bias": torch.randn(channels, generator=generator),
        "residual": 2 * torch.randn(rows, channels, generator=generator),
    }
    wanted = ("x", "gamma", *ADDED[added])
    return {name: inputs[name].to(device, dtype) for name in wanted} | {"silu": silu}


def copied(inputs: dict, dtype: torch.dtype | None = None) -> dict:
    """Fresh tensors, since the residual is written to."""
    return {n: v.to(dtype or v.dtype, copy=True) if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}


def check(run, inputs: dict) -> None:
    """Result, and residual where there is one, within the budget around the float64 reference."""
    mine, reference, oracle = copied(inputs), copied(inputs), copied(inputs, torch.float64)
    actual = run(**mine)
    if "residual" not in inputs:
        assert_within_budget(actual, rms_norm_silu_reference(**reference), rms_norm_silu_reference(**oracle))
    else:
        expected = rms_norm_silu_reference(**reference)
        rms_norm_silu_reference(**oracle)
        assert_within_budget(mine["residual"], reference["residual"], oracle["residual"])
        # The norm is that of the sum as stored, so the oracle starts from there.
        stored = {"x": mine["residual"].double(), "gamma": oracle["gamma"], "silu": inputs["silu"]}
        assert_within_budget(actual, expected, rms_norm_silu_reference(**stored))
    assert actual.is_contiguous()
    for name in ("x", "gamma", "x_bias"):
        if name in inputs:
            assert_bit_equal(mine[name], inputs[name])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64_is_within_budget(implementation, shape, added, dtype, device):
    for silu in (True, False):
        check(RUNS[implementation], make(shape, dtype, device, added, silu))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_farther_from_float64_than_stocks_norm_and_activation(implementation, dtype, device):
    inputs = make((300, 96), dtype, device)
    stock = QwenImageRMS_norm(96, images=False).to(device, dtype)
    with torch.no_grad():
        stock.gamma.copy_(inputs["gamma"].view_as(stock.gamma))
        picture = inputs["x"].T.reshape(1, 96, 1, 20, 15)
        expected = torch.nn.functional.silu(stock(picture))[0].flatten(1).T
    exact = rms_norm_silu_reference(**copied(inputs, torch.float64))
    actual = RUNS[implementation](**inputs)
    ours, theirs = ((value.double() - exact).square().mean().sqrt() for value in (actual, expected))
    # In fp32 both are a few roundings from exact, and which is nearer is chance.
    assert theirs > 0 and ours <= (1.2 if dtype == torch.float32 else 1.0) * theirs, (ours, theirs)


@both
def test_the_norm_is_that_of_the_sum_as_stored(implementation, device):
    """bf16 stores 256 + 1 as 256. Behind a weight of -20 the SiLU of an unrounded sum would be 4 % smaller."""
    x, residual = torch.tensor([[1.0, 0.0]]), torch.full((1, 2), 256.0)
    x, residual, gamma = (value.to(device, torch.bfloat16) for value in (x, residual, torch.full((2,), -20.0)))
    first, second = RUNS[implementation](x, gamma, residual=residual)[0].tolist()
    assert first == second != 0 and residual.tolist() == [[256, 256]]


@both
@pytest.mark.parametrize("layout", ["offset", "strided", "odd stride"])
def test_layouts(implementation, layout, device):
    for dtype, added in ((torch.bfloat16, "both"), (torch.float32, "alone")):
        inputs = make((37, 96), dtype, device, added)
        expected = RUNS[implementation](**copied(inputs))
        moved = copied(inputs)
        moved["x"] = in_layout(moved["x"], layout)
        if layout == "offset":
            moved |= {name: in_layout(moved[name], layout) for name in ADDED[added] if name == "residual"}
        assert_bit_equal(RUNS[implementation](**moved), expected)


@both
def test_zeros_stay_zero_and_what_is_not_finite_stays_in_its_pixel(implementation, device):
    inputs = make((37, 96), torch.bfloat16, device)
    expected = RUNS[implementation](**inputs)
    inputs["x"][5] = 0
    inputs["x"][7, 3] = float("nan")
    inputs["x"][9, 4] = float("inf")
    actual = RUNS[implementation](**inputs)
    assert actual[5].eq(0).all() and actual[7].isnan().all()
    assert actual[9, 4].isnan() and actual[9].nan_to_num().eq(0).all()
    rest = [row for row in range(37) if row not in (5, 7, 9)]
    assert_bit_equal(actual[rest], expected[rest])


@both
@pytest.mark.parametrize("magnitude", [1e-14, 1e-9])
def test_pixels_below_the_smallest_norm(implementation, magnitude, device):
    inputs = make((11, 64), torch.float32, device)
    inputs["x"] *= magnitude
    check(RUNS[implementation], inputs)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(37, 96), (21, 7), (1, 1)], ids=str)
def test_nothing_outside_the_buffers_is_touched(shape, device):
    inputs = make(shape, torch.bfloat16, device, "both")
    expected = launch(**copied(inputs))
    canaries = Canaries()
    guarded = {name: canaries.copy(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    actual = launch(**guarded)
    canaries.check()
    assert_bit_equal(actual, expected)
    assert last_element(guarded["residual"]) > guarded["residual"].data_ptr() or shape == (1, 1)


@pytest.mark.triton
def test_offsets_beyond_32_bits(one_far_program, monkeypatch, device):
    """One program whose pixels lie more than 2^31 elements behind the start of each tensor."""
    inputs, channels = make((1, 96), torch.bfloat16, device, "both"), 96
    near = copied(inputs)
    expected = launch(**near)
    config = default_config(90, channels, 2) | {"BLOCK_ROWS": 1}
    row = 2**31 // channels + 1
    x, residual, out = (each.view(row + 1, channels) for each in one_far_program(row, (row + 1) * channels, torch.bfloat16, 3))
    x[row], residual[row] = inputs["x"][0], inputs["residual"][0]
    monkeypatch.setattr(importlib.import_module("qwen_fast_kernels.rms_norm_silu"), "row_grid", lambda *_: (1,))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: out)
    launch_rms_norm_silu(x, inputs["gamma"], inputs["x_bias"], residual, config=config)
    monkeypatch.undo()
    assert_bit_equal(out[row:], expected)
    assert_bit_equal(residual[row:], near["residual"])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("channels", WIDTHS)
def test_the_default_configuration_computes_little_for_nothing(channels, itemsize):
    """Whole vectors of 16 bytes for every thread, at most a channel in nine idle, and few enough chunks for the registers."""
    config = default_config(90, channels, itemsize)
    block, threads = config["BLOCK_CHANNELS"], 32 * config["num_warps"]
    chunks = -(-channels // block)
    assert chunks <= 5 and 8 * chunks * block <= 9 * channels
    assert config["BLOCK_ROWS"] * block * itemsize == 16 * threads


@pytest.mark.parametrize("channels", [width for width in WIDTHS if width <= 576])
def test_the_sum_of_squares_needs_no_shared_memory(channels):
    """A pixel's chunk lies in one warp, as the committed compile table says."""
    rows = [row for row in read_table() if row["op"] == "rms_norm_silu" and row["case"] == f"{channels} channels, bf16"]
    assert len(rows) == 12 and {row["dynamic_shared"] for row in rows} == {0}


def test_the_cpu_in_blocks(device):
    """More pixels than one block of the CPU's implementation, the last one cut."""
    rows = 2 * (CPU_BLOCK // 384) + 5
    for dtype in (torch.bfloat16, torch.float32):
        check(op, make((rows, 384), dtype, device, "both"))


def test_fp64_on_the_cpu_is_the_formula():
    inputs = make((5, 7), torch.float64, torch.device("cpu"), "both")
    y = inputs["x"] + inputs["x_bias"] + inputs["residual"]
    normed = y / y.square().mean(-1, keepdim=True).sqrt() * inputs["gamma"]
    for run in (op, rms_norm_silu_reference):
        mine = copied(inputs)
        torch.testing.assert_close(run(**mine), normed * normed.sigmoid(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(mine["residual"], y, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("added", ["alone", "both"])
def test_opcheck(added, device):
    overloads = torch.ops.qwen_fast.rms_norm_silu
    overload = overloads.residual if ADDED[added] else overloads.default
    torch.library.opcheck(overload, (), make((13, 7), torch.bfloat16, device, added))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, backend=backend)
    for added in ("alone", "both"):
        inputs = make((20, 96), torch.bfloat16, device, added)
        mine, theirs = copied(inputs), copied(inputs)
        assert_bit_equal(compiled(**mine), op(**theirs))
        assert all(torch.equal(mine[name], theirs[name]) for name in ADDED[added])


META = torch.device("meta")
BAD = {
    "x of integers": ("x", torch.zeros(4, 8, dtype=torch.int32), "x: dtype torch.int32"),
    "x of rank 3": ("x", torch.zeros(1, 4, 8), r"x: shape \(1, 4, 8\)"),
    "x without channels": ("x", torch.zeros(4, 0), r"x: shape \(4, 0\)"),
    "transposed x": ("x", torch.zeros(8, 4).T, "x: stride 4 between channels"),
    "gamma of other channels": ("gamma", torch.zeros(4), r"gamma: got \(4,\)"),
    "gamma of another dtype": ("gamma", torch.zeros(8).half(), "gamma: got .*torch.float16"),
    "gamma elsewhere": ("gamma", torch.zeros(8, device=META), "gamma: on meta"),
    "strided gamma": ("gamma", torch.zeros(16)[::2], "gamma: strides"),
    "x_bias of other channels": ("x_bias", torch.zeros(1, 8), r"x_bias: got \(1, 8\)"),
    "residual of another shape": ("residual", torch.zeros(3, 8), r"residual: got \(3, 8\)"),
    "strided residual": ("residual", torch.zeros(4, 16)[:, :8], "residual: strides"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    inputs = make((4, 8), torch.float32, torch.device("cpu"), "both")
    with pytest.raises(ValueError, match=message):
        op(**inputs | {argument: value})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [96, 192, 384])
def test_real_sizes(channels, dtype, device):
    for added in ADDED:
        check(op, make((1 << 18, channels), dtype, device, added))


@pytest.mark.gpu
def test_a_captured_graph_replays(device):
    inputs = make((4096, 96), torch.bfloat16, device, "bias")
    op(**inputs)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(**inputs)
    inputs["x"].normal_()
    graph.replay()
    assert_bit_equal(out, op(**inputs))
