"""Prompts, tokenizers, embeddings and sizes as people give them."""

import copy

import numpy as np
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting

import qwen_fast
from support.field import GUIDED, IMAGE_TO_IMAGE, SMALL, TEXT_TO_IMAGE, assert_same, compare, draw, guided

LONG = "a red circle beside two green squares on a hill, " * 60
PROMPTS = {
    "more than 512 tokens": {"prompt": LONG},
    "more than 1024 tokens": {"prompt": LONG * 3, "max_sequence_length": 1024},
    "cut to 8 tokens": {"prompt": LONG, "max_sequence_length": 8},
    "both empty": {"prompt": "", "negative_prompt": ""},
    "braces and special tokens": {"prompt": "a {cat} <|im_end|> {0} %s \U0001f60a"},
    "a list of one": {"prompt": ["a red circle"], "negative_prompt": ["blurry"]},
    "the same twice": {"prompt": ["a red circle"] * 2, "negative_prompt": ["blurry"] * 2},
    "prompt and negative prompt the same": {"prompt": "a red circle", "negative_prompt": "a red circle"},
    "a tuple": {"prompt": ("a red circle",)},
    "too long a limit": {"max_sequence_length": 1025},
    "no prompt": {"prompt": None},
    "a number": {"prompt": 7},
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt(field, name):
    compare(field, None, moves=False, **PROMPTS[name])


def own_template(run):
    run.pipe.prompt_template_encode = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    run.pipe.prompt_template_encode_start_idx = len(run.pipe.tokenizer("<|im_start|>user\n").input_ids)


def shorter_maximum(run):
    run.pipe.tokenizer_max_length = 3


def encoder_in_fp8(run):
    apply_layerwise_casting(run.pipe.text_encoder, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def left_padding(run):
    run.pipe.tokenizer = copy.deepcopy(run.pipe.tokenizer)
    run.pipe.tokenizer.padding_side = "left"


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("situation", [own_template, shorter_maximum, encoder_in_fp8])
def test_the_encoding_of_ones_own(field, situation, order):
    compare(field, situation, order)


def test_padding_on_the_left(field):
    prompts = {"prompt": ["a red circle", "two green squares on a hill"], "negative_prompt": [" ", "blurry, bad"]}
    compare(field, left_padding, "after", moves=False, **prompts)


def weighted(run, ramp=1.5):
    """Prompt weighting: embeddings of the pipeline, scaled and shifted, with their masks."""
    with torch.no_grad():
        embeds, mask = run.pipe.encode_prompt(["a red circle", "two green squares on a hill"])
        negative, negative_mask = run.pipe.encode_prompt([" ", "blurry, bad"])
    noise = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(3))
    embeds = embeds * torch.linspace(0.5, ramp, embeds.shape[1])[None, :, None] + 0.1 * noise
    given = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
    given |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
    return draw(run.pipe, **guided(prompt=None, negative_prompt=None, **given))


def test_weighted_embeddings_with_masks(field):
    compare(field, None, act=weighted, moves=False)


def test_embeddings_changed_in_place_between_calls(field):
    """The same tensor object, other values: what was packed from it is not used again."""

    def act(run):
        with torch.no_grad():
            embeds, _ = run.pipe.encode_prompt("a red circle")
            negative, _ = run.pipe.encode_prompt("blurry")
        pictures = []
        for step in range(3):
            embeds[:, step] *= 0.5
            given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
            pictures.append(draw(run.pipe, **guided(prompt=None, negative_prompt=None, **given)))
        return pictures

    compare(field, None, act=act, moves=False)


# Learned embeddings


def learned(run):
    """One placeholder token, several learned embeddings in its row in turn, the same prompt: what textual inversion does.

    20,000 rows stand for 152,000.
    """
    pipe = run.pipe
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.text_encoder.resize_token_embeddings(20000)
    pipe.tokenizer.add_special_tokens({"additional_special_tokens": ["<tok>"]})
    row = pipe.tokenizer.convert_tokens_to_ids("<tok>")
    table, pictures = pipe.text_encoder.get_input_embeddings().weight, []
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(9)))
    for seed in range(3):
        with torch.no_grad():
            table[row] = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(seed))
        pictures.append(draw(pipe, **SMALL | {"prompt": "a photo of <tok>"}))
    return pictures


