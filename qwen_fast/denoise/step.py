"""A denoising step as stock's loop has it, and the parts of one that need to know nothing of a call."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from qwen_fast_kernels import cfg_euler_step, euler_step

from ..common.hardware import free_bytes
from ..common.state import State

SHOWN = ("noise_pred", "neg_noise_pred", "comb_pred", "cond_norm", "noise_norm")  # a step's, by the names of stock's loop
RESIDUALS = "controlnet_block_samples"  # likewise; and the transformer's argument
_PROMPT = ("encoder_hidden_states", "encoder_hidden_states_mask")


@dataclass(eq=False)
class Step:
    """What stock's loop has where it would take a step.

    Attributes:
        t: of the schedule. latents: `[B, S_img, C]`. timestep: `[B]`, t in the latents' dtype.
        forwards: the keyword arguments of the transformer's forwards, but the timestep: for the prompt, and with guidance for
            the negative prompt. The hidden states are `[B, S_img + S_ref, C]` where there are reference pictures.
        true_cfg_scale: None without guidance.
        normalize: whether guidance keeps the norm of the prompt's prediction.
        control: the keyword arguments of the ControlNet's forward, but the timestep; None without.
    """

    t: torch.Tensor
    latents: torch.Tensor
    timestep: torch.Tensor
    forwards: tuple[dict[str, Any], ...]
    true_cfg_scale: float | None
    normalize: bool
    control: dict[str, Any] | None = None

    @property
    def prompts(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Embeddings `[B, S_txt, C_txt]` and mask `[B, S_txt]` or None, of each forward."""
        return [tuple(forward.get(name) for name in _PROMPT) for forward in self.forwards]

    @property
    def shapes(self) -> list:
        """Of the pictures of each sample; a callback that leaves samples out leaves their shapes in."""
        return self.shared("img_shapes")[: len(self.latents)]

    def shared(self, name: str) -> Any:
        """An argument that all forwards have alike."""
        return self.forwards[0].get(name)

    def of(self, sample: int) -> "Step":
        """That of one picture, as it would be alone. Prompts and shapes are still those of the batch."""
        hidden = own(self.shared("hidden_states"), sample)
        forwards = tuple(forward | {"hidden_states": hidden} for forward in self.forwards)
        return replace(self, latents=own(self.latents, sample), forwards=forwards)

    @property
    def is_shared(self) -> bool:
        """Whether the forwards differ in their prompts alone (ControlNet's first one has no guidance, which is None then)."""
        first, *others = self.forwards
        names = {name for forward in self.forwards for name in forward}.difference(_PROMPT, ("attention_kwargs",))
        return all(forward.get(name) is first.get(name) for forward in others for name in names)


def own(batch: torch.Tensor | None, sample: int | None) -> torch.Tensor | None:
    """`[1, ...]`, one sample of a batch in memory of its own, since products may go by an address; None: the batch itself."""
    if batch is None or sample is None:
        return batch
    return batch[sample : sample + 1].clone(memory_format=torch.contiguous_format)


def by_picture(apart: bool, function: Callable[..., Any], *batches: torch.Tensor) -> Any:
    """What `function` makes of these batches, a tensor or several by name; where pictures are kept `apart`, of each alone."""
    if not apart:
        return function(*batches)
    found = [function(*(own(batch, n) for batch in batches)) for n in range(len(batches[0]))]
    if isinstance(found[0], torch.Tensor):
        return torch.cat(found)
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


@dataclass(frozen=True, eq=False)
class Found:
    """A step that was taken.

    Attributes:
        latents: the next ones.
        noise_pred: the velocity; None where nobody asked for it.
        guided: what stock's loop has beside it under guidance, in the order of `SHOWN`, likewise.
        residuals: of the ControlNet.
    """

    latents: torch.Tensor
    noise_pred: torch.Tensor | None = None
    guided: tuple[torch.Tensor | None, ...] = (None,) * 4
    residuals: list[torch.Tensor] | None = None


def scheduling(scheduler: Any) -> dict[str, Any]:
    """What a scheduler holds of a run."""
    names = ("sigmas", "timesteps", "num_inference_steps", "_step_index", "_begin_index")
    return {name: vars(scheduler)[name] for name in names if name in vars(scheduler)}


def drew(scheduler: Any, before: dict[str, Any]) -> bool:
    """Whether a callback drew with another pipeline that has this scheduler, and left it at the end of its own run."""
    found = scheduling(scheduler)
    index, timesteps = found.get("_step_index"), found.get("timesteps")
    if timesteps is None or timesteps is before.get("timesteps"):
        return False
    return index is not None and index >= len(timesteps)


def without_references(output: torch.Tensor, copies: int, rows: int) -> list[torch.Tensor]:
    """The predictions of a packed forward, each `[B, rows, C]`, without the rows of reference pictures."""
    if output.shape[1] != rows:
        output = output[:, :rows].contiguous()
    return list(output.chunk(copies))


def row_of(t: torch.Tensor, scheduled: torch.Tensor) -> int | None:
    """Which element of `scheduled` a timestep of stock's loop is: it is a view of it, which says so without being read."""
    if t.dim() or scheduled.dim() != 1 or t.dtype != scheduled.dtype or t.device != scheduled.device or not len(scheduled):
        return None
    row, rest = divmod(t.data_ptr() - scheduled.data_ptr(), scheduled.element_size() * max(scheduled.stride(0), 1))
    return row if not rest and 0 <= row < len(scheduled) else None


def combined(cond: torch.Tensor, uncond: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Classifier-free guidance without its norm, with stock's roundings."""
    return uncond + (scale * (cond - uncond)).to(uncond.dtype)  # which a scale in a tensor of fp32 would widen


def guided(predictions: tuple[torch.Tensor, ...], step: Step) -> dict[str, torch.Tensor]:
    """What stock's loop has of a step's predictions, by its names and with its roundings; "noise_pred" is the velocity.

    Source: diffusers 0.42.1, pipelines/qwenimage/pipeline_qwenimage.py, QwenImagePipeline.__call__.
    """
    if step.true_cfg_scale is None:
        return {"noise_pred": predictions[0]}
    cond, uncond = predictions
    velocity = combined(cond, uncond, step.true_cfg_scale)
    if not step.normalize:
        return {"noise_pred": velocity, "neg_noise_pred": uncond, "comb_pred": velocity}
    cond_norm, noise_norm = (torch.norm(one, dim=-1, keepdim=True) for one in (cond, velocity))
    return {
        "noise_pred": velocity * (cond_norm / noise_norm),
        "neg_noise_pred": uncond,
        "comb_pred": velocity,
        "cond_norm": cond_norm,
        "noise_norm": noise_norm,
    }


def sampler_step(
    state: State,
    latents: torch.Tensor,
    predictions: tuple[torch.Tensor, ...],
    sigmas: torch.Tensor,
    step_index: torch.Tensor,
    guidance: torch.Tensor | None,
) -> torch.Tensor:
    """The update of one step from its one or two predictions, counted."""
    if guidance is None:
        state.calls["euler_step"] += 1
        return euler_step(latents, predictions[0], sigmas, step_index)
    state.calls["cfg_euler_step"] += 1
    return cfg_euler_step(latents, *predictions, sigmas, step_index, guidance)


def fits_in_memory(rows: int, model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the activations of a forward over so many token rows fit into free GPU memory. True on the CPU."""
    if device.type != "cuda":
        return True
    # Residual twice, norm, branch, attended, query, key and value, four times the width in the MLP; and some room.
    needed = 1.25 * 12 * rows * model.inner_dim * dtype.itemsize
    return needed < free_bytes(device, enough=needed)
