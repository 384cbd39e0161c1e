"""Is the text encoder still the one whose output is kept? Asked once a call, in less time than a tokenizer takes."""

import hashlib
import sys
import types
import uuid
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._device import DeviceContext

from ..common.fingerprint import adapter_state, modules_signature, plain_tensors, sample_places
from ..common.hooks import is_own_forward
from ..common.own import foreign_functions, foreign_methods
from ..common.placement import group_keeps_on_disk

_SAMPLES = 8  # elements of a tensor that every look reads (its time goes into cache misses); the fingerprint itself reads 256
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x1B873593CC9E2D51  # odd, below 2^63
_VISION = "visual"  # no text passes through it
_HARMLESS = "transformers.utils.output_capturing"  # its hooks record hidden states and change nothing
_PACKAGES = ("transformers.", "torch.nn.")  # whose classes are known; adapters and quantised layers show in their tensors
_FUNCTIONS = ("linear", "embedding", "scaled_dot_product_attention", "silu", "softmax", "rms_norm")
_PLAIN = (nn.Parameter, torch.Tensor)
_Group = list[tuple[int, tuple[int], tuple[int]]]  # of one device and dtype: which tensor, and where its sample lies


class _Seen(NamedTuple):
    facts: list[Any]
    versions: list[int]
    signature: str | None
    groups: list[_Group]
    samples: list[torch.Tensor]
    content: str


class EncoderWatch:
    """The fingerprint of a text encoder, computed anew where something may have changed. A copy has seen nothing.

    Each look walks the language model: classes, hooks, adapters, addresses and versions of all tensors, and 8 elements of
    each, which see a write through `.data`, but for one of a few elements. If all are as before, so is the fingerprint; else
    `modules_signature` gives it.
    """

    def __init__(self) -> None:
        self._seen: _Seen | None = None
        self._rows: torch.Tensor | None = None  # fingerprints of all rows of an encoder that was dropped
        self._written: tuple[weakref.ref, str] | None = None  # an encoder whose sample does not tell what it holds

    @torch.no_grad()
    def look(self, encoder: nn.Module) -> tuple[str | None, str | None]:
        """(fingerprint, None), or (None, why this encoder's output cannot be known by its weights)."""
        facts, tensors, reason = _walk(encoder)
        if reason is not None:
            self._seen = None
            return None, reason
        seen, table = self._seen, _embedding(encoder)
        # Of the embedding each prompt's own rows are read.
        versions = [0 if one.is_inference() or one is table else one._version for one in tensors]
        known = seen is not None and seen.facts == facts
        groups = seen.groups if known else _groups(tensors)
        # Views of the moment: kept ones would keep weights alive that an offload has left behind.
        samples = [torch.cat([torch.as_strided(tensors[n], *place) for n, *place in group]) for group in groups]
        samples = [sample.view(torch.uint8) for sample in samples]  # equal bits, whatever they mean
        if known and seen.versions == versions and all(map(torch.equal, seen.samples, samples)):
            return seen.content, None
        signature = modules_signature(_language_parts(encoder)).content
        if known and seen.versions != versions and seen.signature == signature:
            # Something was written, and where it was the fingerprint did not look: a name that no other prompt has.
            self._written = weakref.ref(encoder), uuid.uuid4().hex
        written = self._written[1] if self._written is not None and self._written[0]() is encoder else ""
        text_config = encoder.config.get_text_config().to_json_string()
        content = hashlib.sha256(f"{signature} {text_config} {facts[0]} {written}".encode()).hexdigest()
        self._seen = _Seen(facts, versions, signature, groups, samples, content)
        return content, None

    @torch.no_grad()
    def rows(self, encoder: nn.Module | None, ids: Iterable[int]) -> dict[int, int] | None:
        """What the token embedding holds in the rows `ids`, which is what a prompt of these tokens reads of it.

        A sample of the whole table misses one row, and one row is what a learned token is.

        Returns:
            dict: by id; None where the embedding is no plain table.
        """
        ids = sorted(set(ids))
        if encoder is None:
            rows = None if self._rows is None else self._rows[ids]
        else:
            table = _embedding(encoder)
            index = None if table is None else torch.tensor(ids, device=table.device)
            rows = None if table is None else _fingerprints(table.index_select(0, index))
        return None if rows is None else dict(zip(ids, rows.tolist(), strict=True))

    @torch.no_grad()
    def keep_rows(self, encoder: nn.Module) -> None:
        """Before `encoder` is dropped: the fingerprints of all its rows, 8 bytes each, for prompts that come later."""
        table = _embedding(encoder)
        self._rows = None if table is None else torch.cat([_fingerprints(part).cpu() for part in table.split(4096)])

    def __reduce__(self):
        return EncoderWatch, ()


