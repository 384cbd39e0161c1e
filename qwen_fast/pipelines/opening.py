"""A checkpoint with its LoRAs as a pipeline on its device: what the commands draw with."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import versions
from ..common.family import TEXT_TO_IMAGE

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def library_output(bars: bool, verbosity: bool = True) -> Iterator[None]:
    """Silence the loading bars of diffusers and transformers, and their warnings, and leave their settings as found."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with contextlib.ExitStack() as stack:
        for library in (diffusers_logging, transformers_logging):
            if not bars and library.is_progress_bar_enabled():
                library.disable_progress_bar()
                stack.callback(library.enable_progress_bar)
            if not verbosity:
                stack.callback(library.set_verbosity, library.get_verbosity())
                library.set_verbosity_error()
        yield


def load_pipeline(
    model: str,
    device: "torch.device",
    dtype: "torch.dtype",
    *,
    stock: bool = False,
    loras: list[tuple[str, float]] | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """A QwenImagePipeline, with its LoRAs, on its device; ours, with options of `enable`, or diffusers' own when `stock`.

    Raises:
        ValueError, OSError: not a checkpoint, or a LoRA that does not exist or does not fit.
        ImportError: a LoRA, and no peft.
    """
    import diffusers

    loras = loras or []
    sources = check_loras(loras, model)  # before minutes of loading
    versions.check()
    from ..common.stages import stage
    from ..loading import check_folder, load
    from .text_to_image import QwenImagePipeline

    check_folder(model, hub_ids=True)
    try:
        kind = diffusers.QwenImagePipeline.load_config(model).get("_class_name")
    except OSError as error:
        if Path(model).exists():
            raise
        raise OSError(
            f"--model {model}: neither in the hub's local cache nor found on the hub: it does not exist, or the network cannot "
            f"be reached (HF_HUB_OFFLINE is {os.environ.get('HF_HUB_OFFLINE', 'not set')}). A local folder needs none. {error}"
        ) from error
    if kind not in TEXT_TO_IMAGE:
        raise ValueError(f"--model {model} is a {kind}; generate draws from text alone, with a QwenImagePipeline.")
    if stock:
        pipe = load(diffusers.QwenImagePipeline.from_pretrained, model, device=device, dtype=dtype)
    else:
        pipe = QwenImagePipeline.from_pretrained(model, device=device, dtype=dtype, **(options or {}))
    with stage("load"):
        for i, ((name, _), source) in enumerate(zip(loras, sources, strict=True)):
            _load_lora(pipe, name, f"lora_{i}", *source)
        if loras:
            pipe.set_adapters([f"lora_{i}" for i in range(len(loras))], [scale for _, scale in loras])
    return pipe


def check_loras(loras: list[tuple[str, float]], model: str) -> list[tuple[str, dict[str, str]]]:
    """What `load_lora_weights` takes for each --lora; nothing is imported or read.

    Raises:
        FileNotFoundError: a LoRA that is not there.
        ImportError: peft is not installed.
    """
    sources = [_lora_source(name, Path(model)) for name, _ in loras]
    if sources and importlib.util.find_spec("peft") is None:
        raise ImportError("--lora needs peft, which is not installed: pip install 'qwen-fast[lora]'.")
    return sources


def _lora_source(name: str, checkpoint: Path) -> tuple[str, dict[str, str]]:
    """What `load_lora_weights` takes for a --lora.

    Raises:
        FileNotFoundError: nothing is there by that name. Whether a hub id exists shows when it is loaded.
    """
    path = Path(name).expanduser()
    if not path.exists() and (checkpoint / name).is_dir():
        path = checkpoint / name  # one that comes with the model, such as the demo's "lightning"
    repository = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.+))?", name)
    if path.is_file():
        return str(path.parent), {"weight_name": path.name}
    if path.is_dir():
        files = list(path.glob("*.safetensors"))  # without a network older versions of diffusers do not look for it
        return str(path), {"weight_name": files[0].name} if len(files) == 1 else {}
    is_file = repository and not repository[2] and Path(name).suffix in (".safetensors", ".bin", ".pt")
    if repository and not name.startswith(".") and not is_file:
        return repository[1], {"weight_name": repository[2]} if repository[2] else {}
    raise FileNotFoundError(f"--lora {name}: no such file or folder.")


def _load_lora(pipe: Any, name: str, adapter: str, source: str, keywords: dict[str, str]) -> None:
    try:
        pipe.load_lora_weights(source, adapter_name=adapter, **keywords)
    except Exception as error:  # a wrong file surfaces as anything from KeyError to SafetensorError
        raise ValueError(f"--lora {name} cannot be loaded: {error}") from error
    if not any(adapter in adapters for adapters in pipe.get_list_adapters().values()):
        raise ValueError(f"--lora {name}: none of its weights belongs to this model.")
