"""Pictures edited by what a sentence says: several sentences about the same pictures, which are encoded once.

    python examples/edit.py INPUT.png [INPUT.png ...] --instruction "make the sky red" [--instruction "..."] [--out edited]

Qwen-Image-Edit-2509 and -2511 take up to three pictures. This is the one example that the demo checkpoint has no weights for.
"""

import argparse
from pathlib import Path

import diffusers
import PIL.Image
import torch

import qwen_fast
from qwen_fast.loading import load


def edit(pipe, pictures, instructions, out, **settings):
    """Draw each instruction with an enabled edit pipeline and save it below `out`; returns the pictures."""
    out.mkdir(parents=True, exist_ok=True)
    edited = []
    for number, instruction in enumerate(instructions):
        call = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 40} | settings
        image = pipe(prompt=instruction, image=pictures, generator=torch.Generator().manual_seed(0), **call).images[0]
        image.save(out / f"{number}.png")
        edited.append(image)
    print(qwen_fast.report(pipe))  # with the hits of the prompt cache
    return edited


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="+")
    parser.add_argument("--model", default="Qwen/Qwen-Image-Edit-2509", help="a folder or hub id (default: %(default)s)")
    parser.add_argument("--instruction", action="append", required=True)
    parser.add_argument("--out", type=Path, default=Path("edited"))
    options = parser.parse_args(argv)

    pictures = [PIL.Image.open(name).convert("RGB") for name in options.input]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = load(diffusers.QwenImageEditPlusPipeline.from_pretrained, options.model, device=device, dtype=torch.bfloat16)
    edit(qwen_fast.enable(pipe), pictures, options.instruction, options.out)


if __name__ == "__main__":
    main()
