"""qk_norm_rope against stock diffusers' RMSNorm and rotary embedding, and against float64."""

import itertools
from dataclasses import replace

import pytest
import torch
from rope_cases import (
    ARGUMENTS,
    DTYPES,
    IMPLEMENTATIONS,
    LAYOUTS,
    SHAPES,
    Case,
    assert_pairs_equal,
    cached_case,
    in_layout,
    launch,
    nan_in_storage,
    random_case,
    run_kernel,
)

from budget import assert_bit_equal, assert_within_budget, errors
from canaries import Canaries
from qwen_fast_kernels.qk_norm_rope import (
    HEAD_DIMS,
    default_config,
    qk_norm_rope,
)

pytestmark = pytest.mark.usefixtures("nan_filled_empties")


def check(case: Case, run) -> None:
    for actual, reference, oracle in zip(case.run(run), case.reference(), case.reference(torch.float64), strict=True):
        assert_within_budget(actual, reference, oracle)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64_is_within_budget(run, shape, dtype, device):
    check(cached_case(shape, dtype, device), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_stocks(run, dtype, device):
    case = cached_case((29, 2, 128, 11), dtype, device)
    for actual, stock, oracle in zip(case.run(run), case.stock(), case.reference(torch.float64), strict=True):
        assert_within_budget(actual, stock, oracle)
        if dtype != torch.float32:  # one rounding, where stock has three
            assert errors(actual, oracle)[1] < errors(stock, oracle)[1]


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_rope_of_the_model(run, device):
    """The table is stock's own complex one, seen as real numbers; its tokens of text and image, in the joint order."""
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    model = QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    image, text = model([[(1, 4, 6)]], device=device, max_txt_seq_len=7)
    rope = torch.view_as_real(torch.cat([text, image])).flatten(-2)
    case = replace(cached_case((31, 2, 128, 7), torch.float32, device), rope=rope)
    check(case, run)
    torch.testing.assert_close(case.run(run), case.stock())


OPTIONS = [{"magnitude": 1e-3}, {"magnitude": 3e2}, {"magnitude": 0.0}, {"eps": 0.5}]
OPTIONS += [{"weight_dtype": torch.float32}, {"weight_dtype": torch.bfloat16}]


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_eps_and_weights_of_another_dtype(run, options, dtype, device):
    check(random_case((5, 2, 64, 2), dtype, device, **options), run)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("txt_rows", [0, 1, 4, 5], ids="{} text rows".format)
def test_text_and_image_take_their_own_weights(run, txt_rows, device):
    """With one weight 1 and the others NaN, only the rows and the tensor of that weight are numbers."""
    case = cached_case((5, 2, 32, txt_rows), torch.float32, device)
    for index in range(4):
        weights = [torch.full_like(weight, float("nan")) for weight in case.weights]
        weights[index] = torch.ones_like(weights[index])
        finite = [x.isfinite().flatten(1) for x in replace(case, weights=tuple(weights)).run(run)]
        own_rows = (torch.arange(5, device=device) < txt_rows) == (index >= 2)
        assert torch.equal(finite[index % 2], own_rows[:, None].expand_as(finite[0]))
        assert not finite[1 - index % 2].any()


@pytest.mark.parametrize("dtype", DTYPES + [torch.float64], ids=str)
def test_a_table_may_start_anywhere(dtype):
    """A complex view needs pairs at even offsets; the operator does not."""
    case = random_case((5, 2, 64, 2), dtype, torch.device("cpu"))
    odd = torch.cat([case.rope.new_zeros(1), case.rope.flatten()])[1:].view_as(case.rope)
    assert_pairs_equal(replace(case, rope=odd).run(qk_norm_rope), case.run(qk_norm_rope))


def test_fp64_is_computed_in_fp64():
    case = random_case((7, 2, 64, 3), torch.float64, torch.device("cpu"))
    torch.testing.assert_close(case.run(qk_norm_rope), case.reference(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts(run, layout, dtype, device):
    """Bit-equal, and the room between the rows and heads stays as it was."""
    case = cached_case((5, 3, 64, 2), dtype, device)
    expected = case.run(run)
    for odd_query, odd_key in [(True, True), (True, False), (False, True)]:
        own = case.clone()
        query = in_layout(own.query, layout) if odd_query else own.query
        key = in_layout(own.key, layout) if odd_key else own.key
        room = [nan_in_storage(x) for x in (query, key)]
        run(query, key, *own.rest)
        for actual, wanted, was_nan in zip((query, key), expected, room, strict=True):
            assert_bit_equal(actual, wanted)
            assert torch.equal(nan_in_storage(actual), was_nan)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_nan_stays_in_its_head_and_in_its_row(run, device):
    case = cached_case((5, 3, 64, 2), torch.bfloat16, device)
    clean = case.run(run)
    dirty = replace(case.clone(), rope=case.rope.clone())
    dirty.query[3, 1, 7] = dirty.rope[1] = float("nan")
    clean[0][3, 1] = clean[0][1] = clean[1][1] = float("nan")
    assert_pairs_equal(dirty.run(run), clean)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_other_inputs_stay_and_a_second_run_is_equal(run, device):
    case = cached_case((7, 2, 128, 3), torch.bfloat16, device)
    inputs = (case.qkv, *case.weights, case.rope)
    before = [tensor.clone() for tensor in inputs]
    assert_pairs_equal(case.run(run), case.run(run))
    assert_pairs_equal(inputs, before)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(5, 2, 128, 2), (2, 37, 16, 1), (1, 3, 8, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_buffers_is_touched(shape, dtype, device):
    """Inputs between NaN: what is read outside them shows in the result, what is written in the canaries."""
    case = cached_case(shape, dtype, device)
    canaries = Canaries()
    query, key = canaries.copy(case.query), canaries.copy(case.key)
    weights = [canaries.copy(weight) for weight in case.weights]
    launch(query, key, *weights, canaries.copy(case.rope), case.txt_rows, case.eps)
    canaries.check()
    assert_pairs_equal((query, key), case.run(launch))


@pytest.mark.triton
@pytest.mark.parametrize("far_axis", ["row", "head"])
def test_offsets_beyond_32_bits(far_axis, one_far_program, device):
    """One program whose elements lie 2^31 elements behind the start of each tensor, by the row or by the head."""
    row, heads, head_stride = (2**24, 1, 128) if far_axis == "row" else (0, 3, 2**30)
    case = cached_case((1, heads, 128, 0), torch.float32, device)
    expected = case.run(launch)  # before the interpreter is made to run the far program
    query, key, rope = one_far_program(program=row, numel=2**31 + 128, dtype=torch.float32, count=3)
    far = [x.as_strided((1, heads, 128), (128, head_stride, 1), x.storage_offset() + row * 128) for x in (query, key)]
    far[0].copy_(case.query), far[1].copy_(case.key), rope[row * 128 :][:128].copy_(case.rope[0])
    strides = (128, head_stride, 128, head_stride)
    run_kernel((query, key), case, rope, row + 1, 0, strides)
    assert_pairs_equal(far, expected)


def good() -> dict:
    case = random_case((5, 2, 32, 2), torch.float32, torch.device("cpu"))
    return dict(zip(ARGUMENTS, (case.query, case.key, *case.rest), strict=True))


BAD = {
    "head_dim no power of two": ("query", torch.zeros(5, 2, 48), r"query: shape \(5, 2, 48\).*D one of"),
    "head_dim too small": ("query", torch.zeros(5, 2, 4), r"query: shape \(5, 2, 4\)"),
    "no rows": ("query", torch.zeros(0, 2, 32), r"query: shape \(0, 2, 32\) holds no element"),
    "fp8 query": ("query", torch.zeros(5, 2, 32).to(torch.float8_e4m3fn), r"query: dtype torch.float8"),
    "query with channels apart": ("query", torch.zeros(5, 2, 64)[..., ::2], r"query: stride 2 between channels"),
    "expanded query": ("query", torch.zeros(5, 1, 32).expand(5, 2, 32), r"query: strides \(32, 0, 1\) repeat"),
    "expanded key": ("key", torch.zeros(1, 2, 32).expand(5, 2, 32), r"key: strides \(0, 32, 1\) repeat"),
    "key of another shape": ("key", torch.zeros(5, 3, 32), r"key: got \(5, 3, 32\)"),
    "key of another dtype": ("key", torch.zeros(5, 2, 32).bfloat16(), r"key: got .*torch.bfloat16"),
    "key with channels apart": ("key", torch.zeros(5, 32, 2).mT, r"key: stride 2 between channels"),
    "key elsewhere": ("key", torch.zeros(5, 2, 32, device="meta"), r"key: on meta"),
    **{
        f"{name} {what}": (name, weight, rf"{name}: {message}")
        for name in ARGUMENTS[2:6]
        for what, weight, message in [
            ("too long", torch.ones(64), r"got \(64,\)"),
            ("of integers", torch.ones(32, dtype=torch.int64), r"got .*torch.int64"),
            ("strided", torch.ones(64)[::2], r"got .*stride \(2,\)"),
            ("elsewhere", torch.ones(32, device="meta"), "on meta"),
        ]
    },
    "weights of two dtypes": ("norm_added_k", torch.ones(32).bfloat16(), r"norm_added_k: dtype torch.bfloat16, but"),
    "rope too short": ("rope", torch.zeros(4, 32), r"rope: got \(4, 32\)"),
    "fp64 rope": ("rope", torch.zeros(5, 32, dtype=torch.float64), r"rope: got .*torch.float64"),
    "strided rope": ("rope", torch.zeros(5, 64)[:, :32], r"rope: got .*strides \(64, 1\)"),
    "rope elsewhere": ("rope", torch.zeros(5, 32, device="meta"), r"rope: on meta"),
    "negative txt_rows": ("txt_rows", -1, r"txt_rows: -1 is outside \[0, 5\]"),
    "too many txt_rows": ("txt_rows", 6, r"txt_rows: 6 is outside \[0, 5\]"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    arguments = good()
    before = arguments["query"].clone()
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**arguments | {argument: value})
    assert torch.equal(arguments["query"], before)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 2, 8, 24, 37])
def test_default_config_covers_every_shape(heads, head_dim):
    for capability, itemsize in itertools.product((80, 86, 89, 90, 100, 120), (2, 4)):
        config = default_config(capability, heads, head_dim, itemsize)
        block, warps = config["BLOCK_H"], config["num_warps"]
        assert block in (1, 2, 4, 8, 16, 32) and warps in (1, 2, 4, 8)
        assert block >= min(heads, 32) and block * head_dim * itemsize >= 16 * 32 * warps
    assert default_config(90, 24, 128, 2) == {"BLOCK_H": 32, "num_warps": 8}  # all heads; more threads than channels


@pytest.mark.parametrize("one_base", [True, False], ids=["one base", "two bases"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(one_base, dtype, device):
    case = random_case((5, 2, 32, 2), dtype, device)
    query, key = (case.query, case.key) if one_base else (case.query.clone(), case.key.clone())
    torch.library.opcheck(torch.ops.qwen_fast.qk_norm_rope.default, (query, key, *case.rest))


def of_one_base(qkv, projection, heads, *rest):
    qk_norm_rope(qkv[0].unflatten(-1, (heads, -1)), qkv[1].unflatten(-1, (heads, -1)), *rest)
    return qkv


def of_a_projection(qkv, projection, heads, *rest):
    """The base is made in the graph."""
    return of_one_base(torch.matmul(qkv.flatten(0, 1), projection).view_as(qkv), projection, heads, *rest)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("function", [of_one_base, of_a_projection])
def test_compiled_equals_eager(function, backend, device):
    """Twice, so that the second number of rows is a dynamic one unless the operator asks for a constant.

    Inductor in torch 2.13 loses a dynamic storage offset of a mutated view: the key would go where the query lies.
    """
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for shape in [(5, 2, 32, 2), (9, 2, 32, 3)]:
        case = cached_case(shape, torch.bfloat16, device)
        projection = torch.eye(case.qkv.shape[-1], dtype=torch.bfloat16, device=device)
        expected = case.clone()
        qk_norm_rope(expected.query, expected.key, *expected.rest)
        assert_bit_equal(compiled(case.qkv.clone(), projection, case.heads, *case.rest), expected.qkv)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # Inductor compiles 20 s of C++ for it
def test_compiled_for_arguments_that_alias(backend, device):
    torch.compiler.reset()
    case = cached_case((5, 2, 32, 2), torch.bfloat16, device)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend=backend)
    assert_pairs_equal(case.run(compiled), case.run(qk_norm_rope))


@pytest.mark.gpu
def test_a_captured_graph_replays(device):
    case = cached_case((77, 24, 128, 20), torch.bfloat16, device)
    own, expected = case.clone(), case.run(qk_norm_rope)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qk_norm_rope(own.query, own.key, *own.rest)
    for _ in range(2):
        own.qkv.copy_(case.qkv)
        graph.replay()
        assert_pairs_equal((own.query, own.key), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_model(dtype, device):
    case = cached_case((4224, 24, 128, 128), dtype, device)
    check(case, qk_norm_rope)
    assert_pairs_equal(case.run(qk_norm_rope), case.run(qk_norm_rope))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    rows, small = 2**24 + 3, cached_case((4, 1, 128, 0), torch.bfloat16, device)
    query, key = (x[:1].repeat(rows, 1, 1) for x in (small.query, small.key))
    rope = small.rope[:1].repeat(rows, 1)
    qk_norm_rope(query, key, *small.weights, rope, 0, small.eps)
    for actual, expected in zip((query, key), small.run(qk_norm_rope), strict=True):
        assert (actual == expected[:1]).all()
