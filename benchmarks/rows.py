"""Rows of results: appended, never edited."""

import csv
import subprocess
from pathlib import Path
from typing import Any


def git(*arguments: str) -> str:
    """Output of a git command in this repository, empty where there is none."""
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()


def append(path: Path, fields: list[str], rows: list[list[Any]]) -> None:
    """Add `rows` to the CSV file, which is made with a header of `fields` where it is not there."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        csv.writer(file).writerows([fields] * new + rows)
