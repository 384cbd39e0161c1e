"""How the demo checkpoint is trained: every number of the recipe, in one place."""

from dataclasses import dataclass, field

from ...schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG

# Qwen-Image's, its straight line for mu on the scale of these pictures: 64x64 pixels, 16 tokens, get the shift that 256x256 get
# there (0.5), and 96x64, 24 tokens, about that of 1024x1024 (0.7). With Qwen-Image's own line mu would hardly vary here.
SCHEDULER_CONFIG = QWEN_IMAGE_SCHEDULER_CONFIG | {"base_image_seq_len": 16, "max_image_seq_len": 32}


@dataclass(frozen=True)
class VAEPlan:
    """The VAE: reconstruction of fresh renders, no data set.

    Args:
        base_dim (int): channels at full resolution.
        steps, batch (int): optimiser steps, pictures in each.
        learning_rate (float): of Adam, after a warm-up, before the cosine to 0.
        kl (float): weight of the KL divergence per latent element, against L1 + MSE + edges per pixel, by contrast.
    """

    base_dim: int = 8
    steps: int = 4_000
    batch: int = 16
    learning_rate: float = 2.5e-3
    kl: float = 3e-4


@dataclass(frozen=True)
class DecoderPlan:
    """The VAE's decoder alone, on latents with noise.

    Args:
        steps, batch, learning_rate: as in VAEPlan.
        noise (float): largest standard deviation of the noise, in that of the whitened latents; each picture draws its own.
    """

    steps: int = 4_400
    batch: int = 16
    learning_rate: float = 2e-3
    noise: float = 0.3


@dataclass(frozen=True)
class DenoiserPlan:
    """The transformer: flow matching on latents of a fixed set of scenes.

    Args:
        layers, heads, head_dim (int): sizes of QwenImageTransformer2DModel.
        scenes (int): latents encoded before training.
        steps, batch (int): optimiser steps, latents in each.
        learning_rate (float): peak of AdamW's, up in a line, down in half a cosine.
        dropped (float): share of captions replaced by the negative prompt.
        ema (float): decay of the averaged weights, which are the ones kept.
    """

    layers: int = 4
    heads: int = 4
    head_dim: int = 64
    scenes: int = 64_000
    steps: int = 12_000
    batch: int = 16
    learning_rate: float = 1e-3
    dropped: float = 0.1
    ema: float = 0.999


@dataclass(frozen=True)
class FewStepsPlan:
    """The LoRA for 4 steps without guidance: straight lines between the states that the transformer passes with guidance.

    Args:
        rank (int): of the LoRA.
        trajectories (int): pictures drawn by the transformer before training.
        steps, batch (int): optimiser steps, pairs of states in each.
        learning_rate (float): as in DenoiserPlan.
    """

    rank: int = 16
    trajectories: int = 4_000
    steps: int = 4_000
    batch: int = 16
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Plan:
    """One training run; the same plan on the same machine gives the same weights."""

    seed: int = 0
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (96, 64))  # width, height
    shares: tuple[float, ...] = (0.6, 0.4)
    text_width: int = 64
    text_layers: int = 2
    vae: VAEPlan = field(default_factory=VAEPlan)
    decoder: DecoderPlan = field(default_factory=DecoderPlan)
    denoiser: DenoiserPlan = field(default_factory=DenoiserPlan)
    few_steps: FewStepsPlan = field(default_factory=FewStepsPlan)