def _embedding(encoder: nn.Module) -> torch.Tensor | None:
    """`[words, C]`, the table that tokens are looked up in, or None where it is something else."""
    table = getattr(encoder.get_input_embeddings(), "weight", None)
    return table if type(table) in _PLAIN and table.dim() == 2 and table.element_size() in _INTEGERS else None


def _fingerprints(rows: torch.Tensor) -> torch.Tensor:
    """`[n]` int64, one of each row's bits: sums with odd weights that a linear generator gives, modulo 2^64."""
    bits = rows.contiguous().view(_INTEGERS[rows.element_size()]).to(torch.int64)
    weights = torch.arange(1, bits.shape[-1] + 1, dtype=torch.int64, device=bits.device) * _MULTIPLIER
    weights = (weights ^ (weights >> 29)) * _MULTIPLIER | 1
    mixed = (bits + weights) * weights
    return ((mixed ^ (mixed >> 32)) * weights).sum(-1)


def _language_parts(encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in encoder.model.named_children() if name != _VISION)


def _walk(encoder: nn.Module) -> tuple[list[Any], list[torch.Tensor], str | None]:
    """Facts about the modules that a text passes through, their tensors, and why the output cannot be kept, or None."""
    config = encoder.config.get_text_config()
    facts: list[Any] = [config._attn_implementation]
    tensors: list[torch.Tensor] = []
    reason = _foreign(encoder) or _foreign(encoder.model)
    if encoder.training and config.attention_dropout:
        reason = reason or "its dropout is on"
    reason = reason or _replaced(encoder)
    parts = [child for _, child in _language_parts(encoder)]
    adapters: dict[type, bool] = {}
    for part in parts:  # which grows meanwhile
        kind, own = type(part), part.__dict__
        facts.append(kind)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            reason = reason or _foreign(part)
        if kind not in adapters:
            adapters[kind] = hasattr(kind, "merged_adapters")
            foreign = foreign_methods(kind, ("forward",)) if kind.__module__.startswith(_PACKAGES) else []
            reason = reason or (f"{foreign[0]} was replaced" if foreign else None)
        if adapters[kind]:
            facts.append(adapter_state(part))
        for held in (own["_parameters"], own["_buffers"]):
            for tensor in held.values() if held else ():
                if type(tensor) in _PLAIN:
                    tensors.append(tensor)
                elif tensor is not None:
                    tensors += plain_tensors(tensor)
        if own["_modules"]:
            parts += [child for child in own["_modules"].values() if child is not None]
    for tensor in tensors:
        facts += tensor.data_ptr(), tensor.dtype, tensor.numel()
    if any(tensor.is_meta for tensor in tensors):
        reason = reason or "its weights are on meta"
    return facts, tensors, reason


def _replaced(encoder: nn.Module) -> str | None:
    """Functions of the encoder's module, or torch's, that somebody replaced, or a mode of torch's that sees every call."""
    home = sys.modules[type(encoder).__module__]
    functions = [
        name for name, value in vars(home).items() if isinstance(value, types.FunctionType) and not _is_python_s(value)
    ]
    found = foreign_functions(home, functions) + foreign_functions(F, _FUNCTIONS)
    if found:
        return f"{found[0]} was replaced"
    modes = [
        torch.overrides._get_current_function_mode_stack(),
        torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
    ]
    # A default device is a mode too, and changes nothing for tensors that are there.
    modes = [type(mode).__name__ for stack in modes for mode in stack if type(mode) is not DeviceContext]
    return f"the mode {modes[0]} is on" if modes else None


def _is_python_s(function: types.FunctionType) -> bool:
    """Whether it is one of the standard library, such as `dataclass`, which a module has only imported."""
    module = function.__module__
    return module in sys.stdlib_module_names and getattr(sys.modules.get(module), function.__name__, None) is function


def _groups(tensors: list[torch.Tensor]) -> list[_Group]:
    """Where each tensor is sampled, by device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], _Group] = {}
    for n, tensor in enumerate(tensors):
        if tensor.numel():
            count, step = sample_places(tensor, _SAMPLES)
            groups.setdefault((tensor.device, tensor.dtype), []).append((n, (count,), (step,)))
    return list(groups.values())


def _foreign(part: nn.Module) -> str | None:
    """What hangs on `part` that may change its output in ways its weights do not tell, or that hides its weights."""
    own = part.__dict__
    for hook in (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()):
        if getattr(hook, "__module__", None) != _HARMLESS:
            return f"a hook on its {type(part).__name__}"
    placed = "_hf_hook" in own or "_diffusers_hook" in own
    if "forward" in own and not placed and not is_own_forward(own["forward"], part):
        return f"the forward of its {type(part).__name__} was replaced"
    if group_keeps_on_disk(part):
        return "diffusers' group offload keeps its weights on disk"
    return None
