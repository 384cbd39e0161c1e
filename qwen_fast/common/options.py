"""The options of an accelerated pipeline: names, defaults, values and checks, once. Nothing here imports torch."""

import dataclasses
import difflib
import functools
import inspect
import operator
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

Modulation = Literal["auto", "device", "host", "layers"]
Attention = Literal["auto", "triton", "cudnn", "flash", "efficient", "diffusers"]
CudaGraph = Literal["auto", True, False]
VaeMode = Literal["image", "diffusers"]
TextEncoderMode = Literal["keep", "offload", "free"]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Options:
    """What `enable`, the constructor of `QwenImagePipeline` and its `from_pretrained` take; `enable` says what each means.

    Raises:
        ValueError: a value that an option does not have, by name, and what it may be.
    """

    precise_sampler: bool = False
    modulation: Modulation = "auto"
    attention: Attention = "auto"
    cuda_graph: CudaGraph = "auto"
    vae_mode: VaeMode = "image"
    vae_memory: int | Literal["auto"] | None = "auto"
    prompt_cache: str | Path | None = "memory"
    text_encoder_mode: TextEncoderMode = "keep"
    batch_invariant: bool = False
    check_nan: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        for name, known in VALUES.items():
            value = getattr(self, name)
            if not any(value is one or (isinstance(value, str) and value == one) for one in known):
                raise ValueError(f"`{name}` is {value!r}; use one of {', '.join(map(repr, known))}.")
        check_vae_memory("vae_memory", self.vae_memory)
        if self.batch_invariant and self.vae_mode == "diffusers":
            raise ValueError(
                "`batch_invariant` is True and `vae_mode` is 'diffusers', which codes all pictures of a batch at once; "
                "use vae_mode='image'."
            )
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


class OptionsGiven(TypedDict, total=False):
    """The options as keywords, for type checkers."""

    precise_sampler: bool
    modulation: Modulation
    attention: Attention
    cuda_graph: CudaGraph
    vae_mode: VaeMode
    vae_memory: int | Literal["auto"] | None
    prompt_cache: str | Path | None
    text_encoder_mode: TextEncoderMode
    batch_invariant: bool
    check_nan: bool
    strict: bool


NAMES = tuple(field.name for field in dataclasses.fields(Options))
# Of those that have a few values only.
VALUES: dict[str, tuple[Any, ...]] = {
    field.name: (True, False) if field.type is bool else get_args(field.type)
    for field in dataclasses.fields(Options)
    if field.name not in ("vae_memory", "prompt_cache")
}


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
    kinds = {field.name: _without_literals(field.type) for field in dataclasses.fields(Options)}
    options = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name])
        for field in dataclasses.fields(Options)
    ]
    function.__signature__ = signature.replace(parameters=[*own, *options])
    function.__annotations__ = {name: function.__annotations__[name] for name in function.__annotations__ if name != "options"}
    function.__annotations__ |= kinds
    return function


def _without_literals(kind: Any) -> Any:
    """A type for diffusers, which reads the annotations of a pipeline's constructor and warns of those that are no classes."""
    if get_origin(kind) is Literal:
        parts = [type(value) for value in get_args(kind)]
    elif isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        parts = [_without_literals(part) for part in get_args(kind)]
    else:
        parts = [kind]
    return functools.reduce(operator.or_, dict.fromkeys(parts))


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
