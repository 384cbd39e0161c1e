"""gated_residual against the residual stream of stock's block, and against float64."""

import pytest
import torch
from elementwise_cases import DTYPES, STEP, TOKEN_ROWS, RowOp, RowOpTests, bad_arguments, both
from stock_block import StockBlock

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels.gated_residual import gated_residual, gated_residual_reference

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

ROW_OP = RowOp("gated_residual", tokens=("residual", "branch"), tables=("gate",))


class TestGatedResidual(RowOpTests):
    row_op = ROW_OP


@both
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_residual_stream_of_stocks_block(implementation, dtype, zero_cond_t, device):
    stock = StockBlock.random(dtype, device, zero_cond_t)
    (gate,) = stock.modulation(2)
    actual = getattr(ROW_OP, implementation)(residual=stock.hidden, branch=stock.attended, gate=gate, **stock.arguments())
    assert_within_budget(actual, stock.run()["y"], stock.double().run()["y"])


@both
def test_clips_as_stock_does_in_fp16(implementation, device):
    stock = StockBlock.random(torch.float16, device, zero_cond_t=False, magnitude=3e4)
    stock.hidden[3, 5] = float("nan")
    (gate,) = stock.modulation(2)
    inputs = {"residual": stock.hidden, "branch": stock.attended, "gate": gate} | stock.arguments()
    expected = stock.run()["y"]
    clipped = expected.abs() == 65504
    assert 50 < clipped.sum() < expected.numel() / 2 and expected.isnan().sum() == 1
    actual = getattr(ROW_OP, implementation)(**inputs, clip=True)
    # Where stock's product alone overflows, its sum is at the limit while the exact one may lie below.
    exact = stock.double().run()["y"].clip(-65504, 65504)
    assert_within_budget(actual, gated_residual_reference(**inputs, clip=True), exact)
    assert_bit_equal(actual[exact.abs() == 65504], expected[exact.abs() == 65504])
    assert torch.equal(actual.isnan(), expected.isnan())
    unclipped = getattr(ROW_OP, implementation)(**inputs)
    assert unclipped.isinf().sum() > 50


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip(implementation, dtype, device):
    """At the limit and on both sides of it, with infinities and NaN, in every dtype."""
    inputs = ROW_OP.inputs((5, 64, 2), dtype, device)
    limits = torch.tensor([65504.0, 65503.0, 65519.0, 65520.0, 7e4, 6.4e4, float("inf"), float("nan"), 0.0], device=device)
    inputs["residual"][:, :18] = torch.cat([limits, -limits]).to(dtype)
    inputs["branch"][:, :18] = 0
    inputs["branch"][3, :18] = 1
    clipped = getattr(ROW_OP, implementation)(**inputs, clip=True)
    assert_bit_equal(clipped[:3, :18], gated_residual_reference(**inputs, clip=True)[:3, :18])
    assert clipped.isnan().sum() == 10 and not clipped.isinf().any()
    assert clipped.abs().nan_to_num().max() == torch.tensor(65504.0).to(dtype)
    without = getattr(ROW_OP, implementation)(**inputs)
    assert_bit_equal(without[:3, :18], gated_residual_reference(**inputs)[:3, :18])
    assert without.isinf().any()


@both
def test_what_is_not_finite_stays_in_its_place(implementation, device):
    inputs = ROW_OP.inputs((37, 64, 19), torch.bfloat16, device)
    expected = getattr(ROW_OP, implementation)(**inputs)
    inputs["branch"][[5, 25], 3] = float("nan")
    actual = getattr(ROW_OP, implementation)(**inputs)
    assert actual[[5, 25], 3].isnan().all() and actual.isnan().sum() == 2
    assert torch.equal(actual[~actual.isnan()], expected[~actual.isnan()])


def test_fp64_on_the_cpu_is_the_formula():
    inputs = ROW_OP.inputs((5, 7, 2), torch.float64, torch.device("cpu"))
    gate = inputs["gate"][STEP, torch.tensor([1, 1, 0, 0, 0])]
    for run in (gated_residual, gated_residual_reference):
        torch.testing.assert_close(run(**inputs), inputs["residual"] + gate * inputs["branch"], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("rows, txt_rows", [(200, 0), (200, 90), (24, 24)])
def test_the_cpu_with_a_row_for_every_token_and_with_long_stretches(rows, txt_rows):
    for token_rows in TOKEN_ROWS:
        inputs = ROW_OP.inputs((rows, 16, txt_rows), torch.float32, torch.device("cpu"), token_rows)
        ROW_OP.check(gated_residual(**inputs), inputs)


BAD = bad_arguments(ROW_OP)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    inputs = ROW_OP.inputs((4, 64, 2), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        gated_residual(**inputs | {argument: value})
