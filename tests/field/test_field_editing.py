"""Image-to-image and inpainting at their edges, and pipelines made from one another."""

import diffusers
import pytest
import torch

import qwen_fast
from support.field import IMAGE_TO_IMAGE, INPAINT, TEXT_TO_IMAGE, compare, draw, guided, picture

EDITING = pytest.mark.parametrize("cls", [IMAGE_TO_IMAGE, INPAINT], ids=["img2img", "inpaint"])


@EDITING
@pytest.mark.parametrize("strength", [0.0, 0.05, 0.26, 1.0])
def test_strength(field, cls, strength):
    compare(field, None, cls=cls, moves=False, strength=strength, num_inference_steps=4)


def test_a_crop_around_the_mask(field):
    """Pictures in 8 bits: a last bit of the VAE may move one of 255 grey levels."""

    def act(run):
        arguments = guided(INPAINT, padding_mask_crop=8, output_type="pil", num_inference_steps=4)
        import numpy

        return torch.stack([torch.from_numpy(numpy.array(image)).float() for image in draw(run.pipe, **arguments)])

    compare(field, None, cls=INPAINT, act=act, moves=False, tolerance=1e-2)


def test_two_pictures(field):
    prompts = {"prompt": ["a red circle", "two green squares on a hill"], "image": [picture(), picture().rotate(180)]}
    compare(field, None, cls=IMAGE_TO_IMAGE, moves=False, **prompts)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_pipeline_from_an_enabled_one(field, order):
    """`AutoPipelineForImage2Image.from_pipe` shares the parts."""

    def act(run):
        edited = diffusers.AutoPipelineForImage2Image.from_pipe(run.pipe)
        edited.set_progress_bar_config(disable=True)
        return [draw(edited, **guided(IMAGE_TO_IMAGE)), draw(run.pipe, **guided())]

    compare(field, None, order, act=act, moves=False)


def test_both_enabled_on_the_same_parts(field):
    def act(run):
        edited = IMAGE_TO_IMAGE(**run.pipe.components)
        edited.set_progress_bar_config(disable=True)
        if qwen_fast.report(run.pipe).enabled:
            qwen_fast.enable(edited)
        return [draw(pipe, **guided(cls)) for pipe, cls in ((edited, IMAGE_TO_IMAGE), (run.pipe, TEXT_TO_IMAGE)) * 2]

    compare(field, None, "after", act=act, moves=False)


def test_an_odd_size_in_tiles(field):
    def tiled(run):
        run.pipe.vae.enable_tiling(
            tile_sample_min_height=64, tile_sample_min_width=64, tile_sample_stride_height=48, tile_sample_stride_width=48
        )

    compare(field, tiled, "after", height=144, width=208, num_inference_steps=2, output_type="pt", tolerance=1e-5, moves=False)


def test_slices(field):
    compare(
        field,
        lambda run: run.pipe.vae.enable_slicing(),
        "after",
        prompt=["a red circle", "a dog"],
        negative_prompt=["blurry", " "],
        output_type="pt",
        tolerance=1e-5,
        moves=False,
    )


@EDITING
def test_latents_as_the_picture(field, cls):
    """Stock takes latents in the picture's place."""
    latents = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(4))
    compare(field, None, cls=cls, moves=False, image=latents)


def test_other_latent_statistics(field):
    """A VAE whose configuration says other means than the checkpoint's."""

    def situation(run):
        run.pipe.vae.register_to_config(latents_mean=[0.3] * 16)

    compare(field, situation, "after", output_type="pt", tolerance=1e-5)
