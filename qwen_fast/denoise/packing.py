"""The prompts of a step as rows without padding, and forwards of them: both predictions share one where memory allows it."""

import math
from typing import TYPE_CHECKING, Any

import torch

from ..transformer.adapters import NAMES
from ..transformer.call import PromptBatch, entered
from ..transformer.layout import check_image_shapes
from .step import RESIDUALS, Step, fits_in_memory, own, without_references

if TYPE_CHECKING:
    from .denoiser import Denoiser

# Embeddings `[R, C_txt]` without the masked ones, and per sample how many they are, or where they stood.
Rows = tuple[torch.Tensor, list[int | tuple[int, ...]]]


def packed_prompts(denoiser: "Denoiser", step: Step, together: bool | None = None) -> list[PromptBatch]:
    """The batches that are forwarded one after the other: one of all predictions, or one of each; of the whole batch, or, where
    pictures are kept apart, of one picture after the other.

    Args:
        together: None: where the activations fit into the device's memory, or pictures are kept apart: how much is free may
            not decide over the bits of those.
    """
    packs = []
    for sample in range(denoiser.batch) if denoiser.apart else (None,):
        prompts = [rows_of(*prompt, denoiser.batch, sample) for prompt in step.prompts]
        packs += packed_rows(denoiser, prompts, together, sample)
    return packs


def packed_rows(
    denoiser: "Denoiser", prompts: list[Rows], together: bool | None = None, sample: int | None = None
) -> list[PromptBatch]:
    """`packed_prompts` of prompts as rows, one entry for each prediction.

    Args:
        sample: whose rows they are; None: of all samples of `denoiser.shapes`.
    """
    model, shapes = denoiser.model, denoiser.shapes if sample is None else denoiser.shapes[sample : sample + 1]

    def packed(group: list[Rows]) -> PromptBatch:
        embeds, several = torch.cat([embeds for embeds, _ in group]), shapes * len(group)
        positions = [position for _, own in group for position in own]
        layout = model.layout(several, positions, denoiser.device)
        return PromptBatch(layout, embeds, len(group), several, sample=sample, adapters=denoiser.adapters)

    batch = packed(prompts)
    if together is None:
        together = sample is not None or fits_in_memory(batch.layout.rows, model, denoiser.dtype, denoiser.device)
    return [batch] if together or len(prompts) == 1 else [packed([prompt]) for prompt in prompts]


def packed_predictions(
    denoiser: "Denoiser", step: Step, hidden: torch.Tensor, timestep: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Each prediction of a step `[B, S_img, C]`, of the denoiser's packs.

    Args:
        hidden: `[B, S_img + S_ref, C]`. timestep: `[1]`, over 1000.
    """
    predictions, condition = [], None if denoiser.source is not None else step.shared("additional_t_cond")
    for pack in denoiser.packs:
        others = {RESIDUALS: step.shared(RESIDUALS), "additional_t_cond": own(condition, pack.sample)}
        output = forwarded(denoiser, pack, own(hidden, pack.sample), timestep, **others)
        predictions += without_references(output, pack.copies, step.latents.shape[1])
    if not denoiser.apart:
        return tuple(predictions)
    several = len(step.forwards)  # of each picture, picture after picture
    return tuple(torch.cat(predictions[n::several]) for n in range(several))


def forwarded(
    denoiser: "Denoiser", pack: PromptBatch, hidden: torch.Tensor, timestep: torch.Tensor, **others: Any
) -> torch.Tensor:
    """What `predict` of the model gives for a pack; through the model's own call where a hook brings its weights."""
    model, call = denoiser.model, denoiser.call
    if not call.survey.placed:
        return model.predict(call, hidden, timestep, pack, **others)
    call.prompts = pack
    try:
        with entered(call):
            return model(hidden_states=hidden, timestep=timestep, return_dict=False, **others)[0]
    finally:
        call.prompts = None


def takes_rows(denoiser: "Denoiser", step: Step) -> bool:
    """Whether both predictions of a step can share a forward; what does not fit together is stock's to refuse."""
    hidden = step.shared("hidden_states")
    if step.shared("guidance") is not None or not step.is_shared:
        return False
    if reason_against_rows(denoiser, denoiser.device, step.shared("attention_kwargs")) is not None:
        return False
    if hidden.dtype != denoiser.dtype and not denoiser.state.options.precise_sampler:
        return False
    return are_rows(step.prompts, step.shapes, hidden)


def are_rows(prompts: list, shapes: list, hidden: torch.Tensor) -> bool:
    """Whether prompts and pictures fit to hidden states `[B, S_img, C]`."""
    for embeds, mask in prompts:
        if embeds is None or len(hidden) % embeds.shape[0] or (mask is not None and mask.shape != embeds.shape[:2]):
            return False
    shapes = check_image_shapes(shapes, len(hidden))
    return all(sum(map(math.prod, entry)) == hidden.shape[1] for entry in shapes)


def reason_against_rows(denoiser: "Denoiser", device: torch.device, attention_kwargs: dict[str, Any] | None) -> str | None:
    """Why a forward cannot get the rows of several sequences at once, or None."""
    model, found = denoiser.model, denoiser.call.survey
    if not denoiser.attached:
        return "the transformer is not accelerated"
    if getattr(model, "is_cache_enabled", False):
        return "a step cache"
    if getattr(model, "_parallel_config", None) is not None:
        return "context parallelism"
    if found.whole is not None or not found.rows:
        return found.whole or found.against_rows
    others = set(attention_kwargs or ()) - {"scale", NAMES}
    if others:
        return f"attention_kwargs {', '.join(sorted(others))}"
    return f"autocast on {device.type}" if torch.is_autocast_enabled(device.type) else None


def rows_of(embeds: torch.Tensor, mask: torch.Tensor | None, batch: int, sample: int | None = None) -> Rows:
    """Embeddings of the batch, or of one sample, as rows without the masked ones, and per sample how many they are, or where
    they stood."""
    if sample is not None:
        batch, embeds = 1, embeds[sample % len(embeds)][None]
        mask = None if mask is None else mask[sample % len(mask)][None]
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
