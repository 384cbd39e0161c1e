"""Launch configurations that were measured on the GPU at hand, and the operator's own default where none was.

`configs/<op>,D=<width>,device_name=<name>.json` holds the measured ones: `{"op", "device", "entries": [...]}`, an entry with
`dims` (what the operator's `default_config` takes after the capability), `config` and `triton`, the version it was measured
with. `qwen-fast tune` writes them. The folder is there from the first file on.
"""

import functools
import inspect
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch

from ._triton import HAS_TRITON, capability, triton

logger = logging.getLogger("qwen_fast_kernels")

CONFIGS = Path(__file__).parent / "configs"
_WIDTHS = ("channels", "head_dim", "k")  # what "D" is in a file's name: the first of these that an operator has
_NEAR_ROWS = 2.0  # an entry serves that many times more or fewer rows than it was measured with


def dims_of(default: Callable[..., dict], dims: tuple) -> dict:
    """`dims` by the names that the operator's `default_config` gives them."""
    return dict(zip(list(inspect.signature(default).parameters)[1:], dims, strict=True))


def file_name(op: str, dims: dict, device_name: str) -> str:
    """Name of the file for an operator at one width on one GPU."""
    width = next(dims[name] for name in _WIDTHS if name in dims)
    return f"{op},D={width},device_name={re.sub(r'[^A-Za-z0-9.-]+', '_', device_name)}.json"


def read_entries(path: Path) -> list[dict]:
    """The entries of a file; none where there is no file.

    Raises:
        ValueError: not such a file, with its name.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        if not all(isinstance(entry[key], dict) for entry in entries for key in ("dims", "config")):
            raise TypeError("dims and config have to be objects")
        if not all(isinstance(entry["triton"], str) for entry in entries):
            raise TypeError("triton has to be a version")
        return entries
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a file of launch configurations ({type(error).__name__}: {error}).") from error


def chosen(entries: list[dict], dims: dict, version: str, default: dict) -> dict | None:
    """The configuration that serves `dims` with this version of Triton, or None.

    All dimensions have to agree but `rows`, of which the nearest measured number serves. Versions of Triton agree in their
    first two numbers: tiles do not carry over between others. Its keys have to be those of `default`: others belong to
    another state of the kernel.
    """
    found = [
        entry
        for entry in entries
        if entry["triton"].split(".")[:2] == version.split(".")[:2]
        and entry["config"].keys() == default.keys()
        and {**entry["dims"], "rows": None} == {**dims, "rows": None}
    ]
    if "rows" not in dims:
        return found[0]["config"] if found else None

    def distance(entry: dict) -> float:
        return max(entry["dims"]["rows"], dims["rows"]) / min(entry["dims"]["rows"], dims["rows"])

    nearest = min(found, key=distance, default=None)
    return nearest["config"] if nearest and distance(nearest) <= _NEAR_ROWS else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.lru_cache(maxsize=4096)  # the rows of a linear layer are among the dims, and any number of them may come
def get_config(op: str, dims: tuple, device: torch.device, default: Callable[..., dict]) -> dict:
    """The launch configuration of an operator: the measured one for this GPU, or the operator's default.

    Args:
        op (str): name of the operator.
        dims (tuple): what `default` takes after the capability.
        device (device): the CUDA device it will run on.
        default (Callable): the operator's `default_config`.
    Returns:
        dict: shared by all callers, not to be changed.
    """
    config = default(capability(device), *dims)
    if not _measured(device_name(device)):
        return config
    named = dims_of(default, dims)
    entries = _entries(CONFIGS / file_name(op, named, device_name(device)))
    return chosen(entries, named, triton.__version__ if HAS_TRITON else "", config) or config


@functools.cache
def _entries(path: Path) -> list[dict]:
    """Of a file, which is read once: every number of rows asks for it. None of a damaged one, as the log says."""
    try:
        return read_entries(path)
    except ValueError as error:
        logger.warning("%s The default configurations are used.", error)
        return []


@functools.cache
def _measured(name: str) -> bool:
    """Whether anything was measured on this GPU; where not, the log says so, once."""
    found = any(CONFIGS.glob(file_name("*", {"k": "*"}, name)))
    if not found:
        logger.warning("no launch configurations were measured on %s: the defaults are used (`qwen-fast tune`).", name)
    return found
