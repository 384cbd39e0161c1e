"""The prompts of a step as rows without padding, and forwards of them: both predictions share one where memory allows it."""

import math
from typing import TYPE_CHECKING

import torch

from ..transformer.call import PromptBatch, entered
from ..transformer.layout import check_image_shapes
from .step import Step, fits_in_memory, own, without_references

if TYPE_CHECKING:
    from .denoiser import Denoiser


def packed_prompts(denoiser: "Denoiser", step: Step, together: bool | None = None) -> list[PromptBatch]:
    """The batches that are forwarded one after the other: one of all predictions, or one of each; of the whole batch, or, where
    pictures are kept apart, of one picture after the other.

    Args:
        together: None: where the activations fit into the device's memory, or pictures are kept apart: how much is free may
            not decide over the bits of those.
    """
    model = denoiser.model

    def packed(group: list, sample: int | None) -> PromptBatch:
        shapes = denoiser.shapes if sample is None else denoiser.shapes[sample : sample + 1]
        embeds, shapes = torch.cat([embeds for embeds, _ in group]), shapes * len(group)
        positions = [position for _, own in group for position in own]
        return PromptBatch(model.layout(shapes, positions, denoiser.device), embeds, len(group), shapes, sample=sample)

    packs = []
    for sample in range(denoiser.batch) if denoiser.apart else (None,):
        prompts = [_rows_of(*prompt, denoiser.batch, sample) for prompt in step.prompts]
        batch = packed(prompts, sample)
        if together is None:
            together = denoiser.apart or fits_in_memory(batch.layout.rows, model, denoiser.dtype, denoiser.device)
        packs += [batch] if together or len(prompts) == 1 else [packed([prompt], sample) for prompt in prompts]
    return packs


def packed_predictions(
    denoiser: "Denoiser", step: Step, hidden: torch.Tensor, timestep: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Each prediction of a step `[B, S_img, C]`, of the denoiser's packs.

    Args:
        hidden: `[B, S_img + S_ref, C]`. timestep: `[1]`, over 1000.
    """
    call, predictions = denoiser.call, []
    condition = None if denoiser.source is not None else step.shared("additional_t_cond")
    for pack in denoiser.packs:
        states, others = own(hidden, pack.sample), {"controlnet_block_samples": step.shared("controlnet_block_samples")}
        others["additional_t_cond"] = own(condition, pack.sample)
        if call.survey.placed:
            call.prompts = pack
            try:
                with entered(call):
                    output = denoiser.model(hidden_states=states, timestep=timestep, return_dict=False, **others)[0]
            finally:
                call.prompts = None
        else:
            output = denoiser.model.predict(call, states, timestep, pack, **others)
        predictions += without_references(output, pack.copies, step.latents.shape[1])
    if not denoiser.apart:
        return tuple(predictions)
    several = len(step.forwards)  # of each picture, picture after picture
    return tuple(torch.cat(predictions[n::several]) for n in range(several))


def takes_rows(denoiser: "Denoiser", step: Step) -> bool:
    """Whether both predictions of a step can share a forward; what does not fit together is stock's to refuse."""
    model, found, hidden = denoiser.model, denoiser.call.survey, step.shared("hidden_states")
    others = set(denoiser.pipe.attention_kwargs or ()) - {"scale"}
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


def _rows_of(
    embeds: torch.Tensor, mask: torch.Tensor | None, batch: int, sample: int | None
) -> tuple[torch.Tensor, list[int | tuple[int, ...]]]:
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
