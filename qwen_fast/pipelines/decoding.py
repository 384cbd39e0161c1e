"""Latents as pictures, for those who keep them beside a call of the pipeline or without one."""

from typing import Any

import torch


def decoded_latents(pipe: Any, latents: torch.Tensor, height: int, width: int, output_type: str) -> Any:
    """Packed latents `[B, S_img, C]` as pictures, as stock's `__call__` makes them, in the VAE's dtype."""
    latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).to(pipe.vae.dtype)

    def per_channel(values: list[float]) -> torch.Tensor:
        return torch.tensor(values).view(1, pipe.vae.config.z_dim, 1, 1, 1).to(latents.device, latents.dtype)

    # Division by a rounded reciprocal is what stock does; a product with the deviation rounds otherwise.
    inverse_std = 1.0 / per_channel(pipe.vae.config.latents_std)
    latents = latents / inverse_std + per_channel(pipe.vae.config.latents_mean)
    image = pipe.vae.decode(latents, return_dict=False)[0][:, :, 0]
    return pipe.image_processor.postprocess(image, output_type=output_type)
