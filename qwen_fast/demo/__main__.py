"""The main job on whatever machine it is: pictures by stock diffusers and by qwen_fast, their times and their difference.

python -m qwen_fast.demo [FOLDER]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from .. import enable, report
from . import PROMPTS, checkpoint
from .accuracy import load_stock
from .judge import judge

CALL = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 20, "height": 64, "width": 64}
REPEATS = 3


def main(folder: str = "demo") -> int:
    """Write the pictures below `folder`, print where they are and what is on them; 1 when the two pipelines differ."""
    out = Path(folder).resolve()
    out.mkdir(parents=True, exist_ok=True)
    source = checkpoint()
    print(f"checkpoint (small, trained on coloured shapes): {source}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stock = load_stock(source, device)
    # On the same modules: a second copy of the weights, at other addresses, would move the times by some per cents.
    pipes = {"stock": stock, "qwen_fast": enable(type(stock)(**stock.components))}
    for name, pipe in pipes.items():
        pipe.set_progress_bar_config(desc=f"{name:9s}", leave=False, disable=None)  # None: only in a terminal
        pipe(PROMPTS[0], **{**CALL, "num_inference_steps": 2})  # the first call of a process pays for set-up

    worst, times = 0.0, {name: [] for name in pipes}
    for seed, prompt in enumerate(PROMPTS):
        latents = {}
        for repeat in range(REPEATS):
            for name in sorted(pipes, reverse=bool((seed + repeat) % 2)):  # interleaved, each first as often
                begin = time.perf_counter()
                pipes[name](prompt, **CALL, generator=torch.Generator().manual_seed(seed))
                times[name].append(time.perf_counter() - begin)
        for name, pipe in pipes.items():
            arguments = {**CALL, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
            latents[name] = pipe(prompt, **arguments).images
            picture = pipe(prompt, **CALL, generator=torch.Generator().manual_seed(seed)).images[0]
            path = out / f"{seed}-{name}.png"
            picture.save(path)
            seen = "as asked" if judge(np.asarray(picture), prompt).everything else "not as asked"
            print(f"{path}  {prompt!r}: {seen}")
        worst = max(worst, (latents["qwen_fast"] - latents["stock"]).abs().max().item())

    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:9s} {seconds:.3f} s a picture (median of {len(times[name])}, 64x64, 20 steps, CFG, {device}, fp32)")
    print(f"largest difference of the latents, qwen_fast against stock: {worst:g}")
    print(report(pipes["qwen_fast"]))
    return int(worst > 2e-6 * latents["stock"].abs().max().item())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m qwen_fast.demo", description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default="demo", help="of the pictures (default: %(default)s)")
    sys.exit(main(parser.parse_args().folder))
