"""One Qwen-Image block over joint token rows: fused operators around diffusers' own projections."""

import contextlib
import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn

from qwen_fast_kernels import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm, linear_gelu, qk_norm_rope

from .attention import attend
from .hooks import is_hooked, is_plain_linear
from .layout import Layout
from .modulation import BlockModulation


class Address(NamedTuple):
    """Which row of a modulation table each token takes.

    Attributes:
        step_index: `[1]` on the device.
        token_rows: `[R]` int32, a token's own row where it is not negative; None: the step's row for all.
    """

    step_index: torch.Tensor
    token_rows: torch.Tensor | None


class Beside:
    """A second stream of a CUDA device, on which the text goes its way while the image's products run.

    A prompt's products are small and read as many weights as the image's: alone they take 3 to 13 % of a step.
    """

    def __init__(self, device: torch.device):
        self._stream = _second_stream(device)
        self._read: list[object] = []

    def fork(self, *read: object) -> None:
        """What is enqueued beside from now on comes after what is enqueued on the current stream so far.

        Args:
            read: tensors of the current stream that are read beside: they stay allocated until `join`.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._read += read

    def join(self) -> None:
        """What is enqueued on the current stream from now on comes after all that was enqueued beside."""
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._read.clear()

    def __enter__(self) -> None:
        self._inside = torch.cuda.stream(self._stream)
        self._inside.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inside.__exit__(*error)


def _second_stream(device: torch.device) -> torch.cuda.Stream:
    """One of each device and thread: what a thread captures must not get another's work."""
    streams = _STREAMS.__dict__.setdefault("of", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


_STREAMS = threading.local()


class Part:
    """The text or the image rows on their way through the blocks.

    Args:
        residual: `[R, C]`.
        is_text: which rows of the modulations they take.
        address: of these rows.
    """

    def __init__(self, residual: torch.Tensor, is_text: bool, address: Address):
        self.residual, self.address = residual, address
        self.normed: torch.Tensor | None = None
        self.branch = torch.empty_like(residual)
        self._txt_rows = residual.shape[0] if is_text else 0
        # diffusers clips at the end of each block, and in fp16 only.
        self._clips = residual.dtype == torch.float16

    def norm(self, shift: torch.Tensor, scale: torch.Tensor) -> None:
        """The first norm of a block."""
        if not len(self.residual):
            self.normed = self.residual
            return
        step_index, token_rows = self.address
        self.normed = ada_layer_norm(self.residual, shift, scale, step_index, self._txt_rows, token_rows)

    def gate(self, gate: torch.Tensor) -> None:
        """The last gated residual of a block alone."""
        self.normed = None
        if len(self.residual):
            step_index, token_rows = self.address
            self.residual = gated_residual(
                self.residual, self.branch, gate, step_index, self._txt_rows, token_rows, self._clips
            )

    def gate_and_norm(self, gate: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, *, ends_block: bool) -> None:
        """A gated residual and the norm behind it."""
        if not len(self.residual):
            return
        step_index, token_rows = self.address
        clip = self._clips and ends_block
        self.residual, self.normed = gated_residual_ada_layer_norm(
            self.residual, self.branch, gate, shift, scale, step_index, self._txt_rows, token_rows, clip=clip
        )


class Rows:
    """Text and image rows of all sequences on their way through the blocks of one forward, and the buffers they share.

    Args:
        block: any block, for the sizes.
        text, image: `[R_txt, C]` and `[R_img, C]`.
        layout: where the sequences lie.
        attention: the option, see `attention.attend`.
        beside: where the text's own work goes; None: in turn with the image's.
    """

    def __init__(
        self,
        block: nn.Module,
        text: torch.Tensor,
        image: torch.Tensor,
        layout: Layout,
        address: Address,
        attention: str,
        beside: Beside | None = None,
    ):
        attn, split, token_rows = block.attn, layout.txt_rows, address.token_rows
        own = (None, None) if token_rows is None else (token_rows[:split], token_rows[split:])
        self.text: Part | None = Part(text, True, Address(address.step_index, own[0]))
        self.image = Part(image, False, Address(address.step_index, own[1]))
        self.layout, self.attention = layout, attention
        self.head_dim = attn.inner_dim // attn.heads
        self._qkv = image.new_empty(3, layout.rows, attn.inner_dim)  # in the order of attention
        self._text_qkv = image.new_empty(3, split, attn.inner_dim)
        self._beside = beside
        if beside is not None:
            beside.fork()

    @property
    def normed(self) -> torch.Tensor | None:
        """The image rows after the norm that comes next; None where no block has left it."""
        return self.image.normed

    def join(self) -> None:
        """Before someone else reads the text rows."""
        if self._beside is not None:
            self._beside.join()

    def _aside(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._beside is None else self._beside

    def begin(self, modulation: BlockModulation) -> None:
        """The first norm of a block, where the block before has not left it."""
        if self._beside is not None:
            self._beside.fork()
        if self.text is not None:
            with self._aside():
                self.text.norm(modulation.shift1, modulation.scale1)
        self.image.norm(modulation.shift1, modulation.scale1)

    def attend(self, block: nn.Module, modulation: BlockModulation, *, drop_text: bool = False) -> None:
        """Attention, its gated residual and the second norm.

        Args:
            drop_text: keep the image rows only from here on: nothing reads the text that the last block would give.
        """
        attn, layout, text, image = block.attn, self.layout, self.text, self.image
        projections = ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj), (attn.to_v, attn.add_v_proj))
        if text is not None:
            with self._aside():
                for rows, (_, linear) in zip(self._text_qkv, projections, strict=True):
                    linear_into(linear, text.normed, rows)
        for rows, (linear, _) in zip(self._qkv, projections, strict=True):
            for own, places in layout.images:
                linear_into(linear, image.normed[own], rows[places])
        self.join()
        query, key, value = self._qkv.unflatten(-1, (-1, self.head_dim))
        weights = (attn.norm_q.weight, attn.norm_k.weight, attn.norm_added_q.weight, attn.norm_added_k.weight)
        rope, eps, moved = layout.rope, attn.norm_q.eps, self._text_qkv.unflatten(-1, (-1, self.head_dim))
        qk_norm_rope(query, key, *weights, rope, layout.txt_rows, eps, value, moved, layout.places)
        attended = attend(query, key, value, layout, attn.processor, self.attention)
        if self._beside is not None and not drop_text:
            self._beside.fork(*attended)
        gates = modulation.gate1, modulation.shift2, modulation.scale2
        if drop_text:
            self.text = None
        elif text is not None:
            with self._aside():
                linear_into(attn.to_add_out, layout.text_of(attended), text.branch)
                text.gate_and_norm(*gates, ends_block=False)
        for own, piece, places in layout.images_of(attended):
            linear_into(attn.to_out[0], piece[places], image.branch[own])
        image.gate_and_norm(*gates, ends_block=False)

    def feed_forward(self, block: nn.Module) -> None:
        """Both streams' MLPs; their gated residual is `end` or `end_and_begin`."""
        if self.text is not None:
            with self._aside():
                feed_forward_into(block.txt_mlp, self.text.normed, self.text.branch)
        feed_forward_into(block.img_mlp, self.image.normed, self.image.branch)

    def end(self, gate: torch.Tensor) -> None:
        """The block's last gated residual alone."""
        if self.text is not None:
            with self._aside():
                self.text.gate(gate)
        self.image.gate(gate)

    def end_and_begin(self, gate: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> None:
        """The block's last gated residual and the norm that follows it, of the next block or of the output."""
        if self.text is not None:
            with self._aside():
                self.text.gate_and_norm(gate, shift, scale, ends_block=True)
        self.image.gate_and_norm(gate, shift, scale, ends_block=True)


def linear_into(module: nn.Module, rows: torch.Tensor, out: torch.Tensor) -> None:
    """`out[:] = module(rows)`; a plain linear layer writes there itself."""
    if rows.shape[0] == 0:
        return
    if not is_plain_linear(module) or module.weight.dtype != rows.dtype:
        out.copy_(module(rows))
    elif module.bias is None:
        torch.mm(rows, module.weight.t(), out=out)
    else:
        torch.addmm(module.bias, rows, module.weight.t(), out=out)


def feed_forward_into(module: FeedForward, rows: torch.Tensor, out: torch.Tensor) -> None:
    """`out[:] = module(rows)`, for a feed-forward with tanh-approximated GELU."""
    if rows.shape[0] == 0:
        return
    up, down = module.net[0].proj, module.net[2]
    if is_plain_linear(up) and up.weight.dtype == rows.dtype:
        hidden = linear_gelu(rows, up.weight, up.bias)
    else:
        hidden = F.gelu(up(rows), approximate="tanh")
    linear_into(down, hidden, out)


def stock_reason(block: nn.Module) -> str | None:
    """Why `block` has to run as diffusers wrote it, or None."""
    attn = block.attn
    if type(attn.processor) is not QwenDoubleStreamAttnProcessor2_0:
        return f"attention processor {type(attn.processor).__name__}"
    if getattr(attn.processor, "_parallel_config", None) is not None:
        return "context parallelism"
    norms = (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k)
    if any(type(norm) is not RMSNorm or norm.weight is None or norm.bias is not None for norm in norms):
        return "query and key norms that are not RMSNorm with a weight"
    layer_norms = (block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2)
    for norm in layer_norms:
        if type(norm) is not nn.LayerNorm or norm.weight is not None or norm.eps != 1e-6:
            return "layer norms that are not LayerNorm without affine"
    mlps = (block.img_mlp, block.txt_mlp)
    for mlp in mlps:
        activation = mlp.net[0]
        if type(mlp) is not FeedForward or type(activation) is not GELU or activation.approximate != "tanh":
            return "a feed-forward that is not diffusers' with tanh GELU"
    read_around = (attn, *norms, *layer_norms, *mlps, *(layer for mlp in mlps for layer in mlp.net[:2]))
    if any(is_hooked(module) for module in read_around):
        return "a hook inside a block"
    return None
