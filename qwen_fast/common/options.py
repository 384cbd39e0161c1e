"""The options of an accelerated pipeline: names, defaults, values and checks, once. Nothing here imports torch."""

import dataclasses
import difflib
import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

VALUES = {
    "precise_sampler": (True, False),
    "modulation": ("auto", "device", "host", "layers"),
    "attention": ("auto", "triton", "cudnn", "flash", "efficient", "diffusers"),
    "cuda_graph": ("auto", True, False),
    "vae_mode": ("image", "diffusers"),
    "text_encoder_mode": ("keep", "offload", "free"),
    "check_nan": (True, False),
    "strict": (True, False),
}
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Options:
    """What `enable`, the constructor of `QwenImagePipeline` and its `from_pretrained` take; `enable` says what each means.

    Raises:
        ValueError: a value that an option does not have, by name, and what it may be.
    """

    precise_sampler: bool = False
    modulation: str = "auto"
    attention: str = "auto"
    cuda_graph: bool | str = "auto"
    vae_mode: str = "image"
    vae_memory: int | str | None = "auto"
    prompt_cache: str | Path | None = "memory"
    text_encoder_mode: str = "keep"
    check_nan: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        for name, known in VALUES.items():
            value = getattr(self, name)
            if not any(value is one or (isinstance(value, str) and value == one) for one in known):
                raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(map(repr, known))}.")
        check_vae_memory("vae_memory", self.vae_memory)
        folder = self.prompt_cache
        if folder is None and self.text_encoder_mode == "free":
            raise ValueError(
                "`text_encoder_mode` is 'free' and `prompt_cache` is None: nothing could be drawn twice; use 'offload'."
            )
        if folder is not None and folder != "memory":
            if not isinstance(folder, (str, Path)) or folder == "":
                raise ValueError(f"`prompt_cache` is {folder!r}; use 'memory', None or a folder.")
            object.__setattr__(self, "prompt_cache", writable_folder("prompt_cache", folder))

    @classmethod
    def of(cls, given: dict[str, Any]) -> "Options":
        """Those that are `given`, the others at their defaults; a TypeError for a name that is none of theirs."""
        unknown = given.keys() - NAMES
        if unknown:
            raise TypeError(f"{unknown_options(unknown)}.")
        return cls(**given)


NAMES = tuple(field.name for field in dataclasses.fields(Options))


def unknown_options(names: set[str]) -> str:
    """What an error says of options that there are not."""
    near = [guess for name in sorted(names) for guess in difflib.get_close_matches(name, NAMES, 1)]
    meant = f"; did you mean {', '.join(f'`{name}`' for name in near)}?" if near else ";"
    return f"unknown option {', '.join(f'`{name}`' for name in sorted(names))}{meant} there are {', '.join(NAMES)}"


def takes_options(function: Function) -> Function:
    """Show the options by name and default in the place of the `**options` of `function`: to `help`, and to diffusers,
    whose `from_pretrained` hands a constructor the arguments that its signature names."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in dataclasses.fields(Options)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])
    function.__annotations__ |= {field.name: field.type for field in dataclasses.fields(Options)}
    return function


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
