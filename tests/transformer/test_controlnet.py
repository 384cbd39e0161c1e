"""The fused ControlNet gives stock's residuals: to 1e-11 in float64, and in halves with stock's error."""

import pytest
import torch
from diffusers import QwenImageControlNetModel

from benchmarks.shared.stock import in_float64
from qwen_fast.denoise.packing import rows_of
from qwen_fast.testing import initialize
from qwen_fast.transformer import controlnet
from qwen_fast.transformer.layout import build_layout, check_image_shapes
from qwen_fast.transformer.modulation import FromLayers, FromTable, TableCache, compute_table
from qwen_fast.transformer.survey import survey
from support.small_transformer import SIZES, inputs

HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0, 0]])
CASES = {
    "one sample": {},
    "batch": {"batch": 2},
    "prefix mask": {"batch": 2, "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [3]])},
    "mask with holes": {"batch": 2, "encoder_hidden_states_mask": HOLES},
}


def network(dtype: torch.dtype, layers: int = 3, seed: int = 0) -> QwenImageControlNetModel:
    net = QwenImageControlNetModel(**SIZES | {"num_layers": layers}, extra_condition_channels=4)
    initialize(net, "controlnet", seed)
    return torch.nn.Module.to(net.eval(), dtype)


def asked(dtype: torch.dtype, seed: int = 0, **case) -> dict:
    given = inputs(dtype, **case)
    batch, tokens, channels = given["hidden_states"].shape
    torch.manual_seed(seed)
    given["controlnet_cond"] = torch.randn(batch, tokens, channels + 4, dtype=torch.float64).to(dtype)
    given["timestep"] = given["timestep"][:1].expand(batch)
    names = (
        "hidden_states",
        "controlnet_cond",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "timestep",
        "img_shapes",
    )
    return {name: given[name] for name in names if name in given}


def looked(net):
    found = survey(net)
    assert controlnet.stock_reason(net, found) is None
    return found


def fused(net, found, given: dict, scale: float, *, table: bool) -> list[torch.Tensor]:
    hidden = given["hidden_states"]
    embeds, positions = rows_of(given["encoder_hidden_states"], given.get("encoder_hidden_states_mask"), len(hidden))
    layout = build_layout(net.pos_embed, check_image_shapes(given["img_shapes"], len(hidden)), positions, hidden.device)
    timestep = given["timestep"][:1]
    if table:
        source = FromTable(net, TableCache(), torch.cat([timestep + 0.1, timestep]), torch.ones(1, dtype=torch.int32))
        source.begin(timestep)
    else:
        source = FromLayers(net, found.order, timestep, hidden, None)
    control, text = controlnet.embedded(found, given["controlnet_cond"]), net.txt_in(net.txt_norm(embeds))
    return controlnet.residuals(net, found, hidden, control, scale, text, layout, source, "auto")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("table", [False, True])
def test_equals_stock(name, table):
    net, given = network(torch.float64), asked(torch.float64, **CASES[name])
    found = looked(net)
    with in_float64(), torch.no_grad():
        expected = net(**given, conditioning_scale=0.7, return_dict=False)
        actual = fused(net, found, given, 0.7, table=table)
    assert len(actual) == len(expected) == 3
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape and other.std() > 0.1
        assert (one - other).abs().max() < 1e-11 * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_its_error_is_at_most_stocks(dtype):
    ours, theirs = [], []
    for seed in range(8):
        net, given = network(dtype, seed=seed), asked(dtype, seed=seed, batch=2)
        wide = {name: value.double() if name != "img_shapes" else value for name, value in given.items()}
        with in_float64():
            exact = torch.cat(torch.nn.Module.to(network(dtype, seed=seed), torch.float64)(**wide, return_dict=False))
        ours.append(torch.cat(fused(net, looked(net), given, 1.0, table=False)).double() - exact)
        theirs.append(torch.cat(net(**given, return_dict=False)).double() - exact)
    ours, theirs = torch.stack(ours), torch.stack(theirs)
    assert ours.square().mean().sqrt() <= 1.05 * theirs.square().mean().sqrt()
    assert ours.abs().max() <= 1.5 * theirs.abs().max()


@torch.no_grad()
def test_its_table_has_no_output_norm():
    net = network(torch.float32)
    table = compute_table(net, torch.tensor([0.9, 0.4]), "cpu")
    assert table.values.shape == (2, (12 * 3 + 1) * 64) and table.zero_row is None
    expected = net.transformer_blocks[2].txt_mod(net.time_text_embed(torch.tensor([0.4]), torch.empty(0)))
    text = torch.cat([part[1:, 1] for part in table.block(2)], dim=1)
    assert (text - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_residuals_of_several_pictures_are_added():
    torch.manual_seed(0)
    several = [[torch.randn(1, 4, 8) for _ in range(2)] for _ in range(3)]
    expected = [sum(one) for one in zip(*[[part.clone() for part in one] for one in several], strict=True)]
    assert all(torch.allclose(one, other) for one, other in zip(controlnet.summed(several), expected, strict=True))
    assert controlnet.summed([]) is None
