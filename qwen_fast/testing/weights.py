"""Random weights of which every part of a model shows in its output."""

import math
import zlib

import torch
from torch import nn


@torch.no_grad()
def initialize(module: nn.Module, name: str, seed: int, *, on_device: bool = False) -> None:
    """Overwrite all parameters so that every layer carries its share of the output (unit gain).

    Weights are N(0, 1 / fan_in), biases 0.2 * N, norm weights 1 + 0.2 * N; biases of modulations get another 0.5 * N.
    With default initialisation a small model is a blind test: its gates are nearly 0, and zeroing the text MLP of the
    first block moves the latents of 4 steps by 0.06 %, against 18 % here with seed 0 (5 to 20 % with others). Norm
    weights of 1 would hide the rounding before them.

    Args:
        module (nn.Module): changed in place.
        name (str): of the component, mixed with each parameter's name and the seed.
        seed (int): see `build_checkpoint`.
        on_device (bool): draw where each parameter is, which takes 20 B parameters on a GPU seconds; other kinds of
            devices then draw other values.
    """
    embeddings = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    for parameter_name, parameter in module.named_parameters():
        generator = torch.Generator(parameter.device if on_device else "cpu")
        generator.manual_seed(zlib.crc32(f"{name}.{parameter_name}/{seed}".encode()))

        def normal(shape: torch.Size = parameter.shape, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)

        if parameter_name.endswith("bias"):
            values = 0.2 * normal()
            if "_mod." in parameter_name or parameter_name.startswith("norm_out.linear."):
                values += 0.5 * normal()
        elif parameter.ndim == 1 or parameter_name.endswith("gamma"):
            values = 1 + 0.2 * normal()
        elif id(parameter) in embeddings:
            values = normal()  # a row is looked up, not summed: its fan-in is 1
        else:
            # The VAE's causal convolutions see one frame: of a kernel's taps in time, only the last meets data.
            fan_in = math.prod(parameter.shape[1:]) // (parameter.shape[2] if parameter.ndim == 5 else 1)
            values = normal() / math.sqrt(fan_in)
        parameter.copy_(values)
