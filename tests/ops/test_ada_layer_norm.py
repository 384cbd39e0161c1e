"""ada_layer_norm against the norms of stock's block and of its last layer, and against float64."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormContinuous
from elementwise_cases import DTYPES, STEP, TOKEN_ROWS, RowOp, RowOpTests, bad_arguments, both
from stock_block import StockBlock

from benchmarks.shared.budget import assert_within_budget
from qwen_fast_kernels.ada_layer_norm import ada_layer_norm, ada_layer_norm_reference, default_config

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

ROW_OP = RowOp("ada_layer_norm", tokens=("x",), tables=("shift", "scale"))


class TestAdaLayerNorm(RowOpTests):
    row_op = ROW_OP


@both
@pytest.mark.parametrize("zero_cond_t", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_first_norm_of_stocks_block(implementation, dtype, zero_cond_t, device):
    stock = StockBlock.random(dtype, device, zero_cond_t)
    shift, scale = stock.modulation(0, 1)
    actual = getattr(ROW_OP, implementation)(x=stock.hidden, shift=shift, scale=scale, **stock.arguments())
    assert_within_budget(actual, stock.run()["normed1"], stock.double().run()["normed1"])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_stocks_last_norm(implementation, dtype, device):
    """norm_out has one table of scale and shift, in this order, and no text."""
    torch.manual_seed(0)
    norm_out = AdaLayerNormContinuous(64, 64, elementwise_affine=False, eps=1e-6).to(device, dtype)
    x, temb = torch.randn(2, 13, 64, device=device, dtype=dtype), torch.randn(2, 64, device=device, dtype=dtype)
    with torch.no_grad():
        table = norm_out.linear(F.silu(temb))[:, None]  # [2, 1, 2 C]
        stock = norm_out(x, temb)
        norm_out.linear = torch.nn.Identity()  # the float64 one starts from the same table
        norm_out.silu = torch.nn.Identity()
        oracle = norm_out.double()(x.double(), table[:, 0].double())
    samples = torch.arange(2, dtype=torch.int32, device=device).repeat_interleave(13)
    scale, shift = table[..., :64], table[..., 64:]
    step_index = torch.zeros(1, dtype=torch.int32, device=device)
    actual = getattr(ROW_OP, implementation)(
        x=x.flatten(0, 1), shift=shift, scale=scale, step_index=step_index, token_rows=samples
    )
    assert_within_budget(actual.view_as(stock), stock, oracle)


@both
@pytest.mark.parametrize("eps", [1e-6, 1e-2, 10.0])
def test_eps_is_part_of_the_variance(implementation, eps, device):
    inputs = ROW_OP.inputs((5, 64, 2), torch.float32, device)
    inputs["x"] *= 1e-2
    ROW_OP.check(getattr(ROW_OP, implementation)(**inputs, eps=eps), inputs | {"eps": eps})


@both
def test_eps_is_stocks_by_default(implementation, device):
    inputs = ROW_OP.inputs((5, 64, 2), torch.float32, device)
    inputs["x"] *= 1e-3
    ROW_OP.check(getattr(ROW_OP, implementation)(**inputs), inputs | {"eps": 1e-6})


@both
@pytest.mark.parametrize("channels", [7, 64, 3072])
def test_a_mean_far_from_zero_and_constant_rows(implementation, channels, device):
    """One pass with the mean of squares would lose digits of the variance."""
    inputs = ROW_OP.inputs((6, channels, 2), torch.float32, device)
    inputs["x"][:4] += 30.0
    inputs["x"][4] = -7.0
    inputs["x"][5] = 0.0
    ROW_OP.check(getattr(ROW_OP, implementation)(**inputs), inputs)


@both
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(implementation, value, device):
    inputs = ROW_OP.inputs((37, 64, 19), torch.bfloat16, device)
    expected = getattr(ROW_OP, implementation)(**inputs)
    inputs["x"][[5, 25], 3] = value
    actual = getattr(ROW_OP, implementation)(**inputs)
    assert actual[[5, 25]].isnan().all()
    rest = [row for row in range(37) if row not in (5, 25)]
    assert torch.equal(actual[rest], expected[rest])


def test_fp64_on_the_cpu_is_the_formula():
    inputs = ROW_OP.inputs((5, 7, 2), torch.float64, torch.device("cpu"))
    x, stream = inputs["x"], torch.tensor([1, 1, 0, 0, 0])
    shift, scale = (inputs[name][STEP, stream] for name in ("shift", "scale"))
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift
    for run in (ada_layer_norm, ada_layer_norm_reference):
        torch.testing.assert_close(run(**inputs), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rows, txt_rows", [(200, 0), (200, 90), (24, 24)])
def test_the_cpu_with_a_row_for_every_token_and_with_long_stretches(rows, txt_rows):
    for token_rows in TOKEN_ROWS:
        inputs = ROW_OP.inputs((rows, 16, txt_rows), torch.float32, torch.device("cpu"), token_rows)
        ROW_OP.check(ada_layer_norm(**inputs), inputs)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_configurations_cover_a_row_in_tiles_that_a_program_can_hold(itemsize):
    for channels in [1, 7, 64, 512, 1000, 1536, 3072, 4096, 5120, 12288]:
        config = default_config(90, channels, itemsize)
        rows, block, warps = config["BLOCK_ROWS"], config["BLOCK_CHANNELS"], config["num_warps"]
        chunks = -(-channels // block)
        assert rows & (rows - 1) == block & (block - 1) == 0 and 4 <= warps <= 16
        assert warps == 16 or rows * chunks * block * itemsize <= 128 * warps * 16, "4 vectors of 16 bytes a thread"
        assert (chunks - 1) * block < channels


BAD = bad_arguments(ROW_OP)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    inputs = ROW_OP.inputs((4, 64, 2), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        ada_layer_norm(**inputs | {argument: value})
