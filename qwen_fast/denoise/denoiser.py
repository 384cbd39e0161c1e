"""The predictions of a denoising step: packed into one forward, one after the other, or as stock calls its transformer."""

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch

from qwen_fast_kernels import cfg_euler_step, euler_step

from ..common.hardware import free_bytes
from ..common.hooks import is_hooked
from ..common.state import State, logger
from ..schedule import Schedule
from ..text.encoding import Source, sources_of
from ..transformer.blocks import stock_reason
from ..transformer.call import ATTACHED, Call, Packed
from ..transformer.layout import check_image_shapes
from ..transformer.modulation import FromTable
from ..transformer.modulation_weights import table_reason

Prompt = tuple[torch.Tensor, torch.Tensor | None]  # embeddings [B, S_txt, C_txt], mask [B, S_txt] or None


@dataclass
class Task:
    """One call's denoising.

    Attributes:
        schedule: sigmas and timesteps on the device.
        host_timesteps: `[T]` on the CPU, as the model sees them (its dtype, over 1000).
        prompts: of the prompt, and of the negative prompt if there is guidance.
        true_cfg_scale: None for no classifier-free guidance.
        guidance: `[B]` fp32 for guidance-distilled models.
        img_shapes: as stock hands them to its transformer.
    """

    schedule: Schedule
    host_timesteps: torch.Tensor
    prompts: list[Prompt]
    true_cfg_scale: float | None
    guidance: torch.Tensor | None
    img_shapes: list


def sampler_step(
    state: State,
    latents: torch.Tensor,
    predictions: tuple[torch.Tensor, ...],
    sigmas: torch.Tensor,
    step_index: torch.Tensor,
    true_cfg_scale: float | None,
) -> torch.Tensor:
    """The update of one step from its one or two predictions, counted."""
    if true_cfg_scale is None:
        state.calls["euler_step"] += 1
        return euler_step(latents, predictions[0], sigmas, step_index)
    state.calls["cfg_euler_step"] += 1
    return cfg_euler_step(latents, *predictions, sigmas, step_index, true_cfg_scale)


