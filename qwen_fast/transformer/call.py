"""What a call of an accelerated pipeline and its transformer tell each other, and what a model keeps between calls."""

import contextlib
import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

from ..common.state import State
from ..text.cache import Encoded
from .blocks import Address
from .conditions import Conditions
from .layout import Layout
from .modulation import TableCache

ATTACHED = "_qwen_fast_attachment"  # the one attribute that an attached model carries


@dataclass(eq=False)
class Attachment:
    """What an attached model carries: who uses it, and what is computed from sizes and weights once.

    A copy of the model, or one read back from a file, starts with empty caches.
    """

    users: weakref.WeakSet = field(default_factory=weakref.WeakSet)
    layouts: OrderedDict = field(default_factory=OrderedDict)
    tables: TableCache = field(default_factory=TableCache)
    graphs: OrderedDict = field(default_factory=OrderedDict)
    own: State | None = None  # of a model that was built as ours and accelerates every forward

    def forget(self, *, graphs_only: bool = False) -> None:
        """Free what is kept of sizes on the device that the model has left, or only the graphs, which nobody wants any more."""
        self.graphs.clear()
        if not graphs_only:
            self.layouts.clear()

    def __deepcopy__(self, memo: dict) -> "Attachment":
        users = weakref.WeakSet(copy.deepcopy(user, memo) for user in self.users)
        return Attachment(users=users, own=copy.deepcopy(self.own, memo))

    def __reduce__(self):
        return Attachment, ()


@dataclass
class Packed:
    """Prompts and layout of one forward that holds several predictions for the same latents, such as cond and uncond.

    Attributes:
        layout: its sequences, `copies` times the batch.
        embeds: `[txt_rows, C_txt]`, the prompts' embeddings, sequence after sequence.
        copies: how often the image rows of the batch are repeated.
        text: `[txt_rows, C]`, the embeddings after txt_norm and txt_in; the first forward fills it in (before it, an
            offloaded model's weights are not on the device).
        sources: the encoded prompts that `embeds` was made of and how many tokens of each, where that is known.
    """

    layout: Layout
    embeds: torch.Tensor
    copies: int
    text: torch.Tensor | None = None
    sources: list[tuple[Encoded, int]] | None = None


@dataclass
class Call:
    """What an accelerated pipeline tells its transformer for the forwards of one call.

    Attributes:
        conditions: where modulations come from; None: computed in each forward from its timestep, as stock does.
        changing: a callback may attach something between two forwards, so that blocks are looked at each time.
        separate: per block, whether it has to be called as a module.
        packed: set while a forward is asked for several predictions.
        forward: set while blocks run that something is attached to.
    """

    model: torch.nn.Module
    state: State
    conditions: Conditions | None = None
    changing: bool = False
    separate: list[bool] | None = None
    packed: Packed | None = None
    forward: "SharedForward | None" = None


@dataclass
class SharedForward:
    """What the blocks of one forward share, for those that are called as modules because hooks sit on them."""

    layout: Layout
    address: Address
    conditions: Conditions
    index: dict[int, int]
    block_arguments: dict[str, Any]


CALL: ContextVar[Call | None] = ContextVar("qwen_fast_call", default=None)


@contextlib.contextmanager
def accelerated(model: torch.nn.Module, state: State) -> Iterator[Call]:
    """Inside, forwards of `model` in this thread are fused and counted into `state`."""
    call = Call(model, state)
    token = CALL.set(call)
    try:
        yield call
    finally:
        CALL.reset(token)


@contextlib.contextmanager
def lora_scale(model: torch.nn.Module, attention_kwargs: dict[str, Any] | None) -> Iterator[None]:
    """What `attention_kwargs={"scale": ...}` does to the LoRA layers of `model`, for the time inside."""
    scale = (attention_kwargs or {}).get("scale", 1.0)
    if scale == 1.0 or not USE_PEFT_BACKEND:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)
