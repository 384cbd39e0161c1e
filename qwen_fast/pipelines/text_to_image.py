"""The accelerated pipelines: diffusers' own, with our schedule and sampler in the denoising loop."""

import functools
import inspect
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.qwenimage import QwenImagePipelineOutput
from packaging.version import Version

from ..common.hardware import unsupported_reason
from ..common.options import NAMES, Options, takes_options, unknown_options
from ..common.stages import stage, staged
from ..common.state import STATE, State, logger
from ..denoise.denoiser import Task
from ..denoise.loop import denoise
from ..loading import check_folder, load
from ..schedule import Schedule
from ..text.encoding import configure as configure_texts
from ..text.encoding import of_call as texts_of_call
from ..text.encoding import repeated
from . import scheduler as fast_scheduler
from .base import AcceleratedPipeline
from .inputs import check_attention, check_call


class QwenImagePipeline(AcceleratedPipeline, diffusers.QwenImagePipeline):
    """diffusers.QwenImagePipeline with its schedule on the device and CFG, norm rescale and Euler step in one kernel.

    Same signature, same outputs, same random stream; `from_pretrained`, `from_pipe`, LoRA, offload and saving are
    diffusers' own, and a folder it saves loads in stock diffusers.

    Args:
        options: of `enable`, by the same names. With `precise_sampler` callbacks and `output_type="latent"` see fp32 latents.
    """

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
        bound = _SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        check_call(self, bound.arguments)
        device = self._execution_device  # asks every module for its hooks: once a call
        check_attention(self.fast_state.options.attention, device)
        reason = self._fallback_reason(device)
        if reason is not None:
            self.fast_state.fall_back(reason)
            self.remove_transformer(forced=False)  # stock's forward needs all its weights on the device
            with staged(self):
                return super().__call__(*args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop("self")
        with texts_of_call(self, arguments):
            return self._sample(device, **arguments)

    def _fallback_reason(self, device: torch.device) -> str | None:
        accepted = (fast_scheduler.STOCK, fast_scheduler.FlowMatchEulerDiscreteScheduler)
        if type(self.scheduler) not in accepted:
            return f"scheduler is a {type(self.scheduler).__name__}, not a FlowMatchEulerDiscreteScheduler"
        if self.scheduler.config.get("stochastic_sampling", False):
            return "stochastic_sampling"
        return unsupported_reason(device)

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
            negative_prompt_embeds = repeated(negative_prompt_embeds, batch_size)
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
        grid_size = (1, height // self.vae_scale_factor // 2, width // self.vae_scale_factor // 2)
        with stage("schedule"):
            scheduled = functools.partial(
                Schedule.from_scheduler, self.scheduler, num_inference_steps, image_seq_len=latents.shape[1], sigmas=sigmas
            )
            schedule = scheduled(device=device)
            # The host's own copy names the modulation table without asking the device for its values.
            host_schedule = schedule if device.type == "cpu" else scheduled()
            host_timesteps = host_schedule.model_timesteps(latents.dtype)
        self.fast_state.calls["flow_match_schedule"] += 1
        self._num_timesteps = schedule.num_inference_steps

        reason = self.install_transformer(device)
        if reason is not None:
            self.fast_state.fall_back(reason)
        prompts = [(prompt_embeds, prompt_embeds_mask), (negative_prompt_embeds, negative_prompt_embeds_mask)]
        task = Task(
            schedule=schedule,
            host_timesteps=host_timesteps,
            prompts=prompts if do_true_cfg else prompts[:1],
            true_cfg_scale=true_cfg_scale if do_true_cfg else None,
            guidance=self._guidance(guidance_scale, latents),
            img_shapes=[[grid_size]] * batch_size,
        )
        with stage("denoise"):
            latents = denoise(self, latents, task, callback_on_step_end, callback_on_step_end_tensor_inputs)
        image = latents
        if output_type != "latent":
            with stage("vae"), self._images():
                image = self._decode(latents, height, width, output_type)
        self.maybe_free_model_hooks()
        return QwenImagePipelineOutput(images=image) if return_dict else (image,)

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


_SIGNATURE = inspect.signature(diffusers.QwenImagePipeline.__call__)


def _known_to_diffusers() -> set[str]:
    """Every name that the code of diffusers' `from_pretrained` mentions: it takes its keywords out of a dict one by one."""
    functions = (diffusers.DiffusionPipeline.from_pretrained, diffusers.DiffusionPipeline.download)
    constants = (inspect.unwrap(function).__code__.co_consts for function in functions)
    return {constant for own in constants for constant in own if isinstance(constant, str)}
