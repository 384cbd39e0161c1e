"""linear_gelu against float64 and against the modules of stock diffusers."""

import functools

import pytest
import torch
from diffusers.models.activations import GELU
from linear_cases import (
    BAD_LINEAR,
    DESCRIPTORS,
    DTYPES,
    MODEL,
    ODD_SHAPES,
    POINTERS,
    SHAPES,
    any_strides,
    by_descriptors,
    implementations,
    in_rows,
    layer,
    reads_only,
    sums_in_sequence,
)

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels._matmul import dimensions
from qwen_fast_kernels.linear_gelu import (
    _linear_gelu_kernel,
    default_config,
    launch_linear_gelu,
    linear_gelu,
    linear_gelu_reference,
)
from support.canaries import Canaries

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

IMPLEMENTATIONS = implementations(launch_linear_gelu, linear_gelu)
ANY_STRIDES = any_strides(launch_linear_gelu, linear_gelu)
LAUNCHES = [implementation for implementation in IMPLEMENTATIONS if implementation.id != "op"]


def assert_right(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    oracle = linear_gelu_reference(x.double(), weight.double(), None if bias is None else bias.double())
    assert actual.is_contiguous()
    assert_within_budget(actual, linear_gelu_reference(x, weight, bias), oracle)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, MODEL], ids=str)
