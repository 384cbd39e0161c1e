"""The family natively: stock's picture on the same card, with and without graphs, the same bits call after call."""

import pytest
import torch

import qwen_fast
from support.family import MEMBERS, small_references

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact():
    """References of 64x96 pixels, and fp32 convolutions in fp32, which cuDNN's are not by default."""
    with small_references(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def assert_near(actual, expected):
    """Products in fp32 are summed in another order than stock's; the emulated device's tests allow the same."""
    assert expected.isfinite().all() and expected.std() > 0.01
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max(), (actual - expected).abs().max()


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_stocks_picture_and_the_same_bits_in_each_call(checkpoint, device, name, cuda_graph):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint).to(device)
    expected = {seed: member.draw(pipe, seed) for seed in (7, 8)}
    qwen_fast.enable(pipe, cuda_graph=cuda_graph)
    drawn = [member.draw(pipe, seed) for seed in (7, 7, 8, 7)]
    for seed, one in zip((7, 7, 8, 7), drawn, strict=True):
        assert_near(one, expected[seed])
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[3])
    assert not qwen_fast.report(pipe).fallbacks
    assert (pipe.fast_state.graph is None) is (cuda_graph and "controlnet" not in name), pipe.fast_state.graph
    qwen_fast.disable(pipe)
    assert torch.equal(member.draw(pipe), expected[7])


@pytest.mark.parametrize("name", MEMBERS)
def test_bf16_is_as_near_to_fp32_as_stocks(checkpoint, device, name):
    member = MEMBERS[name]
    exact = member.draw(member.pipe(checkpoint, torch.bfloat16).to(device, torch.float32)).float()
    pipe = member.pipe(checkpoint, torch.bfloat16).to(device)
    expected = member.draw(pipe).float()
    actual = member.draw(qwen_fast.enable(pipe)).float()
    ours, theirs = ((one - exact).square().mean().sqrt() for one in (actual, expected))
    assert 0 < theirs and ours <= 1.5 * theirs, (ours, theirs)


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_lora_that_is_scaled_and_taken_off(checkpoint, device, cuda_graph):
    from peft import LoraConfig

    member = MEMBERS["text"]
    pipe = member.pipe(checkpoint).to(device)
    plain = member.draw(pipe)
    torch.manual_seed(1)
    targets = ["to_q", "add_v_proj", "to_out.0", "img_mod.1", "net.2", "proj_out"]
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="a")
    expected = {}
    for scale in (1.0, 0.3):
        pipe.transformer.set_adapters("a", scale)
        expected[scale] = member.draw(pipe)
    qwen_fast.enable(pipe, cuda_graph=cuda_graph)
    for scale in (1.0, 1.0, 0.3, 0.3, 1.0):
        pipe.transformer.set_adapters("a", scale)
        assert_near(member.draw(pipe), expected[scale])
    pipe.transformer.delete_adapters("a")
    for _ in range(2):
        assert_near(member.draw(pipe), plain)
    assert not qwen_fast.report(pipe).fallbacks
