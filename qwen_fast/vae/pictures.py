"""The VAE for pictures: a video's causal 3-D convolutions see zeros in all but their last temporal tap when there is one
frame, so that frame goes through 2-D convolutions with that tap, and nothing is kept for frames that will not come.

A plain VAE runs layer by layer, channels-last, norm and activation in one pass, and in bands of rows where memory is short;
one with hooks runs along diffusers' own modules. Parameters stay diffusers' own (the tap is a view), so do tiling and slicing;
more than one frame goes stock's way.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d as STOCK_CONV
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn

from ..common.hooks import OURS, rebind_forward
from ..common.options import Options, check_vae_memory
from ..common.own import foreign_methods, foreign_on
from ..common.pickled import EqualsStock, PickledAsStock
from ..common.proofs import require_vae
from ..common.stages import stage
from ..common.state import STATE, State, logger
from .bands import MOST_ON_CUDA, Plan, choose, memory_limit, run, whole_peak
from .kept import moments
from .layers import Layer, decoder_layers, encoder_layers
from .survey import DECODES, ENCODES, foreign_parts

STOCK = diffusers.AutoencoderKLQwenImage
STOCK_OF_21 = getattr(diffusers, "AutoencoderKLQwenImage21", None)  # newer than the oldest diffusers we take
_METHODS = ("encode", "decode", "_encode", "_decode")
_NAMED = 6  # of what was found to be somebody else's, in one reason; edited padding is in each of 60 convolutions
USERS = "_qwen_fast_users"  # the attribute that an attached VAE carries; one that was enabled alone also has a state


class _Active(NamedTuple):
    """The VAE of the call that runs.

    Attributes:
        vae, state: where what it does is counted.
        codes: it codes right now, and was found to be stock's own; in the rest of a call its modules are anybody's to call.
    """

    vae: nn.Module
    state: State
    codes: bool = False


_ACTIVE: ContextVar[_Active | None] = ContextVar("qwen_fast_vae", default=None)


class _Users(weakref.WeakSet):
    """States of the pipelines that use a VAE. Those of a copy attach to it themselves."""

    def __deepcopy__(self, memo: dict) -> "_Users":
        return _Users()


class QwenImageCausalConv3d(PickledAsStock, STOCK_CONV):
    """diffusers' convolution; while a VAE codes that is as diffusers built it, one frame without a past goes through the last
    temporal tap alone.

    Stock's methods are called by their class here and below: who took `forward` before `disable` has it afterwards too.
    """

    STANDS_FOR = STOCK_CONV

    def forward(self, x: torch.Tensor, *past_frames: torch.Tensor | None) -> torch.Tensor:
        width, _, height, _, past, _ = self._padding
        one_frame = x.shape[2] == 1 and all(frames is None for frames in past_frames) and past == self.kernel_size[0] - 1
        active = None if torch.compiler.is_compiling() else _ACTIVE.get()
        if not one_frame or active is None or not active.codes:
            return STOCK_CONV.forward(self, x, *past_frames)
        frame = F.conv2d(
            x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], (height, width), self.dilation[1:], self.groups
        )
        return frame[:, :, None]


class _Pictures(PickledAsStock):
    """Before a VAE of diffusers; where it is active, one frame is coded without the caches that serve a video's next ones."""

    NOT_PICKLED = (STATE, USERS)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        state = _state(self)
        if state is None:
            return _class_of_stock(self)._encode(self, x)
        with stage("vae"):  # which a pipeline calls from within its own methods
            if not _is_stocks_own(self, state, ENCODES):
                return _class_of_stock(self)._encode(self, x)
            _check(x, "x", self.encoder.conv_in.in_channels)
            large = x.shape[-1] > self.tile_sample_min_width or x.shape[-2] > self.tile_sample_min_height

            def encode(x: torch.Tensor) -> torch.Tensor:
                if x.shape[2] > 1 or (self.use_tiling and large) or self.config.get("patch_size") is not None:
                    return _class_of_stock(self)._encode(self, x)

                def encode_frame() -> torch.Tensor:
                    return _code(self, "encode", state, x, encoder_layers, lambda: self.quant_conv(self.encoder(x)))

                return moments(self, state, x, encode_frame)

            with _active(_Active(self, state, codes=True)):
                return _by_picture(state, encode, x)

    def _decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        state = _state(self)
        if state is None or not _is_stocks_own(self, state, DECODES):
            return _class_of_stock(self)._decode(self, z, return_dict=return_dict)
        _check(z, "z", self.post_quant_conv.in_channels)
        ratio = self.spatial_compression_ratio
        smallest = self.tile_sample_min_width // ratio, self.tile_sample_min_height // ratio
        large = z.shape[-1] > smallest[0] or z.shape[-2] > smallest[1]
        first = {} if isinstance(self, STOCK) else {"first_chunk": True}

        def decode(z: torch.Tensor) -> torch.Tensor:
            if z.shape[2] > 1 or (self.use_tiling and large) or self.config.get("patch_size") is not None:
                return _class_of_stock(self)._decode(self, z, return_dict=False)[0]
            image = _code(self, "decode", state, z, decoder_layers, lambda: self.decoder(self.post_quant_conv(z), **first))
            return image.clamp_(-1.0, 1.0) if not image.requires_grad else image.clamp(-1.0, 1.0)

        with _active(_Active(self, state, codes=True)):
            image = _by_picture(state, decode, z)
        return DecoderOutput(sample=image) if return_dict else (image,)


