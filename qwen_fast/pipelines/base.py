"""What all accelerated pipelines share: the models and the scheduler that are put in and taken out, and the text."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..common import proofs
from ..common.hardware import check_device, indexed
from ..common.hooks import hooked_below
from ..common.options import Options
from ..common.own import foreign_methods
from ..common.pickled import PickledAsStock
from ..common.state import STATE, State, logger
from ..text import encoding as text
from ..text import pictures
from ..transformer.attach import attach, detach, settle_modulation
from ..transformer.call import ATTACHED
from ..transformer.compiled import left_as_compiled, without_compiler
from ..transformer.controlnet import fused_net
from ..vae import pictures as fast_vae
from .foreign import scheduler_reason
from .scheduler import FlowMatchEulerDiscreteScheduler
from .stock_call import with_own_steps


class AcceleratedModels(PickledAsStock):
    """The state of an accelerated pipeline, and what is put into it and taken out again: transformer, VAE and scheduler."""

    NOT_PICKLED = (STATE,)

    @property
    def fast_state(self) -> State:
        """Options and counters of this instance."""
        return self.__dict__[STATE]

    def put_in(self, options: Options) -> None:
        """Put everything in as the options say."""
        self.fast_state.options = options
        reason = self.install_transformer()
        if reason is not None:
            logger.warning("the transformer stays as it is: %s.", reason)
        self.drop_unwanted_graphs()
        self.install_vae()
        self.install_scheduler()

    def take_out(self) -> None:
        """Give everything back as it was."""
        self.remove_scheduler()
        self.remove_transformer()
        self.remove_vae()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', but a CUDA device where there is none is refused before anything moves, modulation weights that have
        no room there are not sent, and nothing that qwen_fast keeps is left behind."""
        if STATE not in self.__dict__:  # kept from before `disable`
            return type(self).to(self, *args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, (str, torch.device, torch.dtype))]
        dtype = next((value for value in given if isinstance(value, torch.dtype)), None)
        device = next((value for value in given if not isinstance(value, torch.dtype)), None)
        if device is not None:
            self.about_to_move(check_device(device), dtype)
        super().to(*args, **kwargs)
        model = self.fast_state.transformer
        if model is not None:
            model.__dict__[ATTACHED].leave(indexed(self._execution_device))
        return self

    def about_to_move(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Decide where the modulation weights rest, before any weights go to `device`, where they become `dtype`."""
        model = self.fast_state.transformer
        if model is None:
            return
        device = indexed(device)

        def coming() -> int:
            modules = {id(one): one for one in self.components.values() if isinstance(one, torch.nn.Module)}.values()
            tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
            sizes = (dtype.itemsize if dtype and one.is_floating_point() else one.element_size() for one in tensors)
            return sum(one.numel() * size for one, size in zip(tensors, sizes, strict=True) if one.device != device)

        settle_modulation(model, device, coming)

    @property
    def components(self) -> dict[str, Any]:
        """As diffusers', with the user's own scheduler: other pipelines are made of them."""
        found = super().components
        if type(found.get("scheduler")) is FlowMatchEulerDiscreteScheduler:
            found["scheduler"] = found["scheduler"].stock
        return found

    @property
    def _execution_device(self) -> torch.device:
        """As diffusers', which asks every module for its hooks, more than once: where there are any, and once a call."""
        state = self.__dict__.get(STATE)
        if state is None:
            return super()._execution_device
        if state.device is not None:
            return state.device
        modules = [one for one in self.components.values() if isinstance(one, torch.nn.Module)]
        asked = foreign_methods(self.STANDS_FOR, ("_execution_device",)) or any(map(hooked_below, modules))
        return super()._execution_device if asked else self.device

    def install_transformer(self, device: torch.device | None = None) -> str | None:
        """Attach to the transformer that the pipeline has now, which runs on `device`; returns why it cannot be, or None."""
        state, model = self.fast_state, without_compiler(self.transformer)
        if state.transformer is not None and state.transformer is not model:
            self.remove_transformer(forced=False)  # the user put another in
        if model is None:
            return None
        reason = attach(model, state)
        if reason is None:
            reason = left_as_compiled(self.transformer, model.look)
        state.transformer = model if ATTACHED in model.__dict__ else None
        if reason is not None:
            self.remove_transformer(forced=False)
        else:
            self.about_to_move(self._execution_device if device is None else device)
        return reason

    def require_kernels(self, dtype: torch.dtype, device: torch.device) -> None:
        """Let all kernels of a call prove themselves that have not yet done so on this device, in one go."""
        state, model = self.fast_state, self.transformer
        flags = proofs.ScheduleFlags.of(self.scheduler.config)
        problems = [*proofs.sampler_problems(dtype, model.config.in_channels, flags, state.options.precise_sampler)]
        for one in (state.transformer, fused_net(self)):
            if one is not None:
                problems += proofs.transformer_problems(dtype, one.config.num_attention_heads, one.config.attention_head_dim)
        if state.vae is not None and self.vae is not None:
            problems += proofs.vae_problems(self.vae.dtype, proofs.vae_norms(self.vae))
        proofs.require(state, problems, device)

    def _images(self):
        """Context in which the VAE codes single frames as pictures."""
        reason = self.install_vae()
        if reason is not None:
            self.fast_state.fall_back(reason)
        return fast_vae.images(self.vae, self.fast_state) if self.fast_state.vae is not None else contextlib.nullcontext()

    def remove_transformer(self, *, forced: bool = True) -> None:
        """Give the transformer back as it was; without `forced` it is kept where its weights do not fit back."""
        state = self.fast_state
        if state.transformer is not None and detach(state.transformer, state, forced=forced):
            state.transformer = None

    def drop_unwanted_graphs(self) -> None:
        """Free the CUDA graphs of a transformer whose pipelines all want none; each holds the activations of a step."""
        model = self.fast_state.transformer
        if model is not None:
            attachment = model.__dict__[ATTACHED]
            if all(user.options.cuda_graph is False for user in attachment.users):
                attachment.graphs.clear()

    def install_vae(self) -> str | None:
        """Attach to the VAE that the pipeline has now, if the option says so; returns why it cannot be, or None."""
        state, vae = self.fast_state, self.vae
        wanted = state.options.vae_mode == "image"
        if state.vae is not None and (state.vae is not vae or not wanted):
            self.remove_vae()
        reason = fast_vae.attach(vae, state) if wanted and vae is not None else None
        state.vae = vae if wanted and vae is not None and reason is None else None
        return reason

    def remove_vae(self) -> None:
        """Give the VAE back as it was."""
        if self.fast_state.vae is not None:
            fast_vae.detach(self.fast_state.vae, self.fast_state)
            self.fast_state.vae = None

    def install_scheduler(self) -> str | None:
        """Put our scheduler in the place of the one that the pipeline has now; returns why it cannot be, or None."""
        state, current = self.fast_state, self.scheduler
        if current is None:
            return None
        reason = scheduler_reason(current)
        ours = type(current) is FlowMatchEulerDiscreteScheduler
        if ours and reason is None and current.is_of(state):
            return None
        if reason is not None:
            self.remove_scheduler()  # ours goes around the method that somebody replaced
            return reason
        self.scheduler = FlowMatchEulerDiscreteScheduler.adopt(current, state)
        state.stock_scheduler = self.scheduler.stock
        return None

    def steps_itself(self) -> str | None:
        """Why the scheduler takes the steps itself, in stock's way, or None."""
        scheduler = self.scheduler
        reason = scheduler_reason(scheduler)
        sigmas = getattr(scheduler, "sigmas", None)
        plain = isinstance(sigmas, torch.Tensor) and sigmas.dtype == torch.float32 and sigmas.is_contiguous()
        if reason is None and not plain:
            return "sigmas of another kind than fp32, one behind the other"
        if reason is None and not (type(scheduler) is FlowMatchEulerDiscreteScheduler and scheduler.is_of(self.fast_state)):
            return "another scheduler was put in"
        return reason

    def remove_scheduler(self) -> None:
        """Give the user's scheduler back."""
        if type(self.scheduler) is FlowMatchEulerDiscreteScheduler:
            adopted = self.scheduler
            self.scheduler = adopted.stock
            if adopted.is_of(self.fast_state):
                adopted.release()  # somebody's wrapper may hold on to it


class AcceleratedPipeline(AcceleratedModels):
    """A pipeline of diffusers with a `__call__` of its own: its text, and diffusers' masks repaired."""

    def put_in(self, options: Options) -> None:
        """Put everything in as the options say."""
        self.fast_state.options = options
        with_own_steps(self.STANDS_FOR)  # which takes 20 ms the first time
        text.configure(self, self.fast_state)
        super().put_in(options)

    def take_out(self) -> None:
        """Give everything back as it was."""
        super().take_out()
        self.remove_texts()

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', with what is kept of prompts; see `AcceleratedModels.to`."""
        if STATE not in self.__dict__:  # kept from before `disable`
            return type(self).to(self, *args, **kwargs)
        super().to(*args, **kwargs)
        texts = self.fast_state.texts
        if texts.resting:
            text.rest(self)  # it went along
        for kept in (texts.cache, texts.features):
            kept.leave(indexed(self._execution_device))
        return self

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "STANDS_FOR" in vars(cls):
            cls.encode_prompt = _with_right_masks(cls.STANDS_FOR)

    def _get_qwen_prompt_embeds(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', with its code; the text encoder is asked for what is not in the prompt cache, and rests then."""
        if STATE not in self.__dict__:
            return type(self)._get_qwen_prompt_embeds(self, *args, **kwargs)
        reason = text.stock_reason(self)
        function = pictures.with_kept_outputs(self.STANDS_FOR) if reason is None else None
        if function is not None:
            embeds = function(self, *args, **kwargs)
        else:
            texts = self.fast_state.texts
            texts.content, texts.uncached = None, reason or "diffusers' code around the text encoder is not known"
            self.fast_state.fall_back(texts.uncached)
            text.bring_back(self, self.fast_state)
            embeds = super()._get_qwen_prompt_embeds(*args, **kwargs)
        text.rest(self)
        return embeds

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers'; a pipeline whose text encoder was freed has none to save.

        Raises:
            ValueError: the text encoder was freed.
        """
        if STATE not in self.__dict__:
            return type(self).save_pretrained(self, *args, **kwargs)
        if self.text_encoder is None and self.fast_state.texts.freed:
            raise ValueError(
                "text_encoder_mode='free' has dropped the text encoder: set `pipe.text_encoder` again before saving."
            )
        return super().save_pretrained(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """As diffusers', never that of a text encoder that rests in host memory."""
        state = self.__dict__.get(STATE)
        resting = state is not None and state.texts is not None and state.texts.resting
        if resting and self.transformer is not None:
            return self.transformer.device
        return super().device

    def remove_texts(self) -> None:
        """Bring a text encoder back that rests in host memory; a freed one is named."""
        state = self.fast_state
        text.bring_back(self, state)
        if state.texts.freed and self.text_encoder is None:
            logger.warning(
                "text_encoder_mode='free' has dropped the text encoder: set `pipe.text_encoder` to encode new prompts."
            )


class EncodesText(AcceleratedPipeline):
    """A pipeline whose prompts are text alone, and are encoded as those of QwenImagePipeline."""

    def _get_qwen_prompt_embeds(
        self,
        prompt: str | list[str] | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As diffusers', equal to the bit on the CPU: without logits, and from the prompt cache where it holds the prompt."""
        if STATE not in self.__dict__:
            return type(self)._get_qwen_prompt_embeds(self, prompt, device, *(() if dtype is None else (dtype,)))
        if text.stock_reason(self) is not None:
            return super()._get_qwen_prompt_embeds(prompt, device, *(() if dtype is None else (dtype,)))
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return text.prompt_embeds(self, prompts, device or self._execution_device, dtype)


def _with_right_masks(stock: type) -> Callable[..., Any]:
    """`encode_prompt` of `stock`, with the right mask for each picture.

    diffusers 0.42.1 repeats embeddings prompt by prompt but tiles the masks, so prompts of different lengths with
    num_images_per_prompt > 1 get each other's masks. Here both are repeated prompt by prompt.
    """

    @functools.wraps(stock.encode_prompt)
    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        function = stock.encode_prompt
        if foreign_methods(stock, ("encode_prompt",)):
            return function(self, *args, **kwargs)
        bound = inspect.signature(function).bind(self, *args, **kwargs)
        copies = bound.arguments.pop("num_images_per_prompt", 1)
        embeds, mask = function(**bound.arguments, num_images_per_prompt=1)
        if copies > 1:
            embeds = embeds.repeat_interleave(copies, dim=0)
            mask = None if mask is None else mask.repeat_interleave(copies, dim=0)
        return embeds, mask

    return encode_prompt
