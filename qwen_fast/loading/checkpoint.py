"""Is a local folder a complete Qwen-Image checkpoint? Asked before tens of gigabytes are read; headers only.

diffusers and transformers find a missing or damaged file minutes into loading, and name neither it nor the cure.
"""

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from ..common.family import FAMILY

_INDEX = "model_index.json"
_AGAIN = "copy or download it again"
_HEADER_LIMIT = 100_000_000  # bytes, safetensors' own: more than that is no length but something else's first 8 bytes


Headers = dict[str, dict[str, Any]]  # a tensor's name to what safetensors says of it: dtype ("BF16"), shape, data_offsets


def check_folder(
    path: Any, *, variant: str | None = None, skip: Container[str] = (), hub_ids: bool = False
) -> dict[str, Headers]:
    """Check that `path` holds every file that loading it needs, whole: no tensor is read.

    Args:
        path (str or Path): folder with a model_index.json.
        variant (str): as in `from_pretrained`, such as "fp16": these weights are checked where a component has them.
        skip (container of str): components that the caller supplies himself, such as "transformer".
        hub_ids (bool): a name that is no local folder and may be a repository's id ("Qwen/Qwen-Image") is accepted.

    Returns:
        dict: of each model in the folder that was checked, the headers of the weights that a loader would read; none for
        pickles. Empty for an accepted hub id.

    Raises:
        FileNotFoundError: the folder, one of its files or a component is missing.
        ValueError: a file is empty, truncated, corrupt or of another pipeline. Every message names the file, what is
            wrong with it and what would work.
    """
    folder = Path(path)
    if not folder.exists():
        if hub_ids and _may_be_hub_id(str(path)):
            return {}
        raise FileNotFoundError(f"{folder}: no such folder; give a folder that holds {_INDEX}, or a hub id 'owner/name'")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder that holds {_INDEX}")
    if not (folder / _INDEX).is_file():
        if (folder.parent / _INDEX).is_file():
            raise FileNotFoundError(f"{folder} is one component of a checkpoint; give its parent, {folder.parent}")
        raise FileNotFoundError(f"{folder} has no {_INDEX}; give a checkpoint in diffusers' folder layout")
    index = _read_json(folder / _INDEX)
    class_name = index.get("_class_name")
    if class_name not in FAMILY:
        raise ValueError(
            f"{folder / _INDEX}: _class_name is {class_name!r}, no pipeline of the Qwen-Image family; "
            f"load it with diffusers, or give a checkpoint of one of {', '.join(FAMILY)}"
        )
    headers = {}
    for name, entry in index.items():
        # Other entries are settings; [null, null] is a component left out on purpose.
        if isinstance(entry, list) and len(entry) == 2 and all(entry) and name not in skip:
            found = _check_component(folder / name, *entry, variant)
            if found is not None:
                headers[name] = found
    return headers


def _may_be_hub_id(name: str) -> bool:
    """`owner/name` or `name`; what starts with a dot, a slash or a tilde, or has more parts, can only be a path."""
    return name.count("/") <= 1 and "\\" not in name and not name.startswith((".", "/", "~")) and not name.endswith("/")


