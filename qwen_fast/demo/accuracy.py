"""How often a pipeline draws what it is asked for: prompts of the demo's world, pictures, verdicts.

python -m qwen_fast.demo.accuracy [--model FOLDER] [--count N]
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..pipelines.opening import library_output, load_pipeline
from .judge import Verdict, judge, summary
from .scenes import Request, sample_request

KINDS = ("one", "same", "pair")


def held_out_requests(count: int, kind: str | None = None, seed: int = 0) -> list[Request]:
    """`count` requests, seeded, each with a (colour, shape, background) that the transformer was never shown."""
    rng = random.Random(f"{seed}/held out")
    return [sample_request(rng, held_out=True, kind=kind) for _ in range(count)]


def draw(
    pipe: Any,
    requests: Sequence[Request],
    *,
    width: int = 64,
    height: int = 64,
    seed: int = 0,
    batch: int = 32,
    **arguments: Any,
) -> tuple[np.ndarray, list[Verdict]]:
    """Draw and judge one picture per request; the nth has noise of its own, of seed + n, whatever the batch.

    Args:
        pipe: a QwenImagePipeline, stock or ours.
        requests (sequence of Request): what to draw.
        width, height (int): pixels, multiples of 16.
        seed, batch (int): of the first picture; pictures per call.
        arguments: of the pipeline's call; 20 steps with true_cfg_scale 4 against " " unless they say otherwise.

    Returns:
        tuple: `[N, height, width, 3]` uint8, and N verdicts.
    """
    arguments = {"num_inference_steps": 20, "true_cfg_scale": 4.0, "negative_prompt": " "} | arguments
    pictures = []
    for start in range(0, len(requests), batch):
        prompts = [request.prompt for request in requests[start : start + batch]]
        call = dict(arguments)
        if call["negative_prompt"] is not None:
            call["negative_prompt"] = [call["negative_prompt"]] * len(prompts)
        generators = [torch.Generator().manual_seed(seed + start + n) for n in range(len(prompts))]
        images = pipe(prompts, width=width, height=height, generator=generators, output_type="np", **call).images
        pictures.append((images * 255).round().astype(np.uint8))
    found = np.concatenate(pictures)
    return found, [judge(picture, request) for picture, request in zip(found, requests, strict=True)]


def load_stock(checkpoint: str | Path, device: torch.device) -> Any:
    """A checkpoint as a pipeline of stock diffusers in fp32, silent."""
    with library_output(bars=False):
        pipe = load_pipeline(str(checkpoint), device, torch.float32, stock=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def table(rows: dict[str, Sequence[Verdict]]) -> str:
    """Shares in per cent as a Markdown table, one row per entry."""
    parts = ("count", "background", "colour", "shape", "both", "size", "place", "everything")
    lines = [f"| {' | '.join(('asked for', 'n', *parts))} |", "|---" * (len(parts) + 2) + "|"]
    for name, verdicts in rows.items():
        shares = summary(verdicts)
        cells = [f"{100 * shares[part]:.1f}" if part in shares else "" for part in parts]
        lines.append(f"| {' | '.join((name, str(len(verdicts)), *cells))} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table of a checkpoint, drawn by stock diffusers."""
    from . import checkpoint

    parser = argparse.ArgumentParser(prog="python -m qwen_fast.demo.accuracy", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint's folder (default: the demo's)")
    parser.add_argument("--count", type=int, default=200, help="pictures of one thing (default: %(default)s), half of two")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("WIDTH", "HEIGHT"))
    args = parser.parse_args(argv)
    if args.count < 2:
        parser.error(f"--count {args.count}: at least 2 pictures are needed")
    pipe = load_stock(args.model or checkpoint(), torch.device("cpu"))
    rows = {}
    for kind in KINDS:
        wanted = held_out_requests(args.count if kind == "one" else args.count // 2, kind)
        rows[kind] = draw(pipe, wanted, width=args.size[0], height=args.size[1])[1]
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
