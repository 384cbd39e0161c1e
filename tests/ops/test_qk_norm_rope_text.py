"""qk_norm_rope with text rows of their own, which it puts among rows that lie anywhere, against its joint form."""

from dataclasses import dataclass, replace

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

from budget import assert_bit_equal
from canaries import Canaries
from qwen_fast_kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_reference,
)

pytestmark = pytest.mark.usefixtures("nan_filled_empties")


@dataclass
class Moved:
    """The rows of a `Case` with its image rows somewhere else in `[3, R, H, D]`, and its text rows in a buffer of their own."""

    case: Case
    buffers: torch.Tensor  # the text rows are NaN
    text: torch.Tensor
    places: torch.Tensor

    query = property(lambda self: self.buffers[0])
    key = property(lambda self: self.buffers[1])
    value = property(lambda self: self.buffers[2])
    rest = property(lambda self: (*self.case.rest, self.value, self.text, self.places))

    def clone(self) -> "Moved":
        return replace(self, buffers=self.buffers.clone())

    def run(self, run) -> tuple[torch.Tensor, ...]:
        """Query, key and value in joint order, of a copy of the buffers."""
        own = self.clone()
        run(own.query, own.key, *own.rest)
        return self.joint(own.buffers)

    def reference(self) -> tuple[torch.Tensor, ...]:
        return self.joint(qk_norm_rope_reference(self.query, self.key, *self.rest))

    def joint(self, buffers) -> tuple[torch.Tensor, ...]:
        return tuple(buffer[self.places.long()] for buffer in buffers)

    def expected(self, run) -> tuple[torch.Tensor, ...]:
        """What `run` makes of the joint rows in place, and the value's rows as they were."""
        return *self.case.run(run), self.case.qkv[2].unflatten(-1, (self.case.heads, -1))


def moved(case: Case, places: list[int] | None = None) -> Moved:
    """`places` at random where none are given."""
    rows, split = case.qkv.shape[1], case.txt_rows
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1)) if places is None else torch.tensor(places)
    order = order.to(case.qkv.device)
    joint = case.qkv.unflatten(-1, (case.heads, -1))
    buffers = torch.full_like(joint, float("nan"))
    buffers[:, order[split:]] = joint[:, split:]
    return Moved(case, buffers, joint[:, :split].clone(), order.int())


SEQUENCE_MAJOR = [0, 1, 4, 2, 3, 5, 6]  # two and one text rows, two images of two rows


