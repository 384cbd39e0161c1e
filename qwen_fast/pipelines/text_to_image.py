"""The accelerated pipelines: diffusers' own, with our schedule and sampler in the denoising loop."""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers.pipelines.qwenimage import QwenImagePipelineOutput
from packaging.version import Version

from ..common.hardware import unsupported_reason
from ..common.options import NAMES, Options, takes_options, unknown_options
from ..common.own import foreign_methods
from ..common.stages import on_device, stage, staged
from ..common.state import STATE, State, logger
from ..denoise.denoiser import Task
from ..denoise.loop import denoise
from ..loading import check_folder, load
from ..schedule import Schedule
from ..text.encoding import configure as configure_texts
from ..text.encoding import prompts_of_call
from . import cache_dit
from .base import AcceleratedPipeline, without_no_grad
from .callbacks import Callback
from .foreign import note_foreign, scheduler_reason, scheduling_is_foreign
from .inputs import check_attention, check_call, check_components, whole
from .stock_loop import in_stocks_loop

STOCK = diffusers.QwenImagePipeline
_SIGNATURE = inspect.signature(STOCK.__call__)


class QwenImagePipeline(AcceleratedPipeline, STOCK):
    """diffusers.QwenImagePipeline with its schedule on the device and CFG, norm rescale and Euler step in one kernel.

    Same signature, same outputs, same random stream; `from_pretrained`, `from_pipe`, LoRA, offload and saving are
    diffusers' own, and a folder it saves loads in stock diffusers.

    Args:
        options: of `enable`, by the same names. With `precise_sampler` callbacks and `output_type="latent"` see fp32 latents.
    """

    STANDS_FOR = STOCK
    supports_precise_sampler = True
    supports_check_nan = True

    @takes_options
    def __init__(
        self,
        scheduler: diffusers.FlowMatchEulerDiscreteScheduler,
        vae: diffusers.AutoencoderKLQwenImage,
        text_encoder: transformers.Qwen2_5_VLForConditionalGeneration,
        tokenizer: transformers.Qwen2Tokenizer,
        transformer: diffusers.QwenImageTransformer2DModel,
        **options: Any,
    ):
        options = Options.of(options)
        super().__init__(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer)
        self.__dict__[STATE] = State(options)
        configure_texts(self, self.fast_state)
        self.install_transformer()
        self.install_vae()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, device=None, **kwargs: Any) -> "QwenImagePipeline":
        """As diffusers'; a local folder is checked first, so that a missing, truncated or corrupt file is named.

        Args:
            device (torch.device or str): load straight onto it: see `qwen_fast.loading.load`. Modulation weights, a third of
                the transformer, never reach it where `modulation` leaves them in host memory.
        Raises:
            TypeError: a keyword that is neither an option nor known to diffusers, which would pass over it.
        """
        given = {"scheduler", "vae", "text_encoder", "tokenizer", "transformer"} & kwargs.keys()
        unknown = kwargs.keys() - given - set(NAMES) - _known_to_diffusers()
        if unknown:
            raise TypeError(f"{unknown_options(unknown)}.")
        options = Options.of({name: kwargs[name] for name in NAMES if name in kwargs})
        if "dtype" in kwargs and Version(diffusers.__version__) < Version("0.40"):
            kwargs["torch_dtype"] = kwargs.pop("dtype")  # the older name; under the new one it would be ignored
        if device is not None:
            kwargs["dtype"] = kwargs.pop("torch_dtype", kwargs.get("dtype"))
            may_rest = options.modulation in ("auto", "host")
            return load(
                super().from_pretrained, pretrained_model_name_or_path, device=device, modulation_may_rest=may_rest, **kwargs
            )
        check_folder(pretrained_model_name_or_path, variant=kwargs.get("variant"), skip=given, hub_ids=True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @torch.no_grad()
    @functools.wraps(diffusers.QwenImagePipeline.__call__)
    def __call__(self, *args, **kwargs):
        if torch.is_grad_enabled() or self._call_was_replaced():
            return in_stocks_loop(self, STOCK, args, kwargs)
        bound = _SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        check_call(self, bound.arguments)
        check_components(self, bound.arguments)
        device = self._execution_device  # asks every module for its hooks: once a call
        check_attention(self.fast_state.options.attention, device)
        note_foreign(self, STOCK, self.fast_state)
        reason = self._fallback_reason(device)
        if reason is not None:
            self.fast_state.fall_back(reason)
            self.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
            with staged(self):
                return without_no_grad(STOCK.__call__)(self, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop("self")
        with prompts_of_call(self, arguments), on_device(device):
            return self._sample(device, **arguments)

    def _call_was_replaced(self) -> bool:
        """Whether somebody's `__call__` stands on diffusers' class; cache-dit's counts where this pipeline is cached."""
        foreign = foreign_methods(STOCK, ("__call__",))
        return bool(foreign) and (cache_dit.is_cached(self) or not cache_dit.wraps(STOCK))

    def _fallback_reason(self, device: torch.device) -> str | None:
        """Why a call would not run in our loop, or None."""
        if self._call_was_replaced():
            return f"{STOCK.__name__}.__call__ is not diffusers' own"
        return unsupported_reason(device)

    def own_step(self) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """None where our kernel takes the steps; else the step of the pipeline's scheduler, called in stock's way.

        Returns:
            Callable: (velocity, t, latents) -> latents, each as stock's loop has them.
        """
        if scheduler_reason(self.scheduler) is None:
            return None
        return self.step_of_scheduler

    def step_of_scheduler(self, velocity: torch.Tensor, t: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """One step by whatever scheduler the pipeline has now."""
        return self.scheduler.step(velocity, t, latents, return_dict=False)[0]

    def _sample(
        self,
        device,
        prompt,
        negative_prompt,
        true_cfg_scale,
        height,
        width,
        num_inference_steps,
        sigmas,
        guidance_scale,
        num_images_per_prompt,
        generator,
        latents,
        prompt_embeds,
        prompt_embeds_mask,
        negative_prompt_embeds,
        negative_prompt_embeds_mask,
        output_type,
        return_dict,
        attention_kwargs,
        callback_on_step_end,
        callback_on_step_end_tensor_inputs,
        max_sequence_length,
    ):
        given = dict(locals())
        height = height or self.default_sample_size * self.vae_scale_factor
        width = width or self.default_sample_size * self.vae_scale_factor
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            prompt_embeds_mask=prompt_embeds_mask,
            negative_prompt_embeds_mask=negative_prompt_embeds_mask,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
        )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs or {}
        self._current_timestep = None
        self._interrupt = False

        do_true_cfg = self._wants_true_cfg(true_cfg_scale, negative_prompt, negative_prompt_embeds)
        encode = functools.partial(
            self.encode_prompt,
            device=device,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        batch_size = len(prompt) if isinstance(prompt, list) else 1 if prompt is not None else prompt_embeds.shape[0]
        with stage("text"):
            prompt_embeds, prompt_embeds_mask = encode(
                prompt=prompt, prompt_embeds=prompt_embeds, prompt_embeds_mask=prompt_embeds_mask
            )
            if do_true_cfg:
                negative_prompt_embeds, negative_prompt_embeds_mask = encode(
                    prompt=negative_prompt,
                    prompt_embeds=negative_prompt_embeds,
                    prompt_embeds_mask=negative_prompt_embeds_mask,
                )
        if do_true_cfg and negative_prompt_embeds.shape[0] == num_images_per_prompt and batch_size > 1:
            # One negative prompt for all: diffusers leaves it to broadcasting, which several pictures a prompt break.
            negative_prompt_embeds = negative_prompt_embeds.repeat(batch_size, 1, 1)
            if negative_prompt_embeds_mask is not None:
                negative_prompt_embeds_mask = negative_prompt_embeds_mask.repeat(batch_size, 1)

        latents = self.prepare_latents(
            batch_size * num_images_per_prompt,
            self.transformer.config.in_channels // 4,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )
        self.require_kernels(latents.dtype, device)
        # Whole numbers of numpy or torch are sizes in stock too; ours are plain ones.
        grid_size = (1, *(whole(side) // self.vae_scale_factor // 2 for side in (height, width)))
        with stage("schedule"):
            schedule = self._schedule(num_inference_steps, sigmas, latents.shape[1], device)
        self._num_timesteps = schedule.num_inference_steps

        reason = self.install_transformer(device)
        if reason is not None:
            self.fast_state.fall_back(reason)
        prompts = [(prompt_embeds, prompt_embeds_mask), (negative_prompt_embeds, negative_prompt_embeds_mask)]
        task = Task(
            schedule=schedule,
            prompts=prompts if do_true_cfg else prompts[:1],
            true_cfg_scale=float(true_cfg_scale) if do_true_cfg else None,
            guidance=self._guidance(guidance_scale, latents),
            img_shapes=[[grid_size]] * batch_size,
        )
        callback = None
        if callback_on_step_end is not None:
            callback = Callback(
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                given
                | {
                    "height": height,
                    "width": width,
                    "sigmas": _first_sigmas(num_inference_steps, sigmas),
                    "prompt_embeds_mask": prompt_embeds_mask,
                    "negative_prompt_embeds": negative_prompt_embeds,
                    "negative_prompt_embeds_mask": negative_prompt_embeds_mask,
                    "batch_size": batch_size,
                    "has_neg_prompt": given["negative_prompt"] is not None or given["negative_prompt_embeds"] is not None,
                    "do_true_cfg": do_true_cfg,
                    "num_channels_latents": self.transformer.config.in_channels // 4,
                    "img_shapes": task.img_shapes,
                    "image_seq_len": latents.shape[1],
                    "mu": schedule.mu,
                    "timesteps": schedule.timesteps,
                    "num_warmup_steps": 0,
                    "guidance": task.guidance,
                },
                guided=do_true_cfg,
            )
        with stage("denoise"):
            latents = denoise(self, latents, task, callback, callback.inputs if callback is not None else [])
        image = latents
        if output_type != "latent":
            with stage("vae"), self._images():
                image = self._decode(latents, height, width, output_type)
        self.maybe_free_model_hooks()
        return QwenImagePipelineOutput(images=image) if return_dict else (image,)

    def _schedule(self, num_inference_steps, sigmas, image_seq_len, device) -> Schedule:
        """The schedule on the device.

        A scheduler that is not diffusers' own sets its timesteps itself, as in stock.
        """
        reason = scheduler_reason(self.scheduler)
        if reason is not None:
            self.fast_state.fall_back(reason)
        elif not scheduling_is_foreign(STOCK):
            self.fast_state.calls["flow_match_schedule"] += 1
            return Schedule.from_scheduler(
                self.scheduler, num_inference_steps, image_seq_len=image_seq_len, sigmas=sigmas, device=device
            )
        home, config = sys.modules[STOCK.__module__], self.scheduler.config
        mu = home.calculate_shift(
            image_seq_len,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = _first_sigmas(num_inference_steps, sigmas)
        timesteps, _ = home.retrieve_timesteps(self.scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu)
        self.scheduler.set_begin_index(0)
        tables = getattr(self.scheduler, "sigmas", None)
        if reason is None and len(tables) != len(timesteps) + 1:
            # Stock fails at the step that has no sigma; on a GPU our kernel would give NaN there.
            raise IndexError(
                f"`retrieve_timesteps` gave {len(timesteps)} timesteps for {len(tables)} sigmas, the last one's end."
            )
        return Schedule(mu, tables, timesteps)

    def _wants_true_cfg(self, true_cfg_scale, negative_prompt, negative_prompt_embeds) -> bool:
        """Stock's rule, and its two warnings where only half of what CFG needs is given."""
        has_negative = negative_prompt is not None or negative_prompt_embeds is not None
        if true_cfg_scale > 1 and not has_negative:
            logger.warning(
                "true_cfg_scale is %s, but classifier-free guidance is off: no negative_prompt is given.",
                true_cfg_scale,
            )
        elif true_cfg_scale <= 1 and has_negative:
            logger.warning(
                "negative_prompt is given, but classifier-free guidance is off: true_cfg_scale is %s.", true_cfg_scale
            )
        return true_cfg_scale > 1 and has_negative

    def _guidance(self, guidance_scale, latents) -> torch.Tensor | None:
        """`[B]` fp32 for guidance-distilled models, None for the others."""
        if self.transformer.config.guidance_embeds:
            if guidance_scale is None:
                raise ValueError("`guidance_scale` is None; a guidance-distilled model needs it.")
            return torch.full([1], guidance_scale, device=latents.device, dtype=torch.float32).expand(latents.shape[0])
        if guidance_scale is not None:
            logger.warning("guidance_scale is %s, but ignored: the model is not guidance-distilled.", guidance_scale)
        return None

    def _decode(self, latents, height, width, output_type):
        """Latents `[B, S_img, C]` to pictures, with stock's roundings in the VAE's dtype."""
        latents = self._unpack_latents(latents, height, width, self.vae_scale_factor).to(self.vae.dtype)

        def per_channel(values):
            return torch.tensor(values).view(1, self.vae.config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)

        # Division by a rounded reciprocal is what stock does; a product with the deviation rounds otherwise.
        inverse_std = 1.0 / per_channel(self.vae.config.latents_std)
        latents = latents / inverse_std + per_channel(self.vae.config.latents_mean)
        image = self.vae.decode(latents, return_dict=False)[0][:, :, 0]
        return self.image_processor.postprocess(image, output_type=output_type)


def _first_sigmas(num_inference_steps, sigmas):
    """What stock hands to the scheduler."""
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps) if sigmas is None else sigmas


def _known_to_diffusers() -> set[str]:
    """Every name that the code of diffusers' `from_pretrained` mentions: it takes its keywords out of a dict one by one."""
    functions = (diffusers.DiffusionPipeline.from_pretrained, diffusers.DiffusionPipeline.download)
    constants = (inspect.unwrap(function).__code__.co_consts for function in functions)
    return {constant for own in constants for constant in own if isinstance(constant, str)}
