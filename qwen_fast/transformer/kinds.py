"""Which classes of modules and which functions are stock's own."""

import functools

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.activations import GELU
from diffusers.models.transformers import transformer_qwenimage as stock
from torch import nn

from ..common.own import foreign_functions, foreign_methods, is_own_function

ROTARY = (stock.QwenEmbedRope, stock.QwenEmbedLayer3DRope)
# Packages whose layers take a linear layer's place and compute each row alone: adapters and quantised weights.
ADAPTING = ("peft.", "bitsandbytes.", "torchao.", "optimum.", "sdnq.", "diffusers.quantizers.")
KNOWN = ("torch.nn.", "diffusers.", "cache_dit.", *ADAPTING)
ROTARY_METHODS = ("forward", "rope_params", "_get_device_freqs", "_compute_video_freqs", "_compute_condition_freqs")
METHODS = {
    stock.QwenImageTransformerBlock: ("forward", "_modulate"),
    stock.QwenDoubleStreamAttnProcessor2_0: ("__call__",),
    GELU: ("forward", "gelu"),
    **dict.fromkeys(ROTARY, ROTARY_METHODS),
}
# What stock's attention looks up by name each time that it runs.
_FUNCTIONS = ("apply_rotary_emb_qwen", "dispatch_attention_fn")
_ATTENTION = torch._C._nn.scaled_dot_product_attention


def replaced_functions() -> list[str]:
    """What stock's attention calls by name, or by diffusers' registry, and is not diffusers' or torch's."""
    found = foreign_functions(stock, _FUNCTIONS)
    # diffusers 0.40 and 0.41 look the rotation up here, by the type of the device, and take that of "cuda" where there is none.
    rotations = vars(stock).get("ROPE_PER_DEVICE", {})
    kinds = (kind for kind in ("cuda", "cpu") if kind in rotations and not _rotates(rotations[kind]))
    found += [f"transformer_qwenimage.ROPE_PER_DEVICE[{kind!r}]" for kind in kinds]
    if F.scaled_dot_product_attention is not _ATTENTION:
        found.append("torch.nn.functional.scaled_dot_product_attention")
    registry, name = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName.NATIVE
    native = registry._backends.get(name)
    if native is not None and not is_own_function(native, "diffusers", "_native_attention"):
        found.append("diffusers' attention backend 'native'")
    return found


def _rotates(function: object) -> bool:
    """Whether it is diffusers' rotation by complex numbers."""
    if not isinstance(function, functools.partial) or function.args or function.keywords != {"use_real": False}:
        return False
    return is_own_function(function.func, "diffusers", "apply_rotary_emb_qwen")


def foreign_kind(kind: type) -> str | None:
    """What of the methods of a class of modules is not its package's own, or why nothing is known of the class."""
    if (kind.__module__, kind.__qualname__) == ("peft.tuners.lora.layer", "Linear"):  # which may be gone around
        return next(iter(foreign_methods(kind, ("forward",))), None)
    if kind.__module__.startswith((*ADAPTING, "cache_dit.", "qwen_fast.")):
        return None
    if not kind.__module__.startswith(KNOWN):
        return f"a {kind.__name__}"
    if isinstance(kind, type) and issubclass(kind, (stock.QwenImageTransformerBlock, stock.QwenImageTransformer2DModel)):
        return None  # asked about where it matters what of it was replaced
    if kind.forward is nn.Module.forward:
        return None  # a container, which nobody calls
    return next(iter(foreign_methods(kind, METHODS.get(kind, ("forward",)))), None)