@pytest.mark.triton
@pytest.mark.parametrize("txt_rows", [0, 1], ids=["image", "text"])
def test_offsets_beyond_32_bits(txt_rows, one_far_program, device):
    """One program whose place, and for text whose source, lies 2^31 elements behind the start of each tensor."""
    row = 2**24
    case = cached_case((1, 1, 128, txt_rows), torch.float32, device)
    expected = moved(case).expected(launch)
    query, key, value, text, rope = one_far_program(program=row, numel=2**31 + 2**16, dtype=torch.float32, count=5)
    far = [x[row * 128 :][:128].view(1, 1, 128) for x in (query, key, value)]
    # Query, key and value of the only text row lie 64 KiB apart, which the far tensors leave each other.
    sources = [text[row * 128 + part * 2**14 :][:128] for part in range(3)] if txt_rows else far
    for source, own in zip(sources, case.qkv.unbind(), strict=True):
        source.copy_(own.view_as(source))
    rope[row * 128 :][:128].copy_(case.rope[0])
    places = torch.full((row + 1,), -1, dtype=torch.int32, device=device)
    places[row] = row
    strides = (*(128,) * 6, 2**14, 128, 128)
    run_kernel((query, key), case, rope, row + 1, row + txt_rows, strides, (value, text, places))
    assert_pairs_equal(far, expected)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_those_of_the_joint_form(run, shape, dtype, device):
    """To the bit, of query, key and value; the value's image rows are not touched."""
    own = moved(cached_case(shape, dtype, device))
    assert_pairs_equal(own.run(run), own.expected(run))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("places", [SEQUENCE_MAJOR, [*range(7)], [6, 5, 4, 3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("txt_rows", [0, 3, 7], ids="{} text rows".format)
def test_places(run, places, txt_rows, device):
    own = moved(cached_case((7, 2, 128, txt_rows), torch.bfloat16, device), places)
    assert_pairs_equal(own.run(run), own.expected(run))


@pytest.mark.parametrize("dtype", DTYPES + [torch.float64], ids=str)
def test_the_reference_is_the_joint_one(dtype):
    own = moved(random_case((7, 2, 64, 3), dtype, torch.device("cpu")), SEQUENCE_MAJOR)
    assert_pairs_equal(own.reference(), (*own.case.reference(), own.expected(qk_norm_rope)[2]))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_other_inputs_stay_and_a_second_run_is_equal(run, device):
    own = moved(cached_case((7, 2, 128, 3), torch.bfloat16, device), SEQUENCE_MAJOR)
    inputs = (own.buffers, own.text, own.places, *own.case.weights, own.case.rope)
    before = [tensor.clone() for tensor in inputs]
    assert_pairs_equal(own.run(run), own.run(run))
    assert_pairs_equal(inputs, before)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(run, layout, device):
    """Each of the four buffers by itself; bit-equal, and the room between the rows and heads stays as it was."""
    own = moved(cached_case((7, 3, 64, 3), torch.bfloat16, device), SEQUENCE_MAJOR)
    expected = own.expected(run)
    for odd in range(4):
        buffers = own.buffers.clone().unbind()
        text = torch.stack([*own.text])
        if odd < 3:
            buffers = [in_layout(x, layout) if index == odd else x for index, x in enumerate(buffers)]
            room = nan_in_storage(in_layout(torch.zeros_like(buffers[odd]), layout))
        else:
            text = in_layout(text.flatten(0, 1), layout).unflatten(0, (3, -1))
        run(*buffers[:2], *own.case.rest, buffers[2], text, own.places)
        assert_pairs_equal(own.joint(buffers), expected)
        if odd < 3:
            assert torch.equal(nan_in_storage(buffers[odd]), room)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(7, 2, 128, 3), (7, 37, 16, 0), (7, 3, 8, 7)], ids=str)
def test_nothing_outside_the_buffers_is_touched(shape, device):
    own, canaries = moved(cached_case(shape, torch.bfloat16, device), SEQUENCE_MAJOR), Canaries()
    query, key, value = (canaries.copy(buffer) for buffer in own.buffers)
    weights = [canaries.copy(weight) for weight in own.case.weights]
    rest = (canaries.copy(own.case.rope), own.case.txt_rows, own.case.eps)
    launch(query, key, *weights, *rest, value, canaries.copy(own.text), own.places)
    canaries.check()
    assert_pairs_equal(own.joint((query, key, value)), own.expected(launch))


@pytest.mark.triton
def test_a_place_outside_the_buffers_is_not_written(device):
    """By the kernel, which cannot raise; the operator raises on the CPU."""
    own, canaries = moved(cached_case((7, 2, 128, 3), torch.bfloat16, device), SEQUENCE_MAJOR), Canaries()
    buffers = [canaries.copy(buffer) for buffer in own.buffers]
    places = own.places.clone()
    places[0], places[1], places[6] = -1, 7, 2**31 - 1  # two of text, whose rows are numbers
    launch(*buffers[:2], *own.case.rest, buffers[2], own.text, places)
    canaries.check()
    untouched = [0, 1, 6]
    for actual, before, expected in zip(own.joint(buffers), own.joint(own.buffers), own.expected(launch), strict=True):
        assert_bit_equal(actual[untouched], before[untouched])
        assert_bit_equal(actual[2:6], expected[2:6])


BAD = {
    "no value": ("value", None, "value: None, but value, text and places come together"),
    "no text": ("text", None, "text: None, but"),
    "no places": ("places", None, "places: None, but"),
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


def good() -> dict:
    own = moved(random_case((5, 2, 32, 2), torch.float32, torch.device("cpu")))
    return dict(zip(ARGUMENTS + ("value", "text", "places"), (own.query, own.key, *own.rest), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    arguments = good()
    before = arguments["query"].clone()
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**arguments | {argument: value})
    assert_bit_equal(arguments["query"], before)


@pytest.mark.parametrize("one_base", [True, False], ids=["one base", "three bases"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(one_base, dtype, device):
    own = moved(random_case((5, 2, 32, 2), dtype, device))
    own.buffers.nan_to_num_()  # opcheck compares with ==
    query, key, value = own.buffers if one_base else [buffer.clone() for buffer in own.buffers]
    arguments = (query, key, *own.case.rest, value, own.text, own.places)
    torch.library.opcheck(torch.ops.qwen_fast.qk_norm_rope.text, arguments)


def of_moved_rows(buffers, projection, text, places, *rest):
    """The text rows are made in the graph, the image rows are a part of the buffers, as in a block."""
    text = torch.matmul(text, projection)
    qk_norm_rope(buffers[0], buffers[1], *rest, buffers[2], text, places)
    return buffers


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    torch.compiler.reset()
    compiled = torch.compile(of_moved_rows, fullgraph=True, backend=backend)
    for shape in [(5, 2, 32, 2), (9, 2, 32, 3)]:
        own = moved(cached_case(shape, torch.bfloat16, device))
        projection = torch.eye(32, dtype=torch.bfloat16, device=device)
        actual = compiled(own.buffers.clone(), projection, own.text, own.places, *own.case.rest)
        assert_pairs_equal(own.joint(actual), own.expected(qk_norm_rope))


@pytest.mark.gpu
def test_a_captured_graph_replays(device):
    own = moved(cached_case((77, 24, 128, 20), torch.bfloat16, device))
    buffers, expected = own.clone(), own.run(qk_norm_rope)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        qk_norm_rope(buffers.query, buffers.key, *buffers.rest)
    for _ in range(2):
        buffers.buffers.copy_(own.buffers)
        graph.replay()
        assert_pairs_equal(own.joint(buffers.buffers), expected)


@pytest.mark.gpu
def test_the_size_of_the_model(device):
    own = moved(cached_case((4224, 24, 128, 128), torch.bfloat16, device))
    for _ in range(2):
        assert_pairs_equal(own.run(qk_norm_rope), own.expected(qk_norm_rope))
