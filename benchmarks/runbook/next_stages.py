"""Which stages of the run-book come next: those whose rows the repository still lacks for the machine at hand.

A stage says by which rows of benchmarks/results it is known (`Stage.rows`); one that has no rows of its own, such as tests, by
a row of runbook.csv that says it was done. Looked for are rows of the same machine by name. Then

1. stages that lack a row come first, in the order of their worth,
2. then those whose rows are of other sources (the hash in the column `commit`), the oldest date first,
3. those whose rows are of just these sources are left out.

Rows count when they lie in benchmarks/results: what came back from a borrowed machine is copied there first. What they say does
not matter, for a failure is a result too. Imports nothing but the standard library.
"""

import csv
import platform
import subprocess
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from ..shared.source import RESULTS
from .stages import Stage

BOOK = "runbook.csv"
FIELDS = ("date", "commit", "dirty", "machine", "stage", "status", "code", "seconds")


def machine_at_hand(small: bool = False) -> str:
    """The name that rows carry (`machine.machine_name`), without torch: of the first GPU, or with `small` of this CPU.

    "" where nvidia-smi says nothing.
    """
    if small:
        return f"{platform.machine()} CPU, 1 thread"
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def reason(stage: Stage, machine: str, key: str, results: Path = RESULTS) -> tuple[str, str]:
    """(why the stage is run, a date by which its kind is ordered): nothing and nothing where its rows are of these sources."""
    newest = []
    for file, columns in stage.rows or ((BOOK, {"stage": stage.name, "status": "done"}),):
        wanted = columns | {"machine": machine}
        found = [row for row in rows_of(results / file) if wanted.items() <= row.items()]
        if not found:
            told = ", ".join(f"{name} {value}" for name, value in columns.items())
            return f"no row in {file}" + (f" with {told}" if told else ""), ""
        newest.append(max(found, key=lambda row: (row["commit"].split()[-1] == key.split()[-1], row["date"])))
    oldest = min(newest, key=lambda row: (row["commit"].split()[-1] == key.split()[-1], row["date"]))
    if oldest["commit"].split()[-1] == key.split()[-1]:
        return "", ""
    return f"rows of {oldest['date']}, of other sources ({oldest['commit']})", oldest["date"]


def chosen(
    stages: Iterable[Stage], machine: str, key: str, seconds: float, results: Path = RESULTS
) -> tuple[list[Stage], list[str]]:
    """The stages that come next and fit into `seconds` by their estimates, and a line on each of them all.

    What every stage needs comes first whatever rows there are. A stage that does not fit gives its place to the next one; one
    that measures what another left behind (`Stage.after`) needs that one in the same run.
    """
    stages = list(stages)
    told = {stage.name: reason(stage, machine, key, results) for stage in stages}
    order = sorted((s for s in stages if told[s.name][0] and not s.needed), key=lambda s: told[s.name][1])
    picked, lines, left = [], [], seconds
    for stage in [*(s for s in stages if s.needed), *order]:
        estimate = stage.estimate or stage.limit
        if stage.after and stage.after not in (one.name for one in picked):
            lines.append(f"later: {stage.name}, about {estimate:.0f} s: comes behind {stage.after}")
            continue
        why = "every stage needs it" if stage.needed else told[stage.name][0]
        if estimate <= left or stage.needed:
            picked.append(stage)
            left -= estimate
            lines.append(f"next: {stage.name}, about {estimate:.0f} s: {why}")
        else:
            lines.append(f"later: {stage.name}, about {estimate:.0f} s, {max(left, 0):.0f} s are left: {why}")
    lines += [f"there: {s.name}: rows of these sources" for s in stages if not told[s.name][0] and not s.needed]
    return picked, lines


def note(folder: Path, key: tuple[str, str], machine: str, stage: str, entry: dict) -> None:
    """Append what became of a stage to runbook.csv in `folder`, from where it is copied into benchmarks/results."""
    path, row = folder / BOOK, {"date": date.today().isoformat(), "commit": key[0], "dirty": key[1], "machine": machine}
    row |= {"stage": stage, **{name: entry.get(name) for name in ("status", "code", "seconds")}}
    fresh = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\r\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)
