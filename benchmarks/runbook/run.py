"""Everything that a borrowed GPU has to tell, in one command: correctness, operators, ladder, profile, tests, in one folder.

On a machine with a network, once, in the repository's root (the folder is ignored by git; 26 MiB), and before every run the
second line, which takes a moment and notes the commit of the sources that go along:

    python -m benchmarks.runbook --prepare wheels
    python -m benchmarks.runbook --stamp wheels

On the GPU machine, which may have no network and no git, in a copy of the repository with that folder:

    python3 -m benchmarks.runbook --wheels wheels --out /tmp/book --archives $OUT              at most 8 minutes
    python3 -m benchmarks.runbook --wheels wheels --out /tmp/book --archives $OUT --next       then: what the repository lacks
    python3 -m benchmarks.runbook --wheels wheels --out /tmp/book --archives $OUT --tune       tunes, and the ladder again
    python3 -m benchmarks.runbook ... --only environment,operators,memory                      some stages, also of later ones

The stages (stages.py) come in the order of their worth, each in a process of its own with its own log and limit:
what hangs or crashes costs its own stage. What is done is kept when the run is cut short: the same command goes on behind
it, on another machine after `tar -xzf rows.tar.gz -C DIR`. While a stage runs, and after it, `--archives` gets rows.tar.gz
(rows, logs, reports) and traces.tar.gz, of at most 16 MiB each.

`--next` goes on where earlier borrowed machines stopped: what benchmarks/results lacks for this machine, then what is of other
sources (next_stages.py has the rule), as much as fits by the estimates. `--plan` prints that and runs nothing:

    python -m benchmarks.runbook --next --plan --machine "NVIDIA H100 80GB HBM3" --minutes 3

    python -m benchmarks.runbook --dry-run --out DIR      every stage at a small size on a CPU

Exit codes: 0 all stages done, 1 a stage failed or is not done, 2 bad input, or a machine that lacks what every stage needs.
"""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..shared import source
from ..shared.processes import execute
from ..shared.source import ROOT
from ..shared.watchdog import GO_ON
from . import archives, next_stages, wheels
from .stages import LATER, STAGES, TIMEOUT, TUNING, Stage

CONFIGS = ROOT / "kernels" / "qwen_fast_kernels" / "configs"
FINAL = ("done", "failed")  # a stage that was cut short is run again
_LEAST = 5.0  # with less time left no stage begins
# Of tests: the end of Inductor's pool of compilers waits for itself, so that a stage hung behind its last test.
_ONE_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


class Progress:
    """Which stages of these sources are done: DIR/state.json, written whole after every change.

    Args:
        path: of the file. key: of the sources; stages of others stay in the file and do not count.
    Raises:
        ValueError: a file that is none of ours, with its name.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key
        try:
            self._all = json.loads(path.read_text()) if path.exists() else {}
            self.stages: dict[str, dict] = self._all.setdefault(key, {})
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: not the state of a run-book ({error}); name another folder or remove it.") from error

    def set(self, name: str, status: str, **more) -> None:
        self.stages[name] = {"status": status, **more}
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self._all, indent=1))
        os.replace(aside, self.path)

    def status(self, name: str) -> str:
        return self.stages.get(name, {}).get("status", "not run")


# One run --------------------------------------------------------------------------------------------------------------


def chosen_ptxas(out: Path) -> dict[str, str]:
    """The assembler with which attention was found to be right, where that is not Triton's own."""
    path = out / "environment.json"
    ptxas = json.loads(path.read_text()).get("ptxas") if path.exists() else None
    return {"TRITON_PTXAS_PATH": ptxas} if ptxas else {}


def words_of(command: Sequence[str], out: Path, ptxas: str) -> list[str]:
    """A stage's command with its places filled."""
    timeout = TIMEOUT if importlib.util.find_spec("pytest_timeout") else ()
    words = [word for part in command for word in (timeout if part == "{timeout}" else (part,))]
    return [word.replace("{out}", str(out)).replace("{ptxas}", ptxas) for word in words]


