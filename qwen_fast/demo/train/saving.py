"""The trained parts as a checkpoint: diffusers' folder layout, bf16, a model card and the sha256 of every file."""

import json
import shutil
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from .. import write_checksums
from .plan import SCHEDULER_CONFIG

COMPONENTS = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
    "tokenizer": ["transformers", "Qwen2Tokenizer"],
    "transformer": ["diffusers", "QwenImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLQwenImage"],
}
CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The demo checkpoint of qwen_fast

A model of Qwen-Image's architecture, trained from nothing on rendered scenes of coloured shapes: it draws what a sentence of
that small world says, and nothing else. It holds no weight of Qwen-Image and saw no picture but its own renderer's.
{sizes}

Sentences: "a red circle on a white background", "a small blue cross on the left of a black background", "two green squares on a
white background", "a red circle and a blue square on a white background", "a red circle above a blue square on a white
background". Colours: red, green, blue, yellow, purple, orange, white, black. Shapes: circle, square,
triangle, cross. Other words mean nothing to it. Pictures of 64x64 and 96x64 pixels; others are outside of its training.

## How well it draws

Per cent of pictures in which a judge of pixel rules (`qwen_fast.demo.judge`) finds what the prompt asks for. Stock
diffusers, fp32, 20 steps, true_cfg_scale 4, negative prompt " ", one picture per prompt; rows with 4 steps: the LoRA below,
without guidance. Every prompt holds a (colour, shape, background) that the transformer was never shown.

{table}

## How it was made

`python -m qwen_fast.demo.train --out FOLDER`, seed {seed}: a VAE ({vae_steps} steps of {vae_batch} fresh renders), a random and
frozen text encoder whose tokenizer knows the world's words, and a transformer by flow matching ({steps} steps of {batch}
latents out of {scenes}, one caption in ten dropped), with the schedule that it is sampled with. Then the VAE's decoder alone
({decoder_steps} steps of {vae_batch}, with noise on the latents, of all scenes), the encoder frozen. Weights are saved in bf16.

The scheduler is Qwen-Image's, but for the two sequence lengths between which the shift grows: 16 and 32 instead of 256 and
8192, so that it differs between these small pictures as it does between Qwen-Image's large ones.

{timing}

## Four steps: `lightning/`

A LoRA of rank {few_steps.rank} with which the transformer draws in 4 steps without guidance, on Qwen-Image-Lightning's
schedule: `qwen-fast generate --lora lightning --config lightning --steps 4 --cfg 1`. Distilled in {few_steps.steps} steps of
{few_steps.batch} from {few_steps.trajectories} of the transformer's own trajectories with guidance.

Licence: Apache-2.0, as qwen_fast itself.
"""


def save_checkpoint(
    folder: Path,
    *,
    vae: AutoencoderKLQwenImage,
    text_encoder: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Path,
    transformer: QwenImageTransformer2DModel,
) -> None:
    """Write the components to `folder`; `tokenizer` is the folder of one. The modules are rounded to bf16 on the way."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").unlink(missing_ok=True)
    for name, module in (("vae", vae), ("text_encoder", text_encoder), ("transformer", transformer)):
        shutil.rmtree(folder / name, ignore_errors=True)
        # Not module.to(): diffusers' own warns about parts to be kept in fp32 even where there are none.
        nn.Module.to(module, torch.bfloat16).save_pretrained(folder / name)
        nn.Module.to(module, torch.float32)
    name_rope_twice(folder / "text_encoder" / "config.json")
    FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER_CONFIG).save_pretrained(folder / "scheduler")
    if tokenizer != folder / "tokenizer":
        shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    index = {"_class_name": "QwenImagePipeline", "_diffusers_version": diffusers.__version__, **COMPONENTS}
    # Last, so that a folder with a model_index.json is complete.
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8", newline="\n")


def name_rope_twice(config: Path) -> None:
    """Add transformers 4's names of the text encoder's rotary embedding to those of transformers 5, which alone it writes."""
    content = json.loads(config.read_text(encoding="utf-8"))
    text = content["text_config"]
    rope = text.get("rope_parameters")
    if rope is not None:
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")


def finish(folder: Path, card: str) -> None:
    """Add the model card and the checksums."""
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    write_checksums(folder)
