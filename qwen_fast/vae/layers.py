"""The layers of a VAE as one frame meets them: what each computes on a channels-last picture, how far a row reaches, and
what it costs.

Both VAEs of the family are read by their structure: AutoencoderKLQwenImage, whose causal 3-D convolutions see zeros in all
but their last temporal tap when there is one frame, and AutoencoderKLQwenImage21. The weights stay diffusers' own and are
read at each call. They are read from a VAE that `survey` found as diffusers built it; what is unknown all the same, or placed
by a hook, is a ValueError, which sends the call along diffusers' modules.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwenimage
from torch import nn

from qwen_fast_kernels import rms_norm_silu

from ..common.hooks import is_hooked
from .survey import DECODES, ENCODES

try:
    from diffusers.models.autoencoders import autoencoder_kl_qwenimage21 as qwenimage21
except ImportError:  # an older diffusers
    qwenimage21 = None

# cuDNN adds a bias in a pass of its own, which the next norm saves; a CPU's convolution adds it for nothing.
BIAS_LATER = {"cuda"}
SCORES_BYTES = 1 << 28  # of attention at a time, where no fused kernel takes its heads


def _classes(name: str) -> tuple[type, ...]:
    """The classes of both VAEs called so: name with the families' prefixes."""
    found = [getattr(qwenimage, f"QwenImage{name}", None), getattr(qwenimage21, f"QwenImage21{name}", None)]
    return tuple(cls for cls in found if cls is not None)


