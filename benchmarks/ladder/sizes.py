"""Pictures of different sizes: one call of all against one call after another, ours and stock's.

    python -m benchmarks.ladder.sizes [--device cuda] [--sizes 512x512 768x512 ...] [--steps 8] [--cfg] [--append FILE]

Random weights, given noise and embeddings, prompts of different lengths, no VAE. All ways draw the same pictures, which are
compared with stock's; each is timed after a round that does not count, and ours have their CUDA graphs by then. A wrong result
gets no speed-up. On a GPU, by default, Qwen-Image's transformer in bf16; on a CPU a small one in fp32.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

import qwen_fast

from ..shared.machine import PROVENANCE, Sampler, provenance
from ..shared.measure import Difference, Spread, Stopwatch, interleaved, silence
from ..shared.rows import RowFile
from ..shared.shapes import SHAPES, PictureCase
from .models import call_arguments, check_memory, random_pipeline
from .session import FP32_LIMIT, UNJUDGED_PSNR

STOCK, IN_TURN, TOGETHER = "stock, one by one", "qwen_fast, one by one", "qwen_fast, one call"
FIELDS = [
    *PROVENANCE,
    *Sampler("cpu").summary(),
    *("model", "dtype", "sizes", "steps", "cfg", "text_tokens", "way", "status", "reason", "clock", "repeats"),
    *("s_p20", "s_p50", "s_p80", "speedup_to_one_by_one", "speedup_to_stock", "max_difference", "psnr_db"),
]
_SIZES = {"cuda": ("512x512", "768x512", "512x768", "640x640"), "cpu": ("64x64", "96x64", "64x96", "80x80")}
_WARM_UPS = 2  # beside the one of `interleaved`: a graph is captured in the second call of a size


def cases_of(sizes: Sequence[str], steps: int, cfg: bool, text: int, shape: str) -> list[PictureCase]:
    """A case of each size; no two of four prompts are equally long."""
    base = PictureCase(steps=steps, cfg=cfg, batch=len(sizes), text=text, shape=SHAPES[shape])
    cases = []
    for size, length in zip(sizes, base.text_lengths, strict=True):
        width, _, height = size.partition("x")
        cases.append(replace(base, width=int(width), height=int(height), batch=1, text=length))
    return cases


def joined(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of one call for those of a call of each picture."""
    one = dict(each[0])
    for name in ("height", "width", "latents"):
        one[name] = [arguments[name] for arguments in each]
    for prefix in ("", "negative_"):
        if f"{prefix}prompt_embeds" in one:
            embeds = [arguments[f"{prefix}prompt_embeds"][0] for arguments in each]
            one[f"{prefix}prompt_embeds"] = pad_sequence(embeds, batch_first=True)
            masks = [torch.ones(len(own), dtype=torch.int64, device=own.device) for own in embeds]
            one[f"{prefix}prompt_embeds_mask"] = pad_sequence(masks, batch_first=True)
    return one


