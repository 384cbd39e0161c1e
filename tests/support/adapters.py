"""LoRA adapters: three of which prompts of one batch choose their own, stock with those of one prompt on, and one alone."""

from typing import Any

import pytest
import torch
from peft import LoraConfig

WEIGHTS = {"style": 0.7, "speed": 1.3, "thing": -0.6}
BASE = "__base__"
_PLAIN = ["to_q", "add_k_proj", "to_out.0", "to_add_out", "net.0.proj", "net.2"]
_ENDS = ["img_in", "txt_in", "proj_out"]
MODULATIONS = ["img_mod.1", "txt_mod.1", "norm_out.linear", "linear_1"]
TARGETS = {"style": [*_PLAIN, *_ENDS], "speed": [*_PLAIN[:3], "to_v"], "thing": ["add_v_proj", "net.2", "txt_in"]}


def with_adapters(model: Any, *, modulations: bool = False, on: str = "thing", **options: Any) -> Any:
    """`model` with the three, of which one is on; "style" has none in the modulations, the others do if wanted."""
    for seed, (name, targets) in enumerate(TARGETS.items()):
        torch.manual_seed(seed)
        more = MODULATIONS if modulations and name != "style" else []
        config = LoraConfig(r=3 + seed, lora_alpha=4, target_modules=targets + more, init_lora_weights=False, **options)
        model.add_adapter(config, adapter_name=name)
    model.set_adapters(list(WEIGHTS), list(WEIGHTS.values()))
    model.set_adapters([on], [WEIGHTS[on]])
    return model


def only(model: Any, entry: str | list[str]) -> None:
    """Switch on what an entry of `adapter_names` names, as one does in stock."""
    names = [entry] if isinstance(entry, str) else entry
    if names in ([BASE], []):
        model.disable_adapters()
    else:
        model.enable_adapters()
        model.set_adapters(names, [WEIGHTS[name] for name in names])


def add_style(model: Any, targets: list[str]) -> None:
    """One adapter, "style"; skips where the installed transformers asks for a newer PEFT than is installed."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    try:
        model.add_adapter(config, "style")
    except ValueError as error:
        if "PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip(str(error))
