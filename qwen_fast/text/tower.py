"""The vision tower's output, kept by pictures: another prompt about the same pictures asks the language model alone.

How a version of transformers calls the tower, and what it makes of its output, differs; so the tower's own forward is what is
answered, with an object of the class that it returned before.
"""

import contextlib
import functools
import hashlib
import types
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..common.hooks import OURS, attached
from ..common.state import State
from .encoding import surroundings

_STATE: ContextVar[State | None] = ContextVar("qwen_fast_tower", default=None)
# Of each layer, which nobody reads of a tower below a language model.
_LAYERS = ("hidden_states", "attentions")
_SCALARS = (bool, int, float, str, type(None), torch.dtype)


@contextlib.contextmanager
def kept_tower(encoder: nn.Module, state: State) -> Iterator[None]:
    """Inside, `encoder` looks pictures at that it has seen before in what is kept; where nothing may be kept, as ever."""
    tower = getattr(encoder.model, "visual", None)
    if state.texts.content is None or not isinstance(tower, nn.Module) or attached(tower) is not None:
        yield
        return
    ours, own = "forward" not in vars(tower), vars(tower)
    if ours:  # else another thread's call is under way, or a hook has left the method there
        own["forward"] = types.MethodType(_forward, tower)
    token = _STATE.set(state)
    try:
        yield
    finally:
        _STATE.reset(token)
        if ours:
            own.pop("forward", None)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward, state = functools.partial(type(self).forward, self, *args, **kwargs), _STATE.get()
    key = None if state is None else _key(state.texts.content, args, kwargs)
    if key is None:
        return forward()
    found = state.texts.features.get(key)
    if found is None:
        output = forward()
        state.calls["vision tower"] += 1
        with contextlib.suppress(_Unknown):
            found = _copied(output)
            state.texts.features.put(key, found, sum(tensor.nbytes for tensor in _tensors(found)))
        return output
    return _copied(found)  # its receiver may put other things into it


setattr(_forward, OURS, True)


class _Unknown(Exception):
    """An output of a kind that is not known."""


def _copied(output: Any) -> Any:
    """`output` in tensors of its own.

    Raises:
        _Unknown: something else than tensors, lists and tuples of them, and transformers' outputs.
    """
    if output is None or isinstance(output, torch.Tensor):
        return output if output is None else output.clone()
    if isinstance(output, ModelOutput):
        return type(output)(**{name: _copied(value) for name, value in output.items() if name not in _LAYERS})
    if type(output) in (list, tuple):
        return type(output)(map(_copied, output))
    raise _Unknown


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif output is not None:
        for value in output.values() if isinstance(output, ModelOutput) else output:
            yield from _tensors(value)


def _key(content: str | None, args: tuple, kwargs: dict[str, Any]) -> tuple[str, torch.device] | None:
    """Name of what the tower of an encoder is given, and its device; None where that cannot be told."""
    given = [*enumerate(args), *sorted(kwargs.items())]
    tensors = [value for _, value in given if isinstance(value, torch.Tensor)]
    if content is None or not tensors:
        return None
    device = tensors[0].device
    told = hashlib.sha256(repr((content, surroundings(device))).encode())
    for name, value in given:
        if isinstance(value, torch.Tensor):
            told.update(f"{name} {tuple(value.shape)} {value.dtype} {value.device}".encode())
            told.update(value.detach().cpu().contiguous().view(torch.uint8).numpy())
        elif type(value) in _SCALARS:
            told.update(f"{name} {value!r}".encode())
        else:
            return None
    return told.hexdigest(), device
