"""The accelerated pipelines beside text-to-image, and what `enable` makes of what.

Same names as diffusers', so that a saved folder names the class that stock diffusers loads.
"""

import functools
from typing import Any

import diffusers

from ..common.family import FAMILY, MODULAR
from ..common.options import Options
from ..common.state import STATE, State
from .base import AcceleratedPipeline, EncodesText
from .call import accelerated_call
from .modular import AcceleratedModularPipeline
from .text_to_image import QwenImagePipeline

# Whose prompts are encoded together with pictures, or are not cut at a length.
_WITH_PICTURES = ("Edit", "Layered")


def _accelerated(stock: type) -> type:
    """The class that `enable` gives to a pipeline of `stock`."""
    name = stock.__name__
    if name in MODULAR:
        base, own = AcceleratedModularPipeline, {}
    else:
        base = AcceleratedPipeline if any(part in name for part in _WITH_PICTURES) else EncodesText
        own = {"__call__": accelerated_call(stock)}

    @functools.wraps(stock.__init__)  # the components are read from its signature
    def init(self, *args: Any, **kwargs: Any) -> None:
        """As diffusers', enabled with the default options: what `type(pipe)(**pipe.components)` makes of an enabled one."""
        stock.__init__(self, *args, **kwargs)
        self.__dict__[STATE] = State()
        self.put_in(Options())

    attributes = {"STANDS_FOR": stock, "__init__": init, "__module__": __name__, "__doc__": stock.__doc__}
    return type(name, (base, stock), attributes | own)


ACCELERATED: dict[type, type] = {diffusers.QwenImagePipeline: QwenImagePipeline}
for _name in (*FAMILY, *MODULAR):
    _stock = getattr(diffusers, _name, None)  # an older diffusers has not all of them
    if _stock is not None and _stock not in ACCELERATED:
        ACCELERATED[_stock] = globals()[_name] = _accelerated(_stock)
