"""Every pipeline of the family, small, with arguments of a call; references are shrunk, which stock takes to a megapixel."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import PIL.Image
import torch

from qwen_fast.testing.family import EDIT_2511, build_pipeline

WIDE = PIL.Image.effect_noise((96, 64), 90).convert("RGB")
HIGH = PIL.Image.effect_noise((64, 96), 60).convert("RGB")
MASK = PIL.Image.new("L", (96, 64))
MASK.paste(255, (0, 0, 48, 64))
CALL = {"prompt": "a red circle", "negative_prompt": "x", "true_cfg_scale": 3.0, "num_inference_steps": 3}
SIZE = {"height": 64, "width": 96}
LATENT = {"output_type": "latent"}


@dataclass(frozen=True)
class Member:
    """A pipeline of diffusers and how it is called.

    Attributes:
        arguments: of a call, beside its generator.
        transformer: entries of its configuration.
        pictures: compared are pictures: stock's Layered has no latents to give.
        per_prompt: it takes num_images_per_prompt.
    """

    name: str
    arguments: dict[str, Any]
    transformer: dict[str, Any] = field(default_factory=dict)
    pictures: bool = False
    per_prompt: bool = True

    @property
    def cls(self) -> type:
        return getattr(diffusers, self.name)

    def pipe(self, checkpoint, dtype: torch.dtype = torch.float32):
        return build_pipeline(self.cls, checkpoint, dtype=dtype, **self.transformer)

    def draw(self, pipe, seed: int = 7, **others: Any) -> torch.Tensor:
        torch.manual_seed(0)  # ControlNetInpaint samples its latents from the global random state
        images = pipe(**self.arguments | {"generator": torch.Generator().manual_seed(seed)} | others).images
        return images if isinstance(images, torch.Tensor) else torch.stack(list(images))

    def assert_same(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        limit = 1e-5 if self.pictures else 2e-6
        assert actual.shape == expected.shape and expected.isfinite().all() and expected.std() > 0.01
        assert (actual - expected).abs().max() <= limit * expected.abs().max(), (actual - expected).abs().max()


_TEXT = CALL | SIZE | LATENT
MEMBERS = {
    "text": Member("QwenImagePipeline", _TEXT),
    "image": Member("QwenImageImg2ImgPipeline", _TEXT | {"image": WIDE, "strength": 0.7}),
    "inpaint": Member("QwenImageInpaintPipeline", _TEXT | {"image": WIDE, "mask_image": MASK, "strength": 0.9}),
    "edit": Member("QwenImageEditPipeline", _TEXT | {"image": HIGH}),
    "edit plus": Member("QwenImageEditPlusPipeline", _TEXT | {"image": [WIDE, HIGH]}),
    "edit plus 2511": Member("QwenImageEditPlusPipeline", _TEXT | {"image": [WIDE, HIGH]}, EDIT_2511),
    "edit inpaint": Member("QwenImageEditInpaintPipeline", _TEXT | {"image": WIDE, "mask_image": MASK, "strength": 0.9}),
    "layered": Member(
        "QwenImageLayeredPipeline", CALL | {"image": WIDE.convert("RGBA"), "layers": 2, "output_type": "pt"}, pictures=True
    ),
    "layered, normalized": Member(
        "QwenImageLayeredPipeline",
        CALL | {"image": WIDE.convert("RGBA"), "layers": 1, "output_type": "pt", "cfg_normalize": True},
        pictures=True,
    ),
    "controlnet": Member("QwenImageControlNetPipeline", _TEXT | {"control_image": WIDE}),
    "controlnet inpaint": Member("QwenImageControlNetInpaintPipeline", _TEXT | {"control_image": WIDE, "control_mask": MASK}),
}


@contextlib.contextmanager
def small_references() -> Iterator[None]:
    """Inside, references have 64x96 pixels or the other way round."""

    def small(area: int, ratio: float) -> tuple[int, int]:
        return (96, 64) if ratio > 1 else (64, 96)

    with contextlib.ExitStack() as stack:
        for member in MEMBERS.values():
            home = sys.modules[member.cls.__module__]
            if hasattr(home, "calculate_dimensions"):
                three = "EditPlus" not in member.name and "Layered" not in member.name  # an older copy has a third value
                replacement = (lambda area, ratio: (*small(area, ratio), None)) if three else small
                stack.enter_context(mock.patch.object(home, "calculate_dimensions", replacement))
        yield
