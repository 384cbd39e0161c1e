"""Measure launch configurations on this GPU and keep those that beat the operators' own: `qwen-fast tune`.

For every case: compile its candidates, check each against float64, measure them interleaved, write the file. A case that is
done is a line of the record; a later run on the same GPU, with the same versions and sources, goes on behind it.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from qwen_fast_kernels.tuning import CONFIGS, dims_of, file_name, read_entries

from ..compiler.table import source_hash
from ..operators.arguments import DIMENSIONS
from ..operators.cases import Maker, OperatorCase
from ..shared.budget import IN_PLACE, in_float64, over_budget, results
from ..shared.machine import provenance
from .cases import CASES
from .precompile import precompile
from .search import Outcome, candidates, search

_CHECK_HEADS = 4  # of an attention's check: its oracle holds the float64 scores of every head
_MILLISECONDS = 2.0  # of one measurement
_MOST_SETS = 8  # of arguments that a measurement goes through


@dataclass
class Task:
    """A case and its candidates for one GPU."""

    case: OperatorCase
    dims: dict
    default: dict
    candidates: list[dict] = field(repr=False)

    @classmethod
    def of(cls, case: OperatorCase, capability: int) -> "Task":
        default_config = case.module().default_config
        dims = DIMENSIONS[case.op](*case.arguments(Maker("meta", fake=True)))
        default, named = default_config(capability, *dims), dims_of(default_config, dims)
        return cls(case, named, default, candidates(case.op, capability, default, named))

    @property
    def configs(self) -> list[dict]:
        return [self.default, *self.candidates]


# The record and the files ---------------------------------------------------------------------------------------------


def identity(task: Task, measured: dict) -> dict:
    """What a line of the record holds for: the same on another GPU, version or source is another measurement."""
    here = {name: measured[name] for name in ("machine", "torch", "triton")}
    return here | {"op": task.case.op, "case": task.case.name, "dims": task.dims, "source": source_hash(task.case.op)}


def read_record(path: Path) -> list[dict]:
    """The whole lines of a record; a last one that an interruption cut in half does not count."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
            lines.append(line | {"identity": line["identity"], "outcome": line["outcome"]})
        except (ValueError, KeyError, TypeError):
            continue
    return lines


def append_record(path: Path, line: dict) -> None:
    """On a line of its own, also behind half of one."""
    with path.open("ab+") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_entry(folder: Path, task: Task, outcome: Outcome, measured: dict) -> Path | None:
    """The outcome into its file, in place of what it held for these dims and this Triton; None if nothing is left to write."""
    path = folder / file_name(task.case.op, task.dims, measured["machine"])
    entries = [e for e in read_entries(path) if e["dims"] != task.dims or e["triton"] != measured["triton"]]
    if outcome.worth_writing:
        times = {"default_us": outcome.default_us, "config_us": outcome.best_us, "gain": outcome.gain, "noise": outcome.noise}
        entries.append(
            {"dims": task.dims, "triton": measured["triton"], "config": outcome.best, "default": outcome.default}
            | {name: round(value, 4) for name, value in times.items()}
            | {"measured": measured}
        )
    elif not path.exists():
        return None
    if not entries:
        path.unlink()
        return None
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"op": task.case.op, "device": measured["machine"], "entries": entries}, indent=2)
    aside = path.with_suffix(".tmp")
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path if outcome.worth_writing else None


