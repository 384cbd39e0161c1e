"""One denoising step: the predictions, guidance, and the Euler update."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qwen_fast_kernels import cfg_euler_step, euler_step

from ..common.hardware import free_bytes
from ..common.state import State, logger
from ..schedule import Schedule
from ..transformer.call import ATTACHED, Call, PromptBatch, entered, lora_scale
from ..transformer.layout import check_image_shapes
from ..transformer.modulation import FromTable
from ..transformer.modulation_weights import table_reason
from . import graph

OwnStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Prompt = tuple[torch.Tensor, torch.Tensor | None]  # embeddings [B, S_txt, C_txt], mask [B, S_txt] or None


@dataclass
class Task:
    """One call's denoising.

    Attributes:
        schedule: sigmas and timesteps on the device.
        prompts: of the prompt, and of the negative prompt if there is guidance.
        true_cfg_scale: None for no classifier-free guidance.
        guidance: `[B]` fp32 for guidance-distilled models.
        img_shapes: as stock hands them to its transformer.
    """

    schedule: Schedule
    prompts: list[Prompt]
    true_cfg_scale: float | None
    guidance: torch.Tensor | None
    img_shapes: list


class Denoiser:
    """Takes the steps of one call, in one of two ways.

    Where the model is stock's own throughout, or has what is known to compute by rows, the predictions of a step are packed
    into one forward. Where something of the user's has to be called, each prediction is asked of the transformer as stock
    asks, one after the other, and what can be fused inside still is.

    Args:
        latents: `[B, S_img, C]` in the model's dtype, for sizes, dtype and device.
    """

    def __init__(self, pipe: Any, task: Task, latents: torch.Tensor):
        self.pipe, self.task, self.model = pipe, task, pipe.transformer
        self.state: State = pipe.fast_state
        self.batch, self.dtype, self.device = latents.shape[0], latents.dtype, latents.device
        self.timesteps = task.schedule.model_timesteps(self.dtype)
        self.step_index = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.call: Call | None = None
        self.packs: list[PromptBatch] | None = None
        self.guidance: torch.Tensor | None = None
        if task.true_cfg_scale is not None:  # on the device, so that a graph can read another one
            dtype = torch.promote_types(self.dtype, torch.float32)
            self.guidance = torch.full((1,), task.true_cfg_scale, dtype=dtype, device=self.device)
        self.predictions: tuple[torch.Tensor, ...] = ()
        self.graph: graph.StepGraph | None = None
        self._context = contextlib.ExitStack()
        self.lora_scale, self._steps = 1.0, 0
        self.own_step: OwnStep | None = None
        self.watched = False
        self._seen_scale: float | None = None
        self.look()

    def look(self, changed_prompt: bool = True) -> None:
        """Read what of the model is stock's own: before the first step, and after code of the user's has run.

        Args:
            changed_prompt: the embeddings may be others, or others in place.
        """
        if self.pipe.transformer is not self.model:  # a callback put another in
            self._leave_graph()
            self._context.close()
            reason = self.pipe.install_transformer()
            if reason is not None:
                self.state.fall_back(reason)
            self.model, self.call, self.packs, self.lora_scale = self.pipe.transformer, None, None, 1.0
        if ATTACHED not in self.model.__dict__:
            self.packs = None
            return
        call = self.call = self.call or Call(self.model, self.state)
        before, scale = call.survey, (self.pipe.attention_kwargs or {}).get("scale", 1.0)
        call.survey = found = self.model.look()
        rescaled, self._seen_scale = scale != self._seen_scale, scale
        if found is not before or rescaled:
            for reason in found.foreign:
                self.state.fall_back(reason)
            # Only a hook can forbid one.
            self.state.no_table = found.modulation or (table_reason(self.model) if found.touched else None)
            call.source = None
            if self.state.options.modulation != "layers" and self.state.no_table is None:
                tables = self.model.__dict__[ATTACHED].tables
                call.source = FromTable(self.model, tables, self.timesteps, self.step_index)
        if self.graph is not None and (found is not before or rescaled or changed_prompt):
            self._leave_graph()
            self.state.graph = "a callback changed the model, its LoRA scale or the prompt"
        if not self._takes_rows():
            self.packs = None
            self._context.close()  # stock's forward scales LoRA layers itself
            self.lora_scale = 1.0
        elif self.packs is None or changed_prompt:
            self.packs = self._pack()

    def _takes_rows(self) -> bool:
        """Whether both predictions of a step can share a forward."""
        found, others = self.call.survey, set(self.pipe.attention_kwargs or ()) - {"scale"}
        if not found.rows or found.whole is not None or others or self.task.guidance is not None:
            return False
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self.device.type):
            return False
        return not getattr(self.model, "is_cache_enabled", False) and getattr(self.model, "_parallel_config", None) is None

    @contextlib.contextmanager
    def running(self, latents: torch.Tensor, own_step: OwnStep | None, watched: bool) -> Iterator[None]:
        """Inside, steps can be taken.

        Args:
            latents: those of the first step.
            own_step: the user's own step in place of ours, from velocity, timestep and latents.
            watched: somebody wants to see the predictions.
        """
        self.own_step, self.watched = own_step, watched
        with self._context:
            if self.packs is not None:
                self._apply_lora_scale()  # before a graph bakes it in
            reason = "the scheduler takes the steps itself" if own_step is not None else None
            reason = reason or ("a callback gets the predictions" if watched else graph.reason_against(self))
            self.state.graph = reason
            if reason is None:
                self.graph = graph.take(self, latents)
            try:
                yield
            finally:
                self._leave_graph()

    def leave_steps_to(self, step: OwnStep) -> None:
        """From here on the user's own step is taken."""
        self._leave_graph()
        self.own_step = step

    def _leave_graph(self) -> None:
        if self.graph is not None:
            self.graph.release()
            self.graph = None
            self.step_index.fill_(self._steps)

    def step(self, index: int, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents `[B, S_img, C]` behind step `index`, whose timestep is `t`."""
        self._steps = index + 1
        if self.graph is not None:
            return self.graph.run(index, latents)
        self.predictions = self.predict(latents.to(self.dtype) if self.state.options.precise_sampler else latents)
        if self.own_step is not None:
            velocity = guided(self.predictions, self.task.true_cfg_scale)["noise_pred"]
            latents = self.own_step(velocity, t, latents)
        elif self.predictions[0].dtype != latents.dtype and not self.state.options.precise_sampler:
            self.state.fall_back(f"predictions in {self.predictions[0].dtype} for latents in {latents.dtype}")  # as by autocast
            velocity = guided(self.predictions, self.task.true_cfg_scale)["noise_pred"]
            latents = self.pipe.step_of_scheduler(velocity, t, latents)
        else:
            sigmas = self.task.schedule.sigmas
            latents = sampler_step(self.state, latents, self.predictions, sigmas, self.step_index, self.guidance)
        self.step_index.add_(1)  # in stream order, so no program of this step can see the next index
        return latents

    def predict(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The prediction for the prompt, and with guidance the one for the negative prompt, each `[B, S_img, C]`.

        Args:
            latents: `[B, S_img, C]` in the model's dtype.
        """
        timestep = self.timesteps.index_select(0, self.step_index)
        if self.packs is None:
            with entered(self.call):
                return tuple(self._as_stock(latents, timestep, n) for n in range(len(self.task.prompts)))
        self._apply_lora_scale()
        try:
            return self._packed(latents, timestep)
        except torch.OutOfMemoryError:
            if len(self.packs) == len(self.task.prompts):
                raise
            logger.warning("memory was too short for one forward of both predictions: they come one after the other.")
            self.state.calls["packed transformer out of memory"] += 1
            self.packs = self._pack(together=False)
        torch.cuda.empty_cache()
        return self._packed(latents, timestep)

    def _packed(self, latents: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        predictions = []
        for pack in self.packs:
            if self.call.survey.placed:
                self.call.prompts = pack
                try:
                    with entered(self.call):
                        output = self.model(hidden_states=latents, timestep=timestep, return_dict=False)[0]
                finally:
                    self.call.prompts = None
            else:
                output = self.model.predict(self.call, latents, timestep, pack)
            predictions += output.chunk(pack.copies)
        return tuple(predictions)

    def _as_stock(self, latents: torch.Tensor, timestep: torch.Tensor, n: int) -> torch.Tensor:
        embeds, mask = self.task.prompts[n]
        with self.model.cache_context(("cond", "uncond")[n]):
            return self.model(
                hidden_states=latents,
                timestep=timestep.expand(self.batch),
                guidance=self.task.guidance,
                encoder_hidden_states_mask=mask,
                encoder_hidden_states=embeds,
                img_shapes=self.task.img_shapes,
                attention_kwargs=self.pipe.attention_kwargs,
                return_dict=False,
            )[0]

    def _apply_lora_scale(self) -> None:
        """`attention_kwargs={"scale": ...}`: once for all steps, and again where a callback has changed it."""
        scale = (self.pipe.attention_kwargs or {}).get("scale", 1.0)
        if scale != self.lora_scale:
            self._context.close()
            self._context.enter_context(lora_scale(self.model, {"scale": scale}))
            self.lora_scale = scale

    def _pack(self, together: bool | None = None) -> list[PromptBatch]:
        prompts = [self._rows_of(*prompt) for prompt in self.task.prompts]
        shapes = check_image_shapes(self.task.img_shapes, self.batch)

        def packed(group: list) -> PromptBatch:
            embeds = torch.cat([embeds for embeds, _ in group])
            positions = [position for _, own in group for position in own]
            return PromptBatch(self.model.layout(shapes * len(group), positions, self.device), embeds, len(group))

        batch = packed(prompts)
        if together is None:
            together = fits_in_memory(batch.layout.rows, self.model, self.dtype, self.device)
        return [batch] if together or len(prompts) == 1 else [packed([prompt]) for prompt in prompts]

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


def guided(predictions: tuple[torch.Tensor, ...], true_cfg_scale: float | None) -> dict[str, torch.Tensor]:
    """What stock's loop has of a step's predictions, by its names and with its roundings; "noise_pred" is the velocity.

    Source: diffusers 0.42.1, pipelines/qwenimage/pipeline_qwenimage.py, QwenImagePipeline.__call__.
    """
    if true_cfg_scale is None:
        return {"noise_pred": predictions[0]}
    cond, uncond = predictions
    combined = uncond + true_cfg_scale * (cond - uncond)
    cond_norm, noise_norm = (torch.norm(one, dim=-1, keepdim=True) for one in (cond, combined))
    return {
        "noise_pred": combined * (cond_norm / noise_norm),
        "neg_noise_pred": uncond,
        "comb_pred": combined,
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
