"""Is the text encoder still the one whose output is kept? Asked once a call, in less time than a tokenizer takes."""

import hashlib
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.fingerprint import adapter_state, modules_signature, plain_tensors, sample_places
from ..common.hooks import is_own_forward
from ..common.placement import group_keeps_on_disk
from .survey import PACKAGES, Attributes, foreign_code, reader

_SAMPLES = 8  # elements of a tensor that every look reads (its time goes into cache misses); the fingerprint itself reads 256
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x1B873593CC9E2D51  # odd, below 2^63
_VISION = "visual"  # no text passes through it
_HARMLESS = "transformers.utils.output_capturing"  # its hooks record hidden states and change nothing
_HELD = 4096  # elements of a tensor that is a plain attribute, such as a rope's frequencies
_PLAIN = (nn.Parameter, torch.Tensor)
_Group = list[tuple[int, tuple[int], tuple[int]]]  # of one device and dtype: which tensor, and where its sample lies


class _Seen(NamedTuple):
    facts: list[Any]
    versions: list[int]
    signature: str | None
    groups: list[_Group]
    samples: list[torch.Tensor]
    content: str


class _Walked(NamedTuple):
    """What a walk over the modules that a text passes through has met.

    Attributes:
        facts: equal to those of the walk before, if nothing but the tensors' elements changed.
        tensors: of the modules.
        told: what they hold beside tensors, alike in every process; `configs` and `held` are named in it by their places.
        configs, held: configurations, and tensors that are plain attributes.
        reason: why the output cannot be kept, or None.
    """

    facts: list[Any]
    tensors: list[torch.Tensor]
    told: list[Any]
    configs: list[Any]
    held: list[torch.Tensor]
    reason: str | None


class EncoderWatch:
    """The fingerprint of a text encoder, computed anew where something may have changed. A copy has seen nothing.

    Each look walks the language model: classes and their code, attributes, configurations, hooks, adapters, addresses and
    versions of all tensors, and 8 elements of each, which see a write through `.data`, but for one of a few elements. If all
    are as before, so is the fingerprint; else `modules_signature` gives it, with what the modules hold beside tensors.

    Args:
        pictures: prompts hold pictures, so that the vision tower counts too.
    """

    def __init__(self, pictures: bool = False) -> None:
        self._pictures = pictures
        self._seen: _Seen | None = None
        self._rows: torch.Tensor | None = None  # fingerprints of all rows of an encoder that was dropped
        self._written: tuple[weakref.ref, str] | None = None  # an encoder whose sample does not tell what it holds

    @torch.no_grad()
    def look(self, encoder: nn.Module) -> tuple[str | None, str | None]:
        """(fingerprint, None), or (None, why this encoder's output cannot be known by its weights)."""
        walked, seen, table = _walk(encoder, self._pictures), self._seen, _embedding(encoder)
        facts, tensors = walked.facts, walked.tensors
        known = seen is not None and seen.facts == facts
        reason = walked.reason or (None if known else _dropout(encoder, self._pictures))
        if reason is not None:
            self._seen = None
            return None, reason
        # Of the embedding each prompt's own rows are read.
        versions = [0 if one.is_inference() or one is table else one._version for one in tensors]
        groups = seen.groups if known else _groups(tensors)
        # Views of the moment: kept ones would keep weights alive that an offload has left behind.
        samples = [torch.cat([torch.as_strided(tensors[n], *place) for n, *place in group]) for group in groups]
        samples = [sample.view(torch.uint8) for sample in samples]  # equal bits, whatever they mean
        if known and seen.versions == versions and all(map(torch.equal, seen.samples, samples)):
            return seen.content, None
        signature = modules_signature(_parts(encoder, self._pictures)).content
        if known and seen.versions != versions and seen.signature == signature:
            # Something was written, and where it was the fingerprint did not look: a name that no other prompt has.
            self._written = weakref.ref(encoder), uuid.uuid4().hex
        written = self._written[1] if self._written is not None and self._written[0]() is encoder else ""
        content = hashlib.sha256(f"{signature} {_described(walked)} {written}".encode()).hexdigest()
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
        return EncoderWatch, (self._pictures,)


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


def _described(walked: _Walked) -> str:
    """What a fingerprint has to know beside the weights, alike in every process."""
    configs = [(config.to_json_string(), config._attn_implementation) for config in walked.configs]
    return repr((configs, walked.told, [tensor.flatten()[:_HELD].tolist() for tensor in walked.held]))


def _parts(encoder: nn.Module, pictures: bool) -> Iterator[tuple[str, nn.Module]]:
    return ((name, child) for name, child in encoder.model.named_children() if pictures or name != _VISION)


def _walk(encoder: nn.Module, pictures: bool) -> _Walked:
    facts: list[Any] = []
    tensors: list[torch.Tensor] = []
    values: list[Any] = []
    others: list[Any] = []
    reason = _foreign(encoder) or _foreign(encoder.model)
    attributes = Attributes(encoder.config.get_text_config())
    parts = [child for _, child in _parts(encoder, pictures)]
    kinds: dict[type, tuple[bool, list[Any]]] = {}
    readers: dict[tuple[type, int], Callable[[dict[str, Any]], tuple]] = {}
    for part in parts:  # which grows meanwhile
        kind, own = type(part), part.__dict__
        facts.append(kind)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            reason = reason or _foreign(part)
        if kind not in kinds:
            kinds[kind] = hasattr(kind, "merged_adapters"), values if kind.__module__.startswith(PACKAGES) else others
        is_adapter, its_values = kinds[kind]
        if is_adapter:
            facts.append(adapter_state(part))
        else:
            alike = kind, len(own)
            try:
                its_values += readers[alike](own)
            except KeyError:  # the first of them, or one with other attributes
                readers[alike] = reader(own)
                its_values += readers[alike](own)
        for held in (own["_parameters"], own["_buffers"]):
            for tensor in held.values() if held else ():
                if type(tensor) in _PLAIN:
                    tensors.append(tensor)
                elif tensor is not None:
                    tensors += plain_tensors(tensor)
        if own["_modules"]:
            parts += [child for child in own["_modules"].values() if child is not None]
    told = attributes.told(values)
    reason = reason or attributes.foreign
    told += attributes.told(others)  # of other packages' classes, whose objects may be anything
    configs = attributes.configs
    implementations = dict.fromkeys(config._attn_implementation for config in configs)
    foreign, looked_up = foreign_code(encoder, kinds, implementations)
    reason = reason or foreign
    tensors += attributes.tensors
    for tensor in tensors:
        facts += tensor.data_ptr(), tensor.dtype, tensor.numel()
    if any(tensor.is_meta for tensor in tensors):
        reason = reason or "its weights are on meta"
    told += looked_up
    facts += [*told, *(repr(vars(config)) for config in configs)]
    return _Walked(facts, tensors, told, configs, attributes.tensors, reason)


def _dropout(encoder: nn.Module, pictures: bool) -> str | None:
    """Whether random numbers have a part in what it gives."""
    for name, part in _parts(encoder, pictures):
        for inner in part.modules():
            rate = inner.p if isinstance(inner, nn.Dropout) else getattr(inner, "attention_dropout", 0)
            if inner.training and rate:
                return f"dropout is on in its {name}"
    return None


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
