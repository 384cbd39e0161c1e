"""qk_norm_rope as an operator of the registry: what it refuses, its configuration, opcheck, the compiler and graphs."""

import itertools

import pytest
import torch
from rope_cases import ARGUMENTS, WEIGHTS, assert_pairs_equal, cached_case, random_case

from benchmarks.shared.budget import assert_bit_equal
from qwen_fast_kernels.qk_norm_rope import HEAD_DIMS, default_config, qk_norm_rope

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
        for name in WEIGHTS
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
    "value of another shape": ("value", torch.zeros(5, 3, 32), r"value: got \(5, 3, 32\)"),
    "value of another dtype": ("value", torch.zeros(5, 2, 32).half(), r"value: got .*torch.float16"),
    "value with channels apart": ("value", torch.zeros(5, 2, 64)[..., ::2], "value: stride 2 between channels"),
    "expanded value": ("value", torch.zeros(1, 2, 32).expand(5, 2, 32), r"value: strides \(0, 32, 1\) repeat"),
    "value elsewhere": ("value", torch.zeros(5, 2, 32, device="meta"), "value: on meta"),
    "text of too many rows": ("text", torch.zeros(3, 3, 2, 32), r"text: got \(3, 3, 2, 32\)"),
    "text without value": ("text", torch.zeros(2, 2, 2, 32), r"text: got \(2, 2, 2, 32\)"),
    "text of another dtype": ("text", torch.zeros(3, 2, 2, 32).half(), r"text: got .*torch.float16"),
    "text with channels apart": ("text", torch.zeros(3, 2, 2, 64)[..., ::2], "text: stride 2 between channels"),
    "text elsewhere": ("text", torch.zeros(3, 2, 2, 32, device="meta"), "text: on meta"),
    "too few places": ("places", torch.zeros(4, dtype=torch.int32), r"places: got \(4,\)"),
    "int64 places": ("places", torch.arange(5), r"places: got .*torch.int64"),
    "strided places": ("places", torch.zeros(10, dtype=torch.int32)[::2], "places: got .*contiguous int32"),
    "places elsewhere": ("places", torch.zeros(5, dtype=torch.int32, device="meta"), "places: on meta"),
    "a negative place": ("places", torch.tensor([0, -1, 2, 3, 4], dtype=torch.int32), r"places: -1 to 0 .*\[0, 5\)"),
    "a place too far": ("places", torch.tensor([0, 1, 2, 3, 5], dtype=torch.int32), r"places: 2 to 5 .*\[0, 5\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    case = random_case((5, 2, 32, 2), torch.float32, torch.device("cpu"))
    arguments = dict(zip(ARGUMENTS, case.arguments(case.buffers()), strict=True))
    before = arguments["query"].clone()
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**arguments | {argument: value})
    assert_bit_equal(arguments["query"], before)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("heads", [1, 2, 8, 24, 37])
def test_default_config_covers_every_shape(heads, head_dim):
    for capability, itemsize in itertools.product((80, 86, 89, 90, 100, 120), (2, 4)):
        config = default_config(capability, heads, head_dim, itemsize)
        block, warps = config["BLOCK_H"], config["num_warps"]
        assert block in (1, 2, 4, 8, 16, 32) and warps in (1, 2, 4, 8)
        assert block >= min(heads, 32) and block * head_dim * itemsize >= 16 * 32 * warps
    assert default_config(90, 24, 128, 2) == {"BLOCK_H": 32, "num_warps": 8}  # all heads; more threads than channels


@pytest.mark.parametrize("one_base", [True, False], ids=["one base", "three bases"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(one_base, dtype, device):
    case = random_case((5, 2, 32, 2), dtype, device)
    buffers = case.buffers().nan_to_num_()  # opcheck compares with ==
    arguments = case.arguments(buffers if one_base else [buffer.clone() for buffer in buffers], case.text.clone())
    torch.library.opcheck(torch.ops.qwen_fast.qk_norm_rope.default, arguments)


def of_one_base(buffers, projection, text, places, *rest):
    """The text rows are made in the graph, the image rows are a part of the buffers, as in a block."""
    qk_norm_rope(buffers[0], buffers[1], *rest, buffers[2], torch.matmul(text, projection), places)
    return buffers


def of_a_projection(buffers, projection, *rest):
    """The base is made in the graph too."""
    return of_one_base(torch.matmul(buffers, projection), projection, *rest)


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
        projection = torch.eye(32, dtype=torch.bfloat16, device=device)
        rest = (case.places, *case.weights, case.rope, case.txt_rows, case.eps)
        actual = case.results(compiled(case.buffers(), projection, case.text, *rest))
        assert_pairs_equal(actual, case.run(qk_norm_rope))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # Inductor compiles 20 s of C++ for it
def test_compiled_for_arguments_that_alias(backend, device):
    torch.compiler.reset()
    case = cached_case((5, 2, 32, 2), torch.bfloat16, device)
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend=backend)
    assert_pairs_equal(case.run(compiled), case.run(qk_norm_rope))


@pytest.mark.gpu
def test_a_captured_graph_replays(device):
    case = cached_case((77, 24, 128, 20), torch.bfloat16, device)
    buffers, expected = case.buffers(), case.run(qk_norm_rope)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qk_norm_rope(*case.arguments(buffers))
    for _ in range(2):
        buffers.copy_(case.buffers())
        graph.replay()
        assert_pairs_equal(case.results(buffers), expected)