@pytest.mark.parametrize("options", [{}, {"prompt_cache": None}], ids=["cache", "no cache"])
def test_learned_embeddings_in_one_row(field, options):
    compare(field, None, act=learned, moves=False, options=options)


def test_learned_embeddings_show(field):
    with field.run() as run:
        first, second, third = learned(run)
        assert min((first - second).abs().max(), (second - third).abs().max()) > 1e-3


def one_weight(run):
    """A training step on one small part of the text encoder between two calls with the same prompt."""
    weight = run.pipe.text_encoder.model.language_model.layers[0].self_attn.q_proj.weight
    pictures = [draw(run.pipe, **guided())]
    with torch.no_grad():
        weight[3] = weight[5].clone() + 0.3
    return [*pictures, draw(run.pipe, **guided())]


def data_replaced(run):
    """`.data` replaced leaves no version behind that could be asked."""
    weight = run.pipe.text_encoder.model.language_model.layers[1].mlp.down_proj.weight
    pictures = [draw(run.pipe, **guided())]
    weight.data.mul_(1.1)  # of few elements nobody could know: README, "limits"
    return [*pictures, draw(run.pipe, **guided())]


@pytest.mark.parametrize("act", [one_weight, data_replaced])
def test_a_changed_text_encoder_encodes_anew(field, act):
    compare(field, None, act=act, moves=False)


# Sizes and numbers

SIZES = {
    "numpy": {"height": np.int64(64), "width": np.int64(96)},
    "tensors": {"height": torch.tensor(64), "width": torch.tensor(96)},
    "steps, pictures and scale from numpy": {
        "num_inference_steps": np.int64(3),
        "num_images_per_prompt": np.int64(2),
        "true_cfg_scale": np.float32(3.7),
    },
    "floats": {"height": 64.0, "width": 96.0},
    "odd": {"height": 65, "width": 97},
    "a scale as a tensor": {"true_cfg_scale": torch.tensor(3.7)},
    "sigmas from numpy": {"sigmas": np.array([1.0, 0.6, 0.3])},
    "sigmas as a tensor": {"sigmas": torch.tensor([1.0, 0.6, 0.3])},
    "two steps": {"num_inference_steps": 2},
    "a scale of 1": {"true_cfg_scale": 1.0},
    "a negative scale": {"true_cfg_scale": -2.0},
    "guidance_scale": {"guidance_scale": 3.0},
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_numbers(field, name):
    """Where stock fails too, the same kind of error or a ValueError that names the argument."""
    refused = {"floats": "height|width", "sigmas as a tensor": "sigmas"}.get(name)
    compare(field, None, moves=False, refused=refused, **SIZES[name])


@pytest.mark.parametrize("name", ["numpy", "odd", "tensors"])
def test_sizes_in_image_to_image(field, name):
    compare(field, None, moves=False, cls=IMAGE_TO_IMAGE, **SIZES[name])


def test_generators_and_latents(field):
    """A list of generators, noise of one's own, noise in float64."""
    noise = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(3))

    def act(run):
        pipe = run.pipe
        several = {"prompt": ["a red circle", "a dog"], "negative_prompt": ["blurry", " "]}
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return [
            draw(pipe, **guided(**several, generator=generators)),
            draw(pipe, **guided(**several, latents=noise.clone())),
            draw(pipe, **guided(latents=noise[:1].double())),
        ]

    compare(field, None, act=act, moves=False)


def test_the_noise_that_was_given_is_left_alone(field):
    noise = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3))
    given = noise.clone()
    draw(qwen_fast.enable(field.pipe()), **GUIDED, latents=given)
    assert torch.equal(given, noise)


def test_the_random_stream_goes_on_as_in_stock(field):
    """The generator stands where stock would have left it."""
    left = []
    for pipe in (field.pipe(), qwen_fast.enable(field.pipe())):
        generator = torch.Generator().manual_seed(7)
        draw(pipe, **GUIDED, generator=generator)
        left.append(torch.randn(4, generator=generator))
    assert_same(left[1], left[0], 0.0)
    assert type(field.pipe()) is TEXT_TO_IMAGE
