"""One Qwen-Image block over joint token rows: fused operators around diffusers' own projections."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from qwen_fast_kernels import ada_layer_norm, gated_residual, gated_residual_ada_layer_norm, qk_norm_rope

from .attention import attend
from .compiled import behind_attention
from .layout import Layout
from .linear import AdapterRows, called, feed_forward_into, gather_linear, linear_into, scatter_linear
from .modulation import BlockModulation
from .plan import FUSED, BlockParts, BlockPlan


class TableRows(NamedTuple):
    """Which row of a modulation table each token takes.

    Attributes:
        step_index: `[1]` on the device.
        token_rows: `[R]` int32, a token's own row where it is not negative; None: the step's row for all.
    """

    step_index: torch.Tensor
    token_rows: torch.Tensor | None

    def image(self, txt_rows: int) -> "TableRows":
        """The image rows alone."""
        return TableRows(self.step_index, None if self.token_rows is None else self.token_rows[txt_rows:])


class TokenStream:
    """Joint token rows on their way through the blocks of one forward, and the buffers they share.

    Args:
        residual: `[R, C]`.
        layout: where the sequences lie.
        rows: of the modulation table.
        attention: the option, see `attention.attend`.
        batch: samples, where layers that are not plain get them as stock's `[batch, S, C]`; None: rows in one piece.
        adapted: which text rows and which image rows get which adapters, counted from the first of each; None: all get those
            that are on.
    Attributes:
        arguments: stock's keyword arguments of a block, where a module is called as stock calls it.
        compiled: how many blocks torch.compile had a part in; `uncompiled`: why it had none in another that it was asked for.
        pending: what a block is to do that is called with this stream, through a hook that brings its weights.
    """

    def __init__(
        self,
        residual: torch.Tensor,
        layout: Layout,
        rows: TableRows,
        head_dim: int,
        attention: str,
        batch: int | None = None,
        adapted: tuple[AdapterRows | None, AdapterRows | None] = (None, None),
    ):
        self.adapted = adapted
        self.residual, self.layout, self.rows, self.attention = residual, layout, rows, attention
        self.batch, self.all_rows = batch, rows
        self.arguments: dict[str, Any] | None = None
        self.pending: Callable[[], None] | None = None
        self.split = layout.txt_rows
        self.normed: torch.Tensor | None = None
        self.qkv = residual.new_empty(3, layout.rows, residual.shape[1])  # in the order of attention
        self.compiled, self.uncompiled = 0, None
        self.text = residual.new_empty(3, layout.txt_rows, residual.shape[1])
        self.branch = torch.empty_like(residual)
        self.heads = self.qkv.unflatten(-1, (-1, head_dim)).unbind()
        self.moved = self.text.unflatten(-1, (-1, head_dim))
        # diffusers clips at the end of each block, and in fp16 only.
        self.clip = residual.dtype == torch.float16

    def through(
        self,
        parts: BlockParts,
        modulation: BlockModulation,
        following: Callable[[], tuple[torch.Tensor, torch.Tensor]] | None = None,
        added: torch.Tensor | None = None,
        plan: BlockPlan = FUSED,
        *,
        drop_text: bool = False,
        compiler: Any = None,
    ) -> None:
        """The whole block.

        Args:
            following: gives shift and scale of the norm behind the block, to be computed along with its end.
            added: `[A, C]`, what a ControlNet adds to the image rows behind the block, the same for each A of them.
            drop_text: keep the image rows only: nothing reads the text that the last block would give.
            compiler: of what is behind attention, see `compiled.compiler_of`; None: it is not compiled.
        """
        if self.normed is None:
            self._begin(modulation)
        self._attend(parts, plan, drop_text)
        if compiler is not None and self._compiled(
            compiler, parts, modulation, following if added is None else None, drop_text
        ):
            self.add(added)
            return
        if drop_text:
            self.residual, self.branch = self.residual[self.split :], self.branch[self.split :]
            self._drop_text()
        self._gate_and_norm(modulation.gate1, modulation.shift2, modulation.scale2, clip=False)
        self._feed_forward(parts)
        if following is None:
            self._end(modulation.gate2)
            self.add(added)
        else:
            self._gate_and_norm(modulation.gate2, *following(), clip=self.clip, added=added)

    def _begin(self, modulation: BlockModulation) -> None:
        """The first norm of a block, where the block before has not left it."""
        shift, scale = modulation.shift1, modulation.scale1
        self.normed = ada_layer_norm(self.residual, shift, scale, self.rows.step_index, self.split, self.rows.token_rows)

    def _attend(self, parts: BlockParts, plan: BlockPlan, drop_text: bool) -> None:
        """Attention, its output in `branch`."""
        split, layout, batch = self.split, self.layout, self.batch
        of_text, of_image = self.adapted
        if plan.attention is not None:
            self._call_attention(parts.attn)
        else:
            image, text = self.normed[split:], self.normed[:split]
            for layer, rows in zip(parts.image, self.qkv.unbind(), strict=True):
                scatter_linear(layer, image, [(own, rows, places) for own, places in layout.images], batch, of_image)
            for layer, rows in zip(parts.text, self.text.unbind(), strict=True):
                linear_into(layer, text, rows, batch, of_text)
            weights = (parameters["weight"] for parameters in parts.norms)
            qk_norm_rope(*self.heads[:2], *weights, layout.rope, split, parts.eps, self.heads[2], self.moved, layout.places)
            attended = attend(*self.heads, layout, parts.attn.processor, self.attention)
            gather_linear(parts.to_out, list(layout.images_of(attended)), self.branch[split:], batch, of_image)
            if not drop_text:
                linear_into(parts.to_add_out, layout.text_of(attended), self.branch[:split], batch, of_text)

    def _compiled(self, compiler, parts, modulation, following, drop_text: bool) -> bool:
        """The rest of the block by what torch.compile made of it; False: it could make nothing."""
        if any(self.adapted):
            self.uncompiled = "adapters of each sample's own"
            return False
        tables = None if following is None else following()
        reason = behind_attention(compiler, self, parts, modulation, tables, drop_text)
        if reason is not None:
            self.uncompiled = reason
            return False
        self.compiled += 1
        if drop_text:
            self._drop_text()
        return True

    def _drop_text(self) -> None:
        self.rows, self.split = self.rows.image(self.split), 0

    def _call_attention(self, attn: nn.Module) -> None:
        """The attention module called as stock calls it."""
        text, image = as_batches(self.normed, self.layout)
        image, text = attn(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=self.arguments["encoder_hidden_states_mask"],
            image_rotary_emb=self.arguments["image_rotary_emb"],
            **(self.arguments["joint_attention_kwargs"] or {}),
        )
        self.branch[: self.split], self.branch[self.split :] = text.flatten(0, 1), image.flatten(0, 1)

    def _feed_forward(self, parts: BlockParts) -> None:
        """Both streams' MLPs."""
        streams = (slice(self.split, None), slice(self.split))
        for own, (mlp, ends), adapted in zip(streams, parts.mlps, self.adapted[::-1], strict=True):
            rows, out = self.normed[own], self.branch[own]
            if ends is not None:
                feed_forward_into(*ends, rows, out, self.batch, adapted)
            elif rows.shape[0]:
                out.copy_(called(mlp, rows, self.batch))

    def _end(self, gate: torch.Tensor) -> None:
        """The block's last gated residual alone."""
        step_index, token_rows = self.rows
        self.residual = gated_residual(self.residual, self.branch, gate, step_index, self.split, token_rows, self.clip)
        self.normed = None

    def add(self, added: torch.Tensor | None) -> None:
        """What a ControlNet adds behind a block, where no kernel of ours closes it, see `through`."""
        if added is not None:
            self.residual[self.split :].view(-1, *added.shape).add_(added)

    def _gate_and_norm(self, gate, shift, scale, *, clip: bool, added: torch.Tensor | None = None) -> None:
        step_index, token_rows = self.rows
        self.residual, self.normed = gated_residual_ada_layer_norm(
            self.residual, self.branch, gate, shift, scale, step_index, self.split, token_rows, clip=clip, added=added
        )


def as_batches(rows: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint rows as `[B, S_txt, C]` and `[B, S_img, C]`, for a layout whose sequences have equal lengths."""
    text = rows[: layout.txt_rows].unflatten(0, (layout.sequences, layout.txt_lengths[0]))
    return text, rows[layout.txt_rows :].unflatten(0, (layout.sequences, layout.img_lengths[0]))