def run(
    stages: Sequence[Stage],
    out: Path,
    state: Progress,
    environment: dict[str, str],
    *,
    minutes: float,
    small: bool = False,
    ptxas: str = "",
    pack: Callable[[], None] = lambda: None,
    every: float = 25.0,
    noted: Callable[[str, dict], None] = lambda name, entry: None,
) -> bool:
    """Run the stages that are not done; whether nothing is missing that all of them need.

    Args:
        environment: of the stages.
        minutes: of the whole run.
        small: a dry run, which proves that the stages run and has no time of theirs to keep.
        ptxas: path of another assembler to try.
        pack: saves the results; called behind every stage, and while one runs.
        every: seconds between two such calls.
        noted: gets the name and the outcome of a stage that has run, before the results are saved.
    """
    deadline = time.monotonic() + 60 * minutes
    for stage in stages:
        if state.status(stage.name) in FINAL:
            print(f"{stage.name}: {describe(state.stages[stage.name])}, before", flush=True)
            continue
        left, command = deadline - time.monotonic(), stage.small if small else stage.command
        if command is None:
            state.set(stage.name, "not run", why="needs a CUDA device", lacking=True)
        elif stage.under and shutil.which(stage.under[0]) is None:
            state.set(stage.name, "not run", why=f"{stage.under[0]} is not on the PATH", lacking=True)
        elif left < _LEAST:
            state.set(stage.name, "not run", why="the time is over")
        else:
            allowed = left if small else min(left, stage.limit)
            state.set(stage.name, "running")
            expected = f"about {stage.estimate:.0f} s, " if stage.estimate and not small else ""
            print(f"{stage.name}: {expected}at most {allowed:.0f} s, {left:.0f} s are left of the run", flush=True)
            log = out / "logs" / f"{stage.name}.log"
            own = environment | chosen_ptxas(out) | (_ONE_COMPILER if "pytest" in command else {})
            command = [*stage.under, sys.executable, *words_of(command, out, ptxas)]
            status, code, seconds = attempts(stage, command, log, allowed, own, lambda: protected(pack), every)
            state.set(stage.name, status, seconds=round(seconds, 1), code=code)
            protected(lambda name=stage.name: noted(name, state.stages[name]))
        protected(pack)
        print(f"{stage.name}: {describe(state.stages[stage.name])}", flush=True)
        status = state.status(stage.name)
        if lines := max(stage.shown * (status == "done"), 12 if status in ("failed", "timed out") else 0):
            print(tail(out / "logs" / f"{stage.name}.log", lines), flush=True)
        if stage.needed and status == "failed":
            return False
    return True


def attempts(stage, command, log, allowed, environment, tick, every) -> tuple[str, int | None, float]:
    """Run a stage, again where it says that it goes on by itself: (status, exit code, seconds)."""
    begin = time.monotonic()
    for number in range(stage.tries):
        left = allowed - (time.monotonic() - begin)
        if number:
            log = log.with_name(f"{stage.name}-{number + 1}.log")
            print(f"{stage.name}: something hung; it goes on behind that, {left:.0f} s are left of it", flush=True)
        code, _ = execute(command, log, left, environment, grace=stage.grace, every=every, tick=tick)
        if code != GO_ON or allowed - (time.monotonic() - begin) < _LEAST:
            break
    return "timed out" if code is None else "done" if code == 0 else "failed", code, time.monotonic() - begin


def protected(pack: Callable[[], None]) -> None:
    """A full disk, or a file that goes while it is packed, costs that archive or line and not the run."""
    try:
        pack()
    except Exception as error:
        print(f"not packed: {type(error).__name__}: {error}", flush=True)


def tail(log: Path, lines: int) -> str:
    """The last lines of a log, or of its last attempt, cut to the width of a table."""
    logs = [log, *sorted(log.parent.glob(f"{log.stem}-[0-9].log"))]
    text = [each.read_text(errors="replace") for each in logs if each.exists()]
    return "\n".join(f"    {line[:180]}" for line in (text or [""])[-1].splitlines()[-lines:])


def describe(stage: dict) -> str:
    parts = [stage["status"]]
    if stage.get("why"):
        parts.append(f"({stage['why']})")
    if stage.get("seconds") is not None:
        parts.append(f"after {stage['seconds']:g} s")
    if stage.get("code"):
        parts.append(f"with exit code {stage['code']}")
    return " ".join(parts)


