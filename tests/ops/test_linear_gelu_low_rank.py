"""linear_gelu with low-rank products, as of LoRA adapters, against float64."""

import functools
import inspect

import pytest
import torch
from linear_cases import DESCRIPTORS, DTYPES, POINTERS, implementations, in_rows, layer, reads_only

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels import _library
from qwen_fast_kernels._matmul import dimensions
from qwen_fast_kernels.linear_gelu import default_config, launch_linear_gelu, linear_gelu, linear_gelu_reference
from support.canaries import Canaries

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

IMPLEMENTATIONS = implementations(launch_linear_gelu, linear_gelu)
LAUNCHES = [implementation for implementation in IMPLEMENTATIONS if implementation.id != "op"]
BF16, FP16, FP32 = DTYPES
# (R, K, N) and r: several tiles and a tail on every axis; one row; one block of ranks, a part of one, several, with a tail.
SHAPES = [
    ((33, 80, 40), 1, BF16),
    ((31, 32, 33), 3, FP32),
    ((1, 64, 64), 16, BF16),
    ((77, 64, 72), 32, FP16),
    ((33, 32, 40), 48, FP32),
    ((33, 80, 40), 100, BF16),
]


@functools.cache
def adapted(shape: tuple, ranks: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, low and up; the low-rank product is as large as the layer's own."""
    low, up, _ = layer((shape[0], ranks, shape[2]), dtype, device)
    return *layer(shape, dtype, device), low, up


def assert_right(actual: torch.Tensor, *arguments: torch.Tensor | None) -> None:
    oracle = linear_gelu_reference(*(None if argument is None else argument.double() for argument in arguments))
    assert actual.is_contiguous()
    assert_within_budget(actual, linear_gelu_reference(*arguments), oracle)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "ranks", "dtype"), SHAPES, ids=str)
def test_error_against_float64_is_within_budget(run, shape, ranks, dtype, device):
    arguments = adapted(shape, ranks, dtype, device)
    assert_right(run(*arguments), *arguments)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_bias(run, dtype, device):
    x, weight, _, low, up = adapted((33, 64, 40), 20, dtype, device)
    assert_right(run(x, weight, None, low, up), x, weight, None, low, up)


def test_the_reference_adds_the_product_before_gelu(device):
    """And is the specification: from torch's own pieces, as PEFT's layer and diffusers' GELU have them."""
    x, weight, bias, low, up = (one.double() for one in adapted((33, 80, 40), 3, FP32, device))
    expected = torch.nn.functional.gelu(x @ weight.t() + bias + low @ up.t(), approximate="tanh")
    torch.testing.assert_close(linear_gelu_reference(x, weight, bias, low, up), expected, rtol=1e-12, atol=1e-12)
    assert (expected - linear_gelu_reference(x, weight, bias)).abs().max() > 0.5


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("ranks", [20, 32])
def test_factors_of_any_stride_and_alignment(run, ranks, device):
    """What lies between their rows is NaN: the tail of the ranks must not reach it."""
    x, weight, bias, low, up = adapted((33, 80, 40), ranks, BF16, device)
    expected = run(x, weight, bias, low, up)
    assert_bit_equal(run(x, weight, bias, in_rows(low, 3, 5), in_rows(up, 1, 0)), expected)
    once = run(x, weight, bias, low[:1].expand(33, -1), up)
    assert_right(once, x, weight, bias, low[:1].expand(33, -1), up)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("run", LAUNCHES)
def test_no_load_leaves_the_inputs(run, device):
    """Also those loads whose numbers nobody would see: of rows and columns behind the last."""
    arguments = adapted((33, 48, 72), 5, BF16, device)
    with reads_only(*arguments):
        run(*arguments)


@pytest.mark.parametrize("run", LAUNCHES)
def test_nothing_outside_the_buffers_is_read(run, device):
    """Inputs between NaN: what is read outside them shows in the output."""
    arguments = adapted((33, 48, 72), 5, BF16, device)
    canaries = Canaries()
    assert_bit_equal(run(*map(canaries.copy, arguments)), run(*arguments))
    canaries.check()


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_nan_and_infinity_stay_in_their_row_and_column(run, device):
    x, weight, bias, low, up = adapted((40, 64, 40), 20, BF16, device)
    low, up = low.clone(), up.clone()
    low[3, 5], low[35, 19], up[7, 0] = float("nan"), float("inf"), float("nan")
    actual = run(x, weight, bias, low, up)
    assert actual[3].isnan().all() and not actual[35].isfinite().any() and actual[:, 7].isnan().all()
    rest = actual[[row for row in range(40) if row not in (3, 35)]][:, [n for n in range(40) if n != 7]]
    assert rest.isfinite().all()


