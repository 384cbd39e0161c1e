"""torch.compile over fused blocks: what the user has compiled becomes the half of a block behind its attention.

Projections write their rows into the buffers of attention themselves, which Inductor could only do by copying, and attention is
one kernel, chosen at run time for the lengths at hand. Everything behind them is compiled: both norms, both gated residuals
and the feed-forwards, with the user's own backend, mode and options, once for all blocks.

What is compiled is a function of tensors. Whatever a guard of Dynamo could not see (who replaced, hooked or loaded what, scales
of LoRA, the place in the schedule) is decided outside at each forward, and reaches the function as tensors, or as another
function: `_variant` has one for each structure of a block. Numbers of tokens are dynamic from the first time on, so that no
prompt, size or batch is a reason to compile again.
"""

import contextlib
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from qwen_fast_kernels import gated_residual, gated_residual_ada_layer_norm, linear_gelu

from ..common.hooks import compiled_call
from .linear import Operands, side_by_side
from .modulation import BlockModulation, FromRow, ModulationTable

if TYPE_CHECKING:
    from .blocks import TokenStream
    from .plan import BlockParts
    from .survey import Survey

_DYNAMO = "torch._dynamo.eval_frame"
_KEPT = "_qwen_fast_variants"  # attribute of a compiler: our functions as it has compiled them
_GRAPHS = "_qwen_fast_graphs"  # and whether it takes CUDA graphs of them
_NUMBERS = itertools.count()


