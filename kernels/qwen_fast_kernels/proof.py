"""A kernel proves itself on the GPU at hand before it is used: right against float64, and the same bits in every launch.

`examine` proves one kernel in this process. `prove` does that for many in a child process, so that a kernel that crashes,
hangs or spoils the device costs its own verdict and nothing else, and keeps the verdicts for other processes.

    python -m qwen_fast_kernels.proof cuda:0      the child: problems in JSON on stdin, verdicts on stdout, line by line
"""

import contextlib
import functools
import importlib
import inspect
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ._arguments import ARGUMENTS, Maker, Size
from ._budget import errors, in_float64, over_budget
from ._child import Child, Ended, NoChild, answer, command, end_with_parent
from ._kept import Kept, environment

logger = logging.getLogger("qwen_fast_kernels")

LAUNCHES = 20  # of each kernel: a race or a read of memory that nobody wrote moves from launch to launch
LIMIT = 20.0  # seconds a kernel may take, compilation included; the slowest takes 3
START_LIMIT = 120.0  # seconds until the child has imported torch and made its context
_EPS = torch.finfo(torch.float32).eps  # the kernels compute in fp32, whatever they read and write
# The oracle of attention has a score for each pair of rows: so many heads at a time keep it below 200 MB.
_HEADS_AT_ONCE = 1


@dataclass(frozen=True)
class Problem:
    """One way to call an operator, at a size at which every tile and tail of its kernel takes part.

    Attributes:
        op: name of the operator.
        dtype: of its first tensor, by torch's name for it.
        size: rows and width.
        variant: keywords of the operator's arguments (`_arguments.ARGUMENTS`), as sorted pairs; dtypes by their names.
    """

    op: str
    dtype: str
    size: Size
    variant: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, op: str, dtype: torch.dtype, size: Size, **variant: Any) -> "Problem":
        named = {name: _dtype_name(value) if isinstance(value, torch.dtype) else value for name, value in variant.items()}
        return cls(op, _dtype_name(dtype), size, tuple(sorted(named.items())))

    @classmethod
    def from_json(cls, text: str) -> "Problem":
        found = json.loads(text)
        size = Size(**{name: tuple(v) if isinstance(v, list) else v for name, v in found["size"].items()})
        variant = tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in found["variant"])
        return cls(found["op"], found["dtype"], size, variant)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def __str__(self) -> str:
        return ", ".join([f"{self.op} {self.dtype}", str(self.size), *(f"{name}={value}" for name, value in self.variant)])

    def arguments(self, device: torch.device) -> tuple:
        variant = {name: getattr(torch, value) if name.endswith("dtype") else value for name, value in self.variant}
        return ARGUMENTS[self.op](Maker(device), getattr(torch, self.dtype), self.size, **variant)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Verdict:
    """What a proof found.

    Attributes:
        right: the kernel may be used.
        reason: why not; empty where it is right.
        error: RMS of the difference from float64, as a part of the oracle's RMS; None where nothing was computed.
        limit: what it may be: twice the error of the reference in the same dtype.
        seconds: that the proof took, compilation included.
        final: worth keeping for other processes; running out of memory is not.
    """

    right: bool
    reason: str = ""
    error: float | None = None
    limit: float | None = None
    seconds: float = 0.0
    final: bool = True


# One kernel, in this process ------------------------------------------------------------------------------------------


def examine(problem: Problem, device: torch.device, launches: int | None = None) -> Verdict:
    """Launch the operator's kernel `launches` times and compare. Raises nothing: what the kernel raises is the verdict."""
    begin = time.monotonic()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            reason, error, limit = _compared(problem, device, launches or LAUNCHES)
    except torch.OutOfMemoryError as failure:
        return Verdict(False, f"no memory to prove it: {_line(failure)}", seconds=time.monotonic() - begin, final=False)
    except Exception as failure:  # a compiler's, a driver's, or the operator's own checks: it cannot be used
        return Verdict(False, f"it does not run: {_line(failure)}", seconds=time.monotonic() - begin)
    return Verdict(not reason, reason, error, limit, time.monotonic() - begin)