def check_writable(folder: Path, record: Path) -> None:
    """Raise an OSError before anything is measured where results could not be written."""
    for path in (folder / ".tune", record.parent / f".{record.name}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            path.unlink()
        except OSError as error:
            raise OSError(f"{path.parent}: results cannot be written there ({error.strerror}); name another folder.") from error


# One run --------------------------------------------------------------------------------------------------------------


def tune(
    tasks: list[Task],
    search_task: Callable[[Task], Outcome],
    *,
    folder: Path,
    record: Path,
    measured: dict,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
) -> list[tuple[Task, Outcome | None]]:
    """Search each task, write what gains, and say so; tasks that the record holds are not searched again.

    Args:
        search_task: an Outcome; a RuntimeError ends the run, is recorded, and the task counts as done.
        folder: of the files; record: of the lines, appended.
        measured: the provenance of `machine.provenance`.
        seconds: no task begins later than that.
    Returns:
        list: the tasks of this run with their outcomes; None for those that the time did not suffice for.
    """
    done = {json.dumps(line["identity"], sort_keys=True): line["outcome"] for line in read_record(record)}
    begin, results = clock(), []
    for task in tasks:
        known = identity(task, measured)
        before = done.get(json.dumps(known, sort_keys=True))
        if before is not None:
            print(f"{task.case}: measured before, {describe_record(before)}", flush=True)
            continue
        if clock() - begin > seconds:
            results.append((task, None))
            continue
        try:
            outcome = search_task(task)
        except RuntimeError as error:
            append_record(record, {"identity": known, "outcome": {"error": str(error)}, "measured": measured})
            raise RuntimeError(
                f"{task.case}: {error}. It is recorded and left out when the command is run again; what was measured is kept."
            ) from error
        path = write_entry(folder, task, outcome, measured)
        # Behind the file: a line without its file would never be made good.
        written = path.name if path else None
        line = asdict(outcome) | {"written": written}
        append_record(record, {"identity": known, "outcome": line, "measured": measured})
        print(f"{task.case}: {describe(outcome)}" + (f" -> {written}" if written else ""), flush=True)
        results.append((task, outcome))
    return results


def describe(outcome: Outcome) -> str:
    if outcome.default_is_wrong:
        return f"the operator's own configuration is wrong on this GPU ({outcome.default_is_wrong}): nothing is measured"
    tried = f"{len(outcome.timings)} measured, {len(outcome.pruned)} pruned, {len(outcome.wrong)} wrong"
    times = f"default {outcome.default_us:.1f} us, best {outcome.best_us:.1f} us"
    verdict = (
        ", ".join(f"{name}={value}" for name, value in outcome.best.items() if value != outcome.default[name])
        if outcome.worth_writing
        else "the default stays"
    )
    return f"{times} ({outcome.gain:+.1%} faster, noise {outcome.noise:.1%}; {tried}): {verdict}"


def describe_record(outcome: dict) -> str:
    if "error" in outcome:
        return f"it failed: {outcome['error']}"
    fields = {name: value for name, value in outcome.items() if name != "written"}
    return describe(Outcome(**{name: [tuple(v) for v in value] if name in _PAIRS else value for name, value in fields.items()}))


_PAIRS = ("timings", "pruned", "wrong")


def summary(results: list[tuple[Task, Outcome | None]]) -> Iterator[str]:
    """What a run gained, a line each."""
    written = [(task, outcome) for task, outcome in results if outcome is not None and outcome.worth_writing]
    for task, outcome in written:
        saved = outcome.default_us - outcome.best_us
        yield f"{task.case}: {saved:.1f} us of {outcome.default_us:.1f} us a launch gained"
    missing = [str(task.case) for task, outcome in results if outcome is None]
    if not written:
        yield "no configuration beats the defaults by more than 2 % and the noise: no file was written"
    if missing:
        yield f"the time did not suffice for {', '.join(missing)}: run the command again to go on"


# On the GPU -----------------------------------------------------------------------------------------------------------


def launch(case: OperatorCase, arguments: tuple, config: dict) -> object:
    """What the operator does with this configuration: the library where that is what it says, else its kernel."""
    if config.get("BACKEND") == "cublaslt":
        return case.module()._linear_gelu_cublaslt(*arguments)
    return case.launch(arguments, config)


class Checker:
    """Whether a configuration computes rightly: a call of `check` gives what is wrong, or None.

    Its arguments have the model's width and rows; an attention has a few of the heads, since they do not know each other.
    """

    def __init__(self, case: OperatorCase, device: torch.device):
        if case.op == "joint_attention":
            case = replace(case, size=replace(case.size, heads=min(case.size.heads, _CHECK_HEADS)))
        self.case, self._arguments = case, case.arguments(Maker(device))
        # The reference returns what an operator in place writes.
        self._oracle = [one.double() for one in results(case.op, case.reference(*in_float64(self._arguments)), ())]
        self._reference = results(case.op, case.reference(*self._arguments), ())

    def check(self, config: dict) -> str | None:
        changed = IN_PLACE.get(self.case.op, ())
        arguments = tuple(one.clone() if n in changed else one for n, one in enumerate(self._arguments))
        try:
            # An output lies where the last one did, so a part that is not written would hold a right result.
            with nan_filled():
                actual = results(self.case.op, launch(self.case, arguments, config), arguments)
            found = [over_budget(*each) for each in zip(actual, self._reference, self._oracle, strict=True)]
        except Exception as error:
            if type(error).__name__ == "OutOfResources":
                return f"OutOfResources: {error}"
            raise
        return next((reason for reason in found if reason), None)


class nan_filled:
    """Context in which torch.empty is filled with NaN."""

    def __enter__(self) -> None:
        self._before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_) -> None:
        torch.use_deterministic_algorithms(self._before[0], warn_only=self._before[1])


