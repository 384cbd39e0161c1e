"""Pictures of committed rows: the ladder, the roofline, and a step by picture size and batch.

    python -m benchmarks.pages.plots [--rows benchmarks/results] [--out FOLDER] [--machine H200] [--svg]

Reads ladder.csv and ceilings.csv (`qwen-fast bench`) and operators.csv (`pytest benchmarks --benchmark-only --rows
benchmarks/results/operators.csv`), takes what was last measured on one machine, and draws what there are rows for.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..shared.rows import read
from ..shared.source import RESULTS
from .figures import CASE, Row, ladder_figure, roofline_figure, scaling_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_ladder(rows: Sequence[Row], path: Path) -> None:
    """Seconds per image of every rung of one case, stock first, with speed-up, share of the ceiling and quality beside them.

    Args:
        rows: of ladder.csv, of one machine; the case with the most rungs is drawn.
        path: of a .png or .svg file.
    Raises:
        ValueError: no rows, no rung that was measured, or another kind of file.
        ImportError: matplotlib is not installed.
    """
    save(ladder_figure(rows), path)


def draw_roofline(rows: Sequence[Row], ceilings: Sequence[Row], path: Path) -> None:
    """FLOP/s against FLOPs per byte, under the rates that this machine sustains.

    Args:
        rows: of operators.csv, of ladder.csv, or of both, of one machine and dtype.
        ceilings: of ceilings.csv, of the same; of several rates of one kind the highest counts.
        path: of a .png or .svg file.
    Raises:
        ValueError: no rows, no ceilings, or another kind of file.
        ImportError: matplotlib is not installed.
    """
    save(roofline_figure(rows, ceilings), path)


def draw_scaling(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds a step against picture size and batch, all else but the number of steps equal, stock beside qwen_fast.

    Args:
        rows: of ladder.csv, of one machine.
        path: of a .png or .svg file.
    Raises:
        ValueError: no rows, no two of which differ in one of the two alone, or another kind of file.
        ImportError: matplotlib is not installed.
    """
    save(scaling_figure(rows), path)


def latest(rows: Iterable[Row], keys: Sequence[str], machine: str | None = None) -> list[Row]:
    """The rows of one machine, model and dtype, the last one of each that agree in `keys`; in the order they first came.

    Args:
        machine: part of the machine's name; None: the one of the last row.
    Raises:
        ValueError: there are none.
    """
    rows = [row for row in rows if machine is None or machine.lower() in row["machine"].lower()]
    if not rows:
        raise ValueError("there are no rows" + (f" of a machine named like {machine!r}" if machine else "") + " to draw")
    where = [rows[-1].get(name) for name in ("machine", "model", "dtype")]
    found = {}
    for row in rows:
        if [row.get(name) for name in ("machine", "model", "dtype")] == where:
            found[tuple(row[key] for key in keys)] = row
    return list(found.values())


def of_one_run(rows: Sequence[Row], every: Sequence[Row]) -> list[Row]:
    """Of `every` row those of the run that has most rungs of a case, the last such one; which machine and model, `rows` say."""
    where = ("machine", "model", "dtype")
    runs: dict[tuple, dict[str, Row]] = {}
    for row in every:
        if rows and all(row[name] == rows[-1][name] for name in where):
            runs.setdefault(tuple(row[name] for name in (*CASE, "commit")), {})[row["rung"]] = row
    return list(max(reversed(list(runs.values())), key=len).values()) if runs else list(rows)


def save(figure: "Figure", path: Path) -> None:
    """Write a PNG or an SVG, by the name's ending."""
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path.name} is neither a .png nor a .svg file")
    figure.savefig(path, dpi=110, format=path.suffix[1:])


def draw_all(rows: Path, out: Path, *, machine: str | None = None, suffix: str = ".png") -> tuple[list[Path], list[str]]:
    """Draw what the tables in the folder `rows` have rows for, into the folder `out`.

    Returns:
        tuple: the files that were written, and for each plot that was not why.
    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a table is half-written.
        OSError: `rows` is not there, or nothing can be written to `out`.
    """
    if not rows.is_dir():
        raise FileNotFoundError(f"{rows} is no folder: `qwen-fast bench` writes its rows there")
    out.mkdir(parents=True, exist_ok=True)
    tables = {
        name: read(rows / f"{name}.csv") if (rows / f"{name}.csv").exists() else []
        for name in ("ladder", "ceilings", "operators")
    }
    keys = {"ladder": (*CASE, "rung"), "ceilings": ("what", "detail", "date", "commit"), "operators": ("benchmark", "size")}
    written, left_out = [], []

    def chosen(name: str) -> list[Row]:
        return latest(tables[name], keys[name], machine)

    def under_roof() -> list[Row]:
        ladder = chosen("ladder")
        same = [row for row in tables["operators"] if all(row[name] == ladder[-1][name] for name in ("machine", "dtype"))]
        return ladder + (latest(same, keys["operators"]) if same else [])

    for name, draw in (
        ("ladder", lambda path: draw_ladder(of_one_run(chosen("ladder"), tables["ladder"]), path)),
        ("roofline", lambda path: draw_roofline(under_roof(), chosen("ceilings"), path)),
        ("scaling", lambda path: draw_scaling(chosen("ladder"), path)),
    ):
        path = out / f"{name}{suffix}"
        try:
            draw(path)
        except ValueError as error:
            left_out.append(f"{path.name} is not drawn: {error}")
        else:
            written.append(path)
    return written, left_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS, help="folder of the tables (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the pictures (default: that of the tables)")
    parser.add_argument("--machine", help="part of its name (default: that of the last row)")
    parser.add_argument("--svg", action="store_true", help="SVG instead of PNG")
    options = parser.parse_args()
    written, left_out = draw_all(
        options.rows, options.out or options.rows, machine=options.machine, suffix=".svg" if options.svg else ".png"
    )
    for line in [*map(str, written), *left_out]:
        print(line)
    return 0 if written else 1


if __name__ == "__main__":
    raise SystemExit(main())