class Forwards:
    """How the predictions of a step are computed: packed in one forward, one after the other, or as stock calls them.

    Args:
        call: of the transformer, from `accelerated`.
        step_index: `[1]` int32 on the device.
        batch: samples.
        kept: the forwards of the step before, whose prompts are taken over where they are the same.
    """

    def __init__(
        self,
        pipe: Any,
        call: Call,
        task: Task,
        step_index: torch.Tensor,
        batch: int,
        dtype: torch.dtype,
        kept: "Forwards | None" = None,
    ):
        self.pipe, self.call, self.task, self.step_index, self.batch = pipe, call, task, step_index, batch
        self.timesteps = task.schedule.model_timesteps(dtype)
        model = pipe.transformer
        self.kwargs = {name: value for name, value in (pipe.attention_kwargs or {}).items() if name != "scale"}
        attachment = model.__dict__.get(ATTACHED)
        call.state.no_table = table_reason(model) if attachment is not None else None
        if attachment is not None and call.state.options.modulation != "layers" and call.state.no_table is None:
            if isinstance(call.conditions, FromTable):
                call.conditions.refresh()  # a callback may have touched the weights
            else:
                call.conditions = FromTable(model, attachment.tables, self.timesteps, step_index, call.changing)
        self.packs: list[Packed] | None = None
        if self._takes_rows(model, attachment):
            same = kept is not None and kept.packs is not None and kept.embeds is task.prompts[0][0]
            self.packs = kept.packs if same else self._pack(model)
        self.embeds = task.prompts[0][0]
        self._captured = False  # of a graph's step neither the memory nor the buffers are to be planned anew

    def on(self, call: Call, step_index: torch.Tensor, packs: list[Packed]) -> "Forwards":
        """The same forwards for another call, reading another step index and other prompts."""
        other = copy.copy(self)
        other.call, other.step_index, other.packs, other._captured = call, step_index, packs, True
        return other

    def predict(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The prediction for the prompt, and with guidance the one for the negative prompt, each `[B, S_img, C]`."""
        timestep = self.timesteps.index_select(0, self.step_index)
        if self.packs is None:
            return tuple(self._stock_call(latents, timestep, n) for n in range(len(self.task.prompts)))
        if len(self.task.prompts) > len(self.packs) and not self._captured:
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._packed(latents, timestep)
            logger.warning("memory was too short for one forward of both predictions: they come one after the other.")
            self.call.state.calls["packed transformer out of memory"] += 1
            self.packs = self._pack(self.pipe.transformer, apart=True)
        return self._packed(latents, timestep)

    def _packed(self, latents: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        predictions = []
        for pack in self.packs:
            self.call.packed = pack
            try:
                output = self.pipe.transformer(hidden_states=latents, timestep=timestep, return_dict=False)[0]
            finally:
                self.call.packed = None
            predictions += output.chunk(pack.copies)
        return tuple(predictions)

    def _stock_call(self, latents: torch.Tensor, timestep: torch.Tensor, n: int) -> torch.Tensor:
        embeds, mask = self.task.prompts[n]
        transformer = self.pipe.transformer
        with transformer.cache_context(("cond", "uncond")[n]):
            return transformer(
                hidden_states=latents,
                timestep=timestep.expand(self.batch),
                guidance=self.task.guidance,
                encoder_hidden_states_mask=mask,
                encoder_hidden_states=embeds,
                img_shapes=self.task.img_shapes,
                attention_kwargs=self.kwargs,
                return_dict=False,
            )[0]

    def _takes_rows(self, model: torch.nn.Module, attachment: object) -> bool:
        """Whether nothing stands between the loop and the rows: no hooks on blocks, no cache."""
        if attachment is None or self.task.guidance is not None or self.kwargs:
            return False
        if getattr(model, "is_cache_enabled", False) or getattr(model, "_parallel_config", None) is not None:
            return False
        return not any(is_hooked(block) or stock_reason(block) is not None for block in model.transformer_blocks)

    def _pack(self, model: torch.nn.Module, *, apart: bool = False) -> list[Packed]:
        prompts = [(*self._rows_of(*prompt), self._sources(prompt[0])) for prompt in self.task.prompts]
        shapes = check_image_shapes(self.task.img_shapes, self.batch)
        device = self.step_index.device

        def packed(group: list) -> Packed:
            embeds = torch.cat([embeds for embeds, _, _ in group])
            positions = [position for _, own, _ in group for position in own]
            known = [source for _, _, own in group for source in own or ()]
            sources = known if sum(length for _, length in known) == len(embeds) else None
            return Packed(model.layout(shapes * len(group), positions, device), embeds, len(group), sources=sources)

        together = None if apart else packed(prompts)
        if not apart and (len(prompts) == 1 or fits_in_memory(together.layout.rows, model, self.timesteps.dtype, device)):
            return [together]
        return [packed([prompt]) for prompt in prompts]

    def _sources(self, embeds: torch.Tensor) -> list[Source] | None:
        """The encoded prompts that the rows of `embeds` were made of, sample by sample, if they are known."""
        sources = sources_of(embeds)
        return sources * self.batch if sources is not None and embeds.shape[0] == 1 else sources

    def _rows_of(self, embeds: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, list[int | tuple[int, ...]]]:
        """Embeddings as rows without the masked ones, and per sample how many they are, or where they stood."""
        embeds = embeds.expand(self.batch, -1, -1)
        if mask is None:
            return embeds.flatten(0, 1), [embeds.shape[1]] * self.batch
        # The one place where the host reads the device, once per prompt and before the loop.
        kept = [row.nonzero()[:, 0].tolist() for row in mask.bool().expand(self.batch, -1).cpu()]
        rows = [own[index] for own, index in zip(embeds, kept, strict=True)]
        prefixes = [index == list(range(len(index))) for index in kept]
        positions = [len(index) if prefix else tuple(index) for index, prefix in zip(kept, prefixes, strict=True)]
        return torch.cat(rows), positions


def fits_in_memory(rows: int, model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the activations of a forward over so many token rows fit into free GPU memory. True on the CPU."""
    if device.type != "cuda":
        return True
    # Residual twice, norm, branch, attended, query, key and value, four times the width in the MLP; and some room.
    needed = 1.25 * 12 * rows * model.inner_dim * dtype.itemsize
    return needed < free_bytes(device, enough=needed)
