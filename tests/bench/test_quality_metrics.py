"""The figures of the quality harness against ones worked out by hand, and its contact sheet."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResample

pytest.importorskip("skimage", reason="the quality harness needs scikit-image")

from benchmarks.quality.metrics import FIELDS, Perceptual, accuracy, latent_differences, psnr, ssim, summarise
from benchmarks.quality.run import distance_note
from benchmarks.quality.sheet import FRAME, GAP, HEADER, LABEL, RIGHT, WRONG, Line, contact_sheet, mark
from qwen_fast.demo.judge import Verdict

GOOD = Verdict(count=True, background=True, colour=True, shape=True, both=True, size=None, place=True)
BAD = dataclasses.replace(GOOD, shape=False, both=False)
MISPLACED = dataclasses.replace(GOOD, place=False)
LOST = Verdict(count=False, background=True, colour=False, shape=False, both=False, size=None, place=False)


def flat(*rgb: int) -> np.ndarray:
    return np.broadcast_to(np.array(rgb, dtype=np.uint8), (32, 32, 3)).copy()


def test_psnr_and_ssim_of_flat_pictures():
    dark, light = flat(100, 100, 100), flat(105, 105, 105)
    assert psnr(light, dark) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(dark, dark) == math.inf
    constant = (0.01 * 255) ** 2  # without variance, only the means are compared
    assert ssim(light, dark) == pytest.approx((2 * 100 * 105 + constant) / (100**2 + 105**2 + constant))
    assert ssim(dark, dark) == 1


class _Level(QwenImageResample):
    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs()  # 1 in all channels


class _Vae(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential()
        self.encoder.down_blocks = torch.nn.Sequential(_Level())
        self.encoder.mid_block = torch.nn.Identity()
        self.weight = torch.nn.Parameter(torch.zeros(1))


def test_perceptual_distance_by_hand():
    """Red and green are (1, -1, -1) and (-1, 1, -1) before the level: 2 - 2 cos = 8/3; equal behind it. Half is 4/3."""
    vae = _Vae()
    vae.encoder.forward = lambda x: vae.encoder.mid_block(vae.encoder.down_blocks(x))
    red, green = flat(255, 0, 0), flat(0, 255, 0)
    half = red.copy()
    half[:16] = green[:16]
    many = np.stack([green, red, half] * 20)  # more than go at a time
    assert Perceptual(vae)(many, np.stack([red] * 60)) == pytest.approx([4 / 3, 0, 2 / 3] * 20)


def test_perceptual_distance_of_a_checkpoint_grows_with_the_noise(checkpoint):
    vae, rng = AutoencoderKLQwenImage.from_pretrained(checkpoint / "vae"), np.random.default_rng(0)
    picture = flat(120, 60, 200)
    noise = rng.normal(size=picture.shape)
    noisy = np.stack([(picture + scale * noise).clip(0, 255).astype(np.uint8) for scale in (0, 2, 8, 32)])
    perceptual = Perceptual(vae)
    assert [level.shape[1:] for level in perceptual.features(picture[None])] == [
        (8, 32, 32), (16, 16, 16), (32, 8, 8), (32, 4, 4)
    ]  # fmt: skip
    distances = perceptual(noisy, np.stack([picture] * 4))
    assert distances[0] == 0 and distances == sorted(distances) and 1e-6 < distances[1] < distances[3] < 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in vae.modules())


def test_latent_differences_are_relative_to_each_pictures_largest():
    reference = np.array([[[4.0, -2.0]], [[0.5, 0.25]]], dtype=np.float32)
    largest, mean = latent_differences(reference + np.array([[[0, 1]], [[0.125, 0]]], dtype=np.float32), reference)
    assert largest.tolist() == [0.25, 0.25] and mean.tolist() == [0.125, 0.125]


def test_accuracy_and_its_wilson_interval():
    figures = accuracy([GOOD] * 8 + [BAD] * 2, "shape")
    assert figures["shape"] == 0.8 and figures["shape_asked"] == 10
    z, n, p = 1.959964, 10, 0.8
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert [figures["shape_low"], figures["shape_high"]] == pytest.approx(
        [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)], rel=1e-5
    )
    assert accuracy([dataclasses.replace(GOOD, place=None), GOOD, LOST], "place")["place_asked"] == 2
    assert accuracy([GOOD], "size") is None


def test_a_summary_fills_its_columns_and_hides_no_nan():
    distances = {name: [1.0, 3.0, 2.0, 2.0] for name in ("psnr", "ssim", "perceptual", "latent_max", "latent_mean")}
    row = summarise([GOOD, BAD, GOOD, LOST], [GOOD] * 4, {**distances, "psnr": [math.inf, 20, 40, 30]})
    assert set(row) == set(FIELDS) and all(type(value) in (int, float) for value in row.values())
    assert (row["same_verdict"], row["same_picture"], row["psnr_p50"], row["psnr_min"]) == (0.5, 0.25, 35, 20)
    assert (row["ssim_mean"], row["ssim_min"], row["perceptual_max"], row["latent_max"]) == (2, 1, 3, 3)
    assert math.isnan(summarise([GOOD] * 2, [GOOD] * 2, distances | {"latent_max": [1.0, math.nan]})["latent_max"])


def test_the_sheet_shows_verdicts_where_they_belong():
    pictures = np.stack([flat(0, 0, 255), flat(0, 0, 255)])
    sheet = contact_sheet("t", ["a", "b"], [Line("m", "n", pictures, [GOOD, BAD]), Line("k", "n", pictures, [MISPLACED, GOOD])])
    pitch = 128 + 2 * FRAME + GAP
    top = GAP + 24 + HEADER
    rows = [top, top + (sheet.height - top) // 2]
    frames = [[sheet.getpixel((GAP + LABEL + column * pitch, y)) for column in range(2)] for y in rows]
    assert frames == [[RIGHT, WRONG], [WRONG, RIGHT]]
    assert sheet.getpixel((GAP + LABEL + FRAME, top + FRAME)) == (0, 0, 255)
    assert (mark(GOOD), mark(BAD), mark(LOST)) == ("right", "not: shape", "not: count")
    assert mark(dataclasses.replace(GOOD, both=False, place=False)) == "not: both, place"


def test_the_sheet_speaks_of_no_mode_s_name():
    assert distance_note({"psnr_p50": math.inf, "ssim_mean": 1.0}, "stock diffusers, fp32") == "equal\nto stock diffusers, fp32"
    said = distance_note({"psnr_p50": 35.21, "ssim_mean": 0.9791}, "the same schedule and steps without the LoRA")
    assert said == "PSNR 35.2 dB, SSIM 0.979\nto the same schedule and steps\nwithout the LoRA"