def _compared(problem: Problem, device: torch.device, launches: int) -> tuple[str, float, float]:
    """Why the kernel is wrong ("": it is not), the largest of its results' relative RMS errors, and that one's limit."""
    module = importlib.import_module(f".{problem.op}", __package__)
    # The entry point that the registry has for CUDA: its checks, its choice of a configuration, its launcher.
    entry = getattr(module, f"_{problem.op}_cuda")
    reference = getattr(module, f"{problem.op}_reference")
    arguments = problem.arguments(device)
    written = [place for place in _written(problem.op, reference) if place < len(arguments) and arguments[place] is not None]

    def results(function: Callable, arguments: tuple) -> list[torch.Tensor]:
        """What it returned, then what it wrote."""
        returned = function(*arguments)
        if returned is None:
            return [arguments[place] for place in written]
        returned = list(returned) if isinstance(returned, tuple) else [returned]
        # The reference of an operator that returns nothing returns what that one writes.
        return returned + ([arguments[place] for place in written] if len(returned) == 1 else [])

    def launch() -> list[torch.Tensor]:
        return results(entry, problem.arguments(device) if written else arguments)

    first = launch()
    moved = torch.zeros((), dtype=torch.bool, device=device)
    for _ in range(launches - 1):
        for once, again in zip(first, launch(), strict=True):
            moved |= (_bits(once) != _bits(again)).any()

    reference = _by_heads(problem.op, reference)
    oracle = [one.double() for one in results(reference, tuple(in_float64(arguments)))]
    stock = results(reference, tuple(a.clone() if place in written else a for place, a in enumerate(arguments)))
    found = [_difference(*three) for three in zip(first, stock, oracle, strict=True)]
    reason, error, limit = max(found, key=lambda one: (bool(one[0]), one[1] / one[2] if one[2] else 0.0))
    if not reason and moved.item():
        reason = f"its result moves between {launches} launches on the same data"
    return reason, error, limit


