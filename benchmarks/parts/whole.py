"""A whole picture from its prompt, stock and ours: text encoder, all steps, VAE, and the memory that all of it takes.

    python -m benchmarks.parts.whole [--device cuda] [--steps 50] [--append benchmarks/results/whole.csv]

Every part has random weights, on a GPU the sizes of Qwen/Qwen-Image with its text encoder (57.7 GB in bf16), 1024x1024 with
guidance; on a CPU a small model. No step is computed from others: every call draws all of them. Every call has a prompt of its
own, but "known" has the one before. Seconds before the first step are text encoding and what else prepares a picture, those
behind the last one decoding and the copy to the host. Latents after two steps are compared with stock's.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

import qwen_fast
from qwen_fast.testing import small_text_encoder, write_tokenizer

from ..ladder.models import fill, random_pipeline
from ..shared.machine import Sampler, provenance
from ..shared.measure import Difference, clocked, silence
from ..shared.rows import RowFile
from ..shared.shapes import SHAPES
from .text import prompt_of

TOKENS, LEAST_PSNR = 60, 30.0
WAYS = {"stock": None, "ours": {}, "ours, text encoder in host memory": {"text_encoder_mode": "offload"}}
FIELDS = "date commit dirty machine torch diffusers transformers dtype width height steps cfg tokens way".split()
FIELDS += "first_s image_s known_s before_s steps_s behind_s resident_gib peak_gib psnr_db".split()
FIELDS += [*Sampler("cpu").summary(), "status"]
# Of Qwen2.5-VL-7B.
_TEXT = {"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
_TEXT |= {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
_TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16}


def whole_pipeline(device: torch.device) -> Any:
    """A stock pipeline with all its parts, random weights and a tokenizer of few words."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    pipe = random_pipeline(SHAPES["qwen-image" if on_gpu else "tiny"], device, dtype)
    with tempfile.TemporaryDirectory() as folder:
        words = write_tokenizer(Path(folder))
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    with accelerate.init_empty_weights(include_buffers=False):
        if on_gpu:
            config = Qwen2_5_VLConfig(text_config=_TEXT, vision_config=_VISION, tie_word_embeddings=False)
            encoder = Qwen2_5_VLForConditionalGeneration(config)
        else:
            encoder = small_text_encoder(SHAPES["tiny"].text_width, 2, words)
    fill(encoder, "text_encoder", device, dtype)
    pipe.register_modules(text_encoder=encoder.to(device), tokenizer=tokenizer)
    return pipe


@dataclass
class Drawn:
    """Seconds of a call, by parts."""

    before: float
    steps: float
    behind: float

    @property
    def whole(self) -> float:
        return self.before + self.steps + self.behind


def draw(pipe: Any, prompt: str, steps: int, side: int, stop_after: int, output_type: str = "pil") -> tuple[Any, Drawn]:
    """A picture, or what there is after some steps, with its seconds."""
    call = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": steps, "width": side, "height": side}
    with clocked(pipe, stop_after) as clock:
        begin = clock.stamp()
        images = pipe(prompt, **call, generator=torch.Generator().manual_seed(0), output_type=output_type).images
        end, first, last = clock.stamp(), clock.stamps[0], clock.stamps[-1]
        parts = ((begin, first), (first, last), (last, end))
        return images, Drawn(*(clock.seconds(*pair) for pair in parts))


def measured(pipe: Any, way: str, side: int, steps: int, compared: torch.Tensor | None) -> tuple[dict, torch.Tensor]:
    """The figures of a way, and its latents after two steps of the same prompt."""
    device, prompts = pipe.device, [prompt_of(pipe, TOKENS, word) for word in (f"{way} first", f"{way} second", "compared")]
    cuda = device.type == "cuda"
    with Sampler(device) as sampler:
        _, first = draw(pipe, prompts[0], steps, side, steps)
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        _, new = draw(pipe, prompts[1], steps, side, steps)
        row = {"first_s": first.whole, "image_s": new.whole, "before_s": new.before, "steps_s": new.steps}
        row |= {"behind_s": new.behind}
        if cuda:
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            row["resident_gib"] = torch.cuda.memory_allocated(device) / 2**30
        if way != "stock":
            row["known_s"] = draw(pipe, prompts[1], steps, side, steps)[1].whole
    latents = draw(pipe, prompts[2], steps, side, 2, "latent")[0].clone()
    row = {name: f"{value:.4g}" for name, value in row.items()} | sampler.summary() | {"status": "ok"}
    if compared is not None:
        psnr = Difference.between(latents, compared).psnr
        reasons = qwen_fast.report(pipe).fallbacks
        row |= {"psnr_db": f"{psnr:.4g}"} | ({} if psnr >= LEAST_PSNR else {"status": "wrong result"})
        row |= {"status": f"stock ran: {', '.join(reasons)}"} if reasons else {}
    return row, latents


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--steps", type=int, help="default: 50, on a CPU 3")
    parser.add_argument("--append", type=Path, help="CSV file that gets a row for each way")
    options = parser.parse_args()
    device = options.device
    side, steps = (1024, options.steps or 50) if device.type == "cuda" else (64, options.steps or 3)
    rows, compared, failed = RowFile(options.append, FIELDS) if options.append else None, None, False
    with silence():
        pipe = whole_pipeline(device)
        common = {"dtype": str(pipe.transformer.dtype).removeprefix("torch."), "width": side, "height": side}
        common |= {"steps": steps, "cfg": True, "tokens": TOKENS}
        for way, enabled in WAYS.items():
            if enabled is not None:
                qwen_fast.enable(pipe, **enabled)
            row, latents = measured(pipe, way, side, steps, compared)
            compared = latents if compared is None else compared
            failed |= row["status"] != "ok"
            print(way, *(f"{name} {value}" for name, value in row.items() if value), sep=", ", flush=True)
            if rows:
                found = {name: value for name, value in provenance(device).items() if name in FIELDS}
                rows.add(found | common | {"way": way} | row)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
