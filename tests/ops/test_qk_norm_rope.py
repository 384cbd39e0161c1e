"""qk_norm_rope against stock diffusers' RMSNorm and rotary embedding, and against float64; which rows it writes."""

from dataclasses import replace

import pytest
import torch
from rope_cases import (
    DTYPES,
    IMPLEMENTATIONS,
    LAYOUTS,
    SHAPES,
    assert_pairs_equal,
    cached_case,
    in_layout,
    launch,
    nan_in_storage,
    random_case,
)

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget, errors
from qwen_fast_kernels.qk_norm_rope import _qk_norm_rope_kernel, default_config, qk_norm_rope
from support.canaries import Canaries

pytestmark = pytest.mark.usefixtures("nan_filled_empties")
SEQUENCE_MAJOR = [0, 1, 4, 2, 3, 5, 6]  # two and one text rows, two images of two rows


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_against_float64_is_within_budget(run, shape, dtype, device):
    case = cached_case(shape, dtype, device)
    case.check(case.run(run))


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
    case.check(case.run(run))
    torch.testing.assert_close(case.run(run), case.stock())


OPTIONS = [{"magnitude": 1e-3}, {"magnitude": 3e2}, {"magnitude": 0.0}, {"eps": 0.5}]
OPTIONS += [{"weight_dtype": torch.float32}, {"weight_dtype": torch.bfloat16}]


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_magnitudes_eps_and_weights_of_another_dtype(run, options, dtype, device):
    case = random_case((5, 2, 64, 2), dtype, device, **options)
    case.check(case.run(run))


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
@pytest.mark.parametrize("places", [SEQUENCE_MAJOR, [*range(7)], [6, 5, 4, 3, 2, 1, 0]], ids=str)
@pytest.mark.parametrize("txt_rows", [0, 3, 7], ids="{} text rows".format)
def test_a_rows_place_does_not_change_it(run, places, txt_rows, device):
    case = cached_case((7, 2, 128, txt_rows), torch.bfloat16, device)
    assert_pairs_equal(case.at(places).run(run), case.run(run))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_layouts(run, layout, dtype, device):
    """Each of the four tensors by itself, then all: the room between their rows and heads stays as it was."""
    case = cached_case((7, 3, 64, 3), dtype, device)
    expected = case.run(run)
    for odd in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
        buffers = [in_layout(x, layout) if n in odd else x for n, x in enumerate(case.buffers())]
        text = in_layout(case.text.flatten(0, 1), layout).unflatten(0, (3, -1)) if 3 in odd else case.text
        room = [nan_in_storage(in_layout(torch.zeros_like(x), layout)) if n in odd else None for n, x in enumerate(buffers)]
        run(*case.arguments(buffers, text))
        case.check_aligned_otherwise(case.results(buffers), expected)
        for buffer, was_nan in zip(buffers, room, strict=True):
            assert was_nan is None or torch.equal(nan_in_storage(buffer), was_nan)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_nan_stays_in_its_head_and_in_its_row(run, device):
    case = cached_case((5, 3, 64, 2), torch.bfloat16, device)
    clean = case.run(run)
    dirty = replace(case, joint=case.joint.clone(), rope=case.rope.clone())
    dirty.joint[0, 3, 1, 7] = dirty.joint[0, 0, 2, 7] = dirty.rope[1] = float("nan")
    clean[0][3, 1] = clean[0][0, 2] = clean[0][1] = clean[1][1] = float("nan")
    assert_pairs_equal(dirty.run(run), clean)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_other_inputs_stay_and_a_second_run_is_equal(run, device):
    case = cached_case((7, 2, 128, 3), torch.bfloat16, device)
    inputs = (case.joint, *case.weights, case.rope, case.places)
    before = [tensor.clone() for tensor in inputs]
    assert_pairs_equal(case.run(run), case.run(run))
    assert_pairs_equal(inputs, before)


