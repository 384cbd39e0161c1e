"""The fused transformer alone, in a sampling loop of your own: here Heun's method, which diffusers has no pipeline for.

    python examples/own_loop.py [--model FOLDER] [--prompt "..."] [--steps 10] [--out picture.png]

`qwen_fast.QwenImageTransformer2DModel` takes the arguments of diffusers' class and is loaded like it. Every forward without
gradients is fused. Everything else on this page is plain torch.
"""

import argparse

import diffusers
import torch

import qwen_fast
from qwen_fast import demo

SIDE = 64


@torch.no_grad()
def sample(pipe, prompt: str, steps: int, guidance: float = 4.0, seed: int = 0) -> torch.Tensor:
    """Latents `[1, S_img, C]` of a picture of SIDE x SIDE pixels, by Heun's method with true guidance."""
    transformer, device = pipe.transformer, pipe.transformer.device
    prompts = [pipe.encode_prompt(prompt=text, device=device) for text in (prompt, " ")]
    side = SIDE // 16
    schedule = qwen_fast.Schedule.from_config(pipe.scheduler.config, steps, image_seq_len=side * side, device=device)
    sigmas = schedule.sigmas.tolist()

    def velocity(latents: torch.Tensor, sigma: float) -> torch.Tensor:
        found = []
        for embeds, mask in prompts:
            output = transformer(
                hidden_states=latents.to(transformer.dtype),
                timestep=torch.full((1,), sigma, device=device, dtype=transformer.dtype),
                encoder_hidden_states=embeds,
                encoder_hidden_states_mask=mask,
                img_shapes=[[(1, side, side)]],
                return_dict=False,
            )[0]
            found.append(output.float())
        conditional, unconditional = found
        combined = unconditional + guidance * (conditional - unconditional)
        return combined * (conditional.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    noise = torch.randn(1, side * side, transformer.config.in_channels, generator=torch.Generator().manual_seed(seed))
    latents = noise.to(device)
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        here = velocity(latents, sigma)
        there = latents + (following - sigma) * here
        if following > 0:
            here = (here + velocity(there, following)) / 2
        latents = latents + (following - sigma) * here
    return latents


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder (default: the demo's)")
    parser.add_argument("--prompt", default="a green circle on a white background")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", default="picture.png")
    options = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    transformer = qwen_fast.QwenImageTransformer2DModel.from_pretrained(options.model, subfolder="transformer")
    pipe = diffusers.QwenImagePipeline.from_pretrained(options.model, transformer=transformer).to(device, dtype)
    latents = sample(pipe, options.prompt, options.steps).to(dtype)
    latents = pipe._unpack_latents(latents, SIDE, SIDE, pipe.vae_scale_factor)
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    with torch.no_grad():
        decoded = pipe.vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
    image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    image.save(options.out)
    print(qwen_fast.report(pipe.transformer))
    return image


if __name__ == "__main__":
    main()