class Stream:
    """A picture on its way, channels-last: `value + branch + bias`, a sum that is made where it is needed.

    Attributes:
        value: `[B, C, H, W]`, in channels_last memory format.
        branch: the same, or None.
        bias: `[C]` of the convolution that made the branch, or None.
        own: whether `value` may be written to.
    """

    def __init__(
        self, value: torch.Tensor, branch: torch.Tensor | None = None, bias: torch.Tensor | None = None, own: bool = True
    ):
        self.value, self.branch, self.bias, self.own = value, branch, bias, own

    def total(self) -> torch.Tensor:
        """The sum, which takes the place of `value`."""
        if self.branch is not None:
            if self.bias is not None:
                self.branch += self.bias.view(1, -1, 1, 1)
            self.value = self.value.add_(self.branch) if self.own else self.value + self.branch
            self.branch, self.bias, self.own = None, None, True
        return self.value

    def normed(self, norm: nn.Module, silu: bool = True) -> torch.Tensor:
        """The RMS norm of the sum, activated, as a new picture; `value` becomes the sum."""
        gamma = norm.gamma.reshape(-1)
        if self.branch is None or not self.own:
            return _picture(rms_norm_silu(_pixels(self.total()), gamma, silu=silu), self.value)
        out = rms_norm_silu(_pixels(self.branch), gamma, self.bias, _pixels(self.value), silu)
        self.branch, self.bias = None, None
        return _picture(out, self.value)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pixels(picture: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]` channels-last as `[B * H * W, C]`, the same memory."""
    return picture.permute(0, 2, 3, 1).view(-1, picture.shape[1])


def _picture(pixels: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    batch, _, height, width = like.shape
    return pixels.view(batch, height, width, -1).permute(0, 3, 1, 2)


class Layer:
    """One step of a VAE.

    Attributes:
        name: of its module.
        reach: rows of its input above and below its own that one row of its output depends on; None: all of them.
        up, down: its output has rows * up // down.
        channels: of its output.
        peak: elements alive at its worst, per pixel of its input, the input among them.
        largest: elements of its largest tensor, per pixel of its input.
        flops: of its convolutions, per pixel of its input.
    """

    def __init__(self, name, run, *, channels, peak, largest, flops, reach=0, up=1, down=1):
        self.name, self.run, self.channels, self.peak, self.largest, self.flops = name, run, channels, peak, largest, flops
        self.reach, self.up, self.down = reach, up, down
        self.run: Callable[[Stream], Stream]


# Reading the modules --------------------------------------------------------------------------------------------------


def decoder_layers(vae: nn.Module) -> list[Layer]:
    """The layers of `vae.decode` for one frame, or a ValueError that says which module they cannot be read from."""
    _check_plain(vae, DECODES)
    decoder = vae.decoder
    layers = [_convolution("post_quant_conv", vae.post_quant_conv), _convolution("decoder.conv_in", decoder.conv_in)]
    layers += _middle("decoder.mid_block", decoder.mid_block)
    for name, block in decoder.up_blocks.named_children():
        name = f"decoder.up_blocks.{name}"
        if isinstance(block, _classes("ResidualUpBlock")):
            inside = list(_in_sequence(name, [*block.resnets, *([] if block.upsampler is None else [block.upsampler])]))
            layers += inside if block.avg_shortcut is None else [_residual_up(name, block, inside)]
        elif isinstance(block, _classes("UpBlock")):
            layers += _in_sequence(name, [*block.resnets, *(block.upsamplers or ())])
        else:
            raise ValueError(f"{name} is a {type(block).__name__}")
    return [*layers, _head("decoder.conv_out", decoder)]


def encoder_layers(vae: nn.Module) -> list[Layer]:
    """The layers of `vae.encode` for one frame, or a ValueError as of `decoder_layers`."""
    _check_plain(vae, ENCODES)
    encoder = vae.encoder
    layers = [_convolution("encoder.conv_in", encoder.conv_in)]
    layers += _in_sequence("encoder.down_blocks", encoder.down_blocks)
    layers += _middle("encoder.mid_block", encoder.mid_block)
    return [*layers, _head("encoder.conv_out", encoder), _convolution("quant_conv", vae.quant_conv)]


def _check_plain(vae: nn.Module, parts: tuple[str, ...]) -> None:
    if vae.config.get("patch_size") is not None:
        raise ValueError(f"patch_size={vae.config.patch_size}")
    dtypes = set()
    for part in parts:
        for name, module in getattr(vae, part).named_modules(prefix=part):
            if is_hooked(module):
                raise ValueError(f"a hook on {name}")
            dtypes |= {parameter.dtype for parameter in module.parameters(recurse=False)}
    if len(dtypes) > 1:  # what comes of a product of two is for stock's modules to say
        raise ValueError(f"its weights are {' and '.join(sorted(map(str, dtypes)))}")


def _in_sequence(name: str, modules) -> Iterator[Layer]:
    for index, module in enumerate(modules):
        each = f"{name}.{index}"
        if isinstance(module, _classes("ResidualBlock")):
            yield _residual(each, module)
        elif isinstance(module, _classes("AttentionBlock")):
            yield _attention(each, module)
        elif isinstance(module, _classes("Resample")):
            yield _resample(each, module)
        elif isinstance(module, _classes("ResidualDownBlock")):
            yield _residual_down(each, module)
        else:
            raise ValueError(f"{each} is a {type(module).__name__}")


def _middle(name: str, block: nn.Module) -> list[Layer]:
    first, *others = block.resnets
    pairs = [module for pair in zip(block.attentions, others, strict=True) for module in pair if module is not None]
    return list(_in_sequence(name, [first, *pairs]))


# Convolutions ---------------------------------------------------------------------------------------------------------


def _convolve(x: torch.Tensor, conv: nn.Module, *, bias: bool = True) -> torch.Tensor:
    """A causal convolution of one frame, or an ordinary one; `x` and the result channels-last."""
    weight = conv.weight if conv.weight.ndim == 4 else conv.weight[:, :, -1]
    padding = conv.padding if type(conv) is nn.Conv2d else (conv._padding[2], conv._padding[0])
    bias = conv.bias if bias else None
    return channels_last(F.conv2d(x, weight, bias, conv.stride[-2:], padding, conv.dilation[-2:], conv.groups))


def _later(x: torch.Tensor, conv: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A convolution, and its bias where that is better added later."""
    later = x.device.type in BIAS_LATER
    return _convolve(x, conv, bias=not later), conv.bias if later else None


def _reach(conv: nn.Module) -> int:
    return (conv.kernel_size[-2] - 1) * conv.dilation[-2] // 2


def _flops(conv: nn.Module) -> int:
    """Per pixel of its output."""
    return 2 * conv.out_channels * conv.in_channels // conv.groups * conv.kernel_size[-2] * conv.kernel_size[-1]


def _convolution(name: str, conv: nn.Module) -> Layer:
    def run(stream: Stream) -> Stream:
        return Stream(_convolve(stream.total(), conv))

    into, out = conv.in_channels, conv.out_channels
    return Layer(
        name, run, channels=out, peak=max(2 * into, into + out), largest=max(into, out), flops=_flops(conv), reach=_reach(conv)
    )


def _head(name: str, module: nn.Module) -> Layer:
    norm, conv = module.norm_out, module.conv_out

    def run(stream: Stream) -> Stream:
        normed = stream.normed(norm)
        stream.value = None
        return Stream(_convolve(normed, conv))

    into, out = conv.in_channels, conv.out_channels
    return Layer(
        name, run, channels=out, peak=max(3 * into, into + out), largest=max(into, out), flops=_flops(conv), reach=_reach(conv)
    )


# Blocks ---------------------------------------------------------------------------------------------------------------


def _residual(name: str, block: nn.Module) -> Layer:
    conv1, conv2, shortcut = block.conv1, block.conv2, block.conv_shortcut
    plain = isinstance(shortcut, nn.Identity)

    def run(stream: Stream) -> Stream:
        normed = stream.normed(block.norm1)
        value, own = stream.value, stream.own
        stream.value = None
        if not plain:
            value, own = _convolve(value, shortcut), True
        branch, bias = _later(normed, conv1)
        del normed
        branch = _picture(rms_norm_silu(_pixels(branch), block.norm2.gamma.reshape(-1), bias), branch)
        return Stream(value, *_later(branch, conv2), own=own)

    into, out = conv1.in_channels, conv1.out_channels
    flops = sum(_flops(conv) for conv in (conv1, conv2, *([] if plain else [shortcut])))
    peak = max(3 * into, into + 2 * out, 2 * into + out, 3 * out)
    reach = _reach(conv1) + _reach(conv2)
    return Layer(name, run, channels=out, peak=peak, largest=max(into, out), flops=flops, reach=reach)


def _attention(name: str, block: nn.Module) -> Layer:
    def run(stream: Stream) -> Stream:
        normed = stream.normed(block.norm, silu=False)
        batch, channels, height, width = normed.shape
        tokens = normed.permute(0, 2, 3, 1).view(batch, height * width, channels)
        del normed
        fused = F.linear(tokens, block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        del tokens
        attended = attend(*(part[:, None] for part in fused.chunk(3, dim=-1)))[:, 0]
        del fused
        later = stream.value.device.type in BIAS_LATER
        bias = block.proj.bias
        branch = F.linear(attended, block.proj.weight.flatten(1), None if later else bias)
        branch = branch.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return Stream(stream.value, branch, bias if later else None, stream.own)

    channels = block.proj.out_channels
    flops = _flops(block.to_qkv) + _flops(block.proj)
    return Layer(name, run, channels=channels, peak=5 * channels, largest=3 * channels, flops=flops, reach=None)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(query key^T / sqrt(D)) value of `[B, 1, S, D]`, in memory that grows with S and not with its square."""
    rows = _rows_at_once(query, key, value)
    if rows >= query.shape[2]:
        return F.scaled_dot_product_attention(query, key, value)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for start in range(0, query.shape[2], rows):
        part = query[:, :, start : start + rows]
        out[:, :, start : start + rows] = F.scaled_dot_product_attention(part, key, value)
    return out


def _rows_at_once(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """All where a fused kernel takes them; where scores are written out in fp32, as many as their memory allows."""
    if query.device.type == "cpu":
        return query.shape[2]
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    if torch.backends.cuda.can_use_efficient_attention(parameters):
        return query.shape[2]
    return max(SCORES_BYTES // (query.shape[0] * key.shape[2] * 4), 1)


def _resample(name: str, block: nn.Module) -> Layer:
    if block.mode.startswith("upsample"):
        nearest, conv = block.resample
        if tuple(nearest.scale_factor) != (2.0, 2.0) or nearest.mode != "nearest-exact":
            raise ValueError(f"{name} upsamples by {nearest.scale_factor}, {nearest.mode}")

        def run(stream: Stream) -> Stream:
            # Twice each pixel, whatever its dtype: stock's way through fp32 gives the same bits.
            large = channels_last(F.interpolate(stream.total(), scale_factor=2.0, mode="nearest-exact"))
            stream.value = None
            return Stream(_convolve(large, conv))

        into, out = conv.in_channels, conv.out_channels
        costs = {"peak": max(5 * into, 4 * into + 4 * out), "largest": 4 * max(into, out), "flops": 4 * _flops(conv)}
        return Layer(name, run, channels=out, **costs, reach=-(-_reach(conv) // 2), up=2)
    if block.mode.startswith("downsample"):
        pad, conv = block.resample
        if tuple(conv.stride) != (2, 2):
            raise ValueError(f"{name} downsamples by {conv.stride}")

        def run(stream: Stream) -> Stream:
            padded = channels_last(pad(stream.total()))
            stream.value = None
            return Stream(_convolve(padded, conv))

        into, out = conv.in_channels, conv.out_channels
        costs = {"peak": max(2 * into, into + -(-out // 4)), "largest": into, "flops": -(-_flops(conv) // 4)}
        return Layer(name, run, channels=out, **costs, reach=max(pad.padding), down=2)
    raise ValueError(f"{name} resamples as {block.mode!r}")


# Blocks of AutoencoderKLQwenImage21, with a shortcut around all their layers ------------------------------------------


def _around(layers: list[Layer], stream: Stream) -> tuple[torch.Tensor, Stream]:
    """The stream's value, kept for the shortcut, and what the layers make of it."""
    before = stream.total()
    inner = Stream(before, own=False)
    stream.value = None
    for layer in layers:
        inner = layer.run(inner)
    return before, inner


def _residual_up(name: str, block: nn.Module, layers: list[Layer]) -> Layer:
    def run(stream: Stream) -> Stream:
        before, inner = _around(layers, stream)
        return Stream(inner.total(), duplicated(before, block.avg_shortcut))

    into, out, size = block.in_dim, layers[-1].channels, block.avg_shortcut.factor_s
    # The input is kept beside the layers, then the larger picture, its shortcut and the channels gathered for it.
    peak = max(into + max(layer.peak for layer in layers), into + (2 * size**2 + 1) * out)
    return _combined(name, run, layers, peak, size**2 * out, up=size)


def _residual_down(name: str, block: nn.Module) -> Layer:
    layers = list(_in_sequence(name, [*block.resnets, *([] if block.downsampler is None else [block.downsampler])]))

    def run(stream: Stream) -> Stream:
        before, inner = _around(layers, stream)
        shortcut = block.avg_shortcut(before[:, :, None])[:, :, 0]
        return Stream(inner.total(), channels_last(shortcut))

    shortcut = block.avg_shortcut
    into, out, down = shortcut.in_channels, layers[-1].channels, shortcut.factor_s
    # diffusers' mean pads the missing frames with zeros and copies the picture once more.
    means = into + out + 2 * shortcut.factor_t * into
    peak = max(into + max(layer.peak for layer in layers), means)
    return _combined(name, run, layers, peak, shortcut.factor_t * into, down=down)


def _combined(name: str, run: Callable, layers: list[Layer], peak: int, largest: int, up: int = 1, down: int = 1) -> Layer:
    """Layers that run together: their reach and FLOPs per pixel of the first one's input. A resampling layer is the last."""
    reach, flops = sum(layer.reach for layer in layers), sum(layer.flops for layer in layers)
    costs = {"peak": peak, "largest": max(largest, *(layer.largest for layer in layers)), "flops": flops}
    return Layer(name, run, channels=layers[-1].channels, **costs, reach=reach, up=up, down=down)


def duplicated(x: torch.Tensor, shortcut: nn.Module) -> torch.Tensor:
    """What QwenImage21DupUp3D makes of the first frame: each pixel of the larger picture takes a channel of its own."""
    batch, _, height, width = x.shape
    size, last = shortcut.factor_s, (shortcut.factor_t - 1) * shortcut.factor_s**2
    shape = (batch, shortcut.out_channels, height * size, width * size)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    first = torch.arange(shortcut.out_channels, device=x.device) * shortcut.factor + last
    for place in range(size**2):
        channels = torch.div(first + place, shortcut.repeats, rounding_mode="floor")
        out[:, :, place // size :: size, place % size :: size] = x.index_select(1, channels)
    return out
