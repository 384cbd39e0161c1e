"""qk_norm_rope against stock diffusers' RMSNorm and rotary embedding, and against float64."""

import functools
import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from budget import assert_bit_equal, assert_within_budget, errors
from canaries import Canaries
from qwen_fast_kernels.qk_norm_rope import (
    HEAD_DIMS,
    _qk_norm_rope_kernel,
    default_config,
    launch_qk_norm_rope,
    qk_norm_rope,
    qk_norm_rope_reference,
)

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Rows, heads, head_dim, text rows: one of each, primes, no text, only text, Qwen-Image's heads, two blocks of heads.
SHAPES = [(1, 1, 128, 0), (7, 2, 128, 3), (13, 3, 64, 13), (77, 2, 32, 20), (5, 8, 64, 0), (3, 24, 128, 1)]
SHAPES += [(3, 37, 16, 2), (2, 1, 8, 1), (2, 2, 256, 1)]


def launch(query, key, *rest) -> None:
    launch_qk_norm_rope(query, key, *rest, config=default_config(90, *query.shape[1:], query.element_size()))


IMPLEMENTATIONS = [pytest.param(launch, id="launcher", marks=pytest.mark.triton), pytest.param(qk_norm_rope, id="op")]
ARGUMENTS = ("query", "key", "norm_q", "norm_k", "norm_added_q", "norm_added_k", "rope", "txt_rows", "eps")


