"""In the model's own dtype the fused forward is as near to float64 as stock's: RMS error at most 1.05 x, largest 1.5 x."""

import copy

import pytest
import torch

from benchmarks.shared.stock import in_float64
from support.pipelines import DTYPES
from support.small_transformer import fused, inputs, transformer

# Samples with a seed each; the largest error of the small models would be a matter of luck with 8.
FEW, MANY = 8, 64
WIDE = {"num_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": (16, 56, 56)}
MIDDLE = {"num_layers": 2, "num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)}
LARGEST = "one layer of the real width"
CASES = {
    LARGEST: (WIDE, {"shapes": [[(1, 3, 4)]] * FEW, "tokens": 5}),
    "two layers 512 wide": (MIDDLE, {"shapes": [[(1, 6, 8)]] * FEW}),
    "a small whole model": ({"num_layers": 6}, {"shapes": [[(1, 8, 8)]] * MANY, "tokens": 20}),
    "masked text": (
        {"num_layers": 2},
        {
            "tokens": 9,
            "shapes": [[(1, 4, 6)]] * MANY,
            "encoder_hidden_states_mask": torch.arange(9) < 1 + torch.arange(MANY)[:, None] % 9,
        },
    ),
    "reference pictures": ({"num_layers": 2, "zero_cond_t": True}, {"shapes": [[(1, 4, 6), (1, 3, 3)]] * MANY}),
}


@pytest.mark.parametrize("name", [pytest.param(LARGEST, marks=pytest.mark.slow), *(name for name in CASES if name != LARGEST)])
def test_error_against_float64(name):
    config, case = CASES[name]
    weights = transformer(**config)
    for dtype in DTYPES:
        model, arguments = copy.deepcopy(weights).to(dtype), inputs(dtype, batch=len(case["shapes"]), **case)
        actual = fused(model, arguments).double()
        with torch.no_grad():
            stock = model(**arguments)[0].double()
            model.double()
            wide = {key: value.double() if _is_float(value) else value for key, value in arguments.items()}
            with in_float64():
                oracle = model(**wide)[0]
        ours, theirs = (actual - oracle).abs(), (stock - oracle).abs()
        rms, largest = ours.square().mean().sqrt() / theirs.square().mean().sqrt(), ours.max() / theirs.max()
        print(f"{name}, {dtype}: RMS error {rms:.3f} x stock's, largest {largest:.3f} x")
        assert theirs.max() > 0 and rms <= 1.05 and largest <= 1.5, (dtype, rms, largest)


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
