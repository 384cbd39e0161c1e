"""Give a pipeline's transformer the fused classes in place, and take them away again."""

import torch

from ..common.hooks import rebind_forward
from ..common.state import State
from .call import ATTACHED, Attachment
from .host_weights import keep_on_host, return_to_device
from .model import STOCK, STOCK_BLOCK, QwenImageTransformer2DModel, QwenImageTransformerBlock, swap_blocks
from .modulation import TableCache


def attach(model: torch.nn.Module, state: State) -> str | None:
    """Make `model` ours for the calls of the pipeline that `state` belongs to; returns why it cannot be, or None."""
    if type(model) not in (STOCK, QwenImageTransformer2DModel):
        return f"transformer is a {type(model).__name__}, not a QwenImageTransformer2DModel"
    attachment = model.__dict__.get(ATTACHED)
    if attachment is None:
        attachment = model.__dict__[ATTACHED] = Attachment()
        model.__class__ = QwenImageTransformer2DModel
        rebind_forward(model)
        swap_blocks(model, STOCK_BLOCK, QwenImageTransformerBlock)
    attachment.users.add(state)
    if state.modulation_cache != attachment.tables.folder:
        attachment.tables = TableCache(folder=state.modulation_cache)
    if state.modulation == "table":
        keep_on_host(model)
    return None


def detach(model: torch.nn.Module, state: State) -> None:
    """Take the pipeline of `state` off `model`; the last one makes it stock again and brings its weights back."""
    attachment = model.__dict__.get(ATTACHED)
    if attachment is None:
        return
    if not any(user.modulation == "table" for user in attachment.users if user is not state):
        return_to_device(model)  # raises where memory is too short, and then nothing has changed
    attachment.users.discard(state)
    if not attachment.users and attachment.own is None:
        del model.__dict__[ATTACHED]
        model.__class__ = STOCK
        rebind_forward(model)
        swap_blocks(model, QwenImageTransformerBlock, STOCK_BLOCK)
