"""A part of a picture drawn again: where the mask is white.

python examples/inpaint.py INPUT.png MASK.png [--model Qwen/Qwen-Image] [--prompt "..."] [--out picture.png]
"""

import argparse

import diffusers
import PIL.Image
import torch

import qwen_fast
from qwen_fast import demo


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input")
    parser.add_argument("mask", help="of the same size; white is drawn again, black is kept")
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder or hub id (default: the demo's)")
    parser.add_argument("--prompt", default="a green circle on a white background")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="picture.png")
    options = parser.parse_args(argv)

    picture, mask = PIL.Image.open(options.input).convert("RGB"), PIL.Image.open(options.mask).convert("L")
    if picture.size != mask.size:
        parser.error(f"MASK has {mask.width}x{mask.height} pixels, INPUT {picture.width}x{picture.height}; make them equal")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(options.model, dtype=dtype, device=device)
    pipe = qwen_fast.enable(diffusers.QwenImageInpaintPipeline(**pipe.components))  # the same weights
    image = pipe(
        options.prompt,
        image=picture,
        mask_image=mask,
        strength=1.0,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        width=picture.width // 16 * 16,
        height=picture.height // 16 * 16,
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(options.out)
    return image


if __name__ == "__main__":
    main()
