"""Configs of schedulers: those of Qwen-Image and of its Lightning distillations, or one from a file. No torch here."""

import json
import math
from pathlib import Path
from typing import Any

# scheduler/scheduler_config.json of Qwen/Qwen-Image, complete: also an argument of qwen_fast.Schedule.from_config.
QWEN_IMAGE_SCHEDULER_CONFIG: dict[str, Any] = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


# The one of Qwen-Image-Lightning, the 4- and 8-step distillations: a shift of 3 at every size, and no stretch.
LIGHTNING_SCHEDULER_CONFIG: dict[str, Any] = QWEN_IMAGE_SCHEDULER_CONFIG | {
    "base_shift": math.log(3),
    "max_shift": math.log(3),
    "shift_terminal": None,
}


def load_config(name: str, model: str | None = None) -> tuple[dict[str, Any], str]:
    """A scheduler's config and what to call it.

    Args:
        name: "base", "lightning" or a JSON file; ignored when `model` is given.
        model: a checkpoint's folder.
    Raises:
        FileNotFoundError, ValueError: no such file, or it does not hold a scheduler's config.
    """
    if model is None and name in ("base", "lightning"):
        return dict(QWEN_IMAGE_SCHEDULER_CONFIG if name == "base" else LIGHTNING_SCHEDULER_CONFIG), name
    path = Path(model, "scheduler", "scheduler_config.json") if model is not None else Path(name)
    if not path.is_file():
        if model is not None:
            raise FileNotFoundError(f"--model {model}: {path} does not exist; a checkpoint's local folder is needed.")
        raise FileNotFoundError(f"--config {name}: no such file; use base, lightning or a scheduler_config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a scheduler's config (a JSON object) is needed.")
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift", "num_train_timesteps"):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {key} is {value!r}; a number is needed.")
    if config.get("base_image_seq_len", 256) == config.get("max_image_seq_len", 4096):
        raise ValueError(f"{path}: base_image_seq_len equals max_image_seq_len; a line needs two points.")
    return config, str(path)