@dataclass
class Case:
    """One buffer `[3, R, H * D]` of query, key and value, and the rest of the arguments."""

    qkv: torch.Tensor
    heads: int
    weights: tuple[torch.Tensor, ...]
    rope: torch.Tensor
    txt_rows: int
    eps: float = 1e-6

    query = property(lambda self: self.qkv[0].unflatten(-1, (self.heads, -1)))
    key = property(lambda self: self.qkv[1].unflatten(-1, (self.heads, -1)))
    rest = property(lambda self: (*self.weights, self.rope, self.txt_rows, self.eps))

    def clone(self) -> "Case":
        return replace(self, qkv=self.qkv.clone())

    def run(self, run) -> tuple[torch.Tensor, torch.Tensor]:
        """What `run` makes of a copy of the buffer, whose value part has to stay."""
        own = self.clone()
        run(own.query, own.key, *own.rest)
        assert_bit_equal(own.qkv[2], self.qkv[2])
        return own.query, own.key

    def reference(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = dtype or self.qkv.dtype
        return qk_norm_rope_reference(self.query.to(dtype), self.key.to(dtype), *self.rest)

    def stock(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and image through stock's modules apart, as in its attention processor, then joined."""
        from diffusers.models.normalization import RMSNorm
        from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

        def apart(x: torch.Tensor, rows: slice, weight: torch.Tensor) -> torch.Tensor:
            norm = RMSNorm(weight.numel(), eps=self.eps)
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
            freqs = torch.view_as_complex(self.rope[rows].unflatten(-1, (-1, 2)))
            return apply_rotary_emb_qwen(norm(x[None, rows]), freqs, use_real=False)[0]

        text, image = slice(None, self.txt_rows), slice(self.txt_rows, None)
        norm_q, norm_k, norm_added_q, norm_added_k = self.weights
        query = torch.cat([apart(self.query, text, norm_added_q), apart(self.query, image, norm_q)])
        return query, torch.cat([apart(self.key, text, norm_added_k), apart(self.key, image, norm_k)])


def random_case(shape, dtype, device, weight_dtype=None, magnitude=1.0, eps=1e-6) -> Case:
    """Rows of very different size, four distinct weights, and a distinct angle for every token and pair of channels."""
    rows, heads, head_dim, txt_rows = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    qkv = magnitude * normal(3, rows, heads * head_dim) * torch.exp(normal(3, rows, 1))
    weights = tuple((1 + 0.5 * normal(head_dim)).to(device, weight_dtype or dtype) for _ in range(4))
    angles = 3 * normal(rows, head_dim // 2)
    rope = torch.view_as_real(torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return Case(qkv.to(device, dtype), heads, weights, rope.to(device, torch.float32), txt_rows, eps)


@functools.cache
def cached_case(*args) -> Case:
    """Not to be written to: `run` copies."""
    return random_case(*args)


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


def assert_pairs_equal(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_bit_equal(one, other)


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


def in_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of `[R, H, D]` with other strides; what lies between is NaN."""
    rows, heads, head_dim = x.shape

    def nan(*size: int) -> torch.Tensor:
        return torch.full(size, float("nan"), dtype=x.dtype, device=x.device)

    views = {
        "head-major": lambda: nan(heads, rows, head_dim).transpose(0, 1),
        "padded rows": lambda: nan(rows, heads * head_dim + 24)[:, :-24].view(x.shape),
        "odd rows": lambda: nan(rows, heads * head_dim + 3)[:, :-3].view(x.shape),
        "padded heads": lambda: nan(rows, heads, head_dim + 8)[..., :head_dim],
        "odd offset": lambda: nan(x.numel() + 3)[3:].view(x.shape),
        "interleaved": lambda: nan(rows, heads, 3, head_dim)[:, :, 1],
    }
    return views[layout]().copy_(x)


def nan_in_storage(x: torch.Tensor) -> torch.Tensor:
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).isnan()


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["head-major", "padded rows", "odd rows", "padded heads", "odd offset", "interleaved"])
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
    run_kernel((query, key), case, rope, strides, row + 1, 0, False)
    assert_pairs_equal(far, expected)


@pytest.mark.triton
@pytest.mark.parametrize("txt_rows", [0, 1], ids=["image", "text"])
def test_places_and_text_beyond_32_bits(txt_rows, one_far_program, device):
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
    strides = (128, 128, 128, 128, value, 128, 128, text, 2**14, 128, 128, places)
    run_kernel((query, key), case, rope, strides, row + 1, row + txt_rows, True)
    assert_pairs_equal(far, expected)


def run_kernel(tensors, case: Case, rope, strides, rows: int, txt_rows: int, has_text: bool) -> None:
    """One program, which the interpreter takes for a far one."""
    if not has_text:
        strides = (*strides, tensors[0], 0, 0, tensors[0], 0, 0, 0, rope)
    config = default_config(90, case.heads, 128, 4)
    sizes = (rows, txt_rows, case.heads, case.eps, 128)
    _qk_norm_rope_kernel[(1,)](*tensors, *case.weights, rope, *strides, *sizes, HAS_TEXT=has_text, **config)


# Text rows of their own, rows elsewhere ---------------------------------------------------------------------------------


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moved_rows_are_those_of_the_joint_form(run, shape, dtype, device):
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
def test_the_reference_moves_as_the_joint_one_does_not(dtype):
    own = moved(random_case((7, 2, 64, 3), dtype, torch.device("cpu")), SEQUENCE_MAJOR)
    assert_pairs_equal(own.reference(), (*own.case.reference(), own.expected(qk_norm_rope)[2]))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_moving_leaves_the_other_inputs(run, device):
    own = moved(cached_case((7, 2, 128, 3), torch.bfloat16, device), SEQUENCE_MAJOR)
    inputs = (own.buffers, own.text, own.places, *own.case.weights, own.case.rope)
    before = [tensor.clone() for tensor in inputs]
    assert_pairs_equal(own.run(run), own.run(run))
    assert_pairs_equal(inputs, before)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["head-major", "padded rows", "odd rows", "padded heads", "odd offset", "interleaved"])
def test_layouts_of_moved_rows(run, layout, device):
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
def test_nothing_outside_moved_buffers_is_touched(shape, device):
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


def good(*, of_text: bool = False) -> dict:
    case = random_case((5, 2, 32, 2), torch.float32, torch.device("cpu"))
    if of_text:
        own = moved(case)
        return dict(zip(ARGUMENTS + ("value", "text", "places"), (own.query, own.key, *own.rest), strict=True))
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


BAD_TEXT = {
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


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_arguments_of_text_are_named(name):
    argument, value, message = BAD_TEXT[name]
    arguments = good(of_text=True)
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


@pytest.mark.parametrize("one_base", [True, False], ids=["one base", "two bases"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(one_base, dtype, device):
    case = random_case((5, 2, 32, 2), dtype, device)
    query, key = (case.query, case.key) if one_base else (case.query.clone(), case.key.clone())
    torch.library.opcheck(torch.ops.qwen_fast.qk_norm_rope.default, (query, key, *case.rest))


@pytest.mark.parametrize("one_base", [True, False], ids=["one base", "three bases"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck_of_text(one_base, dtype, device):
    own = moved(random_case((5, 2, 32, 2), dtype, device))
    own.buffers.nan_to_num_()  # opcheck compares with ==
    query, key, value = own.buffers if one_base else [buffer.clone() for buffer in own.buffers]
    arguments = (query, key, *own.case.rest, value, own.text, own.places)
    torch.library.opcheck(torch.ops.qwen_fast.qk_norm_rope.text, arguments)


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


def of_moved_rows(buffers, projection, text, places, *rest):
    """The text rows are made in the graph, the image rows are a part of the buffers, as in a block."""
    text = torch.matmul(text, projection)
    qk_norm_rope(buffers[0], buffers[1], *rest, buffers[2], text, places)
    return buffers


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_moves_as_eager_does(backend, device):
    torch.compiler.reset()
    compiled = torch.compile(of_moved_rows, fullgraph=True, backend=backend)
    for shape in [(5, 2, 32, 2), (9, 2, 32, 3)]:
        own = moved(cached_case(shape, torch.bfloat16, device))
        projection = torch.eye(32, dtype=torch.bfloat16, device=device)
        actual = compiled(own.buffers.clone(), projection, own.text, own.places, *own.case.rest)
        assert_pairs_equal(own.joint(actual), own.expected(qk_norm_rope))


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
    own = moved(case)
    for _ in range(2):
        assert_pairs_equal(own.run(qk_norm_rope), own.expected(qk_norm_rope))


@pytest.mark.gpu
def test_a_captured_graph_moves(device):
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
def test_more_than_2_to_the_31_elements(device):
    rows, small = 2**24 + 3, cached_case((4, 1, 128, 0), torch.bfloat16, device)
    query, key = (x[:1].repeat(rows, 1, 1) for x in (small.query, small.key))
    rope = small.rope[:1].repeat(rows, 1)
    qk_norm_rope(query, key, *small.weights, rope, 0, small.eps)
    for actual, expected in zip((query, key), small.run(qk_norm_rope), strict=True):
        assert (actual == expected[:1]).all()
