"""Small pipelines of the whole family: from the parts of a small checkpoint, and what each needs beside them."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)
from transformers import Qwen2VLProcessor

from .weights import initialize

# What the transformers of Qwen-Image-Edit-2511 and of Qwen-Image-Layered have that the others do not.
EDIT_2511 = {"zero_cond_t": True}
LAYERED = {"use_additional_t_cond": True, "use_layer3d_rope": True}


class SmallProcessor(Qwen2VLProcessor):
    """Of texts and pictures; one for videos needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        """No class is asked for: there is no video processor."""
        return type(argument)


def build_pipeline(
    cls: type, checkpoint: Path | str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **transformer: Any
) -> diffusers.DiffusionPipeline:
    """A pipeline of a class of diffusers with small seeded parts, in memory.

    Args:
        cls: any of the family that takes pictures, references or a ControlNet, such as diffusers.QwenImageEditPlusPipeline.
        checkpoint: a folder that `build_checkpoint` wrote.
        dtype: of the weights, drawn in fp32 and rounded.
        seed: of the weights that the checkpoint does not have.
        transformer: entries of the transformer's configuration, such as `EDIT_2511`; `LAYERED` is set where the class needs it.
    """
    base = diffusers.QwenImagePipeline.from_pretrained(checkpoint)
    parts = dict(base.components)
    if cls.__name__ == "QwenImageLayeredPipeline":
        transformer = LAYERED | transformer
        config = {name: value for name, value in base.vae.config.items() if not name.startswith("_")}
        parts["vae"] = AutoencoderKLQwenImage(**config | {"input_channels": 4})  # with transparency
        initialize(parts["vae"], "vae", seed)
    if transformer:
        config = {name: value for name, value in base.transformer.config.items() if not name.startswith("_")}
        parts["transformer"] = QwenImageTransformer2DModel(**config | transformer)
        initialize(parts["transformer"], "transformer", seed)
    if "Edit" in cls.__name__ or "Layered" in cls.__name__:
        parts["processor"] = small_processor(base.tokenizer)
    if "ControlNet" in cls.__name__:
        sizes = {name: base.transformer.config[name] for name in ("attention_head_dim", "num_attention_heads")}
        # The inpainting one takes the mask as one channel more, packed.
        extra = {"extra_condition_channels": 4} if "Inpaint" in cls.__name__ else {}
        controlnet = QwenImageControlNetModel.from_transformer(base.transformer, num_layers=1, **sizes, **extra)
        initialize(controlnet, "controlnet", seed)
        parts["controlnet"] = controlnet
    parts["scheduler"] = FlowMatchEulerDiscreteScheduler.from_config(base.scheduler.config)
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype).eval()
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_processor(tokenizer: Any) -> SmallProcessor:
    """Pictures of at most 64 patches, and texts."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageProcessor
    except ImportError:  # transformers 4
        from transformers import Qwen2VLImageProcessor as ImageProcessor
    pictures = ImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    return SmallProcessor(image_processor=pictures, tokenizer=tokenizer, video_processor=None)