def compiler_of(compiled: Any) -> Any | None:
    """What a `torch.compile(...)` compiles with: backend, mode and options, to be called with another function.

    Args:
        compiled: what torch.compile gave for a module or a function, or what `module.compile()` has left on a module.
    Returns:
        None where there is none, as under TORCH_COMPILE_DISABLE, or where this torch keeps it elsewhere.
    """
    dynamo = sys.modules.get(_DYNAMO)  # without it nothing was compiled
    if compiled is None or dynamo is None:
        return None
    held = [compiled.dynamo_ctx] if isinstance(compiled, dynamo.OptimizedModule) else []
    for cell in getattr(compiled, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty one
            held.append(cell.cell_contents)
    return next((one for one in held if isinstance(one, dynamo.OptimizeContext)), None)


def without_compiler(model: Any) -> Any:
    """The module inside a `torch.compile(module)`, or `model` itself."""
    dynamo = sys.modules.get(_DYNAMO)
    while dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        model = model._orig_mod
    return model


def left_as_compiled(transformer: Any, look: "Callable[[], Survey]") -> str | None:
    """Why a transformer that torch.compile has a part in stays what it made of stock's, or None."""
    model = without_compiler(transformer)
    made = [*map(compiled_call, (model, *model.transformer_blocks)), None if model is transformer else transformer]
    made = [one for one in made if one is not None]
    if not made:
        return None
    if any(compiler_of(one) is None for one in made):
        return "torch.compile, whose settings this torch keeps where they are not known"
    if model is not transformer:
        own = transformer.__dict__  # hooks here are around what was compiled, such as one that brings the weights
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or compiler_of(own.get("forward")) is None:
            return "a hook on a torch.compile of the transformer"
    quantised = look().quantised  # such layers are slow unless what is in them is compiled
    return None if quantised is None else f"torch.compile of a transformer with {quantised} in it"


def graph_reason(compilers: Iterable[Any]) -> str | None:
    """Why a step whose blocks these compile is not captured in a CUDA graph of ours, or None: graphs do not nest."""
    found = [_takes_graphs(compiler) for compiler in compilers]
    if None in found:
        return "torch.compile with another backend than Inductor, which may take graphs of its own"
    return "torch.compile in a mode that takes CUDA graphs of its own" if True in found else None


def begin_step(compilers: Iterable[Any]) -> None:
    """Before the blocks of a forward: graphs of torch.compile's own may reuse what the forward before has left."""
    if any(_takes_graphs(compiler) for compiler in compilers):
        torch.compiler.cudagraph_mark_step_begin()


def _takes_graphs(compiler: Any) -> bool | None:
    """Whether Inductor takes CUDA graphs of what it compiles; None: it is not Inductor that compiles."""
    kept = vars(compiler)
    if _GRAPHS not in kept:
        backend = getattr(compiler, "callback", None)
        while hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        config = getattr(backend, "get_compiler_config", None)
        kept[_GRAPHS] = None if config is None else bool(config().get("triton.cudagraphs"))
    return kept[_GRAPHS]


class StepRow(FromRow):
    """The row that a forward takes of a table, at one address and with one shape, whatever the schedule."""

    def __init__(self, table: ModulationTable):
        with torch.inference_mode(False):
            super().__init__(table.row_buffer())
        torch._dynamo.mark_static(self.table.values)  # of which its views are, for Dynamo
        self.of = table
        self._blocks: dict[int, BlockModulation] = {}

    def take(self, step_index: torch.Tensor) -> None:
        """Row `step_index` `[1]`; -1 stays a row that there is not."""
        self.of.row_into(self.table, step_index.clamp(min=0))
        self.step_index = step_index.clamp(max=0)

    def block(self, index: int) -> BlockModulation:
        if index not in self._blocks:
            self._blocks[index] = super().block(index)
        return self._blocks[index]


def behind_attention(
    compiler: Any,
    stream: "TokenStream",
    parts: "BlockParts",
    modulation: BlockModulation,
    following: tuple[torch.Tensor, torch.Tensor] | None,
    last: bool,
) -> str | None:
    """The half of a block behind its attention, compiled: `stream.residual` and `stream.normed` are what it leaves.

    Args:
        compiler: see `compiler_of`.
        following: shift and scale of the norm behind the block, or None.
        last: keep the image rows only.
    Returns:
        Why it cannot be compiled, and then nothing was done, or None.
    """
    residual, (step_index, token_rows) = stream.residual, stream.rows
    if stream.split < 2 or residual.shape[0] - stream.split < 2:
        return "a single row of a text, which a compiler would take for a constant"
    mlps = []
    for mlp, ends in parts.mlps:
        operands = [None] if ends is None else [layer.operands(residual) for layer in ends]
        if None in operands:
            called = mlp if ends is None else ends[operands.index(None)].module
            return f"{type(called).__name__} in a feed-forward, which is called"
        mlps.append(tuple(operands))
    tables = (modulation.gate1, modulation.shift2, modulation.scale2, modulation.gate2, *(following or ()))
    text = stream.layout.text_places
    key = (
        (last, len(tables), tuple(tables[0].shape), token_rows is None, stream.clip),
        (residual.dtype, residual.device, residual.shape[1], torch.is_inference_mode_enabled()),
        tuple(_structure(*layer) for mlp in mlps for layer in mlp),
    )
    function = _compiled(compiler, key)
    _mark(compiler, (residual, stream.branch, text, *(() if token_rows is None else (token_rows,))), tables)
    stream.residual, stream.normed = function(
        residual, stream.branch, text, tuple(mlps), tables, step_index, token_rows, last, stream.clip
    )
    return None


def _structure(weight: torch.Tensor, bias: torch.Tensor | None, adapters: tuple) -> tuple:
    return weight.shape, bias is None, tuple(down.shape for down, _, _ in adapters)


def _mark(compiler: Any, rows: Iterable[torch.Tensor], tables: Iterable[torch.Tensor]) -> None:
    """Say which sizes change from call to call, unless the user has said that none is to be dynamic."""
    dynamo = sys.modules["torch._dynamo"]
    if getattr(compiler, "_dynamic", None) is not False:
        for tensor in rows:
            dynamo.maybe_mark_dynamic(tensor, 0)
    for tensor in tables:  # views at many offsets, which are guarded where sizes are dynamic
        dynamo.mark_static(tensor)


def _compiled(compiler: Any, key: tuple) -> Callable[..., Any]:
    variants = vars(compiler).setdefault(_KEPT, {})
    if key not in variants:
        variants[key] = compiler(_variant(key))
    return variants[key]


@functools.lru_cache(maxsize=128)
def _variant(key: tuple) -> Callable[..., Any]:
    """`_behind_attention` as a code of its own: Dynamo counts by code how often it compiles, and refuses the ninth time."""
    code = _behind_attention.__code__.replace(co_name=f"behind_attention_{next(_NUMBERS)}")
    return types.FunctionType(code, globals(), code.co_name)


def _behind_attention(
    residual: torch.Tensor,
    branch: torch.Tensor,
    text: torch.Tensor,
    mlps: tuple[tuple[Operands, Operands], tuple[Operands, Operands]],
    tables: tuple[torch.Tensor, ...],
    step_index: torch.Tensor,
    token_rows: torch.Tensor | None,
    last: bool,
    clip: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `TokenStream.through` computes it, without writing into what it is given.

    Args:
        residual, branch: `[R, C]`.
        text: `[R_txt]`, for its size.
        mlps: of the image and of the text.
        tables: gate1, shift2, scale2, gate2, and shift and scale of the norm behind the block, if that is to be computed.
        last: keep the image rows only.
    """
    split = text.shape[0]
    if last:
        residual, branch = residual[split:], branch[split:]
        token_rows = None if token_rows is None else token_rows[split:]
        split = 0
    gate1, shift2, scale2, gate2, *following = tables
    rows = step_index, split, token_rows, 1e-6  # eps by value: dynamic=True would take the operators' default for a variable
    residual, normed = gated_residual_ada_layer_norm(residual, branch, gate1, shift2, scale2, *rows)
    branch = _feed_forward(normed[split:], *mlps[0])
    if not last:
        branch = torch.cat([_feed_forward(normed[:split], *mlps[1]), branch])  # each product writes there itself
    if following:
        return gated_residual_ada_layer_norm(residual, branch, gate2, *following, *rows, clip)
    return gated_residual(residual, branch, gate2, step_index, split, token_rows, clip), None


def _feed_forward(rows: torch.Tensor, up: Operands, down: Operands) -> torch.Tensor:
    weight, bias, adapters = up
    adapters = [adapter for adapter in adapters if adapter[1].shape[1]]
    low = side_by_side([_low(rows, first, scale) for first, _, scale in adapters])
    return _linear(linear_gelu(rows, weight, bias, low, side_by_side([second for _, second, _ in adapters])), down)


def _linear(rows: torch.Tensor, layer: Operands) -> torch.Tensor:
    weight, bias, adapters = layer
    out = F.linear(rows, weight, bias)
    for down, up, scale in adapters:
        out = torch.addmm(out, _low(rows, down, scale), up.t())
    return out


def _low(rows: torch.Tensor, down: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The first product of an adapter, scaled, `[R, rank]`."""
    return (F.linear(rows, down) * scale).to(rows.dtype)
