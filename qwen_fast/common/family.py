"""The Qwen-Image family: its pipelines by name, and pixels a token. Nothing here imports torch."""

FAMILY = (
    "QwenImagePipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImageInpaintPipeline",
    "QwenImageEditPipeline",
    "QwenImageEditInpaintPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "QwenImageControlNetPipeline",
    "QwenImageControlNetInpaintPipeline",
)

MODULAR = (
    "QwenImageModularPipeline",
    "QwenImageEditModularPipeline",
    "QwenImageEditPlusModularPipeline",
    "QwenImageLayeredModularPipeline",
)

# Those whose checkpoints draw from text alone: they differ in code only, not in their components.
TEXT_TO_IMAGE = FAMILY[:3]

PIXELS_PER_TOKEN = 16  # the VAE's factor 8, times the transformer's 2x2 patches


def image_tokens(width: int, height: int) -> int:
    """Number of image tokens of a picture."""
    return (width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN)
