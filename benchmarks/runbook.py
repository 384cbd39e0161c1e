"""Everything that a borrowed GPU has to tell, in one command: tests, ceilings, ladder, operators, profile, in one folder.

On a machine with a network, once, in the repository's root (the folder is ignored by git; 26 MiB):

    python -m benchmarks.runbook --prepare wheels

On the GPU machine, which may have none, in a copy of the repository with that folder:

    python3 -m benchmarks.runbook --wheels wheels --out /tmp/book --archives $OUT              at most 9 minutes
    python3 -m benchmarks.runbook --wheels wheels --out /tmp/book --archives $OUT --tune       then: tunes, and the ladder again

The stages come in the order of their worth, each in a process of its own with its own log and time. What is done is kept
when the run is cut short: the same command goes on behind it, on another machine after `tar -xzf rows.tar.gz -C DIR`. After
every stage `--archives` gets rows.tar.gz (rows, logs, reports) and traces.tar.gz, of at most 16 MiB each.

    python -m benchmarks.runbook --dry-run --out DIR      every stage at a small size on a CPU

Exit codes: 0 all stages done, 1 a stage failed or is not done, 2 bad input.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import archives, wheels

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "kernels" / "qwen_fast_kernels" / "configs"
FINAL = ("done", "failed")  # a stage that was cut short is run again
_GRACE = 5.0  # seconds between asking a stage to stop and killing it
_LEAST = 5.0  # with less time left no stage begins


@dataclass(frozen=True)
class Stage:
    """A command with its time.

    Attributes:
        seconds: it is stopped then, or when the run's own time is over.
        command: of the interpreter; "{out}" is the folder, "{ptxas}" the assembler that was carried along, or nothing.
        small: what a dry run does instead; None: it needs a CUDA device.
        under: a program that runs the interpreter, with its arguments; where it is not installed the stage is not run.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    small: tuple[str, ...] | None = None
    under: tuple[str, ...] = ()


# It takes all memory that is free: nothing may run beside it.
ALONE = "tests/test_host_weights.py::test_on_cuda_too_little_memory_is_noticed_before_anything_moves"
_PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors")
_CLI = ("-m", "qwen_fast.cli")
_LADDER = (*_CLI, "bench", "--size", "1024x1024", "--steps", "50", "--out", "{out}/ladder")
_PROFILE = (*_CLI, "profile", "--shape", "qwen-image", "--size", "1024x1024", "--steps", "3", "--out", "{out}/profile")
# Most of their time goes into compilers, one for each of the machine's 16 cores. test_ptx needs no GPU.
_OPERATOR_TESTS = (
    *(*_PYTEST, "tests/ops", "-m", "not gpu", "-n", "14", "--ignore", "tests/ops/test_ptx.py"),
    *("--junitxml", "{out}/tests-ops.xml"),
)

STAGES = (
    Stage(
        "environment",
        60,
        ("-m", "benchmarks.environment", "--out", "{out}/environment.json", "--device", "cuda", "--ptxas", "{ptxas}"),
        ("-m", "benchmarks.environment", "--out", "{out}/environment.json", "--device", "cpu"),
    ),
    Stage(
        "tests-gpu",
        80,
        (*_PYTEST, "tests", "-m", "gpu", "-n", "4", "--deselect", ALONE, "--junitxml", "{out}/tests-gpu.xml"),
    ),
    Stage(
        "tests-ops",
        110,
        _OPERATOR_TESTS,
        (*_PYTEST, "tests/ops/test_flow_match_schedule.py", "-k", "timesteps_of_20_steps", "--junitxml", "{out}/tests-ops.xml"),
    ),
    Stage("tests-alone", 25, (*_PYTEST, ALONE, "--junitxml", "{out}/tests-alone.xml")),
    Stage(
        "ceilings",
        25,
        ("-m", "benchmarks.ceilings", "--seconds", "1"),
        ("-m", "benchmarks.ceilings", "--seconds", "0.02", "--device", "cpu"),
    ),
    Stage(
        "ladder",
        230,
        _LADDER,
        (*_CLI, "bench", "--shape", "tiny", "--size", "64x64", "--steps", "2", "--repeats", "1", "--seconds", "0.02")
        + ("--device", "cpu", "--out", "{out}/ladder"),
    ),
    Stage(
        "profile",
        50,
        _PROFILE,
        (*_CLI, "profile", "--shape", "tiny", "--size", "64x64", "--steps", "1", "--device", "cpu", "--out", "{out}/profile"),
    ),
    Stage(
        "operators",
        90,
        (*_PYTEST, "benchmarks/bench_operators.py", "-k", "not compiled", "--benchmark-only", "--benchmark-max-time", "0.05")
        + ("--benchmark-json", "{out}/operators.json"),
        (*_PYTEST, "benchmarks/bench_operators.py", "-k", "cfg_euler_step-bf16-op", "--benchmark-only")
        + ("--benchmark-max-time", "0.01", "--benchmark-json", "{out}/operators.json"),
    ),
    Stage(
        "sanitizer",
        60,
        ("-m", "benchmarks.environment", "--launch-all"),
        under=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
    ),
)
TUNING = (
    Stage("tune", 240, (*_CLI, "tune", "--minutes", "3.5", "--record", "{out}/tuning.jsonl")),
    Stage("tests-ops-tuned", 60, tuple(part.replace("tests-ops.xml", "tests-ops-tuned.xml") for part in _OPERATOR_TESTS)),
    Stage("ladder-tuned", 230, tuple(part.replace("{out}/ladder", "{out}/ladder-tuned") for part in _LADDER)),
    Stage("profile-tuned", 60, tuple(part.replace("{out}/profile", "{out}/profile-tuned") for part in _PROFILE)),
)


