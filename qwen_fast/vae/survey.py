"""Is a VAE as diffusers built it? Its modules are gone around, so whatever somebody changed in them has to be found first.

It is compared with a fresh one of the same config, made without weights: classes, structure, and every attribute that a module
was given. So no list here says what may be edited; what differs from the fresh one is named.
"""

import functools
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..common.hooks import Kind, attached
from ..common.own import foreign_functions, foreign_methods, foreign_on, process_reason

ENCODES, DECODES = ("encoder", "quant_conv"), ("post_quant_conv", "decoder")  # the modules that stock's methods call
# `__init__` too: a fresh VAE tells nothing where somebody decides how layers are made.
_METHODS = ("__init__", "__call__", "_call_impl", "forward", "_conv_forward")
_OF_THE_VAE = ("_encode", "_decode", "clear_cache")
_FUNCTIONS = ("patchify", "unpatchify", "_patchify", "_unpatchify")
_OF_TORCH = ("conv2d", "conv3d", "pad", "silu", "normalize", "scaled_dot_product_attention", "interpolate", "dropout")
_PACKAGES = ("diffusers.", "torch.")
# What torch keeps in each module, looked at by itself below, and what matters in training only.
_APART = vars(nn.Module()).keys() | {"gradient_checkpointing", "_compiled_call_impl", "forward"}


def foreign_parts(vae: nn.Module, stock: type, parts: tuple[str, ...]) -> list[str]:
    """What diffusers did not write, or did not make so, of all that runs when stock codes with these parts of a VAE.

    Args:
        vae: an instance of `stock`, or of our class for it.
        stock: class of diffusers.
        parts: ENCODES or DECODES.
    Returns:
        list: names and reasons, for people; empty where going around the modules computes what calling them would.
    """
    reason = process_reason()
    found = [] if reason is None else [reason]
    found += foreign_methods(type(vae), _OF_THE_VAE) + foreign_on(vae, ("clear_cache",))
    found += foreign_functions(sys.modules[stock.__module__], _FUNCTIONS) + foreign_functions(F, _OF_TORCH)
    modules = [module for part in parts for module in (getattr(vae, part, None),) if isinstance(module, nn.Module)]
    kinds = dict.fromkeys(type(inner) for module in modules for inner in module.modules())
    for kind in kinds:
        if kind.__module__.startswith(_PACKAGES):
            found += foreign_methods(kind, _METHODS)
    if found:
        return list(dict.fromkeys(found))
    try:
        fresh = _fresh(stock, vae.to_json_string())
    except Exception as error:  # an edited config may be anything, and then stock decides what comes of it
        return [f"its config, of which no VAE can be made ({error})"]
    return [name for part in parts for name in _differences(part, getattr(vae, part, None), getattr(fresh, part))]


@functools.lru_cache(maxsize=8)
def _fresh(stock: type, config: str) -> nn.Module:
    with torch.device("meta"):
        return stock.from_config(json.loads(config))


def _differences(name: str, module: Any, fresh: nn.Module) -> Iterator[str]:
    """What of `module` and those in it is not as in `fresh`; below a module of another class nothing is compared."""
    kind = type(module)
    if vars(kind).get("STANDS_FOR", kind) is not type(fresh):
        yield f"{name} is a {kind.__module__}.{kind.__qualname__}"
        return
    hook = attached(module)
    if hook is not None and hook.kind is not Kind.PLACES:
        yield f"{hook.words} on {name}"
    if isinstance(module, nn.Dropout) and module.training and module.p:
        yield f"{name} is training"
    own, theirs = vars(module), vars(fresh)
    for key, value in theirs.items():
        if key not in _APART and not (key in own and type(own[key]) is type(value) and own[key] == value):
            yield f"{name}.{key} is {own.get(key)!r:.80}, not {value!r}"
    for key in own.keys() - theirs.keys() - _APART:
        if hasattr(kind, key):  # it takes the place of a method
            yield f"{name}.{key} is its own"
    for held in ("_parameters", "_buffers"):
        if _tensors(own[held]) != _tensors(theirs[held]):
            yield f"{name} has other tensors: {', '.join(own[held])}"
    if own["_modules"].keys() != theirs["_modules"].keys():
        yield f"{name} has other modules: {', '.join(own['_modules'])}"
        return
    for key, child in theirs["_modules"].items():
        if child is not None or own["_modules"][key] is not None:
            yield from _differences(f"{name}.{key}", own["_modules"][key], child)


def _tensors(held: dict[str, Any]) -> dict[str, Any]:
    return {name: None if tensor is None else (type(tensor), tensor.shape) for name, tensor in held.items()}
