"""What a recipe for less memory costs: peak and milliseconds a step, stock and ours, each on a model of its own.

    python -m benchmarks.parts.memory [--device cuda] [--only NAME] [--append benchmarks/results/memory.csv]

Transformer and VAE with random weights, on a GPU of Qwen-Image's own size at 1024x1024 with guidance, without a text encoder,
whose output is kept or comes first. The peak is torch's, of a call of two steps with the picture decoded; a step is the
difference of calls of 4 steps and 1. Latents are compared with stock's under the same recipe.
"""

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

import qwen_fast

from ..ladder.models import call_arguments, random_pipeline
from ..shared.machine import provenance
from ..shared.measure import Difference, clocked
from ..shared.rows import RowFile
from ..shared.shapes import SHAPES, PictureCase

LEAST_PSNR = 30.0
FIELDS = "date commit dirty machine torch diffusers dtype width height cfg recipe way peak_gib resident_gib".split()
FIELDS += "step_ms first_s psnr_db status".split()


@dataclass(frozen=True)
class Recipe:
    """A way to need less memory.

    Attributes:
        apply: to a pipeline on the device.
        options: of `enable` with it.
    """

    name: str
    apply: Callable[[Any, torch.device], None] = lambda pipe, device: None
    options: tuple[tuple[str, Any], ...] = ()


def _group_offload(pipe: Any, device: torch.device) -> None:
    where = {"onload_device": device, "offload_device": torch.device("cpu")}
    pipe.transformer.to("cpu")
    pipe.transformer.enable_group_offload(**where, offload_type="block_level", num_blocks_per_group=1, use_stream=True)


def _layerwise_casting(pipe: Any, device: torch.device) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=pipe.transformer.dtype)


def _int8_weights(pipe: Any, device: torch.device) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.transformer.transformer_blocks, Int8WeightOnlyConfig())


RECIPES = (  # the last three move 41 GB, before the first call or in each
    Recipe("modulation weights on the host", options=(("modulation", "host"),)),
    Recipe("torchao INT8 weights", _int8_weights),
    Recipe("layerwise casting to FP8", _layerwise_casting),
    Recipe("all on the device", options=(("modulation", "device"),)),
    Recipe("group offload, blocks, a stream", _group_offload),
    Recipe("model CPU offload", lambda pipe, device: pipe.enable_model_cpu_offload(device=device)),
    Recipe("sequential CPU offload", lambda pipe, device: pipe.enable_sequential_cpu_offload(device=device)),
)


def measure(recipe: Recipe, case: PictureCase, device: torch.device, dtype: torch.dtype) -> list[dict]:
    """A row for stock and one for ours."""
    pipe = random_pipeline(case.shape, device, dtype)
    call = call_arguments(pipe, case)
    rows, expected = [], None
    try:
        recipe.apply(pipe, device)
    except Exception as error:
        return [{"recipe": recipe.name, "way": "stock", "status": shortened(error)}]
    for way in ("stock", "ours"):
        if way == "ours":
            qwen_fast.enable(pipe, **dict(recipe.options))
        row = {"recipe": recipe.name, "way": way}
        try:
            figures, latents = timed(pipe, call, device)
            row |= figures | {"status": "ok"}
            if way == "stock":
                expected = latents
            else:
                psnr = Difference.between(latents, expected).psnr
                row |= {"psnr_db": f"{psnr:.4g}"} | ({} if psnr >= LEAST_PSNR else {"status": "wrong result"})
                reasons = qwen_fast.report(pipe).fallbacks
                row |= {"status": f"stock ran: {', '.join(reasons)}"} if reasons else {}
        except Exception as error:  # the other recipes are worth having
            row["status"] = shortened(error)
        rows.append(row)
    return rows


def shortened(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def timed(pipe: Any, call: dict, device: torch.device) -> tuple[dict, torch.Tensor]:
    """Figures of a row, and the latents after two steps."""

    def draw(steps: int, output_type: str = "latent") -> tuple[torch.Tensor, float]:
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        wait()
        begin = time.perf_counter()
        with clocked(pipe, steps):
            images = pipe(**call, output_type=output_type).images
        wait()
        return images, time.perf_counter() - begin

    _, first = draw(1)
    latents, _ = draw(2)
    figures = {"first_s": f"{first:.4g}"}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        draw(2, "pt")
        figures["peak_gib"] = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}"
        figures["resident_gib"] = f"{torch.cuda.memory_allocated(device) / 2**30:.2f}"
    (_, one), (_, four) = draw(1), draw(4)
    return figures | {"step_ms": f"{1e3 * (four - one) / 3:.5g}"}, latents.clone()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--only", default="", help="part of the names of the recipes that are measured")
    parser.add_argument("--append", type=Path, help="CSV file that gets two rows for each recipe")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    cuda = options.device.type == "cuda"
    case, dtype = (PictureCase(), torch.bfloat16) if cuda else (PictureCase(64, 64, 8, shape=SHAPES["tiny"]), torch.float32)
    rows, wrong = RowFile(options.append, FIELDS) if options.append else None, False
    for recipe in RECIPES:
        if options.only not in recipe.name:
            continue
        for row in measure(recipe, case, options.device, dtype):
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            wrong |= row["status"] != "ok"
            row |= {"dtype": str(dtype).removeprefix("torch."), "width": case.width, "height": case.height, "cfg": case.cfg}
            if rows:
                rows.add({name: value for name, value in provenance(options.device).items() if name in FIELDS} | row)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
