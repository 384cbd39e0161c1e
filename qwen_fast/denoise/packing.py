"""The prompts of a step as rows without padding: both predictions share a forward where memory allows it."""

import math
from typing import TYPE_CHECKING

import torch

from ..transformer.adapters import NAMES
from ..transformer.call import PromptBatch
from ..transformer.layout import check_image_shapes
from .step import Step, fits_in_memory

if TYPE_CHECKING:
    from .denoiser import Denoiser


def packed_prompts(denoiser: "Denoiser", step: Step, together: bool | None = None) -> list[PromptBatch]:
    """The batches that are forwarded one after the other: one of all predictions, or one of each.

    Args:
        together: None: where the activations fit into the device's memory.
    """
    model, prompts = denoiser.model, [_rows_of(*prompt, denoiser.batch) for prompt in step.prompts]

    def packed(group: list) -> PromptBatch:
        embeds, shapes = torch.cat([embeds for embeds, _ in group]), denoiser.shapes * len(group)
        positions = [position for _, own in group for position in own]
        return PromptBatch(
            model.layout(shapes, positions, denoiser.device), embeds, len(group), shapes, adapters=denoiser.adapters
        )

    batch = packed(prompts)
    if together is None:
        together = fits_in_memory(batch.layout.rows, model, denoiser.dtype, denoiser.device)
    return [batch] if together or len(prompts) == 1 else [packed([prompt]) for prompt in prompts]


def takes_rows(denoiser: "Denoiser", step: Step) -> bool:
    """Whether both predictions of a step can share a forward; what does not fit together is stock's to refuse."""
    model, found, hidden = denoiser.model, denoiser.call.survey, step.shared("hidden_states")
    others = set(denoiser.pipe.attention_kwargs or ()) - {"scale", NAMES}
    if not denoiser.attached or not found.rows or found.whole is not None or others or step.shared("guidance") is not None:
        return False
    if torch.is_autocast_enabled(denoiser.device.type) or not step.is_shared:
        return False
    if hidden.dtype != denoiser.dtype and not denoiser.state.options.precise_sampler:
        return False
    for embeds, mask in step.prompts:
        if embeds is None or denoiser.batch % embeds.shape[0] or (mask is not None and mask.shape != embeds.shape[:2]):
            return False
    shapes = check_image_shapes(step.shapes, denoiser.batch)
    if any(sum(map(math.prod, entry)) != hidden.shape[1] for entry in shapes):
        return False
    return not getattr(model, "is_cache_enabled", False) and getattr(model, "_parallel_config", None) is None


def _rows_of(embeds: torch.Tensor, mask: torch.Tensor | None, batch: int) -> tuple[torch.Tensor, list[int | tuple[int, ...]]]:
    """Embeddings as rows without the masked ones, and per sample how many they are, or where they stood."""
    # One negative prompt for all: diffusers leaves it to broadcasting, which several pictures a prompt break.
    embeds = embeds.repeat(batch // embeds.shape[0], 1, 1) if embeds.shape[0] != batch else embeds
    if mask is None:
        return embeds.flatten(0, 1), [embeds.shape[1]] * batch
    # The one place where the host reads the device, once per prompt and before the loop.
    rows = mask.bool().cpu()
    kept = [row.nonzero()[:, 0].tolist() for row in rows.repeat(batch // len(rows), 1)]
    rows = [own[index] for own, index in zip(embeds, kept, strict=True)]
    prefixes = [index == list(range(len(index))) for index in kept]
    positions = [len(index) if prefix else tuple(index) for index, prefix in zip(kept, prefixes, strict=True)]
    return torch.cat(rows), positions