@pytest.mark.triton
@pytest.mark.parametrize("shape", [(7, 2, 128, 3), (5, 37, 16, 0), (4, 3, 8, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_buffers_is_touched(shape, dtype, device):
    """Inputs between NaN: what is read outside them shows in the result, what is written in the canaries."""
    case = cached_case(shape, dtype, device)
    canaries = Canaries()
    buffers = [canaries.copy(buffer) for buffer in case.buffers()]
    weights = tuple(canaries.copy(weight) for weight in case.weights)
    between = replace(case, weights=weights, rope=canaries.copy(case.rope))
    launch(*between.arguments(buffers, canaries.copy(case.text)))
    canaries.check()
    case.check_aligned_otherwise(case.results(buffers), case.run(launch))


@pytest.mark.triton
def test_a_place_outside_the_buffers_is_not_written(device):
    """By the kernel, which cannot raise; the operator raises on the CPU."""
    case, canaries = cached_case((7, 2, 128, 3), torch.bfloat16, device), Canaries()
    buffers, before = [canaries.copy(buffer) for buffer in case.buffers()], case.buffers()
    places = case.places.clone()
    places[0], places[1], places[6] = -1, 7, 2**31 - 1  # two of text, whose rows are numbers
    launch(*replace(case, places=places).arguments(buffers))
    canaries.check()
    order = case.places.long()
    untouched, rows = order[[0, 1, 6]], order[2:6]
    for buffer, was, expected in zip(buffers, before, (*case.run(launch), case.joint[2]), strict=True):
        assert_bit_equal(buffer[untouched], was[untouched])
        assert_bit_equal(buffer[rows], expected[2:6])


@pytest.mark.triton
@pytest.mark.parametrize("txt_rows", [0, 1], ids=["image", "text"])
@pytest.mark.parametrize("far_axis", ["row", "head"])
def test_offsets_beyond_32_bits(far_axis, txt_rows, one_far_program, device):
    """One program whose elements lie 2^31 elements behind the start of each tensor, by the row or by the head."""
    row, heads, head_stride = (2**24, 1, 128) if far_axis == "row" else (0, 3, 2**30)
    case = cached_case((1, heads, 128, txt_rows), torch.float32, device)
    expected = case.run(launch)  # before the interpreter is made to run the far program
    query, key, value, text, rope = one_far_program(program=row, numel=2**31 + 2**16, dtype=torch.float32, count=5)

    def far(x: torch.Tensor, *part: int) -> torch.Tensor:
        size, strides = (*(3,) * len(part), 1, heads, 128), (*part, 128, head_stride, 1)
        return x.as_strided(size, strides, x.storage_offset() + row * 128)

    buffers = [far(x) for x in (query, key, value)]
    for buffer, own in zip(buffers, case.buffers(), strict=True):
        buffer.copy_(own)
    apart = 2**14  # 64 KiB between query, key and value of the text row, which the far tensors leave each other
    if txt_rows:
        far(text, apart).copy_(case.text)
    rope[row * 128 :][:128].copy_(case.rope[0])
    places = torch.full((row + 1,), -1, dtype=torch.int32, device=device)
    places[row] = row
    strides = (128, head_stride)
    _qk_norm_rope_kernel[(1,)](
        *(query, key, *case.weights, rope, value, text, places),
        *(row + 1, row + txt_rows, case.eps, heads, *strides, *strides, *strides, apart, *strides, 128),
        **default_config(90, heads, 128, 4),
    )
    assert_pairs_equal(case.results(buffers), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_size_of_the_model(dtype, device):
    case = cached_case((4224, 24, 128, 128), dtype, device)
    first = case.run(qk_norm_rope)
    case.check(first)
    assert_pairs_equal(case.run(qk_norm_rope), first)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements(device):
    rows, small = 2**24 + 3, cached_case((4, 1, 128, 0), torch.bfloat16, device)
    query, key = (x[:1].repeat(rows, 1, 1) for x in small.joint[:2])
    places = torch.arange(rows, dtype=torch.int32, device=device).flip(0)
    text = query.new_empty(3, 0, 1, 128)
    qk_norm_rope(query, key, *small.weights, small.rope[:1].repeat(rows, 1), 0, small.eps, key.clone(), text, places)
    for actual, expected in zip((query, key), small.run(qk_norm_rope), strict=True):
        assert (actual == expected[:1]).all()
