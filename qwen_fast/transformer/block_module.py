"""diffusers' block as a module that is called: by a cache, through a hook, or by a forward of somebody's own.

Called with the arguments that our own forward gave, a block knows its layout and its row of the modulation table. Called with
others, it works from those, as stock's does.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_qwenimage
from packaging.version import Version

from ..common.hooks import compiled_call
from ..common.pickled import PickledAsStock
from .blocks import TableRows, TokenStream, as_batches
from .call import CALL, Call
from .layout import Layout, lay_out
from .modulation import BlockModulation
from .plan import FUSED
from .survey import Survey

STOCK_BLOCK = transformer_qwenimage.QwenImageTransformerBlock
# The transformer of diffusers 0.38 gives its blocks the mask of all keys; from 0.39 on they get the text's.
_MASKS_KEYS = Version(diffusers.__version__).release < (0, 39)


class QwenImageTransformerBlock(PickledAsStock, STOCK_BLOCK):
    """diffusers' block. Called as a module in a call of ours, it is fused within its own boundaries, whoever calls it."""

    STANDS_FOR = STOCK_BLOCK

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """In a call of ours not what torch.compile made of stock's forward: it has its part in ours, see compiled.py."""
        return called_plainly(self, STOCK_BLOCK, lambda: CALL.get() is not None, args, kwargs)

    @functools.wraps(STOCK_BLOCK.forward)
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
        if isinstance(hidden_states, TokenStream):  # through a hook that brings this block's weights
            return hidden_states.pending()
        arguments = {
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "temb": temb,
            "image_rotary_emb": image_rotary_emb,
            "joint_attention_kwargs": joint_attention_kwargs,
            "modulate_index": modulate_index,
        }
        if torch.compiler.is_compiling() and isinstance(self, QwenImageTransformerBlock):
            # diffusers has told Dynamo not to look into its class, whose forward is found by `super` alone.
            return super().forward(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **arguments)
        call = None if torch.compiler.is_compiling() else CALL.get()
        streams = None if call is None else _fused_block(call, self, hidden_states, encoder_hidden_states, arguments)
        if streams is None:
            return STOCK_BLOCK.forward(
                self, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **arguments
            )
        return streams


def mask_arguments(mask: torch.Tensor | None, image_tokens: int, attention_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments by which stock's transformer tells a block of the text mask `[B, S_txt]`, bool."""
    others = attention_kwargs and {name: value for name, value in attention_kwargs.items() if name != "scale"}
    if not _MASKS_KEYS:
        return {"encoder_hidden_states_mask": mask, "joint_attention_kwargs": others}
    of_keys = {} if mask is None else {"attention_mask": F.pad(mask, (0, image_tokens), value=True)[:, None, None]}
    return {"encoder_hidden_states_mask": None, "joint_attention_kwargs": (others or {}) | of_keys}


def called_plainly(
    module: torch.nn.Module, stock: type, is_fused: Callable[[], bool], args: tuple, kwargs: dict[str, Any]
) -> Any:
    """`module(...)`; where its forward `is_fused`, with its hooks but without what torch.compile has put around them.

    Args:
        stock: diffusers' class of the module, on which somebody may have replaced the call.
    """
    if torch.compiler.is_compiling():
        return module._wrapped_call_impl(*args, **kwargs)
    if compiled_call(module) is not None and is_fused():
        return module._call_impl(*args, **kwargs)
    return stock.__call__(module, *args, **kwargs)


def _fused_block(
    call: Call, block: QwenImageTransformerBlock, image: torch.Tensor, text: torch.Tensor, arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Text and image behind a block that was called as a module, or None where it has to run as diffusers wrote it."""
    found = call.look()
    if id(block) not in found.owned or found.whole is not None or context_reason(found, image) is not None:
        return None
    plan = found.blocks.get(id(block), FUSED)
    shared, index = call.forward, found.index.get(id(block))
    sizes = (image.shape[0], text.shape[1], image.shape[1])
    ours = shared is not None and index is not None and shared.gave(arguments)
    if plan.stock is not None or (arguments["joint_attention_kwargs"] and not ours):
        return None
    layout = shared.layout if ours else _layout_given(call, sizes, arguments)
    if layout is None or sizes != (layout.sequences, layout.txt_lengths[0], layout.img_lengths[0]) or text.dtype != image.dtype:
        return None
    if ours:
        rows, modulation = shared.rows, shared.source.block(index)
    else:
        rows, modulation = _modulation_given(block, layout, arguments["temb"])
    residual = torch.cat([text.flatten(0, 1), image.flatten(0, 1)])
    head_dim = block.attn.inner_dim // block.attn.heads
    stream = TokenStream(residual, layout, rows, head_dim, call.state.options.attention, sizes[0])
    stream.arguments = arguments
    compiler = found.compilers.get(id(block), call.compiler)
    stream.through(found.parts[id(block)], modulation, plan=plan, compiler=compiler)
    call.state.calls["transformer block"] += 1
    call.count_compiled(stream)
    return as_batches(stream.residual, layout)


def _layout_given(call: Call, sizes: tuple[int, int, int], arguments: dict[str, Any]) -> Layout | None:
    """The layout of a block's own arguments; the last one is kept, since all blocks of a forward get the same."""
    rotary, mask = arguments["image_rotary_emb"], None if _MASKS_KEYS else arguments["encoder_hidden_states_mask"]
    batch, text_length, image_length = sizes
    if arguments["modulate_index"] is not None or not isinstance(rotary, tuple) or len(rotary) != 2:
        return None
    if arguments["temb"].shape[0] not in (1, batch) or not all(torch.is_complex(freqs) for freqs in rotary):
        return None
    if (rotary[1].shape[0], rotary[0].shape[0]) != (text_length, image_length):
        return None
    if call.given is None or call.given[0] is not rotary or call.given[1] is not mask or call.given[2] != batch:
        layout = lay_out([(rotary[1], rotary[0])] * batch)
        call.given = rotary, mask, batch, layout.with_key_mask(None if mask is None else mask.bool().expand(batch, -1))
    return call.given[3]


def _modulation_given(
    block: QwenImageTransformerBlock, layout: Layout, temb: torch.Tensor
) -> tuple[TableRows, BlockModulation]:
    """The modulation that a block computes from the embedding `[1 or B, C]` that it was given."""
    table = torch.stack([block.img_mod(temb), block.txt_mod(temb)], dim=1).unflatten(-1, (6, -1))
    token_rows = None
    if temb.shape[0] > 1:
        samples = torch.arange(layout.sequences, dtype=torch.int32, device=temb.device)
        of_text, of_image = (samples.repeat_interleave(lengths[0]) for lengths in (layout.txt_lengths, layout.img_lengths))
        token_rows = torch.cat([of_text, of_image])
    return TableRows(torch.zeros(1, dtype=torch.int32, device=temb.device), token_rows), BlockModulation(*table.unbind(2))


def context_reason(found: Survey, hidden_states: torch.Tensor) -> str | None:
    """Why a forward in the present context of torch is stock's."""
    if torch.is_grad_enabled():
        return "gradients are asked for (use torch.no_grad or torch.inference_mode)"
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):
        weight = None if found.img_in.parameters is None else found.img_in.parameters["weight"].dtype
        if not torch.get_autocast_dtype(kind) == hidden_states.dtype == weight:
            return f"autocast to {torch.get_autocast_dtype(kind)} of a model in {weight}"
    return None