def test_error_against_float64_is_within_budget(run, dtype, shape, device):
    x, weight, bias = layer(shape, dtype, device)
    assert_right(run(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("run", ANY_STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_sizes(run, dtype, shape, device):
    x, weight, bias = layer(shape, dtype, device)
    assert_right(run(x, weight, bias), x, weight, bias)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("run", LAUNCHES)
@pytest.mark.parametrize("k", [3072, 12288])
def test_fp32_sums_of_many_terms_keep_their_digits(run, k, device):
    """In the order of a GPU, where one sum of all terms would be over the budget."""
    x, weight, bias = layer((40, k, 40), torch.float32, device)
    with sums_in_sequence():
        assert_right(run(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_that_of_stock_diffusers(run, dtype, device):
    rows, k, n = shape = (33, 64, 40)
    x, weight, bias = layer(shape, torch.float32, device)
    stock = GELU(k, n, approximate="tanh").to(device)
    stock.load_state_dict({"proj.weight": weight, "proj.bias": bias})
    with torch.no_grad():
        stock.to(dtype).double()  # the rounded parameters in float64
        oracle = stock(x.to(dtype).double())
        stock.to(dtype)
        x = x.to(dtype)
        assert_within_budget(run(x, stock.proj.weight, stock.proj.bias), stock(x), oracle)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_without_a_bias(run, device):
    x, weight, _ = layer((33, 64, 40), torch.bfloat16, device)
    assert_right(run(x, weight, None), x, weight, None)


@pytest.mark.parametrize("run", ANY_STRIDES)
@pytest.mark.parametrize("padding", [(3, 5), (0, 1)], ids=str)
def test_rows_of_any_stride_and_alignment(run, padding, device):
    """What lies between the rows is NaN: the tail of K must not reach it."""
    x, weight, bias = layer((33, 40, 35), torch.bfloat16, device)
    expected = run(x, weight, bias)
    assert_bit_equal(run(in_rows(x, *padding), in_rows(weight, *padding), bias), expected)
    assert_right(expected, x, weight, bias)


@pytest.mark.triton
def test_descriptors_of_strided_rows(device):
    launch = by_descriptors(launch_linear_gelu)
    x, weight, bias = layer((33, 48, 35), torch.bfloat16, device)
    views = in_rows(x, 8, 8), in_rows(weight, 16, 16)
    assert dimensions(*views)[-1]
    assert_bit_equal(launch(*views, bias), launch(x, weight, bias))


@pytest.mark.parametrize("run", ANY_STRIDES)
def test_one_row_used_again_and_rows_that_overlap(run, device):
    x, weight, bias = layer((3, 64, 40), torch.bfloat16, device)
    for view in (x[:1].expand(33, -1), x.flatten().as_strided((9, 64), (16, 1))):
        assert not dimensions(view, weight)[-1]
        assert_right(run(view, weight, bias), view, weight, bias)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_values(run, dtype, device):
    """GELU of z is z or 0 there; the cube overflows fp32, and an fp16 result may itself be infinite."""
    magnitude = 2e4 if dtype == torch.float16 else 1e30
    x, weight, bias = layer((33, 64, 40), dtype, device, magnitude)
    actual, z = run(x, weight, bias), x.double() @ weight.double().t() + bias.double()
    # What rounds z first makes it -inf, and stock's GELU of that is NaN.
    rounds_first = run is linear_gelu and dtype == torch.float16
    negative = (z < -magnitude / 10) & ~(rounds_first & (z < -6e4))
    assert negative.any() and (actual[negative] == 0).all()
    positive = z > magnitude / 10
    assert positive.any() and not actual[positive].isnan().any()
    if dtype == torch.float16:
        assert actual[positive].isinf().any()
        positive &= z < 6e4
    assert_within_budget(actual[positive], z[positive].to(dtype), z[positive])


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_small_and_negative_values_keep_their_digits(run, device):
    """z in steps through the range where the two forms of GELU differ most, one value per row; in fp32."""
    z = torch.linspace(-6, 6, 96, device=device)
    x, weight = torch.zeros(96, 16, device=device), torch.zeros(4, 16, device=device)
    x[:, 3], weight[:, 3] = z, 1.0
    actual = run(x, weight, None)[:, 0]
    expected = torch.nn.functional.gelu(z.double(), approximate="tanh")
    assert (actual.double() - expected).abs().max() < 2e-6  # the erf form is 5e-4 away
    assert_within_budget(actual, torch.nn.functional.gelu(z, approximate="tanh"), expected)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_nan_and_infinity_stay_in_their_row(run, device):
    x, weight, bias = layer((40, 64, 40), torch.bfloat16, device)
    x = x.clone()
    x[3, 5], x[35, 63] = float("nan"), float("inf")
    actual = run(x, weight, bias)
    assert actual[3].isnan().all() and not actual[35].isfinite().any()
    rest = [row for row in range(40) if row not in (3, 35)]
    assert actual[rest].isfinite().all()


def test_fp64_on_the_cpu():
    x, weight, bias = layer((7, 33, 5), torch.float64, torch.device("cpu"))
    torch.testing.assert_close(linear_gelu(x, weight, bias), linear_gelu_reference(x, weight, bias), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_inputs_stay_and_the_output_is_new(run, device):
    inputs = layer((33, 64, 40), torch.bfloat16, device)
    before = [tensor.clone() for tensor in inputs]
    out = run(*inputs)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
    assert out.untyped_storage().data_ptr() not in [tensor.untyped_storage().data_ptr() for tensor in inputs]
    assert_bit_equal(run(*inputs), out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("run", LAUNCHES)
@pytest.mark.parametrize("shape", [(33, 48, 72), (1, 16, 1)], ids=str)
def test_no_load_leaves_the_inputs(run, shape, device):
    """Also those loads whose numbers nobody would see: of rows and columns behind the last."""
    inputs = layer(shape, torch.bfloat16, device)
    with reads_only(*inputs):
        run(*inputs)


@pytest.mark.parametrize("run", LAUNCHES)
@pytest.mark.parametrize("shape", [(33, 48, 72), (1, 16, 1)], ids=str)
def test_nothing_outside_the_buffers_is_read(run, shape, device):
    """Inputs between NaN: what is read outside them shows in the output."""
    inputs = layer(shape, torch.bfloat16, device)
    canaries = Canaries()
    copies = [canaries.copy(tensor) for tensor in inputs]
    assert_bit_equal(run(*copies), run(*inputs))
    canaries.check()


def distinct_configs() -> dict[str, tuple[dict, int]]:
    """Every tile of every architecture, by its shape, with the item size it is for."""
    found = {}
    for arch in (80, 86, 89, 90, 100, 120):
        for rows, n, itemsize, aligned in [
            (4096, 12288, 2, True), (1024, 3072, 2, True), (200, 3072, 2, True), (64, 12288, 2, True), (64, 3072, 2, True),
            (20, 3072, 2, True), (13, 12288, 2, True), (13, 3072, 2, True), (4096, 12288, 4, True), (4096, 12288, 2, False),
        ]:  # fmt: skip
            config = default_config(arch, rows, n, 3072, itemsize, aligned)
            shape = "x".join(
                str(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages")
            )
            found[f"{shape}{' described' if config['DESCRIPTORS'] else ''}"] = (config, itemsize)
    return found


CONFIGS = distinct_configs()


@pytest.mark.triton
@pytest.mark.parametrize("name", CONFIGS)
def test_every_default_configuration_is_right(name, device):
    """Just over one tile on two axes; natively that is also a launch of every tile on whatever GPU this is."""
    config, itemsize = CONFIGS[name]
    if device.type == "cuda" and config["num_stages"] * config["BLOCK_N"] * config["BLOCK_K"] > 50000:
        if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < 200_000:
            pytest.skip("more shared memory than this GPU has")
    shape = (config["BLOCK_M"] + 3, 80, config["BLOCK_N"] + 5)
    x, weight, bias = layer(shape, torch.bfloat16 if itemsize == 2 else torch.float32, device)
    assert_right(launch_linear_gelu(x, weight, bias, config=config), x, weight, bias)


@pytest.mark.triton
def test_offsets_beyond_32_bits(one_far_program, device):
    """The last tiles of a matrix whose elements lie more than 2^31 elements behind its start."""
    rows, k, n = 2**27 + 50, 16, 16
    config = POINTERS | {"BLOCK_N": 16, "BLOCK_K": 16, "PARTS": 1}
    first = 2**27 // config["BLOCK_M"]
    own, weight, bias = layer((50, k, n), torch.bfloat16, device)
    low = own.flip(1)
    expected = launch_linear_gelu(own, weight, bias, low, weight, config=config)
    out, x, far = one_far_program(program=first, numel=rows * k, dtype=torch.bfloat16, count=3)
    x[2**31 :], far[2**31 :] = own.flatten(), low.flatten()
    arguments = (out, x, weight, k, k, rows, n, k, bias, far, weight, k, k, k)
    _linear_gelu_kernel[(1,)](*arguments, HAS_BIAS=True, BLOCK_R=32, EVEN_K=True, **config)
    assert_bit_equal(out[2**31 :].view(50, n), expected)


GOOD = {"x": torch.zeros(4, 16), "weight": torch.zeros(8, 16), "bias": torch.zeros(8)}


@pytest.mark.parametrize("name", BAD_LINEAR)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD_LINEAR[name]
    with pytest.raises(ValueError, match=message):
        linear_gelu(**GOOD | {argument: value})


def test_few_rows_have_their_own_tile_and_larger_ones_come_with_more_rows():
    for arch in (75, 80, 86, 89, 90, 100, 103, 120, 121):
        heights = [default_config(arch, rows, 12288, 3072, 2)["BLOCK_M"] for rows in (1, 16, 17, 64, 65, 300, 4096)]
        assert heights == sorted(heights) and heights[3] <= 64 < heights[-1]
        assert not default_config(arch, 4096, 12288, 3072, 2, aligned=False)["DESCRIPTORS"]
    assert (
        default_config(90, 4096, 12288, 3072, 2)["DESCRIPTORS"] and not default_config(89, 4096, 12288, 3072, 2)["DESCRIPTORS"]
    )
    assert default_config(103, 4096, 12288, 3072, 2) == default_config(100, 4096, 12288, 3072, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype, device):
    x, weight, bias = layer((13, 24, 7), dtype, device)
    op = torch.ops.qwen_fast.linear_gelu.default
    torch.library.opcheck(op, (x, weight, bias))
    torch.library.opcheck(op, (in_rows(x, 3, 2), in_rows(weight, 1, 0), None))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    inputs = layer((33, 64, 40), torch.bfloat16, device)
    torch.compiler.reset()
    compiled = torch.compile(linear_gelu, fullgraph=True, backend=backend)
    assert_bit_equal(compiled(*inputs), linear_gelu(*inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 13, 64, 300, 1024, 4109])
def test_both_backends_agree_at_the_models_shapes(rows, dtype, bias, device):
    x, weight, offset = layer((rows, 3072, 12288), dtype, device)
    offset = offset if bias else None
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        library = linear_gelu(x, weight, offset)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    major, minor = torch.cuda.get_device_capability(device)
    config = default_config(10 * major + minor, *dimensions(x, weight))
    assert_right(launch_linear_gelu(x, weight, offset, config=config), x, weight, offset)
    assert_right(library, x, weight, offset)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS, None], ids=["pointers", "descriptors", "op"])
def test_a_captured_graph_replays(config, device):
    launch = functools.partial(launch_linear_gelu, config=config) if config else linear_gelu
    x, weight, bias = (tensor.clone() for tensor in layer((300, 512, 2048), torch.bfloat16, device))
    launch(x, weight, bias)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(x, weight, bias)
    for sign in (1, -1):
        x.mul_(sign)
        graph.replay()
        assert_bit_equal(out, launch(x, weight, bias))