def _check_component(folder: Path, library: str, class_name: str, variant: str | None) -> Headers | None:
    """The headers of a model's weights; None for a component without weights."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing ({class_name}, named in {_INDEX}); {_AGAIN}")
    if class_name.endswith("Scheduler"):
        _read_json(folder / "scheduler_config.json")
    elif "Tokenizer" in class_name:
        vocabulary = [name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()]
        if not vocabulary:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.json; {_AGAIN}")
        if vocabulary == ["vocab.json"]:
            vocabulary.append("merges.txt")
        for name in vocabulary:
            _check_text(folder / name)
    elif "Processor" in class_name or "FeatureExtractor" in class_name:
        _one_of(folder, ("preprocessor_config.json", "processor_config.json"))
    else:
        _read_json(folder / "config.json")
        return _check_weights(folder, library, variant)
    return None


def _check_weights(folder: Path, library: str, variant: str | None) -> Headers:
    """Check the weights that the loader would open: of the variant if there are any, else the plain ones."""
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    for dot in ([f".{variant}"] if variant else []) + [""]:
        single = folder / f"{stem}{dot}.safetensors"
        # The second is an older form, which diffusers still reads.
        indices = folder / f"{stem}.safetensors.index{dot}.json", folder / f"{stem}.safetensors{dot}.index.json"
        index = next((file for file in indices if file.is_file()), None)
        # With both there, transformers opens the single file and diffusers the shards.
        if index and not (library == "transformers" and single.is_file()):
            return _check_shards(index)
        if single.is_file() or single.is_symlink():
            return _safetensors_header(single)
        if any(f"{dot}." in file.name or f"{dot}-" in file.name for file in folder.glob("*.bin")):
            return {}  # pickles have no header to check
    _explain_missing(folder, stem)


def _explain_missing(folder: Path, stem: str) -> NoReturn:
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if not others:
        raise FileNotFoundError(f"{folder} has no weights (*.safetensors, *.bin); {_AGAIN}")
    if any("-of-" in name for name in others) and not any(folder.glob("*.safetensors*.json")):
        raise FileNotFoundError(f"{folder} has shards ({others[0]}, ...) but no *.safetensors.index.json; {_AGAIN}")
    cure = f"the loader looks for {stem}.safetensors or {stem}.safetensors.index.json"
    variant = re.search(r"\.([^.]+?)(-\d+-of-\d+)?\.safetensors$", others[0])
    if variant:
        cure = f"pass variant={variant[1]!r}"
    raise FileNotFoundError(f"{folder} has weights only as {', '.join(others[:3])}; {cure}")


def _check_shards(index: Path) -> Headers:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or {type(shard) for shard in weight_map.values()} != {str}:
        raise ValueError(f"{index}: it has no weight_map; {_AGAIN}")
    headers_in = {}
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index.parent / shard} is missing, {index.name} names it; {_AGAIN}")
        headers_in[shard] = _safetensors_header(index.parent / shard)
    for tensor, shard in weight_map.items():
        if tensor not in headers_in[shard]:
            raise ValueError(f"{index.parent / shard}: it lacks {tensor}, which {index.name} places there; {_AGAIN}")
    return {tensor: headers_in[shard][tensor] for tensor, shard in weight_map.items()}


def _safetensors_header(file: Path) -> Headers:
    """The tensors of a safetensors file whose header fits its length: 8 bytes length, JSON header, data."""
    size = _size(file)
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start == b"version ":
            raise ValueError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`")
        if size < 10 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError(f"{file} is truncated or no safetensors file ({size:,} bytes); {_AGAIN}")
        header_bytes = stream.read(length)
    try:
        header = json.loads(header_bytes)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ValueError(f"{file} is corrupt, its header is not valid; {_AGAIN}") from None
    if size != expected:
        what = "truncated" if size < expected else "corrupt"
        raise ValueError(f"{file} is {what}: {size:,} bytes where its header describes {expected:,}; {_AGAIN}")
    try:
        # What the loader checks besides: types, shapes, gaps between tensors. It maps the file and reads the header.
        with safe_open(file, framework="np"):
            return {name: entry for name, entry in header.items() if name != "__metadata__"}
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt ({error}); {_AGAIN}") from None


def _one_of(folder: Path, names: tuple[str, ...]) -> None:
    found = [name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{folder} has no {' or '.join(names)}; {_AGAIN}")
    _read_json(folder / found[0])


def _check_text(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; {_AGAIN}")
    _size(file)


def _size(file: Path) -> int:
    if not file.exists():
        raise FileNotFoundError(f"{file} is a link to a file that is missing; {_AGAIN}")
    size = file.stat().st_size
    if size == 0:
        raise ValueError(f"{file} is empty; {_AGAIN}")
    return size


def _read_json(file: Path) -> dict[str, Any]:
    _check_text(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {_AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; {_AGAIN}")
    return content
