"""gated_residual_ada_layer_norm against stock's block, against the two operators it fuses, and against float64."""

import pytest
import torch
from elementwise_cases import DTYPES, TOKEN_ROWS, RowOp, RowOpTests, bad_arguments, both, in_layout
from stock_block import StockBlock

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels.gated_residual_ada_layer_norm import gated_residual_ada_layer_norm
from support.canaries import Canaries

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

ROW_OP = RowOp("gated_residual_ada_layer_norm", tokens=("residual", "branch"), tables=("gate", "shift", "scale"))
GATED = RowOp("gated_residual", tokens=("residual", "branch"), tables=("gate",))
NORM = RowOp("ada_layer_norm", tokens=("x",), tables=("shift", "scale"))


class TestGatedResidualAdaLayerNorm(RowOpTests):
    row_op = ROW_OP


@both
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_middle_of_stocks_block(implementation, dtype, zero_cond_t, device):
    stock = StockBlock.random(dtype, device, zero_cond_t)
    gate, shift, scale = stock.modulation(2, 3, 4)
    tensors = {"residual": stock.hidden, "branch": stock.attended, "gate": gate, "shift": shift, "scale": scale}
    y, normed = getattr(ROW_OP, implementation)(**tensors, **stock.arguments())
    expected, oracle = stock.run(), stock.double().run()
    assert_within_budget(y, expected["y"], oracle["y"])
    assert_within_budget(normed, expected["normed2"], oracle["normed2"])


