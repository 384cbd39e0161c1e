"""A picture changed by a prompt: some of its noise is put back, and the rest is drawn again.

python examples/image_to_image.py INPUT.png [--model Qwen/Qwen-Image] [--prompt "..."] [--strength 0.8] [--out picture.png]
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
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder or hub id (default: the demo's)")
    parser.add_argument("--prompt", default="a blue circle on a white background")
    parser.add_argument("--strength", type=float, default=0.8, help="1: nothing of the input is left")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="picture.png")
    options = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(options.model, dtype=dtype, device=device)
    pipe = qwen_fast.enable(diffusers.QwenImageImg2ImgPipeline(**pipe.components))  # the same weights
    picture = PIL.Image.open(options.input).convert("RGB")
    image = pipe(
        options.prompt,
        image=picture,
        strength=options.strength,
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