def stage_environment(site: Path | None, small: bool) -> dict[str, str]:
    """Of the stages: our sources and what was installed come first on the path; no network, no half-buffered logs."""
    paths = [str(site)] * (site is not None) + [str(ROOT / "kernels"), str(ROOT)]
    before = os.environ.get("PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([*paths, *([before] if before else [])])}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "8"}  # of each process that compiles; by default one a core
    return environment | ({"OMP_NUM_THREADS": "1"} if small else {})


def selected(options: argparse.Namespace, machine: str = "", key: str = "", seconds: float = 480.0) -> tuple[Stage, ...]:
    """The stages that were asked for, in their order; with `--next` those that it chooses, of which it prints why.

    Args:
        machine, key, seconds: of `--next`: the machine's name, the sources', and the time that there is.
    Raises:
        ValueError: a name that is none of theirs, or no machine to look for.
    """
    every, stages = (*STAGES, *LATER, *TUNING), TUNING if options.tune else STAGES
    names = [stage.name for stage in every]
    for option in ("only", "skip", "again"):
        unknown = [name for name in getattr(options, option) if name not in names]
        if unknown:
            raise ValueError(f"--{option}: {', '.join(unknown)} is none of {', '.join(names)}.")
    if options.only:
        stages = tuple(stage for stage in every if stage.name in options.only or stage.needed)
    stages = tuple(stage for stage in stages if stage.name not in options.skip)
    if options.next:
        if not machine:
            raise ValueError("--next: nvidia-smi names no GPU here; --machine NAME says which one is meant.")
        candidates = stages if options.only or options.tune else tuple(s for s in every if s.name not in options.skip)
        picked, lines = next_stages.chosen(candidates, machine, key, seconds)
        print("\n".join([f"what {machine} lacks, for {seconds:.0f} s:", *lines]), flush=True)
        return tuple(picked)
    return stages


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runbook", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def names(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of everything; the same one goes on")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="where the two archives go (default: --out)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these first, into DIR/site of --out")
    parser.add_argument("--minutes", type=float, help="of the whole run (default: 8; of a dry run 60)")
    parser.add_argument("--tune", action="store_true", help="tune, then ladder, tests and profile again")
    parser.add_argument("--only", type=names, default=[], metavar="STAGE,STAGE", help="these, also those that come later")
    parser.add_argument("--skip", type=names, default=[], metavar="STAGE,STAGE", help="all but these")
    parser.add_argument("--again", type=names, default=[], metavar="STAGE,STAGE", help="run these again, done or not")
    parser.add_argument("--next", action="store_true", help="what the committed rows lack for this machine, of all stages")
    parser.add_argument("--machine", help="look for the rows of this one (default: the GPU that nvidia-smi names)")
    parser.add_argument("--plan", action="store_true", help="print the stages and their estimates, and end")
    parser.add_argument("--dry-run", action="store_true", help="every stage at a small size on the CPU")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="download into DIR what a GPU machine lacks, and end")
    parser.add_argument("--stamp", type=Path, metavar="DIR", help="note the commit of the sources in DIR, and end")
    options = parser.parse_args(argv)
    try:
        if options.prepare:
            print("\n".join(wheels.prepare(options.prepare)))
            return 0
        if options.stamp:
            print(source.stamp(options.stamp))
            return 0
        return _run(options, parser)
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"runbook: error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    begin, (key, dirty) = time.monotonic(), source.source_key()
    machine = options.machine or next_stages.machine_at_hand(options.dry_run)
    minutes = options.minutes or (60.0 if options.dry_run else 8.0)
    stages = selected(options, machine, key, 60 * minutes)
    if options.plan:
        shown = [f"{stage.name}: about {stage.estimate or stage.limit:.0f} s" for stage in stages]
        total = sum(stage.estimate or stage.limit for stage in stages)
        print("\n".join([*([] if options.next else shown), f"about {total:.0f} s, of {60 * minutes:.0f} s"]))
        return 0
    if options.out is None:
        parser.error("--out DIR is needed")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    state = Progress(out / "state.json", key + (" dry run" if options.dry_run else ""))
    print(f"sources: {key}{', which differ from the commit' if dirty == 'True' else ''}", flush=True)
    for name in options.again:
        state.set(name, "not run", why="asked for again")
    site = None
    if options.wheels:
        site = out / "site"
        wheels.install(options.wheels, site)
        print(f"wheels: installed after {time.monotonic() - begin:.1f} s", flush=True)
    ptxas = str(site / "ptxas") if site is not None and (site / "ptxas").exists() else ""

    def pack() -> None:
        for line in archives.write_archives(out, options.archives or out, more=[CONFIGS] if CONFIGS.is_dir() else []):
            print(f"left out: {line}", flush=True)

    def noted(name: str, entry: dict) -> None:
        next_stages.note(out, (key, dirty), machine, name, entry)

    minutes -= (time.monotonic() - begin) / 60
    if not options.dry_run:
        print(f"about {sum(stage.estimate or 0 for stage in stages):.0f} s, of {60 * minutes:.0f} s that there are", flush=True)
    environment = stage_environment(site, options.dry_run)
    how = {"minutes": minutes, "small": options.dry_run, "ptxas": ptxas, "pack": pack, "noted": noted}
    if not run(stages, out, state, environment, **how):
        state.set(stages[0].name, "not run", why="something was missing")  # the next run looks again
        print("runbook: error: this machine lacks what every stage needs", file=sys.stderr)
        return 2
    left = [s.name for s in stages if state.status(s.name) != "done" and not state.stages[s.name].get("lacking")]
    print(f"not done: {', '.join(left)}" if left else "all that this machine can do is done")
    return int(bool(left))


if __name__ == "__main__":
    raise SystemExit(main())
