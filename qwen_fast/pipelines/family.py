"""What `enable` makes of what. Same names, so that a saved folder names the class that stock diffusers loads."""

import diffusers

from .stock_loop import QwenImageImg2ImgPipeline, QwenImageInpaintPipeline
from .text_to_image import QwenImagePipeline

# What `enable` makes of what. Same names, so that a saved folder names the class that stock diffusers loads.
ACCELERATED = {
    diffusers.QwenImagePipeline: QwenImagePipeline,
    diffusers.QwenImageImg2ImgPipeline: QwenImageImg2ImgPipeline,
    diffusers.QwenImageInpaintPipeline: QwenImageInpaintPipeline,
}
