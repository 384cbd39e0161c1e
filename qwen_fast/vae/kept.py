"""Pictures that were encoded before: references of an edit come again with each prompt, and their moments are the same.

What is kept is what the VAE's encoder gives, mean and deviation. Pipelines that sample their latents draw them anew each time.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.fingerprint import modules_signature
from ..common.placement import group_keeps_on_disk
from .survey import ENCODES


class EncodedPictures:
    """The moments of the pictures used last, by content. A copy starts empty.

    Args:
        max_bytes: of all that is kept, the least recently used goes first; one megapixel takes 1 MB in bf16.
    """

    def __init__(self, max_bytes: int = 2**26):
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict) -> "EncodedPictures":
        return EncodedPictures(self.max_bytes)

    def __reduce__(self) -> tuple:
        return EncodedPictures, (self.max_bytes,)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(moments.nbytes for moments in self._kept.values())

    def get(self, name: str, encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What is kept under `name`, or what `encode` gives, which is kept then. The caller's own."""
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
                return found.clone()
        found = encode()
        with self._lock:
            self._kept[name] = found.clone()
            while self._kept and self.nbytes > self.max_bytes:
                self._kept.popitem(last=False)
        return found


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
        state.pictures = EncodedPictures()
    return state.pictures.get(_name(parts, content, state, x), encode)


def _name(parts: list[tuple[str, nn.Module]], content: Any, state: Any, x: torch.Tensor) -> str:
    weights = [parameter for _, part in parts for parameter in part.parameters()]
    places = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    products = torch.is_autocast_enabled(x.device.type), torch.get_float32_matmul_precision(), state.options.vae_memory
    facts = content, places, tuple(x.shape), x.dtype, str(x.device), products
    told = hashlib.sha256(repr(facts).encode())
    told.update(x.detach().cpu().contiguous().view(torch.uint8).numpy())
    return told.hexdigest()