@both
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("shape", [(37, 64, 19), (21, 7, 5), (2, 3072, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_the_two_operators_one_after_the_other(implementation, dtype, shape, clip, device):
    """To the bit, so the norm is of the rounded (and clipped) sum."""
    inputs = ROW_OP.inputs(shape, dtype, device, "some their own")
    inputs["residual"][:, ::3] *= 3e4
    inputs["residual"][:, ::2] += 100.0  # coarse roundings of the sum
    take = {name: inputs[name] for name in ("step_index", "txt_rows", "token_rows")}
    y, normed = getattr(ROW_OP, implementation)(**inputs, clip=clip)
    gated = {name: inputs[name] for name in ("residual", "branch", "gate")}
    assert_bit_equal(y, getattr(GATED, implementation)(**gated, **take, clip=clip))
    tables = {name: inputs[name] for name in ("shift", "scale")}
    assert_bit_equal(normed, getattr(NORM, implementation)(x=y, **tables, **take))
    assert (y.abs().max() <= torch.tensor(65504.0).to(dtype)) == clip


@both
@pytest.mark.parametrize("eps", [1e-6, 1e-2, 10.0])
def test_eps_is_part_of_the_variance(implementation, eps, device):
    inputs = ROW_OP.inputs((5, 64, 2), torch.float32, device)
    for name in ROW_OP.tokens:
        inputs[name] *= 1e-2
    ROW_OP.check(getattr(ROW_OP, implementation)(**inputs, eps=eps), inputs | {"eps": eps})


@both
def test_eps_is_stocks_by_default(implementation, device):
    inputs = ROW_OP.inputs((5, 64, 2), torch.float32, device)
    for name in ROW_OP.tokens:
        inputs[name] *= 1e-3
    ROW_OP.check(getattr(ROW_OP, implementation)(**inputs), inputs | {"eps": 1e-6, "clip": False})


@both
def test_a_mean_far_from_zero_and_constant_rows(implementation, device):
    inputs = ROW_OP.inputs((6, 3072, 2), torch.float32, device)
    inputs["residual"][:4] += 30.0
    inputs["residual"][4:], inputs["branch"][4:] = -7.0, 0.0
    ROW_OP.check(getattr(ROW_OP, implementation)(**inputs), inputs)


@both
def test_clip_keeps_nan(implementation, device):
    inputs = ROW_OP.inputs((6, 64, 2), torch.float16, device)
    inputs["residual"][1, 2], inputs["residual"][4, 3] = float("nan"), float("inf")
    y, normed = getattr(ROW_OP, implementation)(**inputs, clip=True)
    assert y.isnan().sum() == 1 and y[1, 2].isnan() and y[4, 3] == 65504
    assert normed[1].isnan().all() and normed.isfinite().sum() == 5 * 64


@pytest.mark.parametrize("rows, txt_rows", [(200, 0), (200, 90), (24, 24)])
def test_the_cpu_with_a_row_for_every_token_and_with_long_stretches(rows, txt_rows):
    for token_rows in TOKEN_ROWS:
        inputs = ROW_OP.inputs((rows, 16, txt_rows), torch.float32, torch.device("cpu"), token_rows)
        ROW_OP.check(gated_residual_ada_layer_norm(**inputs), inputs)


# With what a ControlNet adds

# Tokens, channels, text tokens, rows that are added: to each of one, two and three predictions; a tail of a tile; all text.
ADDED = [((37, 64, 19), 18), ((37, 64, 19), 9), ((25, 7, 4), 7), ((3, 3072, 1), 1), ((9, 512, 9), 2), ((36, 64, 0), 12)]


def with_added(shape, rows: int, dtype, device, token_rows=None) -> dict:
    inputs = ROW_OP.inputs(shape, dtype, device, token_rows)
    generator = torch.Generator().manual_seed(rows)
    return inputs | {"added": torch.randn(rows, shape[1], generator=generator).to(device, dtype)}


@both
@pytest.mark.parametrize("shape, rows", ADDED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_added_rows(implementation, dtype, shape, rows, device):
    for token_rows in (None, "some their own"):
        inputs = with_added(shape, rows, dtype, device, token_rows)
        ROW_OP.check(getattr(ROW_OP, implementation)(**inputs), inputs)
        without = {name: value for name, value in inputs.items() if name != "added"}
        text = inputs["txt_rows"]
        for out, other in zip(
            getattr(ROW_OP, implementation)(**inputs), getattr(ROW_OP, implementation)(**without), strict=True
        ):
            assert_bit_equal(out[:text], other[:text])
            assert text == len(out) or not torch.equal(out[text:], other[text:])


def test_added_rows_are_stocks_sum():
    """The formula of stock's transformer behind a block, in float64."""
    inputs = with_added((37, 64, 19), 9, torch.float64, torch.device("cpu"))
    added = inputs.pop("added")
    y, _ = ROW_OP.reference(**inputs)
    y[19:28] += added
    y[28:] += added
    normed = NORM.op(x=y, **{name: inputs[name] for name in ("shift", "scale", "step_index", "txt_rows")})
    for run in (ROW_OP.op, ROW_OP.reference):
        for actual, expected in zip(run(**inputs, added=added), (y, normed), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@both
def test_rows_are_added_behind_the_clipping(implementation, device):
    inputs = with_added((6, 64, 2), 2, torch.float16, device)
    inputs["residual"][:] = 7e4
    inputs["branch"][:], inputs["added"][:] = 0, -1000
    y, _ = getattr(ROW_OP, implementation)(**inputs, clip=True)
    assert (y[:2] == 65504).all() and (y[2:] == torch.tensor(64504.0).half()).all()


@both
@pytest.mark.parametrize("layout", ["offset", "strided", "odd stride"])
def test_added_rows_of_every_layout(implementation, layout, device):
    inputs = with_added((37, 64, 19), 9, torch.bfloat16, device)
    expected = getattr(ROW_OP, implementation)(**inputs)
    before = inputs["added"].clone()
    odd = inputs | {"added": in_layout(inputs["added"], layout)}
    for out, other in zip(getattr(ROW_OP, implementation)(**odd), expected, strict=True):
        assert_bit_equal(out, other)
    assert torch.equal(inputs["added"], before)


@pytest.mark.triton
@pytest.mark.parametrize("shape, rows", ADDED, ids=str)
def test_nothing_outside_the_added_rows_is_read(shape, rows, device):
    inputs, canaries = with_added(shape, rows, torch.bfloat16, device), Canaries()
    guarded = inputs | {"added": canaries.copy(inputs["added"])}
    outputs = ROW_OP.launch(**guarded)
    canaries.check()
    for out, other in zip(outputs, ROW_OP.launch(**inputs), strict=True):
        assert_bit_equal(out, other)


def test_opcheck_with_added_rows(device):
    overload = torch.ops.qwen_fast.gated_residual_ada_layer_norm.default
    torch.library.opcheck(overload, (), with_added((13, 7, 5), 4, torch.bfloat16, device))


def test_compiled_with_added_rows_equals_eager(device):
    torch.compiler.reset()
    compiled = torch.compile(gated_residual_ada_layer_norm, fullgraph=True, backend="aot_eager")
    for rows in (18, 9):
        inputs = with_added((37, 64, 19), rows, torch.bfloat16, device)
        for out, other in zip(compiled(**inputs), gated_residual_ada_layer_norm(**inputs), strict=True):
            assert_bit_equal(out, other)


BAD = bad_arguments(ROW_OP) | {
    "added of other channels": ("added", torch.zeros(2, 32), r"added: got \(2, 32\)"),
    "added of rank 3": ("added", torch.zeros(1, 2, 64), r"added: got \(1, 2, 64\)"),
    "added of another dtype": ("added", torch.zeros(2, 64).half(), "added: got .*torch.float16"),
    "added elsewhere": ("added", torch.zeros(2, 64, device="meta"), "added: on meta"),
    "added without rows": ("added", torch.zeros(0, 64), "added: 0 rows for 2 image tokens"),
    "too many added": ("added", torch.zeros(3, 64), "added: 3 rows for 2 image tokens"),
    "transposed added": ("added", torch.zeros(64, 2).T, "added: stride 2 between channels"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    inputs = ROW_OP.inputs((4, 64, 2), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        gated_residual_ada_layer_norm(**inputs | {argument: value})
