"""A picture on a card that does not hold the whole model: the recipe is chosen by the free memory (docs/memory.md).

python examples/low_memory.py [--model Qwen/Qwen-Image] [--recipe whole|text-on-host|eight-bits|by-blocks] [--out picture.png]
"""

import argparse

import torch
from diffusers.hooks import apply_group_offloading

import qwen_fast
from qwen_fast import demo

# GiB of weights on the card at most, Qwen-Image in bf16, and some for a picture of 1024x1024.
RECIPES = {"whole": 41.1 + 4, "text-on-host": 38.8 + 2, "eight-bits": 19.0 + 3, "by-blocks": 0.0}


def choose(free_gib: float) -> str:
    """The first recipe that fits; all but "eight-bits" are lossless, which is why by-blocks may be named instead."""
    return next(name for name, needed in RECIPES.items() if free_gib >= needed)


def load(model: str, recipe: str, device: torch.device, dtype: torch.dtype):
    """An enabled pipeline after one of the recipes."""
    cls = qwen_fast.QwenImagePipeline
    if recipe == "whole":  # a third of the transformer stays in host memory by itself where it has to
        return cls.from_pretrained(model, dtype=dtype, device=device)
    if recipe == "text-on-host":
        return cls.from_pretrained(model, dtype=dtype, device=device, modulation="host", text_encoder_mode="offload")
    pipe = cls.from_pretrained(model, dtype=dtype)
    if recipe == "eight-bits":
        pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        if device.type != "cpu":
            pipe.enable_model_cpu_offload(device=device)
    else:
        stream = {"use_stream": device.type == "cuda"}
        pipe.transformer.enable_group_offload(onload_device=device, num_blocks_per_group=1, **stream)
        apply_group_offloading(pipe.text_encoder, onload_device=device, offload_type="leaf_level", **stream)
        pipe.vae.to(device)
    return pipe


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder or hub id (default: the demo's)")
    parser.add_argument("--recipe", choices=tuple(RECIPES), help="default: by the free memory")
    parser.add_argument("--prompt", default="a green circle on a white background")
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", default="picture.png")
    options = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    recipe = options.recipe or choose(torch.cuda.mem_get_info(device)[0] / 2**30 if on_gpu else float("inf"))
    pipe = load(options.model, recipe, device, dtype)
    call = {"width": options.size[0], "height": options.size[1], "num_inference_steps": options.steps}
    noise = torch.Generator().manual_seed(0)
    image = pipe(options.prompt, negative_prompt=" ", true_cfg_scale=4.0, generator=noise, **call).images[0]
    image.save(options.out)
    print(f"recipe: {recipe}\n{qwen_fast.report(pipe)}")
    return image


if __name__ == "__main__":
    main()
