"""Stock diffusers against qwen_fast on this machine's CPU, interleaved, with the difference of the latents beside the times.

    python -m benchmarks.parts.pipeline [--repeats N] [--append benchmarks/results/pipeline.csv]

CPU time of one thread, so that other work on the machine does not count. A difference above the numerical contract ends
the run without a ratio.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers.utils import logging

import qwen_fast
from qwen_fast.testing import build_checkpoint

from ..shared.machine import provenance
from ..shared.measure import Difference, Spread, interleaved, ratio
from ..shared.rows import RowFile

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


def drawing(pipe: diffusers.QwenImagePipeline, arguments: dict) -> Callable[[], torch.Tensor]:
    return lambda: pipe(**arguments, generator=torch.Generator().manual_seed(0)).images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--append", type=Path, help="CSV file that gets one row a case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    rows = RowFile(options.append, FIELDS) if options.append else None
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
            ways = {name: drawing(pipe, arguments) for name, pipe in pipes.items()}
            difference = Difference.between(ways["fast"](), ways["stock"]()).largest
            if not difference <= 2e-6:
                print(f"{model} {pixels} px, {steps} steps, CFG {scale}: latents differ by {difference:g}; no times are given")
                return 1
            seconds = interleaved(ways, options.repeats, torch.device("cpu"))
            spread = {name: Spread.of(values) for name, values in seconds.items()}
            times = ratio(seconds["stock"], seconds["fast"])
            print(
                f"{model:6s} {pixels:4d} px, {steps:2d} steps, CFG {scale}: stock {spread['stock'].p50:.4f} s, "
                f"qwen_fast {spread['fast'].p50:.4f} s, ratio {times:.3f}, largest relative difference {difference:g}"
            )
            if rows:
                row = {name: value for name, value in provenance().items() if name in FIELDS}
                row |= {"dtype": "float32", "model": model, "pixels": pixels, "steps": steps, "true_cfg_scale": scale}
                for name, one in spread.items():
                    row |= {f"{name}_{part}": f"{getattr(one, part):.5f}" for part in ("p20", "p50", "p80")}
                row |= {"repeats": options.repeats, "ratio_p50": f"{times:.4f}", "max_latent_difference": difference}
                rows.add(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
