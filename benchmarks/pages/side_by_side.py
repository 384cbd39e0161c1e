"""The picture at the top of the README: stock, ours and their difference, from the demo checkpoint in bf16 on this machine.

python -m benchmarks.pages.side_by_side [--out benchmarks/results/side_by_side.png]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..shared.source import RESULTS

PROMPTS = (
    "a red triangle and an orange cross on a green background",
    "a red cross above a blue circle on a purple background",
    "two yellow crosses on a purple background",
)
SIZE, SHOWN, GAP, TEXT, AMPLIFIED = 64, 128, 8, 20, 16
CALL = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 20, "height": SIZE, "width": SIZE}


def draw_both(pipe, prompt: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stock's picture and ours `[SIZE, SIZE, 3]` uint8, of the same weights and noise."""
    import qwen_fast

    pictures = []
    for switch in (qwen_fast.disable, qwen_fast.enable):
        drawn = switch(pipe)(prompt, **CALL, generator=torch.Generator().manual_seed(seed)).images[0]
        pictures.append(np.asarray(drawn.convert("RGB")))
    return pictures[0], pictures[1]


def sheet(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    """One row: for each pair stock, ours and the difference, which is shown `AMPLIFIED` times."""
    group = 3 * SHOWN + 2 * GAP
    image = Image.new("RGB", (len(pairs) * group + (len(pairs) + 1) * 3 * GAP, SHOWN + 2 * GAP + TEXT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for number, (stock, ours) in enumerate(pairs):
        apart = np.abs(stock.astype(int) - ours.astype(int))
        shown = np.clip(AMPLIFIED * apart, 0, 255).astype(np.uint8)
        names = ("stock diffusers", "qwen_fast", f"{AMPLIFIED} x difference of <= {apart.max()}")
        for place, (picture, name) in enumerate(zip((stock, ours, shown), names, strict=True)):
            x = 3 * GAP + number * (group + 3 * GAP) + place * (SHOWN + GAP)
            pen.text((x, GAP), name, (20, 20, 20), font)
            image.paste(Image.fromarray(picture).resize((SHOWN, SHOWN), Image.Resampling.NEAREST), (x, GAP + TEXT))
    return image


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "side_by_side.png", help="a .png (default: %(default)s)")
    options = parser.parse_args()
    import diffusers

    from qwen_fast import demo

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = diffusers.QwenImagePipeline.from_pretrained(demo.checkpoint()).to(device, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    sheet([draw_both(pipe, prompt, seed) for seed, prompt in enumerate(PROMPTS, start=2)]).save(options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
