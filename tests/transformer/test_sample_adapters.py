"""The transformer alone with LoRA adapters of each sample's own."""

import pytest
import torch

import qwen_fast
from qwen_fast.transformer.linear import AdapterRows
from support.adapters import BASE, only, with_adapters
from support.small_transformer import inputs, transformer

ENTRIES = [["speed", "style"], "thing", BASE, "speed"]
TIMES = torch.tensor([0.9, 0.5, 0.5, 0.1])


def built(**config):
    """Ours and stock's, of the same weights, under the same adapters."""
    model = with_adapters(transformer(**config), modulations=True)
    own = qwen_fast.QwenImageTransformer2DModel(**{name: model.config[name] for name in model.config if name[0] != "_"}).eval()
    return with_adapters(own, modulations=True), model


@pytest.mark.parametrize("config", [{}, {"zero_cond_t": True}], ids=str)
@pytest.mark.parametrize("times", [TIMES, TIMES[:1].expand(4)], ids=["each its own", "one"])
@torch.no_grad()
def test_each_sample_is_the_one_computed_alone(config, times):
    own, model = built(**config)
    own.load_state_dict(model.state_dict())
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, 4:] = False
    shapes = [[(1, 4, 6), (1, 2, 4)]] * 4
    arguments = inputs(batch=4, shapes=shapes, timestep=times, encoder_hidden_states_mask=mask)
    kwargs = {"adapter_names": ENTRIES, "scale": 0.7}
    actual = own(**arguments, attention_kwargs=kwargs)[0]
    for n, entry in enumerate(ENTRIES):
        only(model, entry)
        alone = {name: arguments[name][n : n + 1] for name in arguments if name != "return_dict"}
        expected = model(**alone, attention_kwargs={"scale": 0.7}, return_dict=False)[0]
        assert (actual[n : n + 1] - expected).abs().max() <= 2e-6 * expected.abs().max()
    # The forward behind it has what is on, for all, as before.
    only(model, "thing")
    expected = model(**arguments)[0]
    assert (own(**arguments)[0] - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"attention_kwargs": {"adapter_names": ["style"]}}, "1 entries for 2"),
        ({"attention_kwargs": {"adapter_names": ["style", "stile"]}}, "'stile'"),
        ({"attention_kwargs": {"adapter_names": ["style", BASE], "other": 1}}, "other"),
        ({"attention_kwargs": {"adapter_names": ["style", BASE]}, "guidance": torch.ones(2)}, "guidance"),
    ],
    ids=["another length", "an unknown name", "other arguments", "guidance"],
)
@torch.no_grad()
def test_refused(arguments, words):
    own, _ = built()
    with pytest.raises(ValueError, match=words):
        own(**inputs(batch=2), **arguments)


def test_refused_with_gradients():
    own, _ = built()
    with pytest.raises(ValueError, match="gradients"):
        own(**inputs(batch=2), attention_kwargs={"adapter_names": ["style", BASE]})


def test_rows_within_others():
    rows = AdapterRows((("a", slice(0, 4)), ("b", slice(2, 9)), ("a", slice(8, 9))), 0.5)
    assert rows.within(slice(3, 8)) == AdapterRows((("a", slice(0, 1)), ("b", slice(0, 5))), 0.5)
    assert rows.within(slice(9, 12)).spans == ()
