"""Rows of results: appended one by one, never edited."""

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .machine import machine_name
from .source import source_key


def damage(path: Path, fields: list[str]) -> str | None:
    """Why rows of `fields` cannot follow what `path` holds, or None: it is missing, empty, or a table of these columns."""
    if not path.exists():
        return None
    data = path.read_bytes()
    if not data:
        return None
    if not data.endswith(b"\n"):
        *whole, half = data.decode(errors="replace").split("\n")
        return f"line {len(whole) + 1} is half-written: {half[-60:]!r}"
    table = list(csv.reader(io.StringIO(data.decode(errors="replace"))))
    if table[0] != fields:
        missing, other = [name for name in fields if name not in table[0]], [name for name in table[0] if name not in fields]
        return f"its columns are others: {', '.join(missing) or 'none'} missing, {', '.join(other) or 'none'} unknown"
    for number, row in enumerate(table[1:], start=2):
        if len(row) != len(fields):
            return f"row {number} has {len(row)} of {len(fields)} columns"
    return None


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file, by column.

    Raises:
        ValueError: naming the line that is half-written.
    """
    with path.open(newline="") as file:
        fields = next(csv.reader(file), [])
    problem = damage(path, fields)
    if problem:
        raise ValueError(f"{path}: {problem}. The rows before it are intact; delete that line or restore the file.")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of_this_state(path: Path, device: Any) -> list[dict[str, str]]:
    """The rows of a file that were measured with these sources on this kind of device; none where there is no file."""
    if not path.exists() or not path.stat().st_size:
        return []
    here = {"commit": source_key()[0], "machine": machine_name(device)}
    return [row for row in read(path) if here.items() <= row.items()]


class RowFile:
    """A CSV file that takes one row after the other, each on the disk before the next is measured.

    A file that rows of these columns cannot follow is left as it is, and name-1.csv, name-2.csv, ... is taken.

    Args:
        path: of the file; its folder is made where it is not there.
        fields: names of the columns.
    Attributes:
        path (Path): of the file that is written.
        note (str | None): why that is not the file that was asked for.
    Raises:
        OSError: nothing can be written there.
    """

    def __init__(self, path: Path, fields: list[str]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.fields, self.note = path, fields, None
        problem, number = damage(path, fields), 0
        while damage(self.path, fields):
            number += 1
            self.path = path.with_name(f"{path.stem}-{number}{path.suffix}")
        if problem:
            self.note = f"{path}: {problem}. It is left as it is; rows go to {self.path.name}."
        with self.path.open("a"):  # an unwritable place is known before anything is measured
            pass

    def add(self, row: dict[str, Any]) -> None:
        """Append one row; a column without a value stays empty.

        Raises:
            KeyError: a value without a column.
        """
        unknown = row.keys() - set(self.fields)
        if unknown:
            raise KeyError(f"no column {', '.join(sorted(unknown))} in {self.path}")
        text = io.StringIO()
        writer = csv.writer(text)
        with self.path.open("ab", buffering=0) as file:
            if file.tell() == 0:
                writer.writerow(self.fields)
            writer.writerow([row.get(name, "") for name in self.fields])
            file.write(text.getvalue().encode())  # one write, so that an interruption hardly finds it half done
            os.fsync(file.fileno())


def append(path: Path, fields: list[str], rows: Iterable[list[Any]]) -> None:
    """Add `rows`, whose values are in the order of `fields`, to the CSV file; see `RowFile`."""
    file = RowFile(path, fields)
    if file.note:
        print(file.note)
    for row in rows:
        file.add(dict(zip(fields, row, strict=True)))
