"""A picture for each line of a file. On a GPU the VAE of one works while the next denoises; what is drawn is saved at once.

    python examples/many_prompts.py prompts.txt [--model Qwen/Qwen-Image] [--seed 0] [--out pictures]

`qwen-fast generate --prompt-file prompts.txt` does the same, with the settings in each picture's metadata.
"""

import argparse
from pathlib import Path

import torch

import qwen_fast
from qwen_fast import demo

CALL = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 20, "width": 64, "height": 64}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="one prompt a line")
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder or hub id (default: the demo's)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; picture n has seed + n")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    options = parser.parse_args(argv)

    prompts = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    options.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(options.model, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    for index, image, seconds in qwen_fast.generate(pipe, prompts, seed=options.seed, **CALL):
        image.save(options.out / f"{index:04d}.png")
        stages = ", ".join(f"{stage} {value:.2f}" for stage, value in seconds.items())
        print(f"{index:4d}  {prompts[index]}  ({stages})", flush=True)


if __name__ == "__main__":
    main()
