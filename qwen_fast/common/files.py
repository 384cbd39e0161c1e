"""Tensors kept in a folder for other processes: files that are whole or not there, and damage that is noticed."""

import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .state import logger


def write_whole(tensors: dict[str, torch.Tensor], metadata: dict[str, str], path: Path, what: str) -> None:
    """Tensors, metadata and a checksum of both into `path`, whole or not at all.

    A folder that has become full or unwritable is a warning that names `what`: the caller has the tensors.
    """
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".scratch") as scratch:
            save_file(tensors, Path(scratch, path.name), metadata | {"checksum": _checksum(tensors, metadata)})
            Path(scratch, path.name).replace(path)
    except (OSError, SafetensorError) as error:
        logger.warning("the %s could not be written to %s: %s", what, path, error)


def read_checked(path: Path, names: Iterable[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
    """The tensors `names` and the metadata of a file of `write_whole`; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
        if metadata.pop("checksum", None) != _checksum(tensors, metadata):
            raise SafetensorError("its checksum is another")
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged and will be written anew: %s", path, error)
        return None
    return tensors, metadata


def _checksum(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    parts = [repr(sorted(metadata.items())).encode()]
    parts += (tensors[name].contiguous().view(torch.uint8).numpy() for name in sorted(tensors))
    return str(sum(zlib.crc32(part) << 32 * index for index, part in enumerate(parts)))
