"""Modules called with several rows at once where each row gets what it would get alone, and else row by row."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import layerwise_casting
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_qwenimage
from torch import nn

from ..common.hooks import is_hooked
from .modulation_weights import HostSequential

# Modules that give each row of their input what it would get alone, and so may take all rows at once. Any other, such as a
# quantised linear with one scale for all its activations, may not: that moved a row from 1.5 % to 101 % of error.
_ROW_BY_ROW = {nn.Sequential, HostSequential, nn.ModuleDict, nn.ParameterDict, nn.Identity, nn.Dropout, nn.SiLU, nn.Linear}
_ROW_BY_ROW |= {nn.Embedding, embeddings.Timesteps, embeddings.TimestepEmbedding}
_ROW_BY_ROW |= {transformer_qwenimage.QwenTimestepProjEmbeddings}
_ADAPTERS = {"peft.tuners.lora.layer.Linear", "peft.tuners.lora.dora.DoraLinearLayer"}  # by name: peft need not be there
_CASTS = (layerwise_casting.LayerwiseCastingHook, layerwise_casting.PeftInputAutocastDisableHook)


def of_rows(module: nn.Module, call: Callable[..., torch.Tensor], rows: torch.Tensor, *others: Any) -> torch.Tensor:
    """What `call`, which is `module` on the device, gives each of `rows`."""
    parts = [module]
    for part in parts:  # which grows meanwhile
        if not _row_by_row(part):
            return torch.cat([call(row, *others) for row in rows.split(1)])
        parts += [child for child in part._modules.values() if child is not None]
    return call(rows, *others)


def _row_by_row(part: nn.Module) -> bool:
    kind, hooks = type(part), getattr(part.__dict__.get("_diffusers_hook"), "hooks", {})
    if kind not in _ROW_BY_ROW and f"{kind.__module__}.{kind.__qualname__}" not in _ADAPTERS:
        return False
    casts = bool(hooks) and all(type(hook) in _CASTS for hook in hooks.values())
    if is_hooked(part) and (not casts or part._forward_hooks or part._forward_pre_hooks):
        return False
    tensors = (*part._parameters.values(), *part._buffers.values())
    return all(type(tensor) in (nn.Parameter, torch.Tensor, type(None)) for tensor in tensors)
