"""Objects whose class is ours for a while are what they are to everybody else, stock's: to pickle, torch.save and `==`.

What is read back is diffusers' own, with the same weights and not enabled, and needs no qwen_fast. Copies stay accelerated.
"""

import copy
import copyreg
from typing import Any


class EqualsStock(type):
    """Class of a class that says `==` to the one that it stands for.

    diffusers' `from_pipe` compares the types of an enabled pipeline's models with those that its class names.
    """

    def __eq__(cls, other: Any) -> bool:
        return cls is other or other is vars(cls).get("STANDS_FOR", cls)

    __hash__ = type.__hash__


class PickledAsStock:
    """Put before a class of diffusers' or torch's.

    Attributes:
        STANDS_FOR (type): the class that takes its place in a pickle. A subclass that has none of its own is a user's, and
            is pickled as itself.
        NOT_PICKLED (tuple[str, ...]): attributes of instances that are ours.
    """

    STANDS_FOR: type
    NOT_PICKLED: tuple[str, ...] = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        stock = vars(type(self)).get("STANDS_FOR")
        if stock is None:
            return super().__reduce_ex__(protocol)
        state = {name: value for name, value in _held(self).items() if name not in self.NOT_PICKLED}
        return copyreg._reconstructor, (stock, object, None), state  # __newobj__ wants the class that the object has

    # Without these two, copies would be made of what pickle is told.
    def __copy__(self) -> Any:
        return _with_state(self, _held(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = _with_state(self, {})
        return _with_state(self, copy.deepcopy(_held(self), memo), twin)


def _held(original: Any) -> dict[str, Any]:
    """What a copy takes over: as in torch not what `compile` has left on a module, which would call the original."""
    return {name: value for name, value in vars(original).items() if name != "_compiled_call_impl"}


def _with_state(original: Any, state: dict[str, Any], twin: Any = None) -> Any:
    twin = type(original).__new__(type(original)) if twin is None else twin
    if hasattr(twin, "__setstate__"):
        twin.__setstate__(state)
    else:
        vars(twin).update(state)
    return twin
