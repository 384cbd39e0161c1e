"""A picture from a prompt.

    python examples/text_to_image.py [--model Qwen/Qwen-Image] [--prompt "a cat"] [--out picture.png]

Without --model the small checkpoint of the package draws, which knows coloured shapes at 64x64 and 96x64.
"""

import argparse

import torch

import qwen_fast
from qwen_fast import demo


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder or hub id (default: the demo's)")
    parser.add_argument("--prompt", default="a green circle on a white background")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="picture.png")
    options = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(options.model, dtype=dtype, device=device)
    image = pipe(
        options.prompt,
        negative_prompt=" ",  # guidance needs one
        true_cfg_scale=4.0,
        width=options.size[0],
        height=options.size[1],
        num_inference_steps=options.steps,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    image.save(options.out)
    print(qwen_fast.report(pipe))
    return image


if __name__ == "__main__":
    main()
