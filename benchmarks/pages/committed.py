"""Committed rows, as text by column, and lines of a Markdown table."""

import csv
import re
from collections.abc import Iterable

from ..shared.source import RESULTS

Row = dict[str, str]
CASE = ("width", "height", "steps", "cfg", "batch", "text_tokens")
STOCK, ENABLED, COMPILED = "stock diffusers", "qwen_fast as enabled", "stock + regional compile"


def rows_of(name: str) -> list[Row]:
    """All rows of results/NAME.csv and, in their order, of name-1.csv and so on; none where there is no such file."""
    numbered = {path: re.fullmatch(rf"{name}(?:-(\d+))?", path.stem) for path in RESULTS.glob(f"{name}*.csv")}
    files = sorted((path for path, match in numbered.items() if match), key=lambda path: int(numbered[path][1] or 0))
    rows = []
    for path in files:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def newest(rows: Iterable[Row], *key: str) -> list[Row]:
    """The last row of each case, in the order in which the cases first came."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        last[tuple(row[name] for name in key)] = row
    return list(last.values())


def on_gpu(row: Row) -> bool:
    return " CPU, " not in row["machine"]


def measured_on_gpu(*rungs: str) -> list[Row]:
    """The newest rows of the ladder that were measured on a GPU, of these rungs."""
    rows = [row for row in rows_of("ladder") if on_gpu(row) and row["status"] == "ok" and row["rung"] in rungs]
    return newest(rows, "machine", "model", "dtype", *CASE, "rung")


def guidance(row: Row) -> str:
    return "CFG" if row.get("cfg") == "True" or float(row.get("true_cfg_scale") or 0) > 1 else "no CFG"


def case_name(row: Row) -> str:
    name = f"{row['width']}x{row['height']}, {row['steps']} steps, {guidance(row)}"
    return name if row.get("batch", "1") == "1" else f"{name}, batch {row['batch']}"


def cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def heading(*names: str) -> list[str]:
    return [cells(*names), "|---" * len(names) + "|"]
