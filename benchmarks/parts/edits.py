"""A step of the other pipelines, stock and ours by turns: edits with references, and a ControlNet.

    python -m benchmarks.parts.edits [--device cuda] [--only NAME] [--repeats N] [--append benchmarks/results/edits.csv]

Random weights, on a GPU of Qwen-Image's own size, on the CPU of 2 layers 64 wide; prompts as embeddings. The result has the
references' size, about a megapixel. Steps after the first are timed, the first picture with what it compiles and captures;
latents after two steps are compared with stock's: a distance below `LEAST_PSNR` dB is another picture, and fails.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import torch
from diffusers.utils import logging

import qwen_fast
from qwen_fast.testing import initialize

from ..ladder.models import call_arguments, random_pipeline
from ..shared.machine import provenance
from ..shared.measure import Difference, Spread, Stopwatch, clocked
from ..shared.rows import RowFile
from ..shared.shapes import SHAPES, PictureCase

MEASURED, COMPARED = 4, 2
LEAST_PSNR = 30.0  # two right implementations in bf16 have 40 and more
FIELDS = "date commit dirty machine torch diffusers transformers dtype case width height steps cfg references repeats".split()
FIELDS += "stock_step_ms step_ms speedup_step first_s kept_s psnr_db status".split()


@dataclass(frozen=True)
class Case:
    """A pipeline, how many pictures it is given, and whether its transformer is of 2511."""

    name: str
    cls: str
    references: int
    steps: int
    cfg: bool
    zero_cond_t: bool = False


CASES = (
    Case("EditPlus 2511", "QwenImageEditPlusPipeline", 1, 40, True, True),
    Case("EditPlus 2511, three references", "QwenImageEditPlusPipeline", 3, 40, True, True),
    Case("EditPlus 2511, 4 steps", "QwenImageEditPlusPipeline", 1, 4, False, True),
    Case("EditPlus 2509", "QwenImageEditPlusPipeline", 1, 40, True),
    Case("ControlNet", "QwenImageControlNetPipeline", 1, 30, True),
)


def pipeline(base: Any, case: Case) -> Any:
    """The case's pipeline on the transformer and VAE of `base`."""
    parts = {name: base.components[name] for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")}
    if "Edit" in case.cls:
        parts["processor"] = None
    if "ControlNet" in case.cls:
        parts["controlnet"] = controlnet(base.transformer)
    base.transformer.zero_cond_t = case.zero_cond_t
    for block in base.transformer.transformer_blocks:
        block.zero_cond_t = case.zero_cond_t
    pipe = getattr(diffusers, case.cls)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(transformer: Any) -> Any:
    """Five blocks of the transformer's shape, as InstantX's union has, with random weights."""
    names = ("patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads")
    config = {name: transformer.config[name] for name in (*names, "joint_attention_dim", "axes_dims_rope")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(transformer.dtype)
    try:
        with torch.device(transformer.device):
            net = diffusers.QwenImageControlNetModel(**config | {"num_layers": min(5, config["num_layers"])})
    finally:
        torch.set_default_dtype(before)
    initialize(net, "controlnet", 0, on_device=True)
    return net.eval()


def arguments(pipe: Any, case: Case, size: int, tokens: int, text_width: int) -> dict:
    shape = SHAPES["qwen-image" if text_width == SHAPES["qwen-image"].text_width else "tiny"]
    found = call_arguments(pipe, PictureCase(size, size, case.steps, case.cfg, 1, tokens, shape))
    pictures = [PIL.Image.effect_noise((size, size), 60 + 10 * n).convert("RGB") for n in range(case.references)]
    named = {"control_image": pictures[0]} if "ControlNet" in case.cls else {"image": pictures}
    return found | named | {"output_type": "latent"}


def measure(pipe: Any, case: Case, call: dict, repeats: int) -> dict:
    """A row of one case."""

    def draw(steps: int) -> tuple[torch.Tensor, list[float]]:
        torch.manual_seed(0)  # a ControlNet's picture is sampled from the global random state
        with clocked(pipe, steps) as clock:
            latents = pipe(**call).images
        return latents, clock.steps[1:]

    def timed(function: Callable[[], object]) -> float:
        begin = time.perf_counter()
        function()
        if pipe.device.type == "cuda":
            torch.cuda.synchronize(pipe.device)
        return time.perf_counter() - begin

    steps = min(MEASURED, case.steps)
    seconds: dict[str, list[float]] = {"stock": [], "ours": []}
    expected, _ = draw(COMPARED)
    for _ in range(repeats):
        draw(1)
        seconds["stock"] += draw(steps)[1]
        qwen_fast.enable(pipe, modulation="device")
        try:
            first = timed(lambda: draw(1))
            actual, _ = draw(COMPARED)
            with Stopwatch(pipe.device) as watch:  # one step, with what is kept of pictures
                draw(1)
            seconds["ours"] += draw(steps)[1]
            reasons = qwen_fast.report(pipe).fallbacks
        finally:
            qwen_fast.disable(pipe)
    psnr = Difference.between(actual, expected).psnr
    stock, ours = (Spread.of(seconds[way]).p50 for way in ("stock", "ours"))
    wrong = (
        f"wrong result: {psnr:.1f} dB" if not psnr >= LEAST_PSNR else f"stock ran: {', '.join(reasons)}" if reasons else "ok"
    )
    figures = {"stock_step_ms": 1e3 * stock, "step_ms": 1e3 * ours, "first_s": first, "kept_s": watch.seconds, "psnr_db": psnr}
    row = {name: f"{value:.5g}" for name, value in figures.items()} | {"status": wrong}
    return row | ({"speedup_step": f"{stock / ours:.4f}"} if wrong == "ok" else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--only", default="", help="part of the names of the cases that are measured")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--append", type=Path, help="CSV file that gets one row for each case")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    cuda = options.device.type == "cuda"
    if not cuda:
        torch.set_num_threads(1)
    shape, dtype = (SHAPES["qwen-image"], torch.bfloat16) if cuda else (SHAPES["tiny"], torch.float32)
    size, tokens = (1024, 384) if cuda else (64, 16)
    base = random_pipeline(shape, options.device, dtype)
    rows, wrong = RowFile(options.append, FIELDS) if options.append else None, False
    for case in CASES:
        if options.only not in case.name:
            continue
        pipe = pipeline(base, case)
        row = {"case": case.name, "width": size, "height": size, "steps": case.steps, "cfg": case.cfg}
        row |= {"references": case.references, "repeats": options.repeats, "dtype": str(dtype).removeprefix("torch.")}
        try:
            row |= measure(pipe, case, arguments(pipe, case, size, tokens, shape.text_width), options.repeats)
        except Exception as error:  # the other cases are worth having
            row["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        wrong |= row["status"] != "ok"
        if rows:
            rows.add({name: value for name, value in provenance(pipe.device).items() if name in FIELDS} | row)
    return int(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
