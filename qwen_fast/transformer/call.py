"""What a call of an accelerated pipeline and its transformer tell each other, and what a model keeps between calls."""

import contextlib
import copy
import threading
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
from .adapters import SampleAdapters
from .blocks import TableRows, TokenStream
from .compiled import StepRow
from .layout import ImageShapes, Layout
from .modulation import FromRow, ModulationSource, TableCache
from .survey import Survey

ATTACHED = "_qwen_fast_attachment"  # the one attribute that an attached model carries


@dataclass(eq=False)
class ModelState:
    """What an attached model carries: who uses it, and what is computed from sizes and weights once.

    A copy of the model, or one read back from a file, starts with empty caches.
    """

    users: weakref.WeakSet = field(default_factory=weakref.WeakSet)
    layouts: OrderedDict = field(default_factory=OrderedDict)
    tables: TableCache = field(default_factory=TableCache)
    graphs: OrderedDict = field(default_factory=OrderedDict)
    survey: Survey | None = None
    lock: Any = field(default_factory=threading.Lock)
    own: State | None = None  # of a model that was built as ours and accelerates every forward
    settled: tuple | None = None  # what the place of the modulation weights was decided for

    def leave(self, device: torch.device) -> None:
        """Forget what is not on `device`, to which the model has gone."""
        self.tables.leave(device)
        for kept in (self.layouts, self.graphs):
            for key in [key for key in kept if device not in key]:
                del kept[key]

    def __deepcopy__(self, memo: dict) -> "ModelState":
        users = weakref.WeakSet(copy.deepcopy(user, memo) for user in self.users)
        return ModelState(users=users, own=copy.deepcopy(self.own, memo))

    def __reduce__(self):
        return ModelState, ()


@dataclass
class PromptBatch:
    """Prompts and layout of one forward that holds several predictions for the same latents, such as cond and uncond.

    Attributes:
        layout: its sequences, `copies` times the batch.
        embeds: `[txt_rows, C_txt]`, the prompts' embeddings, sequence after sequence.
        copies: how often the image rows of the batch are repeated.
        sample: the one picture of the batch that this is of; None: all of them.
        shapes: of the pictures of each sequence.
        text: `[txt_rows, C]`, the embeddings after txt_norm and txt_in; the first forward fills it in (before it, an
            offloaded model's weights are not on the device).
        adapters: of each sample; None: all have those that are on.
    """

    layout: Layout
    embeds: torch.Tensor
    copies: int
    shapes: tuple[ImageShapes, ...]
    text: torch.Tensor | None = None
    sample: int | None = None
    adapters: SampleAdapters | None = None


@dataclass
class Call:
    """What an accelerated pipeline tells its transformer for the forwards of one call.

    Attributes:
        source: where modulations come from; None: computed in each forward from its timestep, as stock does.
        survey: what of the model is stock's own; None: looked at in each forward.
        prompts: set while a forward is asked for several predictions.
        forward: set while the blocks of a forward run.
        compiler: of a torch.compile(transformer) that the pipeline has in the transformer's place.
        row: of its table, for compiled blocks.
        given: what the last block was called with by code that is not ours: rotary tables, mask, batch, and their layout.
    """

    model: torch.nn.Module
    state: State
    source: ModulationSource | None = None
    survey: Survey | None = None
    prompts: PromptBatch | None = None
    forward: "SharedForward | None" = None
    compiler: Any = None
    row: StepRow | None = None
    given: tuple[Any, Any, int, Layout] | None = None

    def look(self) -> Survey:
        """What of the model is stock's own, now."""
        return self.survey or self.model.look()

    def source_of_step(self, table: FromRow) -> StepRow:
        """A table at its present row, for compiled blocks."""
        if self.row is None or self.row.of is not table.table:
            self.row = StepRow(table.table)
        self.row.take(table.step_index)
        return self.row

    def count_compiled(self, stream: TokenStream) -> None:
        """What torch.compile did for the blocks that a stream went through."""
        if stream.compiled:
            self.state.calls["compiled block"] += stream.compiled
        self.state.uncompiled = stream.uncompiled


@dataclass
class SharedForward:
    """What the blocks of one forward share, for those that are called as modules.

    Attributes:
        arguments: stock's keyword arguments of a block, but for the two streams.
    """

    layout: Layout
    rows: TableRows
    source: ModulationSource
    arguments: dict[str, Any]

    def gave(self, arguments: dict[str, Any]) -> bool:
        """Whether a block was called with just these, so that what is known beside them holds too."""
        return all(arguments[name] is value for name, value in self.arguments.items())


CALL: ContextVar[Call | None] = ContextVar("qwen_fast_call", default=None)


@contextlib.contextmanager
def entered(call: Call | None) -> Iterator[Call | None]:
    """Inside, forwards of the call's model in this thread are fused and counted into its state; None: no model's are."""
    token = CALL.set(call)
    try:
        yield call
    finally:
        CALL.reset(token)


def accelerated(model: torch.nn.Module, state: State) -> contextlib.AbstractContextManager[Call]:
    """`entered` with a new call of `model`, looked at now."""
    return entered(Call(model, state, survey=model.look()))


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
