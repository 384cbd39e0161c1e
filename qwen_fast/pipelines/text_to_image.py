"""The text-to-image pipeline: diffusers' own, with our schedule, sampler, transformer, text and VAE."""

import inspect
from typing import Any

import diffusers
import transformers
from packaging.version import Version

from ..common.options import NAMES, Options, takes_options, unknown_options
from ..common.state import STATE, State
from ..loading import check_folder, load
from .base import EncodesText
from .call import accelerated_call

STOCK = diffusers.QwenImagePipeline


class QwenImagePipeline(EncodesText, STOCK):
    """diffusers.QwenImagePipeline with its schedule on the device and CFG, norm rescale and Euler step in one kernel.

    Same signature, same outputs, same random stream; `from_pretrained`, `from_pipe`, LoRA, offload and saving are
    diffusers' own, and a folder it saves loads in stock diffusers. One thing more: `height` and `width` may be lists of one for
    each prompt, whose pictures are then drawn together, see pipelines/sizes.py.

    Args:
        options: of `enable`, by the same names. With `precise_sampler` callbacks and `output_type="latent"` see fp32 latents.
    """

    STANDS_FOR = STOCK

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
        self.put_in(options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *, device=None, **kwargs: Any) -> "QwenImagePipeline":
        """As diffusers'; a local folder is checked first, so that a missing, truncated or corrupt file is named.

        Args:
            device (torch.device or str): load straight onto it: see `qwen_fast.loading.load`. Modulation weights, a third of
                the transformer, never reach it where `modulation` leaves them in host memory.
        Raises:
            TypeError: a keyword that is neither an option nor known to diffusers, which would pass over it.
        """
        if "dtype" in kwargs and Version(diffusers.__version__) < Version("0.40"):
            kwargs["torch_dtype"] = kwargs.pop("dtype")  # the older name; under the new one it would be ignored
        given = {"scheduler", "vae", "text_encoder", "tokenizer", "transformer"} & kwargs.keys()
        unknown = kwargs.keys() - given - set(NAMES) - _known_to_diffusers()
        if unknown:
            raise TypeError(f"{unknown_options(unknown)}.")
        options = Options.of({name: kwargs[name] for name in NAMES if name in kwargs})
        if device is not None:
            kwargs["dtype"] = kwargs.pop("torch_dtype", kwargs.get("dtype"))
            may_rest = options.modulation in ("auto", "host")
            return load(
                super().from_pretrained, pretrained_model_name_or_path, device=device, modulation_may_rest=may_rest, **kwargs
            )
        check_folder(pretrained_model_name_or_path, variant=kwargs.get("variant"), skip=given, hub_ids=True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    __call__ = accelerated_call(STOCK)


def _known_to_diffusers() -> set[str]:
    """Every name that the code of diffusers' `from_pretrained` mentions: it takes its keywords out of a dict one by one."""
    functions = (diffusers.DiffusionPipeline.from_pretrained, diffusers.DiffusionPipeline.download)
    constants = (inspect.unwrap(function).__code__.co_consts for function in functions)
    return {constant for own in constants for constant in own if isinstance(constant, str)}