class AutoencoderKLQwenImage(_Pictures, STOCK, metaclass=EqualsStock):
    """diffusers' VAE, for pictures."""

    STANDS_FOR = STOCK


_SWAPS = {STOCK: AutoencoderKLQwenImage, STOCK_CONV: QwenImageCausalConv3d}
if STOCK_OF_21 is not None:

    class AutoencoderKLQwenImage21(_Pictures, STOCK_OF_21, metaclass=EqualsStock):
        """diffusers' VAE of Qwen-Image-2.1, for pictures."""

        STANDS_FOR = STOCK_OF_21

    _SWAPS[STOCK_OF_21] = AutoencoderKLQwenImage21


def _class_of_stock(vae: nn.Module) -> type:
    """The class of diffusers that `vae` is of, enabled or not."""
    return STOCK if isinstance(vae, STOCK) else STOCK_OF_21


def _state(vae: nn.Module) -> State | None:
    """Of the pipeline whose call this is, or of the VAE itself where it was enabled alone."""
    if torch.compiler.is_compiling():
        return None
    active = _ACTIVE.get()
    return active.state if active is not None and active.vae is vae else vae.__dict__.get(STATE)


def _is_stocks_own(vae: nn.Module, state: State, parts: tuple[str, ...]) -> bool:
    """Whether these parts may be gone around; if not, all of them run as in stock, which is counted as a fallback.

    Methods of the VAE that somebody replaced have been called by then, and are named. Its pipeline does so where it has one.
    """
    if vae.__dict__.get(STATE) is state:
        for name in foreign_methods(type(vae), _METHODS[:2]) + foreign_on(vae, _METHODS):
            state.fall_back(f"{name} is not diffusers' own, and is called as it is")
    found = sorted(foreign_parts(vae, _class_of_stock(vae), parts))
    if found:
        found[_NAMED:] = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
        state.fall_back(f"the VAE codes as in stock, for what is not diffusers' or torch's own: {', '.join(found)}")
    return not found


def _by_picture(state: State, code: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """`code(batch)`; with `batch_invariant` of each picture by itself, in memory of its own."""
    if not state.options.batch_invariant:
        return code(batch)
    return torch.cat([code(one.clone(memory_format=torch.contiguous_format)) for one in batch.split(1)])


def _code(
    vae: nn.Module, what: str, state: State, x: torch.Tensor, read: Callable[..., list[Layer]], along_modules: Callable
) -> torch.Tensor:
    """One frame `[B, C, 1, H, W]` through all layers, or along the modules where they have to be called."""
    state.calls[f"vae {what}"] += 1
    layers = _readable(vae, read, x)
    if isinstance(layers, str):
        state.vae_note = f"{what}: along diffusers' modules, since {layers}"
        return along_modules()
    require_vae(state, vae, x.dtype, x.device)
    with torch.no_grad():
        return _in_memory(what, layers, x[:, :, 0], state)[:, :, None]


def _readable(vae: nn.Module, read: Callable[..., list[Layer]], x: torch.Tensor) -> list[Layer] | str:
    """Its layers, or why diffusers' modules have to be called."""
    if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in vae.parameters())):
        return "gradients are wanted"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is on"
    try:
        return read(vae)
    except ValueError as error:
        return str(error)


