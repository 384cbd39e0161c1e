"""Stock diffusers against qwen_fast on this machine's CPU, interleaved, with the difference of the latents beside the times.

    python -m benchmarks.bench_pipeline [--repeats N] [--append benchmarks/results/pipeline.csv]

CPU time of one thread, so that other work on the machine does not count. A difference above the numerical contract ends
the run without a ratio.
"""

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers.utils import logging

import qwen_fast
from qwen_fast.testing import build_checkpoint

from .rows import append, git

# Sizes of the checkpoint: tiny shows what the driver costs, middle what a user would notice.
MODELS = {
    "tiny": {},
    "middle": {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64},
}
CASES = [  # model, pixels, steps, true_cfg_scale (1: no CFG)
    ("tiny", 64, 4, 4.0),
    ("tiny", 256, 20, 4.0),
    ("tiny", 256, 20, 1.0),
    ("middle", 256, 20, 4.0),
    ("middle", 512, 4, 4.0),
]
FIELDS = "date commit dirty machine torch diffusers transformers dtype model pixels steps true_cfg_scale repeats".split()
FIELDS += "stock_p20 stock_p50 stock_p80 fast_p20 fast_p50 fast_p80 ratio_p50 max_latent_difference".split()


def measure(pipes: dict, arguments: dict, repeats: int) -> tuple[dict[str, list[float]], float]:
    """CPU seconds of each call by pipeline, and the largest difference of the latents."""
    seconds, latents = {name: [] for name in pipes}, {}
    for repeat in range(-1, repeats):  # the first round warms up
        for name in sorted(pipes, reverse=bool(repeat % 2)):
            begin = time.thread_time()
            latents[name] = pipes[name](**arguments, generator=torch.Generator().manual_seed(0)).images
            if repeat >= 0:
                seconds[name].append(time.thread_time() - begin)
    return seconds, (latents["fast"] - latents["stock"]).abs().max().item() / latents["stock"].abs().max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--append", type=Path, help="CSV file that gets one row a case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model, pixels, steps, scale in CASES:
            checkpoint = Path(folder, model)
            if not checkpoint.exists():
                build_checkpoint(checkpoint, **MODELS[model])
            stock = diffusers.QwenImagePipeline.from_pretrained(checkpoint)
            # The same modules: two copies of the weights at other addresses differ by per cents in time.
            pipes = {"stock": stock, "fast": qwen_fast.QwenImagePipeline.from_pipe(stock)}
            for pipe in pipes.values():
                pipe.set_progress_bar_config(disable=True)
            arguments = {"prompt": "a red circle", "height": pixels, "width": pixels, "num_inference_steps": steps}
            arguments |= {"true_cfg_scale": scale, "negative_prompt": "blurry" if scale > 1 else None, "output_type": "latent"}
            seconds, difference = measure(pipes, arguments, options.repeats)
            if difference > 2e-6:
                print(f"{model} {pixels} px, {steps} steps, CFG {scale}: latents differ by {difference:g}; no times are given")
                return 1
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            spread = [
                [fifths[0], medians[name], fifths[3]]
                for name, fifths in ((n, statistics.quantiles(v, n=5)) for n, v in seconds.items())
            ]
            ratio = statistics.median(s / f for s, f in zip(seconds["stock"], seconds["fast"], strict=True))
            print(
                f"{model:6s} {pixels:4d} px, {steps:2d} steps, CFG {scale}: stock {medians['stock']:.4f} s, "
                f"qwen_fast {medians['fast']:.4f} s, ratio {ratio:.3f}, largest relative difference {difference:g}"
            )
            rows.append(
                [
                    datetime.date.today(), git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain")),
                    f"{platform.machine()} CPU, 1 thread", torch.__version__, diffusers.__version__, transformers.__version__,
                    "float32", model, pixels, steps, scale, options.repeats,
                    *(f"{value:.5f}" for values in spread for value in values),
                    f"{ratio:.4f}", difference,
                ]
            )  # fmt: skip
    if options.append:
        append(options.append, FIELDS, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
