"""What else a user would pick, imported where it is installed: cache-dit, torchao, SageAttention."""

import contextlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from ..shared.shapes import PictureCase
from .rung import NotMeasured, Rung
from .stock import compiled_blocks

# diffusers' recipe for Qwen-Image with torchao leaves these as they are.
_UNQUANTISED = (
    *("img_mod", "txt_mod", "txt_mlp", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("norm_out", "proj_out", "img_in", "txt_in", "time_text_embed"),
)


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        raise NotMeasured(f"not installed (pip install {package})") from None


@contextlib.contextmanager
def cache_dit(pipe: Any, case: PictureCase) -> Iterator[str]:
    """Its default: DBCache, which skips blocks where their residual hardly changes from step to step."""
    version = _version("cache-dit")
    if pipe.text_encoder is None:
        raise NotMeasured("random weights: a step cache finds no two steps alike (measured with --model)")
    import cache_dit as library

    # By default it watches 8 blocks, which a small model does not have.
    config = library.DBCacheConfig() if case.shape.layers > 8 else library.DBCacheConfig(Fn_compute_blocks=1)
    library.enable_cache(pipe, cache_config=config)
    try:
        yield version
    finally:
        library.disable_cache(pipe)
        pipe.transformer.__dict__.pop("forward", None)  # the bound method that it leaves behind


@contextlib.contextmanager
def torchao(pipe: Any, case: PictureCase) -> Iterator[str]:
    """Rows of activations and weights in FP8 with regional compilation on a GPU that has it, else in INT8."""
    version = _version("torchao")
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int8DynamicActivationInt8WeightConfig,
        PerRow,
        quantize_,
    )

    fp8 = pipe.device.type == "cuda" and torch.cuda.get_device_capability(pipe.device) >= (8, 9)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if fp8 else Int8DynamicActivationInt8WeightConfig()
    chosen = {
        name: module
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and not any(part in name for part in _UNQUANTISED)
    }
    kept = {name: (module.weight, "extra_repr" in module.__dict__) for name, module in chosen.items()}
    with ExitStack() as stack:

        def restore() -> None:
            for name, (weight, had_repr) in kept.items():
                chosen[name]._parameters["weight"] = weight
                if not had_repr:
                    chosen[name].__dict__.pop("extra_repr", None)

        stack.callback(restore)
        quantize_(pipe.transformer, config, filter_fn=lambda module, name: name in chosen)
        if pipe.device.type == "cuda":
            stack.enter_context(compiled_blocks(pipe, case))
        yield f"{version}, {'FP8' if fp8 else 'INT8'}{' + compile' if pipe.device.type == 'cuda' else ''}"


@contextlib.contextmanager
def sage_attention(pipe: Any, case: PictureCase) -> Iterator[str]:
    """In the place of torch's attention, as its documentation says: diffusers' own backend asks for 2.1 and newer."""
    version = _version("sageattention")
    if pipe.device.type != "cuda":
        raise NotMeasured(f'{version} refuses CPU tensors ("Input tensors must be on cuda.")')
    if len(set(case.text_lengths)) > 1:
        raise NotMeasured(f"{version} takes no mask, which prompts of different lengths need in stock")
    from sageattention import sageattn

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        return sageattn(query, key, value, is_causal=is_causal, sm_scale=scale)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield version


PEERS = (
    Rung("cache-dit", cache_dit, lossy=True, steady=False),
    Rung("torchao", torchao, lossy=True),
    Rung("SageAttention", sage_attention, lossy=True),
)
