"""The accelerated pipelines beside text-to-image, and what `enable` makes of what.

Same names as diffusers', so that a saved folder names the class that stock diffusers loads.
"""

import diffusers

from .base import AcceleratedPipeline
from .call import accelerated_call
from .text_to_image import QwenImagePipeline


class QwenImageImg2ImgPipeline(AcceleratedPipeline, diffusers.QwenImageImg2ImgPipeline):
    STANDS_FOR = diffusers.QwenImageImg2ImgPipeline
    __call__ = accelerated_call(diffusers.QwenImageImg2ImgPipeline)


class QwenImageInpaintPipeline(AcceleratedPipeline, diffusers.QwenImageInpaintPipeline):
    STANDS_FOR = diffusers.QwenImageInpaintPipeline
    __call__ = accelerated_call(diffusers.QwenImageInpaintPipeline)


ACCELERATED = {ours.STANDS_FOR: ours for ours in (QwenImagePipeline, QwenImageImg2ImgPipeline, QwenImageInpaintPipeline)}
