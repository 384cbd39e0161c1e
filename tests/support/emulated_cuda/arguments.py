"""What an operator's schema and its arguments say: which tensors it writes to, what it would give, the same on the host."""

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from support.emulated_cuda.memory import on_host

_NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}


def is_on_device(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def count_of_tensor_results(schema) -> int:
    return sum("Tensor" in str(described.type) for described in schema.returns)


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a copy of `tensor`: its own where they leave no holes."""
    return torch.empty_like(tensor, device="meta").stride()


@functools.cache
def is_view(op: Any) -> bool:
    aliases = [described.alias_info for described in op._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def written_by(schema, args: tuple, kwargs: dict, *, returned: bool = False) -> list[torch.Tensor]:
    """The tensors that the operator writes to, in the order of its arguments."""
    found = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) and not argument.kwarg_only else kwargs.get(argument.name)
        found += [value] if returned and value is not None else tensors_in(value)
    return found


def numbers_as_tensors(schema, args: tuple) -> tuple:
    """A number that torch wrapped into a tensor arrives here as a number again; the operator takes a tensor."""
    return tuple(
        torch.scalar_tensor(value, dtype=_NUMBERS[type(value)])
        if type(value) in _NUMBERS and "Tensor" in str(described.type)
        else value
        for value, described in zip(args, schema.arguments, strict=False)
    )


def with_host_views(args: tuple, kwargs: dict, fresh: list[torch.Tensor]) -> tuple[tuple, dict, dict[int, torch.Tensor]]:
    """Host views of all CUDA tensors; for the empty ones that are written, new tensors that an operator may resize."""
    new = {id(tensor): torch.empty(0, dtype=tensor.dtype) for tensor in fresh}

    def host(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return new[id(value)] if id(value) in new else on_host(value)
        return value

    return tree_map(host, args), tree_map(host, kwargs), new


def shapes_of(op: Any, args: tuple, kwargs: dict, fresh: list[torch.Tensor]) -> tuple[Any, dict[int, torch.Tensor]]:
    """What the operator would give, on meta: a capture runs nothing."""
    new = {id(tensor): torch.empty(0, dtype=tensor.dtype, device="meta") for tensor in fresh}

    def meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in new:
                return new[id(value)]
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    return op(*tree_map(meta, args), **tree_map(meta, kwargs)), new
