"""The demo's VAE: diffusers' AutoencoderKLQwenImage, small, trained on fresh renders of scenes."""

import contextlib
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

from ...common.state import State
from ...vae import pictures as image_vae
from ..scenes import Scene, lay_out, render, sample_request
from .plan import Plan
from .progress import Progress, load_state, save_state

STD_FLOOR = 0.5  # of the largest channel's: dividing a collapsed channel by its own std would blow its noise up


def _resumed(file: Path, vae: AutoencoderKLQwenImage, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an interrupted training left in `file`, its weights and moments where they belong; step 0 where it left nothing."""
    state = load_state(file)
    if state is None:
        return {"step": 0}
    vae.load_state_dict(state["vae"])
    optimizer.load_state_dict(state["optimizer"])
    return state


def train_vae(plan: Plan, file: Path, device: torch.device, *, keep_every: int = 500) -> AutoencoderKLQwenImage:
    """Train the VAE, or go on where `file` says an earlier run stopped.

    Args:
        plan (Plan): the recipe.
        file (Path): state of the run, written every `keep_every` steps.
        device (torch.device): where to train.

    Returns:
        AutoencoderKLQwenImage: in eval mode, fp32, its latents_mean and latents_std measured.
    """
    recipe = plan.vae
    torch.manual_seed(plan.seed)
    vae = AutoencoderKLQwenImage(base_dim=recipe.base_dim, num_res_blocks=1).to(device)
    _clear_unreachable_taps(vae)
    optimizer = torch.optim.Adam(vae.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99))
    state = _resumed(file, vae, optimizer)
    if "latents" in state:
        vae.register_to_config(**state["latents"])
        return vae.eval()
    step = state["step"]
    progress = Progress("vae", recipe.steps, step)
    with as_images(vae):
        while step < recipe.steps:
            pictures = training_pictures(plan, step, recipe.batch)[1].to(device, memory_format=torch.channels_last)
            pictures = 2 * pictures - 1
            noise = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warmup_cosine(step, recipe.steps, 100)
            with torch.autocast(device.type, torch.bfloat16):
                posterior = vae.encode(pictures[:, :, None]).latent_dist
                sample = torch.randn(posterior.mean.shape, generator=noise).to(device)
                decoded = _decode(vae, posterior.mean.float() + posterior.std.float() * sample).float()
            pixels, edges = reconstruction_losses(decoded, pictures)
            mean, logvar = posterior.mean.float(), posterior.logvar.float()
            kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
            loss = pixels + edges + recipe.kl * kl
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.step(step, recipe.batch, pixels=pixels, edges=edges, kl=kl)
            if step % keep_every == 0 or step == recipe.steps:
                save_state(file, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
        latents = _measure_latents(vae.eval(), plan)
    vae.register_to_config(**latents)
    save_state(file, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "latents": latents})
    return vae


def training_pictures(plan: Plan, step: int, count: int, held_out: bool | None = False) -> tuple[list[Scene], torch.Tensor]:
    """The `step`th batch of `plan`: scenes of one size, and their pictures, `[count, 3, height, width]` in [0, 1].

    `held_out`: as in `sample_request`.
    """
    rng = random.Random(f"{plan.seed}/pictures/{step}")
    (width, height), *_ = rng.choices(plan.sizes, plan.shares)
    scenes = [lay_out(sample_request(rng, held_out=held_out), width, height, rng) for _ in range(count)]
    return scenes, render(scenes, width, height)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """Share of the learning rate at `step`: up in a line (a tenth of `steps` at most), down to 0 in half a cosine."""
    warmup = max(1, min(warmup, steps // 10))
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


def sharpen_decoder(
    plan: Plan, vae: AutoencoderKLQwenImage, file: Path, device: torch.device, *, keep_every: int = 500
) -> AutoencoderKLQwenImage:
    """Train the decoder on, the encoder frozen and its latents noisier than it makes them: as a denoiser leaves them.

    The latents do not change, so a denoiser may be trained before or after. Arguments as in `train_vae`; `vae` is changed.
    """
    recipe = plan.decoder
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate, betas=(0.9, 0.99))
    step = _resumed(file, vae, optimizer)["step"]
    progress = Progress("decoder", recipe.steps, step)
    std = torch.tensor(vae.config.latents_std, device=device)[:, None, None, None]
    with as_images(vae):
        while step < recipe.steps:
            # All scenes: this stage sees no prompt, and without them tips of triangles came out blunt in the held-out colours.
            pictures = training_pictures(plan, 10**6 + step, recipe.batch, held_out=None)[1]
            pictures = 2 * pictures.to(device, memory_format=torch.channels_last) - 1
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warmup_cosine(step, recipe.steps, 50)
            with torch.autocast(device.type, torch.bfloat16):
                with torch.no_grad():
                    latents = vae.encode(pictures[:, :, None]).latent_dist.mode().float()
                level = recipe.noise * torch.rand(recipe.batch, 1, 1, 1, 1, generator=generator)
                noise = (level * torch.randn(latents.shape, generator=generator)).to(device)
                decoded = _decode(vae, latents + std * noise).float()
            pixels, edges = reconstruction_losses(decoded, pictures)
            optimizer.zero_grad(set_to_none=True)
            (pixels + edges).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            progress.step(step, recipe.batch, pixels=pixels, edges=edges)
            if step % keep_every == 0 or step == recipe.steps:
                save_state(file, {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step})
    return vae


def reconstruction_losses(decoded: torch.Tensor, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 + MSE of the pixels, and L1 of the differences between neighbours, which keeps edges sharp.

    Both by each picture's contrast: orange on yellow should have edges as sharp as black on white.
    """
    contrast = (pictures - pictures[:, :, :1, :1]).abs().amax((1, 2, 3), keepdim=True)
    decoded, pictures = decoded / contrast, pictures / contrast
    pixels = F.l1_loss(decoded, pictures) + F.mse_loss(decoded, pictures)
    return pixels, sum(F.l1_loss(decoded.diff(dim=axis), pictures.diff(dim=axis)) for axis in (2, 3))


@contextlib.contextmanager
def as_images(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """Inside, `vae` codes pictures through 2-D convolutions, in a third of the time; afterwards it is stock again."""
    state = State()
    image_vae.attach(vae, state)
    try:
        with image_vae.images(vae, state):
            yield
    finally:
        image_vae.detach(vae, state)


@torch.no_grad()
def encode(vae: AutoencoderKLQwenImage, pictures: torch.Tensor) -> torch.Tensor:
    """Latents as the denoiser sees them: whitened and packed, `[N, 3, H, W]` in [0, 1] to `[N, H / 16 * W / 16, 64]`."""
    mean, std = (
        torch.tensor(values, device=pictures.device)[:, None, None]
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents = (vae.encode(2 * pictures[:, :, None] - 1).latent_dist.mode()[:, :, 0] - mean) / std
    count, channels, height, width = latents.shape
    patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, height * width // 4, 4 * channels)


@torch.no_grad()
def reconstruct(vae: AutoencoderKLQwenImage, pictures: torch.Tensor) -> torch.Tensor:
    """Pictures through the VAE, `[N, 3, H, W]` in [0, 1] both."""
    latents = vae.encode(2 * pictures[:, :, None] - 1).latent_dist.mode()
    return vae.decode(latents).sample[:, :, 0] / 2 + 0.5


def _decode(vae: AutoencoderKLQwenImage, latents: torch.Tensor) -> torch.Tensor:
    # Not vae.decode: its clamp to [-1, 1] would hide the gradient of everything beyond.
    return vae.decoder(vae.post_quant_conv(latents))[:, :, 0]


@torch.no_grad()
def _measure_latents(vae: AutoencoderKLQwenImage, plan: Plan, batches: int = 16) -> dict[str, list[float]]:
    """latents_mean and latents_std, of fresh pictures."""
    found = []
    for batch in range(batches):
        pictures = training_pictures(plan, -1 - batch, 64)[1].to(vae.device)
        latents = vae.encode(2 * pictures[:, :, None] - 1).latent_dist.mode()
        found.append(latents.movedim(1, 0).flatten(1))
    values = torch.cat(found, dim=1)
    std = values.std(dim=1)
    floor = STD_FLOOR * float(std.max())
    return {"latents_mean": values.mean(dim=1).tolist(), "latents_std": std.clamp(min=floor).tolist()}


def _clear_unreachable_taps(vae: AutoencoderKLQwenImage) -> None:
    """Zero what one frame never meets: all temporal taps but the last, and the convolutions between frames."""
    with torch.no_grad():
        for name, module in vae.named_modules():
            if isinstance(module, QwenImageCausalConv3d):
                module.weight[:, :, :-1] = 0
                if name.endswith("time_conv"):
                    module.weight.zero_()
                    module.bias.zero_()
