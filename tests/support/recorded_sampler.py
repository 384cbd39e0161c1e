"""Stock diffusers as the oracle of the sampler: its own denoising loop, recorded predictions in the model's place."""

import contextlib
import types
from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG as QWEN_IMAGE


@dataclass
class Run:
    """Everything a sampler sees in one run: `latents[i]` and the predictions of step i lead to `latents[i + 1]`."""

    latents: list[torch.Tensor]
    cond: list[torch.Tensor]
    uncond: list[torch.Tensor] | None
    sigmas: torch.Tensor
    true_cfg_scale: float

    def __len__(self) -> int:
        return len(self.cond)

    def index(self, step: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor([step], dtype=dtype, device=self.sigmas.device)


class _Predictions(torch.nn.Module):
    """Stands in for the transformer and plays predictions back by step and by cache context, "cond" or "uncond"."""

    def __init__(self, by_context: dict[str, list[torch.Tensor]]) -> None:
        super().__init__()
        first = by_context["cond"][0]
        self.config = types.SimpleNamespace(in_channels=4 * first.shape[-1], guidance_embeds=False)
        self.device, self.dtype = first.device, first.dtype
        self._players = {name: iter(predictions) for name, predictions in by_context.items()}
        self._context = None

    @contextlib.contextmanager
    def cache_context(self, name: str):
        self._context = name
        yield

    def forward(self, **_) -> tuple[torch.Tensor]:
        return (next(self._players[self._context]),)


def play(
    latents: torch.Tensor,
    cond: list[torch.Tensor],
    uncond: list[torch.Tensor] | None = None,
    true_cfg_scale: float = 4.0,
    scheduler_config: dict = QWEN_IMAGE,
) -> Run:
    """Run diffusers.QwenImagePipeline on recorded predictions and keep the latents of every step.

    Args:
        latents (Tensor): `[B, S_img, C]` initial noise in the model's dtype.
        cond, uncond (list[Tensor]): one prediction per step, like `latents`; without `uncond` no guidance takes place.
        true_cfg_scale (float): above 1.
        scheduler_config (dict): configuration of FlowMatchEulerDiscreteScheduler; its sigmas are curved.
    """
    predictions = {"cond": cond} if uncond is None else {"cond": cond, "uncond": uncond}
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler_config),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=_Predictions(predictions),
    )
    pipe.set_progress_bar_config(disable=True)
    text = {
        "embeds": latents.new_zeros(latents.shape[0], 1, 1),
        "embeds_mask": torch.ones(latents.shape[0], 1, dtype=torch.long, device=latents.device),
    }
    prompt = {f"prompt_{name}": value for name, value in text.items()}
    negative = {} if uncond is None else {f"negative_{name}": value for name, value in prompt.items()}
    trajectory = [latents]

    def keep(_pipe, _step, _timestep, tensors: dict) -> dict:
        trajectory.append(tensors["latents"])
        return {}

    pipe(
        **prompt,
        **negative,
        height=16,
        width=16,
        latents=latents,
        num_inference_steps=len(cond),
        true_cfg_scale=1.0 if uncond is None else true_cfg_scale,
        output_type="latent",
        callback_on_step_end=keep,
    )
    return Run(trajectory, cond, uncond, pipe.scheduler.sigmas.to(latents.device), true_cfg_scale)


def random_run(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    steps: int = 4,
    guided: bool = True,
    true_cfg_scale: float = 4.0,
    magnitude: float = 1.0,
    seed: int = 0,
) -> Run:
    """A run on random predictions; cond and uncond differ by a tenth of their size, as a model's do."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def place(tensor: torch.Tensor) -> torch.Tensor:
        return (magnitude * tensor).to(device=device, dtype=dtype)

    latents, shared = place(noise()), [noise() for _ in range(steps)]
    cond = [place(values + 0.1 * noise()) for values in shared]
    uncond = [place(values + 0.1 * noise()) for values in shared] if guided else None
    return play(latents, cond, uncond, true_cfg_scale)
