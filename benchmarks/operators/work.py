"""Bytes and FLOPs of work: an operator's as its docstring declares them, a whole run's counted while it runs once."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..shared.ceilings import Ceilings
from .arguments import TRAFFIC


class Piece(NamedTuple):
    """One operator's share of some work."""

    op: str
    bytes: int
    flops: int

    @property
    def kind(self) -> str:
        """Which of a machine's rates bounds its FLOPs."""
        return "attention" if "attention" in self.op else "product"


def floor_seconds(pieces: list[Piece], ceilings: Ceilings) -> dict[str, float]:
    """The least that the pieces take one after the other, by what bounds them: "copy", "product" or "attention".

    A piece takes the longer of its bytes at the rate of a copy and its FLOPs at the rate of the products in the ceilings'
    dtype, or of their attention.
    """
    rates = {"product": ceilings.matmul_flops_per_s[ceilings.dtype], "attention": ceilings.attention_flops_per_s}
    floor: dict[str, float] = {}
    for piece in pieces:
        moving, computing = piece.bytes / ceilings.copy_bytes_per_s, piece.flops / rates[piece.kind]
        bound = "copy" if moving >= computing else piece.kind
        floor[bound] = floor.get(bound, 0.0) + max(moving, computing)
    return floor


def count(run: Callable[[], object]) -> list[Piece]:
    """The work of one call: our operators by their declared traffic; matrix products, convolutions and torch's attention
    by the shapes of what they read and write.

    Elementwise operators of torch are left out: they can ride in one of the others. So the bytes are the least that such
    work moves.
    """
    with _Counter() as counter:
        run()
    return counter.pieces


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[Piece] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._opname
        if func.namespace == "qwen_fast" and name in TRAFFIC:
            # What stands at its default does not come through the dispatcher.
            left_out = func._schema.arguments[len(args) :]
            given = [*args, *(kwargs.get(argument.name, argument.default_value) for argument in left_out)]
            self.pieces.append(Piece(name, *TRAFFIC[name](*given)))
        elif name == "linear":  # with `out=` it comes through whole
            rows, weight = args[:2]
            self.pieces.append(Piece("addmm", _bytes([*args, out]), 2 * rows.numel() * weight.shape[0]))
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            self.pieces.append(Piece(name, _bytes([*args, out]), flops))
        elif name == "_scaled_dot_product_flash_attention_for_cpu":  # torch's table has the GPU's only
            query, key = args[:2]
            flops = 4 * query.numel() * key.shape[-2]
            self.pieces.append(Piece(name, _bytes([*args[:3], out[0]]), flops))
        return out


def _bytes(values: list[object]) -> int:
    flat = [value for entry in values for value in (entry if isinstance(entry, list | tuple) else [entry])]
    return sum(value.numel() * value.element_size() for value in flat if isinstance(value, torch.Tensor))