class Timer:
    """Seconds of a launch: graphs that go through sets of arguments larger than the caches, replayed by turns.

    A graph, since the host needs longer for a launch than the smaller kernels run.
    """

    def __init__(self, case: OperatorCase, device: torch.device):
        self.case, self.device = case, device
        make = Maker(device)
        self._sets = [case.arguments(make)]
        moved, _ = case.traffic(self._sets[0])
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        wanted = min(max(2, math.ceil(4 * cache / moved)), _MOST_SETS)
        self._sets += [case.arguments(make) for _ in range(wanted - 1)]

    def _captured(self, config: dict, pool: object) -> torch.cuda.CUDAGraph:
        launch(self.case, self._sets[0], config)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for arguments in self._sets:
                launch(self.case, arguments, config)
        return graph

    def measure(self, configs: list[dict], rounds: int) -> list[list[float]]:
        with torch.cuda.device(self.device):
            pool = torch.cuda.graph_pool_handle()  # one for all: they never run at once, and nobody reads what they write
            graphs = [self._captured(config, pool) for config in configs]
            repeats = [max(1, math.ceil(_MILLISECONDS / 1e3 / self._seconds(graph, 1))) for graph in graphs]
            seconds: list[list[float]] = [[] for _ in graphs]
            order, shuffle = list(range(len(graphs))), random.Random(0).shuffle
            for _ in range(rounds):
                shuffle(order)
                for index in order:
                    seconds[index].append(self._seconds(graphs[index], repeats[index]) / len(self._sets))
        return seconds

    def _seconds(self, graph: torch.cuda.CUDAGraph, repeats: int) -> float:
        """Of one replay, on average."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats


@torch.no_grad()
def tune_device(
    device: torch.device,
    *,
    ops: list[str] | None = None,
    folder: Path = CONFIGS,
    record: Path = Path("tuning.jsonl"),
    minutes: float = math.inf,
    jobs: int | None = None,
) -> int:
    """Tune the operators on a CUDA device; prints as it goes. 0: done; 1: an operator's own configuration is wrong here.

    Raises:
        OSError: results cannot be written. RuntimeError: the device failed; what was measured before is kept.
    """
    begin = time.monotonic()
    check_writable(folder, record)
    properties, measured = torch.cuda.get_device_properties(device), provenance(device)
    capability = 10 * properties.major + properties.minor
    tasks = [Task.of(case, capability) for case in CASES if ops is None or case.op in ops]
    done = [line["identity"] for line in read_record(record)]
    todo = [task for task in tasks if identity(task, measured) not in done]
    print(f"{measured['machine']}, torch {measured['torch']}, Triton {measured['triton']}: {len(todo)} of {len(tasks)} cases")
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    wanted = [(task.case, config) for task in todo for config in task.configs if config.get("BACKEND") != "cublaslt"]
    reasons = precompile(wanted, capability, shared, jobs)
    compiled = {(str(case), json.dumps(config)): reason for (case, config), reason in zip(wanted, reasons, strict=True)}

    def search_task(task: Task) -> Outcome:
        checker, timer = Checker(task.case, device), Timer(task.case, device)
        outcome = search(
            task.default,
            task.candidates,
            compile=lambda configs: [compiled.get((str(task.case), json.dumps(config))) for config in configs],
            check=checker.check,
            measure=timer.measure,
        )
        del checker, timer
        torch.cuda.empty_cache()
        return outcome

    left = 60 * minutes - (time.monotonic() - begin)
    found = tune(tasks, search_task, folder=folder, record=record, measured=measured, seconds=left)
    print("\n".join(summary(found)))
    return int(any(outcome is not None and outcome.default_is_wrong is not None for _, outcome in found))
