"""The demo's text encoder: random and frozen. Its features tell words apart, which is all that the denoiser needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import QwenImagePipeline
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ...testing import initialize, small_text_encoder, write_tokenizer
from ..scenes import ARRANGEMENTS, COLOURS, PLACES, SHAPES, SIZES
from .plan import Plan

NEGATIVE = " "  # what classifier-free guidance compares with, and what a dropped caption becomes
_CONTEXT = 0.1  # scale of what a layer adds to a word: with 1 the words before a word hide it


def build_text(plan: Plan, folder: Path) -> tuple[Qwen2Tokenizer, Qwen2_5_VLForConditionalGeneration]:
    """Write the tokenizer below `folder`, in which every word of the scenes is one token, and make the encoder.

    Returns:
        tuple: tokenizer, and encoder in eval mode, fp32, its weights rounded to bf16 as they will be saved.
    """
    plurals = [f"{shape}{'es' if shape.endswith('s') else 's'}" for shape in SHAPES]
    words = ["a", "an", "two", "on", "the", "of", "background", *ARRANGEMENTS, *COLOURS, *SHAPES, *plurals, *SIZES, *PLACES]
    vocabulary_size = write_tokenizer(folder / "tokenizer", ["a", "an", "two", "".join(f" {word}" for word in words)])
    encoder = small_text_encoder(plan.text_width, plan.text_layers, vocabulary_size)
    initialize(encoder, "text_encoder", plan.seed)
    with torch.no_grad():
        for name, parameter in encoder.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(_CONTEXT)
    encoder = encoder.to(torch.bfloat16).float().eval()
    return Qwen2Tokenizer.from_pretrained(folder / "tokenizer"), encoder


@dataclass(frozen=True)
class Features:
    """Features of many prompts: `[P, L, D]` fp32, padded with zeros, and a mask `[P, L]` bool of what is none."""

    values: torch.Tensor
    mask: torch.Tensor
    index: dict[str, int]


@torch.no_grad()
def encode_prompts(
    tokenizer: Qwen2Tokenizer, encoder: Qwen2_5_VLForConditionalGeneration, prompts: Sequence[str], batch: int = 512
) -> Features:
    """Encode prompts as the pipeline does."""
    pipe = QwenImagePipeline(None, None, encoder, tokenizer, None)
    parts = []
    for start in range(0, len(prompts), batch):
        values, mask = pipe._get_qwen_prompt_embeds(list(prompts[start : start + batch]), device=encoder.device)
        parts.append((values, mask.bool()))
    longest = max(mask.shape[1] for _, mask in parts)
    padded = [
        [torch.nn.functional.pad(part, (0, 0) * (part.ndim - 2) + (0, longest - part.shape[1])) for part in pair]
        for pair in parts
    ]
    values, mask = (torch.cat(column) for column in zip(*padded, strict=True))
    return Features(values, mask, {prompt: i for i, prompt in enumerate(prompts)})
