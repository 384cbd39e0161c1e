"""How far a mode's pictures lie from the lossless ones, and how well they follow their prompts.

PSNR and SSIM are scikit-image's, on the 8-bit pictures that a user sees. The perceptual distance is built as LPIPS is, on
the encoder of the checkpoint's own VAE instead of a classifier that would have to be downloaded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResample
from scipy.stats import binomtest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qwen_fast.demo.judge import Verdict

PARTS = ("colour", "shape", "both", "count", "place", "everything")  # of a verdict
DISTANCES = ("psnr_p50", "psnr_min", "ssim_mean", "ssim_min", "perceptual_mean", "perceptual_max")
FIELDS = (
    *(column for part in PARTS for column in (part, f"{part}_asked", f"{part}_low", f"{part}_high")),
    *("same_verdict", "same_picture", *DISTANCES, "latent_max", "latent_mean"),
)
CHUNK = 32  # pictures in the encoder at a time


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of `[H, W, 3]` uint8 pictures; inf for equal ones."""
    with np.errstate(divide="ignore"):
        return float(peak_signal_noise_ratio(reference, picture, data_range=255))


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of `[H, W, 3]` uint8 pictures, with the Gaussian window and the constants of its authors."""
    return float(
        structural_similarity(
            reference,
            picture,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


class Perceptual:
    """LPIPS-like distance on the encoder of a VAE.

    Features are what leaves each resolution of the encoder and its middle block. At every position the vector of channels
    is scaled to length 1; squared differences are summed over channels, averaged over positions, then over the levels:
    from 0 to 4. LPIPS does so with a classifier's features and weights channels by what people said; here none is weighted.

    Args:
        vae (AutoencoderKLQwenImage): stock's, as the checkpoint has it.
    """

    def __init__(self, vae: torch.nn.Module):
        self._vae = vae
        encoder = vae.encoder
        self._levels = [layer for layer in encoder.down_blocks if isinstance(layer, QwenImageResample)]
        self._middle = encoder.mid_block

    @torch.no_grad()
    def features(self, pictures: np.ndarray) -> list[torch.Tensor]:
        """`[N, C, H, W]` fp32 of unit vectors along C, one a level, for `[N, H, W, 3]` uint8."""
        found: list[torch.Tensor] = []

        def keep(_, inputs: tuple) -> None:
            found.append(inputs[0])

        hooks = [level.register_forward_pre_hook(keep) for level in self._levels]  # before it is made smaller
        hooks.append(self._middle.register_forward_hook(lambda _, __, output: found.append(output)))
        try:
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2)[:, :, None]
            parameter = next(self._vae.parameters())
            self._vae.encoder(x.to(parameter.device, parameter.dtype) / 127.5 - 1)
        finally:
            for hook in hooks:
                hook.remove()
        return [torch.nn.functional.normalize(level[:, :, 0].float(), dim=1, eps=1e-10) for level in found]

    def __call__(self, pictures: np.ndarray, references: np.ndarray) -> list[float]:
        """One distance a picture; both `[N, H, W, 3]` uint8."""
        distances = []
        for first in range(0, len(pictures), CHUNK):
            pair = [self.features(some[first : first + CHUNK]) for some in (pictures, references)]
            levels = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(*pair, strict=True)]
            distances += torch.stack(levels).mean(0).tolist()
        return distances


def latent_differences(latents: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest and mean absolute difference of each picture's latents `[N, S_img, C]`, in units of its largest latent."""
    axes = tuple(range(1, latents.ndim))
    difference, scale = np.abs(latents - references), np.abs(references).max(axes)
    return difference.max(axes) / scale, difference.mean(axes) / scale


def accuracy(verdicts: Sequence[Verdict], part: str) -> dict[str, float] | None:
    """Share of the verdicts that were asked for `part` and have it right, its Wilson interval of 95 %; None: none was."""
    asked = [getattr(verdict, part) for verdict in verdicts if getattr(verdict, part) is not None]
    if not asked:
        return None
    interval = binomtest(sum(asked), len(asked)).proportion_ci(0.95, method="wilson")
    return {
        part: sum(asked) / len(asked),
        f"{part}_asked": len(asked),
        f"{part}_low": interval.low,
        f"{part}_high": interval.high,
    }


def summarise(
    verdicts: Sequence[Verdict],
    references: Sequence[Verdict],
    distances: dict[str, Sequence[float]],
) -> dict[str, Any]:
    """The columns `FIELDS` of a set of pictures.

    Args:
        verdicts, references: of the mode's pictures and of the lossless ones.
        distances: "psnr", "ssim", "perceptual", "latent_max" and "latent_mean" of each picture.
    """
    row: dict[str, Any] = {}
    for part in PARTS:
        row |= accuracy(verdicts, part) or {}
    row["same_verdict"] = np.mean([a == b for a, b in zip(verdicts, references, strict=True)])
    row["same_picture"] = np.mean(np.isposinf(distances["psnr"]))
    # numpy's, unlike Python's own max and min, let a NaN through.
    row |= {"psnr_p50": np.median(distances["psnr"]), "psnr_min": np.min(distances["psnr"])}
    row |= {"ssim_mean": np.mean(distances["ssim"]), "ssim_min": np.min(distances["ssim"])}
    row |= {"perceptual_mean": np.mean(distances["perceptual"]), "perceptual_max": np.max(distances["perceptual"])}
    row |= {"latent_max": np.max(distances["latent_max"]), "latent_mean": np.mean(distances["latent_mean"])}
    return {name: value if isinstance(value, int) else float(value) for name, value in row.items()}