def test_fp64_on_the_cpu():
    arguments = adapted((7, 33, 5), 3, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(linear_gelu(*arguments), linear_gelu_reference(*arguments), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_inputs_stay_and_the_output_is_new(run, device):
    inputs = adapted((33, 64, 40), 16, BF16, device)
    before = [tensor.clone() for tensor in inputs]
    out = run(*inputs)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
    assert out.untyped_storage().data_ptr() not in [tensor.untyped_storage().data_ptr() for tensor in inputs]
    assert_bit_equal(run(*inputs), out)


GOOD = {
    "x": torch.zeros(4, 16), "weight": torch.zeros(8, 16), "bias": torch.zeros(8),
    "low": torch.zeros(4, 3), "up": torch.zeros(8, 3),
}  # fmt: skip
BAD = {
    "up alone": ("low", None, r"low: None, but up is given"),
    "low alone": ("up", None, r"up: None, but low is given"),
    "vector low": ("low", torch.zeros(4), r"low: shape \(4,\); \[4, r\]"),
    "too few rows": ("low", torch.zeros(3, 3), r"low: shape \(3, 3\); \[4, r\]"),
    "no rank": ("low", torch.zeros(4, 0), r"low: shape \(4, 0\)"),
    "up of another N": ("up", torch.zeros(7, 3), r"up: shape \(7, 3\); \[8, r\]"),
    "transposed low": ("low", torch.zeros(3, 4).t(), r"low: stride 4 between ranks"),
    "transposed up": ("up", torch.zeros(3, 8).t(), r"up: stride 8 between ranks"),
    "other ranks": ("up", torch.zeros(8, 4), r"up: 4 ranks, but low has 3"),
    "bf16 low": ("low", torch.zeros(4, 3, dtype=BF16), r"low: dtype torch.bfloat16"),
    "fp16 up": ("up", torch.zeros(8, 3, dtype=FP16), r"up: dtype torch.float16"),
    "low elsewhere": ("low", torch.zeros(4, 3, device="meta"), r"low: on meta"),
    "up elsewhere": ("up", torch.zeros(8, 3, device="meta"), r"up: on meta"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    linear_gelu(**GOOD)
    with pytest.raises(ValueError, match=message):
        linear_gelu(**GOOD | {argument: value})


def test_what_computes_it():
    """The kernel on sm_90, since cuBLASLt's epilogue adds no product; not in fp32. On sm_100 a tile whose sums fit twice."""
    for arch in (80, 86, 89, 90, 100, 103, 120):
        alone, beside = (default_config(arch, 4096, 12288, 3072, 2, True, low_rank) for low_rank in (False, True))
        assert (alone["BACKEND"], beside["BACKEND"]) == ("cublaslt", "triton" if arch == 90 else "cublaslt")
        assert default_config(arch, 4096, 12288, 3072, 4, True, True)["BACKEND"] == "cublaslt"
        differing = {name for name in alone if alone[name] != beside[name]}
        assert differing == ({"BLOCK_N"} if arch in (100, 103) else {"BACKEND"} if arch == 90 else set())


def test_torch_s_operators_that_take_a_wrong_kernel_s_place_take_it_too(device):
    arguments = adapted((33, 80, 40), 3, BF16, device)
    operator = _library._OPERATORS["linear_gelu"]
    assert_right(operator.by_torch(*arguments), *arguments)
    assert list(inspect.signature(operator.by_torch).parameters) == list(inspect.signature(linear_gelu).parameters)


def test_opcheck(device):
    x, weight, bias, low, up = adapted((13, 24, 7), 3, BF16, device)
    op = torch.ops.qwen_fast.linear_gelu.default
    torch.library.opcheck(op, (x, weight, bias, low, up))
    torch.library.opcheck(op, (x, weight, None, in_rows(low, 3, 2), in_rows(up, 1, 0)))


def test_compiled_equals_eager(device):
    inputs = adapted((33, 64, 40), 16, BF16, device)
    torch.compiler.reset()
    compiled = torch.compile(linear_gelu, fullgraph=True, backend="aot_eager")
    assert_bit_equal(compiled(*inputs), linear_gelu(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("ranks", [4, 32, 100])
@pytest.mark.parametrize("rows", [13, 4109])
def test_the_operator_at_the_models_shapes(rows, ranks, dtype, device):
    arguments = adapted((rows, 3072, 12288), ranks, dtype, device)
    actual = linear_gelu(*arguments)
    assert_right(actual, *arguments)
    assert_bit_equal(linear_gelu(*arguments), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS, None], ids=["pointers", "descriptors", "default"])
def test_a_captured_graph_replays(config, device):
    x, weight, bias, low, up = (tensor.clone() for tensor in adapted((300, 512, 2048), 32, BF16, device))
    major, minor = torch.cuda.get_device_capability(device)
    config = config or default_config(10 * major + minor, *dimensions(x, weight), True)
    launch = functools.partial(launch_linear_gelu, x, weight, bias, low, up, config=config)
    launch()  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch()
    for sign in (1, -1):
        low.mul_(sign)
        graph.replay()
        assert_bit_equal(out, launch())
