"""The fused Qwen-Image transformer: diffusers' class and parameters, another forward.

`attach` gives a model and its blocks these classes in place, `detach` takes them away. Nothing else of the model changes,
and its forward is stock's unless a call of an accelerated pipeline that owns it is under way: another pipeline that shares
the model keeps stock diffusers to the bit.
"""

import copy
import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers import transformer_qwenimage

from qwen_fast_kernels import ada_layer_norm

from ..common.fingerprint import modules_signature
from ..common.hooks import OURS, is_hooked, rebind_forward
from ..common.options import Options
from ..common.proofs import require_transformer
from ..common.state import State
from .blocks import Address, Rows, stock_reason
from .call import ATTACHED, CALL, Attachment, Call, Packed, SharedForward, lora_scale
from .layout import ImageShapes, Layout, build_layout, check_image_shapes
from .linear import linear_into
from .modulation import FromLayers, ModulationSource
from .modulation_weights import disk_reason, host_bytes

STOCK = diffusers.QwenImageTransformer2DModel
STOCK_BLOCK = transformer_qwenimage.QwenImageTransformerBlock
_SIGNATURE = inspect.signature(STOCK.forward)
_KEPT_LAYOUTS = 16


class QwenImageTransformerBlock(STOCK_BLOCK):
    """diffusers' block. Called as a module (something is attached to it), it is fused within its own boundaries."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = None if torch.compiler.is_compiling() else CALL.get()
        forward = None if call is None else call.forward
        index = None if forward is None else forward.index.get(id(self))
        if index is not None:
            sizes = (encoder_hidden_states.shape[0], encoder_hidden_states.shape[1], hidden_states.shape[1])
            layout = forward.layout
            fits = sizes == (layout.sequences, layout.txt_lengths[0], layout.img_lengths[0])
        if index is None or not fits or joint_attention_kwargs or stock_reason(self) is not None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                encoder_hidden_states_mask,
                temb,
                image_rotary_emb,
                joint_attention_kwargs,
                modulate_index,
            )
        residual = torch.cat([encoder_hidden_states.flatten(0, 1), hidden_states.flatten(0, 1)])
        rows = Rows(self, residual, layout, forward.address, call.state.options.attention)
        modulation = forward.conditions.block(index)
        rows.begin(modulation)
        rows.attend(self, modulation)
        rows.feed_forward(self)
        rows.end(modulation.gate2)
        return _as_batches(rows.residual, layout)


class QwenImageTransformer2DModel(STOCK):
    """diffusers.QwenImageTransformer2DModel with its hot paths in fused operators; parameters and names are diffusers'.

    Built or loaded as this class, every forward without gradients is fused, whoever calls it. `enable` attaches the class
    to a pipeline's own model instead, and then only that pipeline's calls are.
    """

    @functools.wraps(STOCK.__init__)  # the configuration is read from this signature
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__[ATTACHED] = Attachment(own=State(Options(modulation="layers")))
        swap_blocks(self, STOCK_BLOCK, QwenImageTransformerBlock)

    def forward(self, *args, **kwargs):
        call = None if torch.compiler.is_compiling() else self._call()
        if call is None:
            return super().forward(*args, **kwargs)
        bound = _SIGNATURE.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        del arguments["self"]
        reason = self._stock_reason(arguments)
        if reason is not None:
            call.state.fall_back(reason)
            return super().forward(*args, **kwargs)
        rows = arguments["hidden_states"]
        require_transformer(call.state, self, rows.dtype, rows.device)
        with lora_scale(self, arguments["attention_kwargs"]):
            if call.packed is not None:
                output = self._packed_forward(call, arguments["hidden_states"], arguments["timestep"])
            else:
                output = self._batch_forward(call, **arguments)
        packed = call.packed is not None and call.packed.copies > 1
        call.state.calls["packed transformer" if packed else "transformer"] += 1
        return Transformer2DModelOutput(sample=output) if arguments["return_dict"] else (output,)

    def _call(self) -> Call | None:
        call = CALL.get()
        if call is not None:
            return call if call.model is self else None
        attachment = self.__dict__.get(ATTACHED)
        return None if attachment is None or attachment.own is None else Call(self, attachment.own, changing=True)

    def _stock_reason(self, arguments: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():
            return "gradients are asked for (use torch.no_grad or torch.inference_mode)"
        if arguments["guidance"] is not None:
            return "guidance embeddings"
        others = set(arguments["attention_kwargs"] or ()) - {"scale"}
        if others:
            return f"attention_kwargs {', '.join(sorted(others))}"
        if getattr(self, "_parallel_config", None) is not None:
            return "context parallelism"
        if type(self.pos_embed) not in (transformer_qwenimage.QwenEmbedRope, transformer_qwenimage.QwenEmbedLayer3DRope):
            return f"rotary embedding {type(self.pos_embed).__name__}"
        return None

    def _batch_forward(
        self,
        call: Call,
        hidden_states,
        encoder_hidden_states,
        encoder_hidden_states_mask,
        timestep,
        img_shapes,
        controlnet_block_samples=None,
        additional_t_cond=None,
        **_unused,
    ) -> torch.Tensor:
        """Stock's signature: `[B, S_img, C_in]` and `[B, S_txt, C_txt]`, padded text masked."""
        batch, text_length = hidden_states.shape[0], encoder_hidden_states.shape[1]
        shapes = check_image_shapes(img_shapes, batch)
        tokens = {sum(math.prod(shape) for shape in entry) for entry in shapes}
        if tokens != {hidden_states.shape[1]}:
            raise ValueError(
                f"`img_shapes` {img_shapes} are {sorted(tokens)} tokens a sample, but `hidden_states` has "
                f"{hidden_states.shape[1]}."
            )
        if encoder_hidden_states.shape[0] not in (1, batch):
            raise ValueError(
                f"`encoder_hidden_states` holds {encoder_hidden_states.shape[0]} prompts for {batch} samples; "
                "one for all, or one for each."
            )
        mask = encoder_hidden_states_mask
        if mask is not None:
            if mask.shape != encoder_hidden_states.shape[:2]:
                raise ValueError(
                    f"`encoder_hidden_states_mask` shape {tuple(mask.shape)} must match "
                    f"{tuple(encoder_hidden_states.shape[:2])} of the embeddings."
                )
            mask = mask.bool().expand(batch, -1)
        layout = self.layout(shapes, (text_length,) * batch, hidden_states.device)
        residual = hidden_states.new_empty(layout.rows, self.inner_dim)
        text = self.txt_norm(encoder_hidden_states).expand(batch, -1, -1)
        linear_into(self.txt_in, text.flatten(0, 1), residual[: layout.txt_rows])
        linear_into(self.img_in, hidden_states.flatten(0, 1), residual[layout.txt_rows :])

        conditions = self._conditions(call, timestep, hidden_states, additional_t_cond)
        address = self.address(conditions, layout, shapes)
        layout = layout.with_key_mask(mask)
        if call.separate is None or call.changing:
            call.separate = [is_hooked(block) or stock_reason(block) is not None for block in self.transformer_blocks]
        separate = call.separate
        if any(separate):
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"`img_shapes` {img_shapes} differ within a batch whose blocks have hooks: run them one by one."
                )
            call.forward = self._shared(call, layout, address, conditions, shapes, mask, batch)
        try:
            output = self._run(call, residual, layout, address, conditions, separate, controlnet_block_samples)
        finally:
            call.forward = None
        return output.unflatten(0, (batch, -1))

    def _packed_forward(self, call: Call, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """`[B, S_img, C_in]` to `[copies * B, S_img, C_out]`, the text given by `call.packed`."""
        packed, layout = call.packed, call.packed.layout
        residual = hidden_states.new_empty(layout.rows, self.inner_dim)
        if packed.text is None:
            packed.text = self.text_rows(packed)
        residual[: layout.txt_rows] = packed.text
        image = residual[layout.txt_rows :].unflatten(0, (packed.copies, -1))
        linear_into(self.img_in, hidden_states.flatten(0, 1), image[0])
        image[1:] = image[0]
        conditions = self._conditions(call, timestep, hidden_states, None)
        address = Address(conditions.step_index, None)
        separate = [False] * len(self.transformer_blocks)
        output = self._run(call, residual, layout, address, conditions, separate, None)
        return output.unflatten(0, (packed.copies * hidden_states.shape[0], -1))

    def _conditions(self, call: Call, timestep, hidden_states, additional_t_cond) -> ModulationSource:
        timestep = timestep.to(hidden_states.dtype)
        if call.conditions is not None and additional_t_cond is None and call.conditions.begin(timestep):
            return call.conditions
        return FromLayers(self, timestep, hidden_states, additional_t_cond)

    def _run(self, call, residual, layout, address, conditions, separate, controlnet) -> torch.Tensor:
        """Joint token rows `[R, C]` through all blocks, norm_out and proj_out: `[R_img, C_out]`."""
        blocks = self.transformer_blocks
        every = None if controlnet is None else math.ceil(len(blocks) / len(controlnet))
        rows = Rows(blocks[0], residual, layout, address, call.state.options.attention)
        last = len(blocks) - 1
        for index, block in enumerate(blocks):
            modulation = conditions.block(index)
            if separate[index]:
                rows.residual = self._call_block(call, block, rows.residual)
            else:
                if rows.normed is None:
                    rows.begin(modulation)
                rows.attend(block, modulation, drop_text=index == last)
                rows.feed_forward(block)
                if controlnet is None and index < last and not separate[index + 1]:
                    following = conditions.block(index + 1)
                    rows.end_and_begin(modulation.gate2, following.shift1, following.scale1)
                elif controlnet is None and index == last and rows.address.token_rows is None:
                    rows.end_and_begin(modulation.gate2, *conditions.out())
                else:
                    rows.end(modulation.gate2)
            if controlnet is not None:
                rows.residual[rows.split :] += controlnet[index // every].flatten(0, 1)
        image = rows.normed
        if image is None:
            image = rows.residual[rows.split :]
            shift, scale = conditions.out()
            token_rows = None
            if conditions.samples > 1:
                # The output norm takes a sample's own timestep for its reference tokens too, as in stock.
                token_rows = address.token_rows[layout.txt_rows :] % conditions.samples
            image = ada_layer_norm(image, shift, scale, address.step_index, 0, token_rows)
        return self.proj_out(image)

    def _call_block(self, call: Call, block, residual: torch.Tensor) -> torch.Tensor:
        """A block with something attached to it, through its own `__call__` and with its own boundaries."""
        reason = stock_reason(block)
        if reason is not None:
            call.state.fall_back(f"a block as diffusers wrote it: {reason}")
        text, image = _as_batches(residual, call.forward.layout)
        arguments = call.forward.block_arguments
        text, image = block(hidden_states=image, encoder_hidden_states=text, **arguments)
        return torch.cat([text.flatten(0, 1), image.flatten(0, 1)])

    def _shared(self, call, layout, address, conditions, shapes, mask, batch) -> SharedForward:
        temb, modulate_index = conditions.temb(batch), None
        if self.zero_cond_t:
            index = [[int(i > 0) for i, shape in enumerate(entry) for _ in range(math.prod(shape))] for entry in shapes]
            modulate_index = torch.tensor(index, device=layout.rope.device, dtype=torch.int)
        frequencies = self.pos_embed(
            [list(entry) for entry in shapes], max_txt_seq_len=layout.txt_lengths[0], device=layout.rope.device
        )
        arguments = {
            "encoder_hidden_states_mask": mask,
            "temb": temb,
            "image_rotary_emb": frequencies,
            "joint_attention_kwargs": None,
            "modulate_index": modulate_index,
        }
        index = {id(block): i for i, block in enumerate(self.transformer_blocks)}
        return SharedForward(layout, address, conditions, index, arguments)

    def text_rows(self, packed: Packed) -> torch.Tensor:
        """`[txt_rows, C]`: the text after txt_norm and txt_in, from what is kept of a prompt where its prompts are known."""

        def project(embeds: torch.Tensor) -> torch.Tensor:
            return self.txt_in(self.txt_norm(embeds))

        layers = (self.txt_norm, self.txt_in)
        if packed.sources is None or any(is_hooked(part) for layer in layers for part in layer.modules()):
            return project(packed.embeds)
        signature = modules_signature(zip(("txt_norm", "txt_in"), layers, strict=True), readable=disk_reason(self) is None)
        if signature.content is None:
            return project(packed.embeds)
        device = packed.embeds.device.type
        content = f"{signature.content} {torch.is_autocast_enabled(device)} {torch.get_autocast_dtype(device)}"
        return torch.cat([prompt.projected(content, project)[:length] for prompt, length in packed.sources])

    def fast_memory(self) -> dict[str, int]:
        """Bytes that stay in host memory, and bytes that the caches of this model take."""
        kept = self.__dict__[ATTACHED]
        layouts = [entry for entry in kept.layouts.values() if isinstance(entry, Layout)]
        return {
            "modulation weights that stay on the host": host_bytes(self),
            "modulation tables": kept.tables.nbytes,
            "rotary tables": sum(layout.rope.nbytes for layout in layouts),
        }

    def layout(
        self, shapes: Sequence[ImageShapes], text_positions: Sequence[int | tuple[int, ...]], device: torch.device
    ) -> Layout:
        """The rows of these sequences; the last few layouts are kept. See `build_layout`."""
        return self._kept(
            ("layout", tuple(shapes), tuple(text_positions), device),
            lambda: build_layout(self.pos_embed, shapes, text_positions, device),
        )

    def address(self, conditions: ModulationSource, layout: Layout, shapes: Sequence[ImageShapes]) -> Address:
        """Which rows of the conditions' tables the tokens of `layout` take."""

        def token_rows() -> torch.Tensor | None:
            """Own rows for samples with timesteps of their own, and for reference pictures at timestep 0."""
            if conditions.samples == 1 and conditions.zero_row is None:
                return None
            per_sample = range(layout.sequences) if conditions.samples > 1 else [-1] * layout.sequences
            text = [own for own, length in zip(per_sample, layout.txt_lengths, strict=True) for _ in range(length)]
            image = []
            for n, (own, entry) in enumerate(zip(per_sample, shapes, strict=True)):
                zero = conditions.zero_row if conditions.samples == 1 else conditions.samples + n
                for i, shape in enumerate(entry):
                    reference = i > 0 and conditions.zero_row is not None
                    image += [zero if reference else own] * math.prod(shape)
            return torch.tensor(text + image, dtype=torch.int32, device=layout.rope.device)

        key = ("token rows", tuple(shapes), layout.txt_lengths, conditions.samples, conditions.zero_row, layout.rope.device)
        return Address(conditions.step_index, self._kept(key, token_rows))

    def _kept(self, key: tuple, build) -> Any:
        kept = self.__dict__[ATTACHED].layouts
        if key not in kept:
            kept[key] = build()
            while len(kept) > _KEPT_LAYOUTS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def _as_batches(residual: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint rows as `[B, S_txt, C]` and `[B, S_img, C]`, for a layout whose sequences have equal lengths."""
    text = residual[: layout.txt_rows].unflatten(0, (layout.sequences, layout.txt_lengths[0]))
    return text, residual[layout.txt_rows :].unflatten(0, (layout.sequences, layout.img_lengths[0]))


def swap_blocks(model: torch.nn.Module, old: type, new: type) -> None:
    if new is QwenImageTransformerBlock and new not in TransformerBlockRegistry._registry:
        # Cache hooks of diffusers look a block's outputs up by its class.
        TransformerBlockRegistry.register(new, copy.copy(TransformerBlockRegistry.get(old)))
    for block in model.transformer_blocks:
        if type(block) is old:
            block.__class__ = new
            rebind_forward(block)


# Hooks that captured a forward of ours recognise it by this mark; a saved folder names the modules of stock diffusers.
for _ours, _stock in ((QwenImageTransformer2DModel, STOCK), (QwenImageTransformerBlock, STOCK_BLOCK)):
    setattr(_ours.forward, OURS, True)
    _ours.__module__ = _stock.__module__
