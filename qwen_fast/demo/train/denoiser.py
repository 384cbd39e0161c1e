"""The demo's denoiser: diffusers' QwenImageTransformer2DModel, trained by flow matching on the schedule it samples with."""

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..scenes import lay_out, render, sample_request
from .plan import SCHEDULER_CONFIG, Plan
from .progress import Progress, load_state, save_state
from .text import NEGATIVE, Features
from .vae import as_images, encode, warmup_cosine

# With 30 tokens and a mask the CPU's flash attention costs a tenth of the whole step.
ATTENTION = {
    "cpu": [SDPBackend.MATH],
    "cuda": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


@dataclass(frozen=True)
class Latents:
    """Training data of one size: packed latents `[N, H * W, 64]` fp16, their grid (H, W) and the prompt of each."""

    values: torch.Tensor
    grid: tuple[int, int]
    prompts: list[str]


def encode_scenes(plan: Plan, vae: AutoencoderKLQwenImage, file: Path, chunk: int = 64) -> list[Latents]:
    """Draw the plan's scenes and encode them, one entry per size; or read what an earlier run wrote to `file`."""
    state = load_state(file)
    if state is not None:
        return [Latents(values, tuple(grid), prompts) for values, grid, prompts in state["parts"]]
    data = []
    with as_images(vae):
        for (width, height), share in zip(plan.sizes, plan.shares, strict=True):
            rng = random.Random(f"{plan.seed}/latents/{width}x{height}")
            values, prompts = [], []
            for _ in range(0, round(plan.denoiser.scenes * share), chunk):
                scenes = [lay_out(sample_request(rng), width, height, rng) for _ in range(chunk)]
                values.append(encode(vae, render(scenes, width, height).to(vae.device)).half())
                prompts += [scene.request.prompt for scene in scenes]
            data.append(Latents(torch.cat(values), (height // 16, width // 16), prompts))
    save_state(file, {"parts": [(part.values, part.grid, part.prompts) for part in data]})
    return data


def build_transformer(plan: Plan) -> QwenImageTransformer2DModel:
    """The untrained transformer: modulations and the last layer zero, so that every block begins as the identity."""
    recipe = plan.denoiser
    torch.manual_seed(plan.seed)
    side = recipe.head_dim * 7 // 16
    transformer = QwenImageTransformer2DModel(
        num_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_dim,
        joint_attention_dim=plan.text_width,
        axes_dims_rope=(recipe.head_dim - 2 * side, side, side),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            if "_mod." in name or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def train_denoiser(
    plan: Plan,
    data: list[Latents],
    features: Features,
    file: Path,
    device: torch.device,
    *,
    keep_every: int = 500,
    look: Callable[[int, QwenImageTransformer2DModel], None] = lambda step, transformer: None,
) -> QwenImageTransformer2DModel:
    """Train the transformer, or go on where `file` says an earlier run stopped.

    Args:
        plan (Plan): the recipe.
        data (list of Latents): from `encode_scenes`.
        features (Features): of all prompts of `data` and of the negative prompt.
        file (Path): state of the run, written every `keep_every` steps.
        device (torch.device): where to train.
        look (callable): called with the step and the averaged weights whenever the state is written.

    Returns:
        QwenImageTransformer2DModel: the averaged weights, fp32, in eval mode.
    """
    recipe = plan.denoiser
    transformer = build_transformer(plan).to(device)
    average = copy.deepcopy(transformer).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        transformer.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    step = 0
    state = load_state(file)
    if state is not None:
        transformer.load_state_dict(state["transformer"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    batches = Batches(data, features, device)
    progress = Progress("denoiser", recipe.steps, step)
    while step < recipe.steps:
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        part, chosen, prompts = batches.draw(recipe.batch, generator)
        dropped = torch.rand(recipe.batch, generator=generator) < recipe.dropped
        prompts = torch.where(dropped, features.index[NEGATIVE], prompts).to(device)
        clean = part.values[chosen.to(part.values.device)].to(device, torch.float32)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = sample_sigmas(recipe.batch, part.grid[0] * part.grid[1], generator).to(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup_cosine(step, recipe.steps, 200)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        velocity = predict(transformer, noisy, sigma, batches.values[prompts], batches.mask[prompts], part.grid)
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(recipe.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(transformer.parameters()), 1 - decay)
        progress.step(step, recipe.batch, loss=loss)
        if step % keep_every == 0 or step == recipe.steps:
            parts = {"transformer": transformer, "average": average, "optimizer": optimizer}
            save_state(file, {name: part.state_dict() for name, part in parts.items()} | {"step": step})
            look(step, average)
    return average


class Batches:
    """What a training step draws from: parts of one size each, with `values` and `prompts`, and features on `device`.

    Args:
        data (list): the parts.
        features (Features): of all their prompts.
        device (torch.device): where `values`, `[P, L, D]`, and `mask`, `[P, L]`, of the features go.
    """

    def __init__(self, data: Sequence[Any], features: Features, device: torch.device) -> None:
        self.data = data
        self.indices = [torch.tensor([features.index[prompt] for prompt in part.prompts]) for part in data]
        self.shares = torch.tensor([len(part.prompts) for part in data], dtype=torch.float32)
        self.values, self.mask = features.values.to(device), features.mask.to(device)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """A part, by its share of the data, the places of `count` of its entries, and those of their prompts' features."""
        size = int(torch.multinomial(self.shares, 1, generator=generator))
        chosen = torch.randint(len(self.indices[size]), (count,), generator=generator)
        return self.data[size], chosen, self.indices[size][chosen]


def predict(
    transformer: QwenImageTransformer2DModel,
    latents: torch.Tensor,
    sigma: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    grid: tuple[int, int],
) -> torch.Tensor:
    """The velocity of latents `[B, S_img, C]` at `sigma`, `[B]`, given features of prompts; in bf16 autocast, back in fp32."""
    kind = latents.device.type
    with torch.autocast(kind, torch.bfloat16), sdpa_kernel(ATTENTION[kind]):
        return transformer(
            hidden_states=latents,
            encoder_hidden_states=values,
            encoder_hidden_states_mask=mask,
            timestep=sigma,
            img_shapes=[[(1, *grid)]] * len(latents),
            return_dict=False,
        )[0].float()


def sample_sigmas(count: int, image_seq_len: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels to train on: stratified uniform, shifted as the schedule shifts them at this size, `[count]` fp32.

    They are rounded to bf16: that is how bf16 shows a timestep to the model, and noise and timestep then agree.
    """
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(image_seq_len, *(SCHEDULER_CONFIG[name] for name in names))
    order = torch.randperm(count, generator=generator)
    uniform = ((order + torch.rand(count, generator=generator)) / count).clamp(1e-3, 1.0)
    return (math.exp(mu) / (math.exp(mu) + 1 / uniform - 1)).bfloat16().float()
