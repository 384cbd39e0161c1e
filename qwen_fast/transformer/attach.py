"""Give a pipeline's transformer the fused classes in place, and take them away again."""

from collections.abc import Callable

import torch

from ..common.hooks import rebind_forward
from ..common.state import State, logger
from .block_module import STOCK_BLOCK, QwenImageTransformerBlock
from .call import ATTACHED, ModelState
from .model import STOCK, QwenImageTransformer2DModel, swap_blocks
from .modulation_weights import keep_on_host, offloaded, rests_on_host, return_to_device, settle

_WISHES = ("layers", "device", "auto", "host")  # of pipelines that share a model the last of these counts


def attach(model: torch.nn.Module, state: State) -> str | None:
    """Make `model` ours for the calls of the pipeline that `state` belongs to; returns why it cannot be, or None."""
    if type(model) not in (STOCK, QwenImageTransformer2DModel):
        return f"transformer is a {type(model).__name__}, not a QwenImageTransformer2DModel"
    kept = model.__dict__.get(ATTACHED)
    if kept is None:
        kept = model.__dict__[ATTACHED] = ModelState()
        model.__class__ = QwenImageTransformer2DModel
        rebind_forward(model)
        swap_blocks(model, STOCK_BLOCK, QwenImageTransformerBlock)
    kept.users.add(state)
    return None


def settle_modulation(model: torch.nn.Module, device: torch.device, coming: Callable[[], int]) -> None:
    """See `modulation_weights.settle`; a call that finds all as it was decided for decides nothing."""
    kept = model.__dict__[ATTACHED]
    wish = max((user.options.modulation for user in kept.users), key=_WISHES.index)
    asked = wish, device, offloaded(model)
    if kept.settled != asked:
        settle(model, wish, device, coming)
        kept.settled = asked
    elif rests_on_host(model):
        keep_on_host(model)  # brings home what strayed: a LoRA loaded since


def detach(model: torch.nn.Module, state: State, *, forced: bool = True) -> bool:
    """Take the pipeline of `state` off `model`; the last one makes it stock again and brings its weights back.

    Args:
        forced: False: where memory is too short for that, leave all as it is, say so and return False.
    Raises:
        RuntimeError: memory is too short, and then nothing has changed.
    """
    kept = model.__dict__.get(ATTACHED)
    if kept is None:
        return True
    if not any(user.options.modulation in ("auto", "host") for user in kept.users if user is not state):
        try:
            return_to_device(model)
        except RuntimeError as error:
            if forced:
                raise
            logger.warning("stock's forwards bring the modulation weights from host memory each time: %s", error)
            return False
        kept.settled = None
    kept.users.discard(state)
    if not kept.users and kept.own is None:
        del model.__dict__[ATTACHED]
        model.__class__ = STOCK
        rebind_forward(model)
        swap_blocks(model, QwenImageTransformerBlock, STOCK_BLOCK)
    return True
