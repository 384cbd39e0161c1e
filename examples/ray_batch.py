"""A file of prompts over all GPUs of a Ray cluster: one pipeline a GPU, prompts of a batch in one call.

    pip install 'ray[data]'
    python examples/ray_batch.py prompts.txt [--model Qwen/Qwen-Image] [--workers 8] [--batch 4] [--out pictures]

Picture n has the noise of seed n, whichever worker draws it; prompts of different lengths cost a batch nothing.
"""

import argparse
from pathlib import Path

import numpy as np
import ray
import torch

import qwen_fast
from qwen_fast import demo

CALL = {"true_cfg_scale": 4.0, "num_inference_steps": 20, "width": 64, "height": 64}


class Painter:
    """An enabled pipeline that Ray keeps for many batches."""

    def __init__(self, model: str, out: Path):
        self.out = out
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.pipe = qwen_fast.QwenImagePipeline.from_pretrained(model, dtype=dtype, device=device)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Save the pictures of a batch, and give their files in the place of the pictures, which would fill Ray's memory."""
        prompts = list(map(str, rows["prompt"]))
        noise = [torch.Generator().manual_seed(int(seed)) for seed in rows["index"]]
        images = self.pipe(prompts, negative_prompt=[" "] * len(prompts), generator=noise, **CALL).images
        files = []
        for index, image in zip(rows["index"], images, strict=True):
            files.append(str(self.out / f"{index:06d}.png"))
            image.save(files[-1])
        return {"index": rows["index"], "file": np.array(files)}


def main(argv=None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="one prompt a line")
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder or hub id (default: the demo's)")
    parser.add_argument("--workers", type=int, default=1, help="as many as there are GPUs")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("pictures"), help="a folder that all workers see")
    options = parser.parse_args(argv)

    lines = [line.strip() for line in options.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    options.out.mkdir(parents=True, exist_ok=True)
    drawn = ray.data.from_items([{"index": index, "prompt": prompt} for index, prompt in enumerate(lines)]).map_batches(
        Painter,
        fn_constructor_args=(options.model, options.out.resolve()),
        batch_size=options.batch,
        num_gpus=1 if torch.cuda.is_available() else 0,
        compute=ray.data.ActorPoolStrategy(size=options.workers),
    )
    files = [row["file"] for row in sorted(drawn.take_all(), key=lambda row: row["index"])]
    print("\n".join(files))
    return files


if __name__ == "__main__":
    main()
