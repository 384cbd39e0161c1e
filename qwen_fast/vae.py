"""The VAE for pictures: a video's causal 3-D convolutions see zeros in all but their last temporal tap when there is one
frame, so that frame goes through 2-D convolutions with that tap, and nothing is kept for frames that will not come.

Parameters stay diffusers' own (the tap is a view), so do tiling, slicing and hooks; more than one frame goes stock's way.
"""

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d as STOCK_CONV
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from .hooks import OURS, rebind_forward
from .reporting import State

STOCK = diffusers.AutoencoderKLQwenImage
USERS = "_qwen_fast_users"  # the one attribute that an attached VAE carries
_ACTIVE: ContextVar[tuple[nn.Module, State] | None] = ContextVar("qwen_fast_vae", default=None)


class QwenImageCausalConv3d(STOCK_CONV):
    """diffusers' convolution; inside `images`, one frame without a past goes through the last temporal tap alone."""

    def forward(self, x: torch.Tensor, cache_x: torch.Tensor | None = None) -> torch.Tensor:
        width, _, height, _, past, _ = self._padding
        taps = self.kernel_size[0]
        one_frame = x.shape[2] == 1 and cache_x is None and past == taps - 1
        if not one_frame or torch.compiler.is_compiling() or _ACTIVE.get() is None:
            return super().forward(x, cache_x)
        frame = F.conv2d(
            x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (height, width), self.dilation[1:], self.groups
        )
        return frame[:, :, None]


class AutoencoderKLQwenImage(STOCK):
    """diffusers' VAE; inside `images`, one frame is coded without the caches that serve a video's next frames."""

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        tiled = self.use_tiling and (x.shape[-1] > self.tile_sample_min_width or x.shape[-2] > self.tile_sample_min_height)
        if not self._takes(x, tiled):
            return super()._encode(x)
        _ACTIVE.get()[1].calls["vae encode"] += 1
        return self.quant_conv(self.encoder(x))

    def _decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        ratio = self.spatial_compression_ratio
        smallest = self.tile_sample_min_width // ratio, self.tile_sample_min_height // ratio
        tiled = self.use_tiling and (z.shape[-1] > smallest[0] or z.shape[-2] > smallest[1])
        if not self._takes(z, tiled):
            return super()._decode(z, return_dict=return_dict)
        _ACTIVE.get()[1].calls["vae decode"] += 1
        image = self.decoder(self.post_quant_conv(z)).clamp(-1.0, 1.0)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def _takes(self, x: torch.Tensor, tiled: bool) -> bool:
        active = None if torch.compiler.is_compiling() else _ACTIVE.get()
        return active is not None and active[0] is self and x.shape[2] == 1 and not tiled


@contextlib.contextmanager
def images(vae: nn.Module, state: State) -> Iterator[None]:
    """Inside, `vae` codes single frames as pictures in this thread, counted into `state`, if it is attached to it."""
    if state not in vae.__dict__.get(USERS, ()):
        yield
        return
    token = _ACTIVE.set((vae, state))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def attach(vae: nn.Module, state: State) -> str | None:
    """Make `vae` ours for the calls of the pipeline that `state` belongs to; returns why it cannot be, or None."""
    if type(vae) not in (STOCK, AutoencoderKLQwenImage):
        return f"vae is a {type(vae).__name__}, not an AutoencoderKLQwenImage"
    if USERS not in vae.__dict__:
        vae.__dict__[USERS] = weakref.WeakSet()
        _swap(vae, {STOCK: AutoencoderKLQwenImage, STOCK_CONV: QwenImageCausalConv3d})
    vae.__dict__[USERS].add(state)
    return None


def detach(vae: nn.Module, state: State) -> None:
    """Take the pipeline of `state` off `vae`; the last one makes it stock again."""
    users = vae.__dict__.get(USERS)
    if users is None:
        return
    users.discard(state)
    if not users:
        del vae.__dict__[USERS]
        _swap(vae, {AutoencoderKLQwenImage: STOCK, QwenImageCausalConv3d: STOCK_CONV})


def _swap(vae: nn.Module, classes: dict[type, type]) -> None:
    for module in vae.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            rebind_forward(module)


for _ours, _stock in ((AutoencoderKLQwenImage, STOCK), (QwenImageCausalConv3d, STOCK_CONV)):
    _ours.__module__ = _stock.__module__
setattr(QwenImageCausalConv3d.forward, OURS, True)