# What is done ---------------------------------------------------------------------------------------------------------


def source_key(root: Path = ROOT) -> str:
    """The commit, and a hash of the sources: a GPU machine gets them without their history."""
    digest = hashlib.sha256()
    for folder in ("kernels", "qwen_fast", "benchmarks", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    commit = done.stdout.strip() or wheels.carried_commit() or "no commit"
    return f"{commit} {digest.hexdigest()[:12]}"


class State:
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


def _as_child() -> None:
    """In the child: it takes SIGINT also where the run-book was started in the background, and dies with the run-book."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no stage lives on beside the next run's


def execute(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> tuple[int | None, float]:
    """Run a command with its output in `log`; (exit code, seconds), the code None where the time was over."""
    begin = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_as_child,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
    return code, time.monotonic() - begin


def _stop(process: subprocess.Popen) -> None:
    """End a stage and what it started: as Ctrl-C does, so that it writes what it has, then for good."""
    for number, patience in ((signal.SIGINT, _GRACE), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        if process.returncode is not None and number == signal.SIGKILL:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def chosen_ptxas(out: Path) -> dict[str, str]:
    """The assembler with which the first stage found attention to be right, where that is not Triton's own."""
    path = out / "environment.json"
    ptxas = json.loads(path.read_text()).get("ptxas") if path.exists() else None
    return {"TRITON_PTXAS_PATH": ptxas} if ptxas else {}


def run(
    stages: Sequence[Stage],
    out: Path,
    state: State,
    environment: dict[str, str],
    *,
    minutes: float,
    small: bool = False,
    ptxas: str = "",
    after: Callable[[], None] = lambda: None,
) -> None:
    """Run the stages that are not done; `after` each.

    Args:
        environment: of the stages.
        minutes: of the whole run.
        small: a dry run, which proves that the stages run and has no time of theirs to keep.
        ptxas: path of another assembler for the first stage to try.
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
            words = [word.replace("{out}", str(out)).replace("{ptxas}", ptxas) for word in command]
            allowed = left if small else min(left, stage.seconds)
            state.set(stage.name, "running")
            print(f"{stage.name}: at most {allowed:.0f} s", flush=True)
            log = out / "logs" / f"{stage.name}.log"
            code, seconds = execute([*stage.under, sys.executable, *words], log, allowed, environment | chosen_ptxas(out))
            status = "timed out" if code is None else "done" if code == 0 else "failed"
            state.set(stage.name, status, seconds=round(seconds, 1), code=code)
        after()
        print(f"{stage.name}: {describe(state.stages[stage.name])}", flush=True)


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
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return environment | ({"OMP_NUM_THREADS": "1"} if small else {})


def sees_cuda(environment: dict[str, str]) -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runbook", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of everything; the same one goes on")
    parser.add_argument("--archives", type=Path, metavar="DIR", help="where the two archives go (default: --out)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="install these first, into DIR/site of --out")
    parser.add_argument("--minutes", type=float, help="of the whole run (default: 9; of a dry run 60)")
    parser.add_argument("--tune", action="store_true", help="tune, then tests, ladder and profile again")
    parser.add_argument("--again", metavar="STAGE,STAGE", help="run these again, done or not")
    parser.add_argument("--dry-run", action="store_true", help="every stage at a small size on the CPU")
    parser.add_argument("--prepare", type=Path, metavar="DIR", help="download into DIR what a GPU machine lacks, and end")
    options = parser.parse_args(argv)
    try:
        if options.prepare:
            print("\n".join(wheels.prepare(options.prepare)))
            return 0
        return _run(options, parser)
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, and the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"runbook: error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    begin, stages = time.monotonic(), TUNING if options.tune else STAGES
    again = options.again.split(",") if options.again else []
    if options.out is None:
        parser.error("--out DIR is needed")
    if unknown := set(again) - {stage.name for stage in stages}:
        raise ValueError(f"--again: {', '.join(sorted(unknown))} is none of {', '.join(stage.name for stage in stages)}.")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    state = State(out / "state.json", source_key() + (" dry run" if options.dry_run else ""))
    for name in again:
        state.set(name, "not run", why="asked for again")
    site = None
    if options.wheels:
        site = out / "site"
        wheels.install(options.wheels, site)
    environment = stage_environment(site, options.dry_run)
    if not options.dry_run and not sees_cuda(environment):
        raise ValueError("torch sees no CUDA device here; --dry-run does every stage at a small size on the CPU.")
    ptxas = str(site / "ptxas") if site is not None and (site / "ptxas").exists() else ""

    def pack() -> None:
        for line in archives.write_archives(out, options.archives or out, more=[CONFIGS] if CONFIGS.is_dir() else []):
            print(f"left out: {line}", flush=True)

    minutes = (options.minutes or (60.0 if options.dry_run else 9.0)) - (time.monotonic() - begin) / 60
    run(stages, out, state, environment, minutes=minutes, small=options.dry_run, ptxas=ptxas, after=pack)
    left = [s.name for s in stages if state.status(s.name) != "done" and not state.stages[s.name].get("lacking")]
    print(f"not done: {', '.join(left)}" if left else "all that this machine can do is done")
    return int(bool(left))


if __name__ == "__main__":
    raise SystemExit(main())