def measured(
    pipe: Any, each: list[dict[str, Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[torch.Tensor]]]:
    """Seconds and latents of every way."""
    drawn: dict[str, list[torch.Tensor]] = {}

    def way(name: str, draw: Callable[[], list[torch.Tensor]]) -> Callable[[], None]:
        def run() -> None:
            drawn[name] = draw()

        return run

    def in_turn() -> list[torch.Tensor]:
        return [pipe(**arguments, output_type="latent").images[0] for arguments in each]

    together = joined(each)
    seconds = interleaved({STOCK: way(STOCK, in_turn)}, repeats, pipe.device)
    qwen_fast.enable(pipe, modulation="device")
    ours = {
        IN_TURN: way(IN_TURN, in_turn),
        TOGETHER: way(TOGETHER, lambda: pipe(**together, output_type="latent").images),
    }
    try:
        for _ in range(_WARM_UPS):
            for run in ours.values():
                run()
        seconds |= interleaved(ours, repeats, pipe.device)
        reasons = qwen_fast.report(pipe).fallbacks
    finally:
        qwen_fast.disable(pipe)
    if reasons:
        raise RuntimeError(f"stock diffusers ran instead: {', '.join(reasons)}")
    return seconds, drawn


def rows_of(seconds: dict[str, list[float]], drawn: dict[str, list[torch.Tensor]]) -> list[dict[str, str]]:
    """The figures of every way, those of a wrong result without its speed."""
    rows, exact = [], drawn[STOCK][0].dtype == torch.float32
    for name, taken in seconds.items():
        spread = Spread.of(taken)
        row = {"way": name, "status": "ok", **{f"s_{part}": f"{getattr(spread, part):.5g}" for part in ("p20", "p50", "p80")}}
        rows.append(row)
        if name == STOCK:
            continue
        differences = [Difference.between(*pair) for pair in zip(drawn[name], drawn[STOCK], strict=True)]
        largest, psnr = max(one.largest for one in differences), min(one.psnr for one in differences)
        row |= {"max_difference": f"{largest:.3g}", "psnr_db": f"{psnr:.2f}"}
        if not (largest <= FP32_LIMIT if exact else psnr >= UNJUDGED_PSNR):
            row |= {"status": "wrong result", "reason": f"{psnr:.1f} dB, at most {largest:.2g}, from stock"}
            continue
        row["speedup_to_stock"] = f"{Spread.of(seconds[STOCK]).p50 / spread.p50:.4f}"
        if name == TOGETHER:
            row["speedup_to_one_by_one"] = f"{Spread.of(seconds[IN_TURN]).p50 / spread.p50:.4f}"
    return rows


def told(row: dict[str, str]) -> str:
    """A row in a few words."""
    text = f"{row['way']:22s} {row['s_p50']} s"
    for name, of in (("speedup_to_stock", "stock"), ("speedup_to_one_by_one", "one by one")):
        text += f", {row[name]}x {of}" if row.get(name) else ""
    if row.get("psnr_db"):
        text += f"; at most {row['max_difference']}, {row['psnr_db']} dB, from stock"
    return text if row["status"] == "ok" else f"{text}: {row['status']}"


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: qwen-image on a GPU, middle on a CPU")
    parser.add_argument("--sizes", nargs="+", metavar="WxH", help="default: about 512x512, on a CPU 64x64")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cfg", action="store_true", help="with guidance")
    parser.add_argument("--text", type=int, default=64, help="tokens of the longest prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--append", type=Path, help="CSV file that gets a row for each way")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)
    shape, dtype = options.shape or ("qwen-image" if on_gpu else "middle"), torch.bfloat16 if on_gpu else torch.float32
    sizes = options.sizes or _SIZES["cuda" if on_gpu else "cpu"]
    cases = cases_of(sizes, options.steps, options.cfg, options.text, shape)
    rows = RowFile(options.append, FIELDS) if options.append else None  # before what takes long
    check_memory([replace(cases[0], width=sum(case.width for case in cases))], device, dtype)
    pipe = random_pipeline(SHAPES[shape], device, dtype)
    with silence(), Sampler(device) as sampler:
        pipe.set_progress_bar_config(disable=True)
        seconds, drawn = measured(pipe, [call_arguments(pipe, case) for case in cases], options.repeats)
    model = f"random, {SHAPES[shape].layers} layers, {SHAPES[shape].heads} x {SHAPES[shape].head_dim}"
    common = provenance(device) | sampler.summary() | {"model": model, "dtype": str(dtype).removeprefix("torch.")}
    common |= {"sizes": " ".join(sizes), "steps": str(options.steps), "cfg": str(options.cfg)}
    common |= {"text_tokens": " ".join(str(case.text) for case in cases), "repeats": str(options.repeats)}
    found = rows_of(seconds, drawn)
    for row in found:
        print(told(row), flush=True)
        if rows:
            rows.add(common | {"clock": Stopwatch(device).kind} | row)
    return 0 if all(row["status"] == "ok" for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
