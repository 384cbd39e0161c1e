"""What of a transformer is stock's own, level by level: read before a call, and again after code of the user's has run.

The fused forward works around the modules: it reads their weights, and calls neither blocks nor norms nor attention. That is
right for as long as calling them would run what diffusers wrote. What somebody has replaced, hooked or wrapped is called
instead, in stock's way and with stock's arguments and batches, and everything around it stays fused.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.models.transformers import transformer_qwenimage as stock
from torch import nn

from ..common.fingerprint import adapter_state
from ..common.hooks import Kind, attached, compiled_call, modules_below
from ..common.own import foreign_methods, foreign_on, process_reason
from .compiled import compiler_of
from .kinds import ADAPTING, KNOWN, METHODS, ROTARY, ROTARY_METHODS, foreign_kind, replaced_functions
from .linear import SWITCHING, Projection
from .plan import FUSED, BlockParts, BlockPlan

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
# What is read of modules beside their weights, and no module itself.
_ODD = {
    Attention: "processor",
    nn.LayerNorm: "eps",
    RMSNorm: "eps",
    GELU: "approximate",
    stock.QwenImageTransformerBlock: "_modulate",
}
_WEIGHED = (nn.Linear, RMSNorm)
_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_PROJECTIONS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


_STRANGER = BlockPlan(called="a block that somebody put in for the time of a forward")


@dataclass(frozen=True, eq=False)
class Survey:
    """One look at a transformer.

    Attributes:
        whole: why everything runs as diffusers wrote it, or None.
        model: why the transformer is called as a module with stock's arguments, or None.
        stock: why the transformer's forward is stock's, or None.
        placed: a hook brings the transformer's weights to the device: it is called as a module.
        rotary: why its rotary module is called in each forward, or None.
        modulation: why modulations are computed in each forward, by the model's own modules, or None.
        rows: all layers may get the rows of several predictions at once.
        blocks: how each block is computed that is not fused throughout, by id.
        parts: of each block of ours whose attention or feed-forward is, by id.
        img_in, txt_in, proj_out: the model's other projections; a ControlNet has no last one.
        control: of a ControlNet: the embedder of its pictures, then a projection to the residual of each block; else empty.
        index: place of each block of `transformer_blocks`, by id.
        order: the blocks of `transformer_blocks`.
        owned: blocks of ours anywhere in the model, by id.
        norm_out: why the output norm is called as a module, or None.
        quantised: a layer of a block whose weight is not plain, in words, or None.
        compilers: what torch.compile compiles blocks with, by id of the block.
        modules: the transformer and all modules below it.
        touched: something is attached to one of them, of whatever kind.
        adapters: scales of adapters and which of them are on, in words.
        foreign: what is not stock's own, in words. Known adapters, quantised layers, placements and caches are not in it.
        key: equal where nothing has changed since, but for the values of weights.
        fit: sets of adapters that samples may have as their own, as far as was asked.
    """

    whole: str | None
    model: str | None
    stock: str | None
    placed: bool
    rotary: str | None
    modulation: str | None
    rows: bool
    blocks: dict[int, BlockPlan]
    parts: dict[int, BlockParts]
    img_in: Projection
    txt_in: Projection
    proj_out: Projection | None
    control: tuple[Projection, ...]
    index: dict[int, int]
    order: list[nn.Module]
    owned: frozenset[int]
    norm_out: str | None
    quantised: str | None
    compilers: dict[int, Any]
    modules: list[nn.Module]
    touched: bool
    adapters: tuple[str, ...]
    foreign: tuple[str, ...]
    key: tuple
    fit: set[frozenset[str]] = field(default_factory=set)

    def plan(self, block: nn.Module) -> BlockPlan:
        """How a block of `transformer_blocks` is computed; one that was not there when this was looked at is called."""
        return self.blocks.get(id(block), FUSED if id(block) in self.index else _STRANGER)

    @property
    def against_rows(self) -> str:
        """In words, what forbids `rows`."""
        plans = ((plan.called, plan.stock, plan.attention, *plan.mlps) for plan in self.blocks.values())
        found = (*self.foreign, self.model, self.rotary, self.norm_out, *(reason for plan in plans for reason in plan))
        return next(filter(None, found), None) or self.modulation or "layers that may not get several predictions at once"

    def compilers_of(self, around: Any) -> list[Any]:
        """All that compile blocks, each once, where `around` compiles the whole transformer, or None."""
        return list(dict.fromkeys([*self.compilers.values(), *([] if around is None else [around])]))


def survey(model: nn.Module, before: Survey | None = None) -> Survey:
    """Look at a transformer, a walk over its 2,300 modules, or a ControlNet; `before` again where nothing has changed since."""
    with SWITCHING:
        look = _Look(model)
    return before if before is not None and before.key == look.key else look.result()


class _Look:
    """What is seen on one walk, and what follows from it."""

    def __init__(self, model: nn.Module):
        self.model, self.modules = model, modules_below(model)
        self.norm_out = getattr(model, "norm_out", None)
        cls = stock.QwenImageTransformer2DModel if self.norm_out is not None else type(model)  # a ControlNet has none
        kinds = set(map(type, self.modules))
        self.kinds = {kind: words for kind in kinds if (words := foreign_kind(kind)) is not None}
        touched = [  # something may be attached to: the quick look at all of them
            module
            for module in self.modules
            if "forward" in (own := module.__dict__)
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or "_compiled_call_impl" in own
        ]
        ours = stock.QwenImageTransformer2DModel, stock.QwenImageTransformerBlock
        compiled = {id(module): compiled_call(module) for module in touched if isinstance(module, ours)}
        self.compilers = {place: found for place, one in compiled.items() if (found := compiler_of(one)) is not None}
        looks = ((module, attached(module, compiled=id(module) not in self.compilers)) for module in touched)
        self.attached = {id(module): found for module, found in looks if found is not None}
        self.whole = process_reason()
        self.functions = [f"{name} was replaced" for name in replaced_functions()]
        self.stock = foreign_methods(cls, ("forward",))
        self.wrapped = [name for name in foreign_methods(type(model), ("forward",)) if name not in self.stock]
        self.processor_methods = foreign_methods(stock.QwenDoubleStreamAttnProcessor2_0, ("__call__",))
        self.block_methods = foreign_methods(stock.QwenImageTransformerBlock, METHODS[stock.QwenImageTransformerBlock])
        self.rotary = foreign_on(model.pos_embed, ROTARY_METHODS[1:])
        self.wrapped += foreign_methods(cls, ("__call__",))
        self.contexts = [*foreign_methods(type(model), ("cache_context",)), *foreign_on(model, ("cache_context",))]
        self.foreign = [*self.kinds.values(), *self.functions, *self.stock, *self.wrapped, *self.contexts]
        self.foreign += [*self.block_methods, *self.processor_methods, *self.rotary]
        self.random = any(module.training and module.p for module in self.modules if type(module) is nn.Dropout)
        adapted = {kind for kind in kinds if hasattr(kind, "merged_adapters")}
        states = (str(adapter_state(module)) for module in self.modules if type(module) in adapted) if adapted else ()
        self.adapters = tuple(states)
        self.key = self._key()

    def _key(self) -> tuple:
        """All that `result` depends on; the modules themselves, held and compared by identity."""
        odd = [module.__dict__.get(_ODD[kind]) for module in self.modules if (kind := type(module)) in _ODD]
        # Where the weights of plain layers are, and how often they were written: what a table was made from.
        weights = [
            tensor
            for module in self.modules
            if type(module) in _WEIGHED
            for tensor in module.__dict__["_parameters"].values()
            if type(tensor) is nn.Parameter
        ]
        try:
            places = [(tensor.data_ptr(), tensor._version) for tensor in weights]
        except RuntimeError:  # one of inference mode, which counts no writes, or a sparse one, which has no place
            weights = [tensor for tensor in weights if tensor.layout is torch.strided]
            places = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in weights]
        norm, time = self.norm_out, self.model.time_text_embed  # read by the fused forward, or by a table
        odd += [getattr(getattr(norm, "norm", None), "eps", None), *map(str, vars(getattr(time, "time_proj", time)).values())]
        seen = self.modules, self.attached, self.compilers, tuple(self.foreign)
        return *seen, self.whole, odd, self.adapters, self.random, places

    def reason(self, module: Any) -> str | None:
        """Why `module` has to be called with stock's arguments, or None. A hook that brings weights is no reason."""
        found = self.attached.get(id(module))
        if found is not None and found.kind is not Kind.PLACES:
            return found.words
        return self.kinds.get(type(module))

    def is_placed(self, module: nn.Module) -> bool:
        found = self.attached.get(id(module))
        return found is not None and found.kind is Kind.PLACES

    def result(self) -> Survey:
        model, blocks = self.model, list(self.model.transformer_blocks)
        self._name_what_is_attached()
        fused = [module for module in self.modules if isinstance(module, stock.QwenImageTransformerBlock)]
        plans = {id(block): self._block(block) for block in dict.fromkeys((*blocks, *fused))}
        plans = {place: plan for place, plan in plans.items() if plan is not FUSED}
        outside = self.reason(model) or next(iter((*self.stock, *self.wrapped, *self.contexts)), None)
        rotary = self._rotary(model.pos_embed)
        norm_out = None if self.norm_out is None else self._output_norm(self.norm_out)
        rows = outside is None and rotary is None and norm_out is None and all(map(self._is_by_rows, plans.values()))
        rows = rows and all(self._takes_rows(module) for module in self._linears(blocks))
        strange = (found.words for found in self.attached.values() if found.kind is Kind.FOREIGN)
        strange = next(strange, None) or next(iter(self.kinds.values()), None) or ("dropout" if self.random else None)
        rows = rows and strange is None
        return Survey(
            whole=self.whole,
            model=outside,
            stock=next(iter(self.stock), None),
            placed=self.is_placed(model),
            rotary=rotary,
            modulation=strange,
            rows=rows,
            blocks=plans,
            parts={id(block): self._parts(block, plans.get(id(block), FUSED)) for block in fused},
            img_in=self._projection(model.img_in),
            txt_in=self._projection(model.txt_in),
            proj_out=self._projection(model.proj_out) if self.norm_out is not None else None,
            control=() if self.norm_out is not None else tuple(map(self._projection, self._control())),
            index={id(block): place for place, block in enumerate(blocks)},
            order=blocks,
            owned=frozenset(map(id, fused)),
            norm_out=norm_out,
            quantised=next(filter(None, map(_quantised, self._linears(blocks))), None),
            compilers={id(block): one for block in fused if (one := self._compiler(block)) is not None},
            modules=self.modules,
            touched=bool(self.attached),
            adapters=self.adapters,
            foreign=tuple(dict.fromkeys(([self.whole] if self.whole else []) + self.foreign)),
            key=self.key,
        )

    def _compiler(self, block: nn.Module) -> Any | None:
        """Of the block, or of the transformer as a whole: then too its blocks are compiled one by one."""
        return self.compilers.get(id(block)) or self.compilers.get(id(self.model))

    def _name_what_is_attached(self) -> None:
        strange = [module for module in self.modules if id(module) in self.attached]
        strange = [module for module in strange if self.attached[id(module)].kind is Kind.FOREIGN]
        if strange:
            names = {id(module): name for name, module in self.model.named_modules()}
            whole = "the transformer" if self.norm_out is not None else "the ControlNet"
            told = [f"{self.attached[id(m)].words} on {names.get(id(m)) or whole}" for m in strange]
            self.foreign = self.foreign + (told if len(told) <= 4 else [*told[:3], f"{len(told) - 3} more such modules"])

    def _block(self, block: nn.Module) -> BlockPlan:
        called = self.reason(block)
        if not isinstance(block, stock.QwenImageTransformerBlock):
            called = called or f"a {type(block).__name__} in a block's place"
            return BlockPlan(called=called)
        foreign = [*self.block_methods, *foreign_on(block, ("_modulate",))]
        self.foreign += foreign
        plan = BlockPlan(
            called,
            self.is_placed(block),
            next(iter(foreign), None) or self._norms(block),
            next(iter(self.functions), None) or self._attention(block.attn),
            (self._mlp(block.img_mlp), self._mlp(block.txt_mlp)),
        )
        return FUSED if plan == FUSED else plan

    def _parts(self, block: nn.Module, plan: BlockPlan) -> BlockParts:
        attn = block.attn
        ours = plan.attention is None and plan.stock is None
        image, text = ([self._projection(getattr(attn, name)) for name in names] if ours else () for names in (_IMAGE, _TEXT))
        mlps = []
        for mlp, reason in zip((block.img_mlp, block.txt_mlp), plan.mlps, strict=True):
            ends = None if reason or plan.stock else (self._projection(mlp.net[0].proj), self._projection(mlp.net[2]))
            mlps.append((mlp, ends))
        return BlockParts(
            block,
            attn,
            tuple(image),
            tuple(text),
            self._projection(attn.to_out[0]) if ours else None,
            self._projection(attn.to_add_out) if ours else None,
            tuple(getattr(attn, name)._parameters for name in _NORMS) if ours else (),
            attn.norm_q.eps if ours else 0.0,
            tuple(mlps),
        )

    def _projection(self, module: nn.Module) -> Projection:
        return Projection(module, readable=self.reason(module) is None)

    def _norms(self, block: nn.Module) -> str | None:
        for norm in (block.img_norm1, block.img_norm2, block.txt_norm1, block.txt_norm2):
            if (reason := self.reason(norm)) is not None:
                return reason
            if type(norm) is not nn.LayerNorm or norm.weight is not None or norm.eps != 1e-6:
                return self._structure(norm, "layer norms that are not LayerNorm without affine")
        return None

    def _attention(self, attn: nn.Module) -> str | None:
        processor, out = attn.processor, attn.to_out
        for part in (attn, out, *list(out._modules.values())[1:]):
            if (reason := self.reason(part)) is not None:
                return reason
        if type(processor) is not stock.QwenDoubleStreamAttnProcessor2_0:
            # diffusers' own do something else on purpose, and are as known as its caches.
            return self._structure(processor, f"attention processor {type(processor).__name__}")
        if self.processor_methods:
            return self.processor_methods[0]
        if getattr(processor, "_parallel_config", None) is not None:
            return "context parallelism"
        for name in _NORMS:
            norm = getattr(attn, name)
            if (reason := self.reason(norm)) is not None:
                return reason
            if type(norm) is not RMSNorm or norm.weight is None or norm.bias is not None:
                return self._structure(norm, "query and key norms that are not RMSNorm with a weight")
            if self.is_placed(norm):
                return "offloading brings the weights of query and key norms for each call"
        return None

    def _mlp(self, mlp: nn.Module) -> str | None:
        if (reason := self.reason(mlp)) is not None:
            return reason
        if type(mlp) is not FeedForward or type(mlp.net[0]) is not GELU or mlp.net[0].approximate != "tanh":
            return self._structure(mlp, "a feed-forward that is not diffusers' with tanh GELU")
        parts = list(mlp.net._modules.values())  # the layers themselves may be anything that computes by rows
        return next(filter(None, map(self.reason, (mlp.net, parts[0], parts[1], *parts[3:]))), None)

    def _structure(self, part: Any, words: str) -> str:
        """`words`, and a note where `part` is of nobody that is known."""
        if not type(part).__module__.startswith(KNOWN):
            self.foreign.append(words)
        return words

    def _output_norm(self, norm: nn.Module) -> str | None:
        reason = self.reason(norm)
        if reason is None and type(norm) is not AdaLayerNormContinuous:
            reason = self._structure(norm, f"a {type(norm).__name__} as output norm")
        reason = reason or self.reason(norm.norm)
        if reason is None and getattr(norm.norm, "eps", None) != 1e-6:
            reason = self._structure(norm, "an output norm whose eps is not 1e-6")
        return reason

    def _rotary(self, module: nn.Module) -> str | None:
        reason = self.reason(module) or next(iter(self.rotary), None)
        if reason is None and type(module) not in ROTARY:
            reason = self._structure(module, f"rotary embedding {type(module).__name__}")
        return reason

    def _control(self) -> list[nn.Module]:
        return [self.model.controlnet_x_embedder, *self.model.controlnet_blocks]

    def _linears(self, blocks: list[nn.Module]):
        yield from (self.model.img_in, self.model.txt_in)
        yield from (self.model.proj_out,) if self.norm_out is not None else self._control()
        for block in blocks:
            if isinstance(block, stock.QwenImageTransformerBlock):
                attn = block.attn._modules
                yield from (attn[name] for name in _PROJECTIONS if name in attn)
                yield attn["to_out"]._modules["0"]
                for mlp in (block.img_mlp, block.txt_mlp):
                    if type(mlp) is FeedForward:
                        layers = mlp.net._modules
                        yield from (layers["0"].proj, layers["2"])

    def _takes_rows(self, module: nn.Module) -> bool:
        if self.reason(module) is not None:
            return False
        known = type(module) is nn.Linear or type(module).__module__.startswith(ADAPTING)
        return known or self._structure(module, f"a {type(module).__name__} in a linear layer's place") is None

    @staticmethod
    def _is_by_rows(plan: BlockPlan) -> bool:
        return plan.called is None and plan.stock is None and plan.attention is None and plan.mlps == (None, None)


def _quantised(layer: nn.Module) -> str | None:
    """What there is in a plain weight's place, adapters aside, or None."""
    base = getattr(layer, "base_layer", layer)
    weight = base._parameters.get("weight")
    if type(base) is nn.Linear and type(weight) is nn.Parameter:
        return None
    return f"a {type(base).__name__}" if type(base) is not nn.Linear else f"a weight that is a {type(weight).__name__}"
