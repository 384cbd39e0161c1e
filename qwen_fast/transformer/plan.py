"""How a block is computed, and what of it is read for that: what the survey finds out of each."""

from typing import NamedTuple

from torch import nn

from .linear import Projection


class BlockPlan(NamedTuple):
    """How one block is computed. Reasons are words for `report`; None where the block is ours throughout.

    Attributes:
        called: why the block is called as a module, with stock's arguments.
        placed: a hook brings the block's weights to the device: it is called as a module, with our rows.
        stock: why its forward is stock's.
        attention: why its attention module is called.
        mlps: why the image's and the text's feed-forward are called.
    """

    called: str | None = None
    placed: bool = False
    stock: str | None = None
    attention: str | None = None
    mlps: tuple[str | None, str | None] = (None, None)


class BlockParts(NamedTuple):
    """What the fused computation of a block reads, found once.

    Attributes:
        image, text: projections to query, key and value of each stream.
        to_out, to_add_out: those behind attention.
        norms: parameters of norm_q, norm_k, norm_added_q and norm_added_k.
        eps: of these.
        mlps: up and down projection of the image's and the text's feed-forward; None where it is called.
    """

    block: nn.Module
    attn: nn.Module
    image: tuple[Projection, ...]
    text: tuple[Projection, ...]
    to_out: Projection
    to_add_out: Projection
    norms: tuple[dict[str, nn.Parameter], ...]
    eps: float
    mlps: tuple[tuple[nn.Module, tuple[Projection, Projection] | None], ...]


FUSED = BlockPlan()
