"""Every modular pipeline of diffusers, small, with arguments of a call; references are shrunk, stock's have a megapixel."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.modular_pipelines.qwenimage import encoders
from diffusers.modular_pipelines.qwenimage.denoise import QwenImageDenoiseStep

from qwen_fast.testing.family import EDIT_2511, build_pipeline

from .family import CALL, HIGH, MASK, SIZE, WIDE

GUIDANCE = 3.0
_TEXT = {name: value for name, value in CALL.items() if name != "true_cfg_scale"} | SIZE


@functools.lru_cache
def _parts(name: str, checkpoint: Any, dtype: torch.dtype, transformer: tuple) -> dict[str, Any]:
    return build_pipeline(getattr(diffusers, name), checkpoint, dtype=dtype, **dict(transformer)).components


@dataclass(frozen=True)
class Workflow:
    """What of a modular pipeline a call runs.

    Attributes:
        blocks: name of diffusers' class of blocks.
        parts: name of the ordinary pipeline with the same components.
        arguments: of a call, beside its generator.
        transformer: entries of its configuration.
    """

    blocks: str
    parts: str
    arguments: dict[str, Any] = field(default_factory=dict)
    transformer: dict[str, Any] = field(default_factory=dict)

    def pipe(self, checkpoint, dtype: torch.dtype = torch.float32, guider: Any = None):
        """A pipeline with small parts, and plain guidance where no guider is given."""
        built = getattr(diffusers, self.blocks)().init_pipeline()
        parts = copy.deepcopy(_parts(self.parts, checkpoint, dtype, tuple(self.transformer.items())))
        parts["guider"] = diffusers.ClassifierFreeGuidance(guidance_scale=GUIDANCE) if guider is None else guider
        built.update_components(**{name: part for name, part in parts.items() if name in built.component_names})
        silence(built)
        return built

    def draw(self, pipe, seed: int = 7, output: Any = "latents", **others: Any) -> Any:
        torch.manual_seed(0)
        arguments = _TEXT | self.arguments | {"generator": torch.Generator().manual_seed(seed)} | others
        return pipe(**arguments, output=output)


def silence(pipe: Any) -> None:
    """Without progress bars: `pipe.set_progress_bar_config` does not reach the loops, which lie deeper."""

    for block in blocks_of(pipe._blocks):
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


def blocks_of(block: Any) -> Iterator[Any]:
    """A block and all below it."""
    yield block
    for one in block.sub_blocks.values():
        yield from blocks_of(one)


def loop_of(pipe: Any) -> Any:
    """The loop that draws from text alone."""
    return next(one for one in blocks_of(pipe._blocks) if type(one) is QwenImageDenoiseStep)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, limit: float = 2e-6) -> None:
    """Within `limit` of the largest."""
    assert actual.shape == expected.shape and expected.isfinite().all() and expected.std() > 0.01
    assert (actual - expected).abs().max() <= limit * expected.abs().max(), (actual - expected).abs().max()


WORKFLOWS = {
    "text": Workflow("QwenImageAutoBlocks", "QwenImagePipeline"),
    "image": Workflow("QwenImageAutoBlocks", "QwenImagePipeline", {"image": WIDE, "strength": 0.7}),
    "inpaint": Workflow("QwenImageAutoBlocks", "QwenImagePipeline", {"image": WIDE, "mask_image": MASK, "strength": 0.9}),
    "controlnet": Workflow("QwenImageAutoBlocks", "QwenImageControlNetPipeline", {"control_image": WIDE}),
    "controlnet inpaint": Workflow(
        "QwenImageAutoBlocks",
        "QwenImageControlNetPipeline",
        {"control_image": WIDE, "image": WIDE, "mask_image": MASK, "strength": 0.9, "control_guidance_end": 0.6},
    ),
    "edit": Workflow("QwenImageEditAutoBlocks", "QwenImageEditPipeline", {"image": HIGH}),
    "edit inpaint": Workflow(
        "QwenImageEditAutoBlocks", "QwenImageEditPipeline", {"image": WIDE, "mask_image": MASK, "strength": 0.9}
    ),
    "edit plus": Workflow("QwenImageEditPlusAutoBlocks", "QwenImageEditPlusPipeline", {"image": [WIDE, HIGH]}),
    "edit plus 2511": Workflow("QwenImageEditPlusAutoBlocks", "QwenImageEditPlusPipeline", {"image": [WIDE, HIGH]}, EDIT_2511),
    "layered": Workflow("QwenImageLayeredAutoBlocks", "QwenImageLayeredPipeline", {"image": WIDE.convert("RGBA"), "layers": 2}),
}


@contextlib.contextmanager
def small_references() -> Iterator[None]:
    """Inside, references have 64x96 pixels or the other way round."""

    def small(area: int, ratio: float) -> tuple[int, int, None]:
        return (*((96, 64) if ratio > 1 else (64, 96)), None)

    with mock.patch.object(encoders, "calculate_dimensions", small):
        yield
