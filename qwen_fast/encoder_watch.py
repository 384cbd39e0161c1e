"""Is the text encoder still the one whose output is kept? Asked once a call, in less time than a tokenizer takes."""

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .hooks import is_own_forward
from .host_weights import group_keeps_on_disk
from .modulation import adapter_state, modules_signature, plain_tensors, sample_places

_SAMPLES = 32  # elements of a tensor that every call reads: as fast as 8, within the noise
_VISION = "visual"  # no text passes through it
_HARMLESS = "transformers.utils.output_capturing"  # its hooks record hidden states and change nothing


class _Seen(NamedTuple):
    facts: list[Any]
    places: list[tuple[int, int]]
    samples: list[torch.Tensor]
    content: str


class EncoderWatch:
    """The fingerprint of a text encoder, computed anew where something may have changed. A copy has seen nothing.

    Each look walks the language model: classes, hooks, adapters, addresses and versions of all tensors, and 32 elements of
    each, which see a write through `.data`. If all are as before, so is the fingerprint; else `modules_signature` gives it.
    """

    def __init__(self) -> None:
        self._seen: _Seen | None = None

    def look(self, encoder: nn.Module) -> tuple[str | None, str | None]:
        """(fingerprint, None), or (None, why this encoder's output cannot be known by its weights)."""
        facts, tensors, reason = _walk(encoder)
        if reason is None and any(tensor.is_meta for tensor in tensors):
            reason = "its weights are on meta"
        if reason is not None:
            self._seen = None
            return None, reason
        seen = self._seen
        known = seen is not None and seen.facts == facts
        places = seen.places if known else [sample_places(tensor, _SAMPLES) for tensor in tensors]
        # Views of the moment: kept ones would keep weights alive that an offload has left behind.
        samples = _read(tensors, places)
        if known and all(torch.equal(old, new) for old, new in zip(seen.samples, samples, strict=True)):
            return seen.content, None
        signature = modules_signature(_language_parts(encoder))
        text_config = encoder.config.get_text_config().to_json_string()
        content = hashlib.sha256(f"{signature.content} {text_config} {facts[0]}".encode()).hexdigest()
        self._seen = _Seen(facts, places, samples, content)
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
    parts = [child for _, child in _language_parts(encoder)]
    reason = _foreign(encoder) or _foreign(encoder.model)
    if encoder.training and config.attention_dropout:
        reason = reason or "its dropout is on"
    while parts:
        part = parts.pop()
        own = part.__dict__
        facts.append(type(part))
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own:
            reason = reason or _foreign(part)
        if hasattr(type(part), "merged_adapters"):
            facts.append(adapter_state(part))
        for tensor in (*own["_parameters"].values(), *own["_buffers"].values()):
            if tensor is None:
                continue
            plain = (tensor,) if type(tensor) in (nn.Parameter, torch.Tensor) else plain_tensors(tensor)
            for one in plain:
                facts += one.data_ptr(), one.numel(), one.dtype, 0 if one.is_inference() else one._version
                tensors.append(one)
        parts += [child for child in own["_modules"].values() if child is not None]
    return facts, tensors, reason


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


def _read(tensors: list[torch.Tensor], places: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The sampled elements, one tensor for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for tensor, (count, step) in zip(tensors, places, strict=True):
            if tensor.numel():
                groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.as_strided((count,), (step,)))
        return [torch.cat(same).view(torch.uint8) for same in groups.values()]