def _written(op: str, reference: Callable) -> list[int]:
    """Places of the arguments that an operator writes into, by the schemas of its overloads."""
    packet = getattr(torch.ops.qwen_fast, op)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    names = {a.name for schema in schemas for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    return [place for place, name in enumerate(inspect.signature(reference).parameters) if name in names]


def _difference(actual: torch.Tensor, reference: torch.Tensor, oracle: torch.Tensor) -> tuple[str, float, float]:
    """The budget of STYLE: twice (the reference's error + eps), eps that of the arithmetic and not that of the result.

    A right attention in bf16 has 2e-3 of its output's RMS, and 3.5e-3 are allowed.
    """
    size = max(oracle[torch.isfinite(oracle)].square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)
    error, limit = errors(actual, oracle)[1] / size, 2.0 * (errors(reference, oracle)[1] / size + _EPS)
    reason = over_budget(actual, reference, oracle) or ""
    if not error <= limit:  # NaN is wrong too
        reason = f"relative RMS error {error:.2g} where {limit:.2g} are allowed"
    return reason, error, limit


def _by_heads(op: str, reference: Callable) -> Callable:
    if op != "joint_attention":
        return reference

    def by_heads(query, key, value, *rest):
        parts = zip(*(x.split(_HEADS_AT_ONCE, dim=1) for x in (query, key, value)), strict=True)
        return torch.cat([reference(*part, *rest) for part in parts], dim=1)

    return by_heads


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _line(error: BaseException | str) -> str:
    """The first line that says something, within reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, str) else type(error).__name__
    return ": ".join(part for part in (kind, lines[0][:300] if lines else "") if part)


# Many kernels, in a child process -------------------------------------------------------------------------------------


def prove(
    problems: Iterable[Problem],
    device: torch.device,
    kept: Kept,
    *,
    again: bool = False,
    limit: float | None = None,
    tell: Callable[[str], None] = logger.warning,
    each: Callable[[Problem, Verdict], None] = lambda problem, verdict: None,
) -> dict[Problem, Verdict]:
    """A verdict on each problem: what is kept of an earlier proof, or a new one from a child process.

    Before each launch a mark is put into `kept`, and the verdict takes its place. A mark that is found later means that the
    process which left it, and the one that watched over it, ended in that kernel: it counts as failed.

    Args:
        device: with an index; the child uses the same.
        kept: where verdicts are looked up and kept.
        again: prove anew what has a verdict.
        limit: seconds for a kernel, LIMIT if None.
        tell: is told in whole sentences what takes long or goes another way.
        each: is given each new verdict at once.
    """
    problems = list(dict.fromkeys(problems))
    found = {} if again else _read(problems, kept)
    if len(found) == len(problems):
        return found
    limit = LIMIT if limit is None else limit
    seconds = limit * (len(problems) - len(found)) + START_LIMIT
    with kept.alone(seconds) as certain:  # another process may be about to prove the same
        if not again:
            found |= _read(problems, kept)
            if certain:
                found |= {problem: verdict for problem in problems if (verdict := _judge_mark(problem, kept, each))}
        missing = [problem for problem in problems if problem not in found]
        if missing:
            card = environment(device)["card"]
            tell(
                f"{len(missing)} kernels prove themselves on {card} before their first use there. It runs once per card and "
                f"takes about {len(missing) + 10} seconds."
            )
            begin = time.monotonic()
            for problem, verdict in _proved(missing, device, kept, limit, tell):
                found[problem] = verdict
                each(problem, verdict)
            wrong = sum(not found[problem].right for problem in missing)
            logger.info("%d kernels, %d of them wrong: %.1f s.", len(missing), wrong, time.monotonic() - begin)
    return found


def _read(problems: list[Problem], kept: Kept) -> dict[Problem, Verdict]:
    found = {}
    for problem in problems:
        with contextlib.suppress(TypeError):  # nothing, a mark, or of another state of this file
            found[problem] = Verdict(**kept.get(str(problem)))
    return found


def _judge_mark(problem: Problem, kept: Kept, each: Callable) -> Verdict | None:
    if not isinstance(kept.get(str(problem)), dict) or "begun" not in kept.get(str(problem)):
        return None
    verdict = Verdict(False, "a process that launched it has not come back; `qwen-fast doctor --prove` tries again")
    kept.put(str(problem), asdict(verdict))
    each(problem, verdict)
    return verdict


def _proved(
    problems: list[Problem], device: torch.device, kept: Kept, limit: float, tell: Callable[[str], None]
) -> Iterator[tuple[Problem, Verdict]]:
    child, instead, fatal = None, None, None
    try:
        for problem in problems:
            if child is None and instead is None:
                try:
                    child = _started(device)
                except NoChild as failure:
                    instead = _without_child(failure, fatal, device, tell)
            kept.put(str(problem), {"begun": time.time()})
            try:
                verdict, goes_on = (instead(problem), True) if child is None else _asked(child, problem, limit)
                if child is not None and not verdict.final:
                    verdict = examine(problem, device)  # this process may have reserved the memory that the child lacked
            except BaseException:  # an interrupt is nothing that the kernel did
                kept.forget(str(problem))
                raise
            if verdict.final:
                kept.put(str(problem), asdict(verdict))
            else:
                kept.forget(str(problem))
            yield problem, verdict
            if not goes_on:
                child.stop()
                child, fatal = None, problem
    finally:
        if child is not None:
            child.stop()


def _started(device: torch.device) -> Child:
    child = Child([*command(f"{__package__}.proof"), str(device)], START_LIMIT)
    card = environment(device)["card"]
    if child.about["card"] != card:
        child.stop()
        raise NoChild(f"in one that was started {device} is {child.about['card']}, not {card}")
    return child


def _asked(child: Child, problem: Problem, limit: float) -> tuple[Verdict, bool]:
    """The child's verdict, or what became of the child, and whether it can be asked again."""
    begin = time.monotonic()
    try:
        found = child.ask(problem.to_json(), limit)
    except Ended as end:
        return Verdict(False, str(end), seconds=time.monotonic() - begin), False
    goes_on = found.pop("goes_on")
    return Verdict(**found), goes_on


def _without_child(
    failure: Exception, fatal: Problem | None, device: torch.device, tell: Callable[[str], None]
) -> Callable[[Problem], Verdict]:
    """What judges the problems that no child can prove: this process, unless a kernel may have spoilt the device."""
    if fatal is not None:
        unknown = Verdict(False, f"not proved: {fatal.op} may have spoilt the device ({failure})", final=False)
        return lambda problem: unknown
    tell(f"kernels prove themselves in this process, since no other serves: {failure}.")
    return functools.partial(examine, device=device)


# The child ------------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Prove what is asked for on stdin, until it ends or the device is spoilt."""
    end_with_parent()
    device = torch.device(sys.argv[1])
    _usable(device)
    answer({"card": environment(device)["card"]})
    for line in sys.stdin:
        verdict = examine(Problem.from_json(line), device)
        goes_on = _usable(device)
        answer(asdict(verdict) | {"goes_on": goes_on})
        if not goes_on:
            return


def _usable(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access nothing does."""
    try:
        return torch.ones(1, device=device).add(1).item() == 2.0
    except Exception:
        return False


if __name__ == "__main__":
    serve()
