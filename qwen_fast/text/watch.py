"""Is the text encoder still the one whose output is kept? Asked once a call, in less time than a tokenizer takes."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.fingerprint import adapter_state, modules_signature, plain_tensors, sample_places
from ..common.hooks import is_own_forward
from ..common.placement import group_keeps_on_disk

_SAMPLES = 8  # elements of a tensor that every look reads (its time goes into cache misses); the fingerprint itself reads 256
_VISION = "visual"  # no text passes through it
_HARMLESS = "transformers.utils.output_capturing"  # its hooks record hidden states and change nothing
_PLAIN = (nn.Parameter, torch.Tensor)
_Group = list[tuple[int, tuple[int], tuple[int]]]  # of one device and dtype: which tensor, and where its sample lies


class _Seen(NamedTuple):
    facts: list[Any]
    groups: list[_Group]
    samples: list[torch.Tensor]
    content: str


class EncoderWatch:
    """The fingerprint of a text encoder, computed anew where something may have changed. A copy has seen nothing.

    Each look walks the language model: classes, hooks, adapters, addresses and versions of all tensors, and 8 elements of
    each, which see a write through `.data`. If all are as before, so is the fingerprint; else `modules_signature` gives it.
    """

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    @torch.no_grad()
    def look(self, encoder: nn.Module) -> tuple[str | None, str | None]:
        """(fingerprint, None), or (None, why this encoder's output cannot be known by its weights)."""
        facts, tensors, reason = _walk(encoder)
        if reason is not None:
            self._seen = None
            return None, reason
        seen = self._seen
        known = seen is not None and seen.facts == facts
        groups = seen.groups if known else _groups(tensors)
        # Views of the moment: kept ones would keep weights alive that an offload has left behind.
        samples = [torch.cat([torch.as_strided(tensors[n], *place) for n, *place in group]) for group in groups]
        samples = [sample.view(torch.uint8) for sample in samples]  # equal bits, whatever they mean
        if known and all(map(torch.equal, seen.samples, samples)):
            return seen.content, None
        signature = modules_signature(_language_parts(encoder))
        text_config = encoder.config.get_text_config().to_json_string()
        content = hashlib.sha256(f"{signature.content} {text_config} {facts[0]}".encode()).hexdigest()
        self._seen = _Seen(facts, groups, samples, content)
        return content, None

    def __reduce__(self):
        return EncoderWatch, ()


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
    parts = [child for _, child in _language_parts(encoder)]
    adapters: dict[type, bool] = {}
    for part in parts:  # which grows meanwhile
        kind, own = type(part), part.__dict__
        facts.append(kind)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            reason = reason or _foreign(part)
        if kind not in adapters:
            adapters[kind] = hasattr(kind, "merged_adapters")
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
        facts += tensor.data_ptr(), tensor.dtype, tensor.numel(), 0 if tensor.is_inference() else tensor._version
    if any(tensor.is_meta for tensor in tensors):
        reason = reason or "its weights are on meta"
    return facts, tensors, reason


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
