"""Pictures that are encoded again: their moments are kept by content, what is sampled from them is drawn anew."""

import copy

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading

import qwen_fast
from qwen_fast.vae.kept import moments
from support.family import HIGH, MEMBERS, WIDE, small_references
from support.small_transformer import needs_group_offload

WITH_PICTURES = ["image", "inpaint", "edit", "edit plus 2511", "edit inpaint", "layered"]


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


def encoded(pipe) -> int:
    return qwen_fast.report(pipe).calls["vae encode"]


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_the_second_call_encodes_nothing_and_draws_what_stock_draws(checkpoint, name):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    expected = {seed: member.draw(pipe, seed) for seed in (7, 8)}
    qwen_fast.enable(pipe)
    member.assert_same(member.draw(pipe, 7), expected[7])
    once = encoded(pipe)
    for seed in (7, 8):  # another seed samples other latents from the same moments
        member.assert_same(member.draw(pipe, seed), expected[seed])
    again = encoded(pipe)
    # Inpainting encodes the masked noise of each seed's own, if at all.
    assert once >= 1 and again == once
    assert qwen_fast.report(pipe).memory["encoded pictures"] > 0


def other_picture(pipe):
    return {"image": [WIDE.rotate(180), HIGH]}


def edited_weight(pipe):
    pipe.vae.encoder.conv_in.weight.data.mul_(1.2)
    return {}


def one_element(pipe):
    with torch.no_grad():
        pipe.vae.encoder.mid_block.resnets[0].conv1.weight[3, 2, -1, 1, 1] += 0.5
    return {}


@pytest.mark.parametrize("change", [other_picture, edited_weight, one_element])
def test_another_picture_or_weight_is_encoded(checkpoint, change):
    member = MEMBERS["edit plus"]
    pipes = member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint))
    for pipe in pipes:
        member.draw(pipe)
    before = encoded(pipes[1])
    expected, actual = (member.draw(pipe, **change(pipe)) for pipe in pipes)
    member.assert_same(actual, expected)
    assert encoded(pipes[1]) > before


def test_nothing_is_kept_where_prompts_are_not_or_for_a_vae_alone(checkpoint):
    member = MEMBERS["edit"]
    pipe = qwen_fast.enable(member.pipe(checkpoint), prompt_cache=None)
    for _ in range(2):
        member.draw(pipe)
    assert encoded(pipe) == 2 and pipe.fast_state.pictures is None
    vae = qwen_fast.enable_vae(member.pipe(checkpoint).vae)
    with torch.no_grad():
        first, second = (vae.encode(torch.ones(1, 3, 1, 32, 32)).latent_dist.mean for _ in range(2))
    assert torch.equal(first, second) and qwen_fast.report(vae).calls["vae encode"] == 2


def test_a_copy_starts_empty_and_the_oldest_goes_first(checkpoint):
    member = MEMBERS["edit"]
    pipe = qwen_fast.enable(member.pipe(checkpoint))
    member.draw(pipe)
    assert copy.deepcopy(pipe).fast_state.pictures.nbytes == 0
    kept = pipe.fast_state.pictures
    kept.max_bytes = kept.nbytes
    member.draw(pipe, image=WIDE)
    assert kept.nbytes <= kept.max_bytes
    before = encoded(pipe)
    member.draw(pipe)
    assert encoded(pipe) == before + 1


def test_nothing_is_kept_of_weights_that_cannot_be_read(checkpoint):
    member = MEMBERS["edit"]
    pipes = member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint))
    held = []
    for pipe in pipes:
        accelerate.cpu_offload(pipe.vae.encoder, execution_device="cpu", offload_buffers=True)
        held.append(pipe.vae.encoder.conv_in._hf_hook.weights_map)
    for _ in range(2):
        expected, actual = (member.draw(pipe) for pipe in pipes)
        member.assert_same(actual, expected)
        for weights in held:
            weights["weight"].mul_(1.2)
    assert pipes[1].fast_state.pictures is None


@needs_group_offload
def test_nothing_is_kept_of_weights_on_disk(checkpoint, tmp_path):
    pipe = qwen_fast.enable(MEMBERS["edit"].pipe(checkpoint))
    vae, picture, asked = pipe.vae, torch.ones(1, 3, 1, 32, 32), []

    def encode():
        asked.append(True)
        return torch.zeros(1)

    def twice():
        with torch.no_grad():
            for _ in range(2):
                moments(vae, pipe.fast_state, picture, encode)
        return len(asked)

    assert twice() == 1
    devices = {"onload_device": torch.device("cpu"), "offload_device": torch.device("cpu")}
    apply_group_offloading(vae.encoder, **devices, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert twice() == 3
