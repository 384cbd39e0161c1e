"""One Qwen-Image block over joint token rows: fused operators around diffusers' own projections."""

from typing import NamedTuple

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0
from torch import nn

from qwen_fast_kernels import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm, qk_norm_rope

from ..common.hooks import is_hooked
from .attention import attend
from .layout import Layout
from .linear import feed_forward_into, linear_into
from .modulation import BlockModulation


class Address(NamedTuple):
    """Which row of a modulation table each token takes.

    Attributes:
        step_index: `[1]` on the device.
        token_rows: `[R]` int32, a token's own row where it is not negative; None: the step's row for all.
    """

    step_index: torch.Tensor
    token_rows: torch.Tensor | None

    def image(self, txt_rows: int) -> "Address":
        """The image rows alone."""
        return Address(self.step_index, None if self.token_rows is None else self.token_rows[txt_rows:])


class Rows:
    """Joint token rows on their way through the blocks of one forward, and the buffers they share.

    Args:
        block: any block, for the sizes.
        residual: `[R, C]`.
        layout: where the sequences lie.
        attention: the option, see `attention.attend`.
    """

    def __init__(self, block: nn.Module, residual: torch.Tensor, layout: Layout, address: Address, attention: str):
        attn = block.attn
        self.residual, self.layout, self.address, self.attention = residual, layout, address, attention
        self.split = layout.txt_rows
        self.normed: torch.Tensor | None = None
        self.head_dim = attn.inner_dim // attn.heads
        self.qkv = residual.new_empty(3, layout.rows, attn.inner_dim)  # in the order of attention
        self.text = residual.new_empty(3, layout.txt_rows, attn.inner_dim)
        self.branch = torch.empty_like(residual)
        # diffusers clips at the end of each block, and in fp16 only.
        self.clip = residual.dtype == torch.float16

    def begin(self, modulation: BlockModulation) -> None:
        """The first norm of a block, where the block before has not left it."""
        shift, scale = modulation.shift1, modulation.scale1
        self.normed = ada_layer_norm(self.residual, shift, scale, self.address.step_index, self.split, self.address.token_rows)

    def attend(self, block: nn.Module, modulation: BlockModulation, *, drop_text: bool = False) -> None:
        """Attention, its gated residual and the second norm.

        Args:
            drop_text: keep the image rows only from here on: nothing reads the text that the last block would give.
        """
        attn, split, layout = block.attn, self.split, self.layout
        image, branch = self.normed[split:], self.branch[split:]
        projections = ((attn.to_q, attn.add_q_proj), (attn.to_k, attn.add_k_proj), (attn.to_v, attn.add_v_proj))
        for rows, text, (of_image, of_text) in zip(self.qkv, self.text, projections, strict=True):
            linear_into(of_text, self.normed[:split], text)
            for own, places in layout.images:
                linear_into(of_image, image[own], rows[places])
        query, key, value = self.qkv.unflatten(-1, (-1, self.head_dim))
        weights = (attn.norm_q.weight, attn.norm_k.weight, attn.norm_added_q.weight, attn.norm_added_k.weight)
        text = self.text.unflatten(-1, (-1, self.head_dim))
        qk_norm_rope(query, key, *weights, layout.rope, split, attn.norm_q.eps, value, text, layout.places)
        attended = attend(query, key, value, layout, attn.processor, self.attention)
        for own, piece, places in layout.images_of(attended):
            linear_into(attn.to_out[0], piece[places], branch[own])
        if drop_text:
            self.residual, self.branch = self.residual[split:], self.branch[split:]
            self.address, self.split = self.address.image(split), 0
        else:
            linear_into(attn.to_add_out, layout.text_of(attended), self.branch[:split])
        self._gate_and_norm(modulation.gate1, modulation.shift2, modulation.scale2, clip=False)

    def feed_forward(self, block: nn.Module) -> None:
        """Both streams' MLPs; their gated residual is `end` or `end_and_begin`."""
        feed_forward_into(block.txt_mlp, self.normed[: self.split], self.branch[: self.split])
        feed_forward_into(block.img_mlp, self.normed[self.split :], self.branch[self.split :])

    def end(self, gate: torch.Tensor) -> None:
        """The block's last gated residual alone."""
        step_index, token_rows = self.address
        self.residual = gated_residual(self.residual, self.branch, gate, step_index, self.split, token_rows, self.clip)
        self.normed = None

    def end_and_begin(self, gate: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> None:
        """The block's last gated residual and the norm that follows it, of the next block or of the output."""
        self._gate_and_norm(gate, shift, scale, clip=self.clip)

    def _gate_and_norm(self, gate, shift, scale, *, clip: bool) -> None:
        step_index, token_rows = self.address
        self.residual, self.normed = gated_residual_ada_layer_norm(
            self.residual, self.branch, gate, shift, scale, step_index, self.split, token_rows, clip=clip
        )


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
