"""The main job on whatever machine it is: pictures by stock diffusers and by qwen_fast, their times and their difference.

python -m qwen_fast.demo [FOLDER]
"""

import statistics
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers

from .. import QwenImagePipeline, report
from ..testing import build_checkpoint

PROMPTS = ("a red circle on a white background", "two green squares", "a blue triangle next to a yellow cross")
CALL = {"negative_prompt": "blurry", "true_cfg_scale": 4.0, "num_inference_steps": 20, "height": 256, "width": 256}
REPEATS = 3


def main(folder: str = "demo") -> int:
    """Write a checkpoint and the pictures below `folder`, print where they are; 1 when the two pipelines differ."""
    out = Path(folder).resolve()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    checkpoint = build_checkpoint(out / "checkpoint")
    print(f"checkpoint (small, random weights: its pictures are abstract): {checkpoint}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast = QwenImagePipeline.from_pretrained(checkpoint).to(device)
    # On the same modules: a second copy of the weights, at other addresses, would move the times by some per cents.
    pipes = {"stock": diffusers.QwenImagePipeline(**fast.components), "qwen_fast": fast}
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
            pictures = pipe(prompt, **CALL, generator=torch.Generator().manual_seed(seed)).images
            path = out / f"{seed}-{name}.png"
            pictures[0].save(path)
            print(f"{path}  {prompt!r}")
        worst = max(worst, (latents["qwen_fast"] - latents["stock"]).abs().max().item())

    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:9s} {seconds:.3f} s a picture (median of {len(times[name])}, 256x256, 20 steps, CFG, {device}, fp32)")
    print(f"largest difference of the latents, qwen_fast against stock: {worst:g}")
    print(report(pipes["qwen_fast"]))
    return int(worst > 2e-6 * latents["stock"].abs().max().item())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
