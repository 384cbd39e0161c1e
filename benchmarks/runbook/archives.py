"""A folder of results as two archives of limited size: rows, logs and reports in one, traces in the other."""

import io
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path

LIMIT = 16 * 2**20 - 4096
NOTE = "left_out.txt"
_TRACES = (".json.gz", ".pickle")
_NOT_RESULTS = ("site",)  # folders of what the run installed


def is_trace(path: Path) -> bool:
    return path.name.endswith(_TRACES)


def write_archives(folder: Path, target: Path, more: Iterable[Path] = (), limit: int = LIMIT) -> list[str]:
    """Write rows.tar.gz and traces.tar.gz, each whole or not at all; what was left out, a line a file.

    Args:
        folder: of the results. target: where the archives go; may be the folder.
        more: folders from elsewhere, kept by their name.
        limit: bytes of an archive. The largest files are left out until it fits; rows.tar.gz holds a note of that.
    """
    own = {path: path.relative_to(folder) for path in _files(folder) if not _excluded(path, folder)}
    own |= {path: Path(root.name, path.relative_to(root)) for root in more for path in _files(root)}
    traces = {path: name for path, name in own.items() if is_trace(path)}
    target.mkdir(parents=True, exist_ok=True)
    left_out = _write(target / "traces.tar.gz", traces, limit)
    rows = {path: name for path, name in own.items() if path not in traces}
    left_out += _write(target / "rows.tar.gz", rows, limit, note=left_out)
    return left_out


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _excluded(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return parts[0] in _NOT_RESULTS or path.suffix == ".tmp" or path.name in ("rows.tar.gz", "traces.tar.gz")


def _write(path: Path, files: dict[Path, Path], limit: int, note: Iterable[str] = ()) -> list[str]:
    kept, left_out = dict(files), []
    while True:
        data = _packed(kept, [*note, *left_out])
        if len(data) <= limit or not kept:
            break
        largest = max(kept, key=lambda one: one.stat().st_size)
        left_out.append(f"{kept.pop(largest)}: {largest.stat().st_size} bytes, too large for {path.name}")
    aside = path.with_suffix(".tmp")
    aside.write_bytes(data)
    os.replace(aside, path)
    return left_out


def _packed(files: dict[Path, Path], note: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, name in files.items():
            with path.open("rb") as file:
                data = file.read()  # a log that grows meanwhile would not have the size that its header says
            entry = tarfile.TarInfo(str(name))
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            archive.addfile(entry, io.BytesIO(data))
        if note:
            data = ("\n".join(note) + "\n").encode()
            entry = tarfile.TarInfo(NOTE)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()
