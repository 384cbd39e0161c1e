"""The pipeline's own methods replaced, on one pipeline or on its class: prompt weighting, own noise, previews."""

import types

import diffusers
import pytest
import torch

from support.field import IMAGE_TO_IMAGE, INPAINT, ORDERS, TEXT_TO_IMAGE, assert_not_stocks_own, compare, guided

STATIC = {"_pack_latents", "_unpack_latents"}


def tilted(embeddings):
    """Other channels louder: a plain factor would vanish in the norm of the text."""
    return embeddings * torch.linspace(0.5, 1.5, embeddings.shape[-1])


def tilted_embeddings(result):
    return (tilted(result[0]), *result[1:])


def louder_latents(result):
    return result * 0.9 if isinstance(result, torch.Tensor) else (result[0] * 0.9, *result[1:])


# Helper, what the user's version does to its result, whether that shows in latents.
HELPERS = {
    "encode_prompt": (tilted_embeddings, True),
    "_get_qwen_prompt_embeds": (tilted_embeddings, True),
    "_extract_masked_hidden": (lambda rows: [tilted(row) for row in rows], True),
    "check_inputs": (None, False),
    "prepare_latents": (louder_latents, True),
    "_pack_latents": (lambda latents: latents.flip(1), True),
    "_unpack_latents": (lambda latents: latents * 0.9, True),
    "progress_bar": (None, False),
    "maybe_free_model_hooks": (None, False),
}
EDITING = ("encode_prompt", "check_inputs", "prepare_latents", "get_timesteps", "_encode_vae_image")


def on_the_object(name, change):
    return lambda run: run.wrap(run.pipe, name, change)


def on_the_class(name, change, cls=TEXT_TO_IMAGE):
    def situation(run):
        if name not in STATIC:
            return run.wrap(cls, name, change)
        old = getattr(cls, name)

        def wrapped(*args, **kwargs):
            run.note(name, *args, **kwargs)
            return change(old(*args, **kwargs))

        run.patch.setattr(cls, name, staticmethod(wrapped))

    return situation


SITUATIONS = {
    f"{name}, {place.__name__}": (place(name, change), moves)
    for name, (change, moves) in HELPERS.items()
    for place in (on_the_object, on_the_class)
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_replaced_helper_is_called_as_in_stock(field, name, order):
    situation, moves = SITUATIONS[name]
    seen_in = "pt" if name.startswith("_unpack_latents") else "latent"
    compare(field, situation, order, moves=moves, output_type=seen_in, tolerance=1e-5 if seen_in == "pt" else 2e-6)


@pytest.mark.parametrize("cls", [IMAGE_TO_IMAGE, INPAINT], ids=["img2img", "inpaint"])
@pytest.mark.parametrize("name", EDITING)
def test_a_replaced_helper_of_the_editing_pipelines(field, name, cls):
    changes = {"encode_prompt": tilted_embeddings, "prepare_latents": louder_latents}
    change = changes.get(name)
    place = on_the_object(name, change) if cls is INPAINT else on_the_class(name, change, cls)
    compare(field, place, "after", cls=cls, moves=name in changes)


def refused(run):
    """A policy check of a server in the place of `check_inputs`."""

    def check_inputs(prompt, *args, **kwargs):
        raise PermissionError("not this prompt")

    run.pipe.check_inputs = check_inputs


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_helper_raises_comes_through(field, order):
    compare(field, refused, order)


def own_noise(run):
    """Noise of one's own instead of the pipeline's, bound as a method."""

    def prepare_latents(self, batch_size, channels, height, width, dtype, device, generator, latents=None):
        run.note("prepare_latents", batch_size, channels, height, width, dtype, device, latents)
        tokens = (height // 16) * (width // 16)
        return (
            torch.linspace(-2, 2, batch_size * tokens * channels * 4, dtype=dtype).view(batch_size, tokens, channels * 4).sin()
        )

    run.pipe.prepare_latents = types.MethodType(prepare_latents, run.pipe)


@pytest.mark.parametrize("order", ORDERS)
def test_noise_of_ones_own(field, order):
    compare(field, own_noise, order)


def calculate_shift(run):
    """The pipeline's module function: a mu of one's own, as scripts for other sizes replace it."""
    run.wrap(diffusers.pipelines.qwenimage.pipeline_qwenimage, "calculate_shift", lambda mu: mu + 0.7)


def retrieve_timesteps(run):
    """Timesteps of one's own, for experiments with other spacings."""
    home = diffusers.pipelines.qwenimage.pipeline_qwenimage
    old = home.retrieve_timesteps

    def own(scheduler, *args, **kwargs):
        run.note("retrieve_timesteps", scheduler, *args, **{k: v for k, v in kwargs.items() if k != "sigmas"})
        return old(scheduler, *args, **kwargs | {"sigmas": [1.0, 0.6, 0.3]})

    run.patch.setattr(home, "retrieve_timesteps", own)


def randn_tensor(run):
    run.wrap(diffusers.pipelines.qwenimage.pipeline_qwenimage, "randn_tensor", lambda noise: noise * 0.9)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("situation", [calculate_shift, retrieve_timesteps, randn_tensor])
def test_functions_of_the_pipelines_module(field, situation, order):
    compare(field, situation, order)


def postprocess(run):
    run.wrap(run.pipe.image_processor, "postprocess", lambda images: images * 0.5)


def own_image_processor(run):
    class Half(diffusers.image_processor.VaeImageProcessor):
        def postprocess(self, image, output_type="pil", do_denormalize=None):
            run.note("postprocess", image, output_type, do_denormalize)
            return super().postprocess(image, output_type=output_type) * 0.5

    run.pipe.image_processor = Half(vae_scale_factor=16)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [postprocess, own_image_processor])
def test_the_image_processor(field, situation, order):
    compare(field, situation, order, output_type="pt", tolerance=1e-5)


def cached_contexts(run):
    """Which forward has the prompt and which the negative one: caches ask the transformer's context."""
    run.wrap(run.transformer, "cache_context")


def test_contexts_of_caches_are_entered_as_in_stock(field):
    run = compare(field, cached_contexts, "after", moves=False)
    assert [args for args, _ in run.seen["cache_context"]] == [("cond",), ("uncond",)] * 3


# The second contract: what is not stock's own is named, and raises under strict=True.


@pytest.mark.parametrize("name", ["encode_prompt", "_get_qwen_prompt_embeds", "prepare_latents", "_unpack_latents"])
@pytest.mark.parametrize("place", [on_the_object, on_the_class])
def test_strict_a_replaced_helper_is_named_and_raises(field, name, place):
    assert_not_stocks_own(field, place(name, HELPERS[name][0]), name, output_type="pt")


def test_strict_noise_of_ones_own_raises(field):
    assert_not_stocks_own(field, own_noise, "prepare_latents")


def test_guided_arguments_are_made_anew():
    """What a call consumes is not shared between stock and qwen_fast."""
    assert guided() is not guided() and "generator" not in guided()
