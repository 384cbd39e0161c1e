"""Pictures that were encoded before: references of an edit come again with each prompt, and their moments are the same.

What is kept is what the VAE's encoder gives, mean and deviation. Pipelines that sample their latents draw them anew each time.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.fingerprint import modules_signature
from ..common.placement import group_keeps_on_disk
from ..common.recent import Recent
from .survey import ENCODES


def moments(vae: nn.Module, state: Any, x: torch.Tensor, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
    """`encode()`, kept for pipelines that keep prompts; of a VAE alone, or where gradients are wanted, nothing is.

    Nor is anything where the encoder's weights cannot be read, such as those that offloading holds on
    `meta` or on disk.

    Args:
        x: `[B, C, 1, H, W]`, the pictures, of which the host reads all values.
    """
    if state.texts is None or state.texts.option is None or torch.is_grad_enabled():
        return encode()
    parts = [(name, getattr(vae, name)) for name in ENCODES]
    content = modules_signature(parts, readable=not any(map(group_keeps_on_disk, vae.modules()))).content
    if content is None:
        return encode()
    if state.pictures is None:
        state.pictures = Recent()
    name = _name(parts, content, state, x)
    found = state.pictures.get(name)
    if found is None:
        found = encode()
        state.pictures.put(name, found)
    return found.clone()  # the caller's own


def _name(parts: list[tuple[str, nn.Module]], content: Any, state: Any, x: torch.Tensor) -> str:
    weights = [parameter for _, part in parts for parameter in part.parameters()]
    places = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    products = torch.is_autocast_enabled(x.device.type), torch.get_float32_matmul_precision(), state.options.vae_memory
    facts = content, places, tuple(x.shape), x.dtype, str(x.device), products
    told = hashlib.sha256(repr(facts).encode())
    told.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
    return told.hexdigest()
