"""The options of `enable`, their values and checks. Nothing here imports torch."""

import tempfile
from pathlib import Path
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


OPTIONS = {
    "modulation": ("table", "layers"),
    "attention": ("auto", "triton", "cudnn", "flash", "efficient", "diffusers"),
    "cuda_graph": ("auto", True, False),
    "vae": ("image", "diffusers"),
    "text_encoder": ("keep", "offload", "free"),
    "check_nan": (True, False),
}


def check_options(**options: Any) -> dict[str, Any]:
    """`options` of `enable`, or a ValueError that names the one that is none of its values."""
    for name, value in options.items():
        if not any(value is known or (isinstance(value, str) and value == known) for known in OPTIONS[name]):
            raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(map(repr, OPTIONS[name]))}.")
    return options


def check_text_options(prompt_cache: str | Path | None, text_encoder: str) -> str | Path | None:
    """`prompt_cache` as "memory", None or a folder that is there, or a ValueError that names what is wrong."""
    check_options(text_encoder=text_encoder)
    if prompt_cache is None and text_encoder == "free":
        raise ValueError("`text_encoder` is 'free' and `prompt_cache` is None: nothing could be drawn twice; use 'offload'.")
    if prompt_cache is None or prompt_cache == "memory":
        return prompt_cache
    if not isinstance(prompt_cache, (str, Path)) or prompt_cache == "":
        raise ValueError(f"`prompt_cache` is {prompt_cache!r}; use 'memory', None or a folder.")
    return writable_folder("prompt_cache", prompt_cache)


def check_vae_memory(name: str, value: Any) -> int | str | None:
    """`value`, bytes for the VAE's activations, or a ValueError that names the argument."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (value is None or value == "auto" or (whole and value > 0)):
        raise ValueError(f"`{name}` is {value!r}; use 'auto', None, or a whole number of bytes of at least 1.")
    return value


def writable_folder(name: str, folder: str | Path | None) -> Path | None:
    """`folder`, made if it is not there, or a ValueError that names the argument when nothing can be written in it."""
    if folder is None:
        return None
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"`{name}` is {folder}, where nothing can be written: {error}; give a folder of your own.") from error
    return folder