def _in_memory(what: str, layers: list[Layer], x: torch.Tensor, state: State) -> torch.Tensor:
    """`[B, C, H, W]` through the layers, picture by picture or in bands where the memory is short.

    A plan for which the memory is too short all the same is given up, and one made that takes half of it.
    """
    limit = memory_limit(state.options.vae_memory, x.device, enough=whole_peak(layers, x.shape, x.element_size()))
    plan = _plan(layers, x, limit)
    if limit is not None and plan.peak > limit:
        logger.warning(
            "the VAE cannot %s a picture of this size in %.1f MiB; it takes %.1f MiB in its smallest bands.",
            what,
            limit / 2**20,
            plan.peak / 2**20,
        )
    while True:
        if plan.bands > 1 and len(x) > 1:
            return torch.cat([_in_memory(what, layers, one, state) for one in x.split(1)])
        state.vae_note = f"{what}: {x.shape[-2]}x{x.shape[-1]} {_told(layers, plan)}"
        given = state.options.vae_memory
        if state.options.batch_invariant and plan != _plan(layers, x, None if given == "auto" else given):
            state.not_invariant(f"memory was too short to {what} a picture but {_told(layers, plan)}")
        with contextlib.suppress(torch.OutOfMemoryError):
            found = run(layers, x, plan)
            if plan.bands > 1:
                state.calls["vae bands"] += plan.bands
            return found
        failed, plan = plan, _plan(layers, x, plan.peak // 2)
        if plan.peak >= failed.peak:
            return run(layers, x, plan)  # there is no smaller one: the error is the user's to see
        state.calls["vae out of memory"] += 1
        logger.warning(
            "memory was too short to %s a picture %s; it is coded %s.", what, _told(layers, failed), _told(layers, plan)
        )


def _plan(layers: list[Layer], x: torch.Tensor, limit: int | None) -> Plan:
    return choose(layers, x.shape, x.element_size(), limit, MOST_ON_CUDA if x.is_cuda else None)


def _told(layers: list[Layer], plan: Plan) -> str:
    if plan.bands == 1:
        return f"whole, {plan.peak / 2**20:.1f} MiB by estimate"
    return (
        f"in {plan.bands} bands of {plan.rows} rows from {layers[plan.first].name} to {layers[plan.last - 1].name}, "
        f"{plan.peak / 2**20:.1f} MiB by estimate, {plan.overhead:.1%} computed twice"
    )


def _check(x: torch.Tensor, name: str, channels: int) -> None:
    if x.ndim != 5 or x.shape[1] != channels:
        raise ValueError(f"`{name}` has shape {tuple(x.shape)}; [batch, {channels} channels, frames, height, width] is needed.")


@contextlib.contextmanager
def _active(active: _Active) -> Iterator[None]:
    token = _ACTIVE.set(active)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


@contextlib.contextmanager
def images(vae: nn.Module, state: State) -> Iterator[None]:
    """Inside, `vae` codes single frames as pictures in this thread, counted into `state`, if it is attached to it."""
    if state not in vae.__dict__.get(USERS, ()):
        yield
        return
    with _active(_Active(vae, state)):
        yield


def attach(vae: nn.Module, state: State) -> str | None:
    """Make `vae` ours for the calls of the pipeline that `state` belongs to; returns why it cannot be, or None."""
    known = [stock for stock, ours in _SWAPS.items() if stock is not STOCK_CONV and type(vae) in (stock, ours)]
    if not known:
        return f"vae is a {type(vae).__name__}, not an AutoencoderKLQwenImage"
    if USERS not in vae.__dict__:
        vae.__dict__[USERS] = _Users()
        _swap(vae, _SWAPS)
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
        _swap(vae, {ours: stock for stock, ours in _SWAPS.items()})


def enable_vae(vae: nn.Module, *, memory: int | str | None = "auto") -> nn.Module:
    """Accelerate a VAE alone, in place, for every caller. Calling it again changes the option.

    Args:
        vae: an AutoencoderKLQwenImage or AutoencoderKLQwenImage21 of diffusers; no subclass of them.
        memory: bytes that the activations of `encode` and `decode` may take, beyond the weights; a larger picture is coded in
            bands of rows, with the same result. "auto": what is free on a CUDA device, no limit elsewhere. None: no limit.
    Returns:
        The same object. `report(vae)` says what it did.
    Raises:
        ValueError: another VAE, by name; `memory` that is none of these.
    """
    check_vae_memory("memory", memory)
    state = vae.__dict__.get(STATE) or State()
    reason = attach(vae, state)
    if reason is not None:
        raise ValueError(f"`vae` cannot be accelerated: {reason}.")
    vae.__dict__[STATE] = state
    state.vae, state.options = vae, Options(vae_memory=memory)
    return vae


def disable_vae(vae: nn.Module) -> nn.Module:
    """Undo `enable_vae`; pipelines that were enabled with this VAE keep theirs.

    Returns:
        The same object.
    """
    state = vae.__dict__.pop(STATE, None)
    if state is not None:
        detach(vae, state)
    return vae


def description(vae: nn.Module, state: State) -> str:
    """For `report`: how pictures are coded, from which size on in bands, and what the last one took."""
    parts = ["one frame through 2-D convolutions"]
    parameter = next(vae.parameters(), torch.empty(0))  # somebody may have taken all its parts away
    limit = memory_limit(state.options.vae_memory, parameter.device)
    layers = None
    if limit is not None and not foreign_parts(vae, _class_of_stock(vae), DECODES):
        with contextlib.suppress(ValueError):
            layers = decoder_layers(vae)
    if layers is not None:
        patch = 2 * vae.spatial_compression_ratio
        bytes_of_patch = whole_peak(layers, torch.Size((1, vae.config.z_dim, 2, 2)), parameter.element_size())
        largest = int((limit / bytes_of_patch) ** 0.5) * patch
        parts.append(f"decoded in bands of rows above {largest}x{largest}, where {limit / 2**20:.0f} MiB are not enough")
    if state.vae_note is not None:
        parts.append(f"last {state.vae_note}")
    return "; ".join(parts)


def _swap(vae: nn.Module, classes: dict[type, type]) -> None:
    for module in vae.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
            rebind_forward(module)


for _stock, _ours in _SWAPS.items():
    _ours.__module__ = _stock.__module__
setattr(QwenImageCausalConv3d.forward, OURS, True)
