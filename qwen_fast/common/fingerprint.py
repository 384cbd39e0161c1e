"""What weights look like: types, adapters and sampled content, in one hash that every process computes alike."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

_SAMPLES = 256  # elements of a tensor that a signature reads; at least half as many after rounding the stride


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Signature(NamedTuple):
    """What the weights behind a table looked like.

    Attributes:
        content (str | None): hash of all but the addresses, the same in every process; None where the weights are out of
            reach (on meta or on disk).
        addresses (tuple[int, ...]): data pointers of all tensors, which offloading changes and the content does not.
    """

    content: str | None
    addresses: tuple[int, ...]


def modules_signature(modules: Iterable[tuple[str, nn.Module]], *, readable: bool = True) -> Signature:
    """A fingerprint of named modules: types, tensors, adapters and sampled content.

    Of each tensor its type, shape, dtype and at least 128 elements (all, if it has fewer than 512), spread over its
    memory by a stride that passes through rows and columns, are read; on CUDA with one copy to the host. `_version` is
    not asked: it does not see writes through `.data`, which is how PEFT fuses a LoRA.

    What a sample can miss: an edit of some elements that leaves every sampled one as it was; in practice one of less
    than a few hundredths of one single tensor. A fused LoRA changes all tensors it targets, each nearly everywhere. It
    sees neither attributes of a quantised layer that are no tensors nor what a hook does.

    Args:
        readable: False where the content is out of reach.
    """
    description: list[Any] = []
    tensors: list[torch.Tensor] = []
    for name, module in modules:
        for path, part in module.named_modules(prefix=name):
            hooks = len(part._forward_hooks) + len(part._forward_pre_hooks)
            description.append((path, part._get_name(), hooks, adapter_state(part)))
            for key, tensor in itertools.chain(part._parameters.items(), part._buffers.items()):
                for plain in () if tensor is None else plain_tensors(tensor):
                    description.append((key, type(tensor).__name__, tuple(plain.shape), plain.stride(), str(plain.dtype)))
                    tensors.append(plain)
    addresses = tuple(tensor.data_ptr() for tensor in tensors)
    if any(tensor.is_meta for tensor in tensors) or not readable:
        return Signature(None, addresses)
    digest = hashlib.sha256(repr(description).encode())
    digest.update(_sampled(tensors))
    return Signature(digest.hexdigest(), addresses)


def adapter_state(module: nn.Module) -> tuple[Any, ...] | None:
    """What PEFT does in `module` beside its tensors: active adapters, their scalings, merged ones, switched off."""
    if not hasattr(module, "merged_adapters"):  # a transformers model has a method `active_adapters`
        return None
    scaling = sorted(getattr(module, "scaling", {}).items())
    return tuple(module.active_adapters), scaling, list(module.merged_adapters), module.disable_adapters


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the data of a wrapper such as torchao's or of a sparse tensor, or `tensor` itself."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor.detach()._indices(), tensor.detach()._values())
    elif tensor.layout in _COMPRESSED:
        rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
        yield from (tensor.crow_indices(), tensor.col_indices()) if rows else (tensor.ccol_indices(), tensor.row_indices())
        yield tensor.detach().values()
    else:
        yield tensor.detach()


def _sampled(tensors: list[torch.Tensor]) -> bytes:
    """Elements spread over each tensor, tensor after tensor within a device and an element size."""
    groups: dict[torch.device, dict[int, list[torch.Tensor]]] = {}
    with torch._C.DisableTorchFunctionSubclass():  # quantised parameters wrap or refuse what is done to them
        for tensor in tensors:
            if tensor.numel():
                groups.setdefault(tensor.device, {}).setdefault(tensor.element_size(), []).append(_sample(tensor))
        on_each = [torch.cat([torch.cat(same).view(torch.uint8) for same in sizes.values()]) for sizes in groups.values()]
        return b"".join(sampled.cpu().numpy().tobytes() for sampled in on_each)


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """`[n]` integers, a view: 128 <= n <= 256, or all elements of a tensor with fewer than 512."""
    count, step = sample_places(tensor, _SAMPLES)
    return torch.as_strided(tensor, (count,), (step,)).view(_INTEGERS[tensor.element_size()])


def sample_places(tensor: torch.Tensor, samples: int) -> tuple[int, int]:
    """How many elements a sample of about `samples` reads, and how far apart in memory: all, if they are not twice as many."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    step = max(1, span // samples)
    row = max(tensor.stride(), default=1)
    if step > row > 1:
        # Whole rows and the golden part of one: a stride of whole rows would read a single column.
        step = step // row * row + max(1, round(row * (math.sqrt(5) - 1) / 2))
    count = min(samples, (span - 1) // step + 1) if step > 1 else span
    return count, step
