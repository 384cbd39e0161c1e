"""How the benchmarks measure: a check first, then rounds on buffers by turns, then bytes and FLOPs over the median.

The rounds are pytest-benchmark's, one call each, with its `--benchmark-max-time` and `--benchmark-min-rounds`; at most 1000
of them. On a CPU they take the thread's own time, or `--benchmark-timer=time.perf_counter`.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from ..shared.ceilings import Ceilings
from ..shared.machine import PROVENANCE
from .work import Piece, floor_seconds

Run = Callable[[], object]
_MAX_ROUNDS = 1000
_MAX_SETS = 64
_IDLE_CYCLES = 2_000_000  # about a millisecond; stock's longest operator, 24 launches, takes a fifth of that to queue


class DeviceClock:
    """A timer for pytest-benchmark that reads a GPU's own clock: a round is the time between two events.

    The first reading queues a pause and waits for nothing, so the round's kernels are all queued when the GPU comes to
    them: what the host takes to launch them is not in the time. The second reading waits.

    Args:
        event: makes an event, as `torch.cuda.Event(enable_timing=True)`.
        pause: queues it.
    """

    def __init__(self, event: Callable[[], Any] | None = None, pause: Callable[[], None] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        self._pause = pause or (lambda: torch.cuda._sleep(_IDLE_CYCLES))
        self._begin: Any = None

    def __call__(self) -> float:
        if self._begin is None:
            self._pause()
            self._begin = self._event()
            self._begin.record()
            return 0.0
        begin, end = self._begin, self._event()
        self._begin = None
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def reset(self) -> None:
        """Forget a round that an exception cut short."""
        self._begin = None


DEVICE_CLOCK = DeviceClock()


def synchronized_clock() -> float:
    """Wall clock in seconds, read when the GPU has done what is queued."""
    torch.cuda.synchronize()
    return time.perf_counter()


def clock(*, host: bool = False) -> pytest.MarkDecorator:
    """The mark that gives a benchmark its timer: the device's clock; with `host`, where the host's work counts, the wall's."""
    if not torch.cuda.is_available():
        return pytest.mark.benchmark()
    return pytest.mark.benchmark(timer=synchronized_clock if host else DEVICE_CLOCK)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sets(device: torch.device, nbytes: int) -> int:
    """How many sets of buffers of so many bytes overflow the L2 cache twice, so that none is there when its turn comes."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    return min(_MAX_SETS, max(2, math.ceil(2 * cache / max(nbytes, 1))))


def measure(
    benchmark: Any,
    runs: Sequence[Run],
    check: Callable[[object], dict[str, float]],
    pieces: list[Piece],
    *,
    ceilings: Callable[[], Ceilings],
    max_time: float,
    min_rounds: int,
    **info: Any,
) -> None:
    """Check, warm up and time `runs`, and put what was measured into `extra_info`.

    Args:
        benchmark: pytest-benchmark's fixture.
        runs: the same work on a set of buffers each; rounds take them by turns.
        check: of the first run's result; raises AssertionError where it is wrong, and then nothing is timed. Returns its
            errors, by name.
        pieces: the work of one run.
        ceilings: gives this machine's rates; asked when a time is there.
        max_time, min_rounds: seconds of all rounds together, and how many there are at least.
        info: more for `extra_info`.
    """
    DEVICE_CLOCK.reset()
    begin = time.perf_counter()
    result = runs[0]()
    synchronize()
    first = time.perf_counter() - begin
    info |= check(result)
    del result
    moved, flops = sum(piece.bytes for piece in pieces), sum(piece.flops for piece in pieces)
    benchmark.extra_info |= {"bytes": moved, "flops": flops, "buffer_sets": len(runs), "first_call_seconds": first} | info
    rounds = 1
    if benchmark.enabled:
        begin = time.perf_counter()
        for run in runs:
            run()
        synchronize()
        once = (time.perf_counter() - begin) / len(runs)
        rounds = max(min_rounds, min(_MAX_ROUNDS, math.ceil(max_time / max(once, 1e-9))))
    turns = itertools.cycle(runs)
    benchmark.pedantic(lambda run: run(), setup=lambda: ((next(turns),), {}), rounds=rounds)
    if benchmark.stats:
        seconds, floor = benchmark.stats.stats.median, floor_seconds(pieces, ceilings())
        benchmark.extra_info |= {
            "GB/s": moved / seconds / 1e9,
            "TFLOP/s": flops / seconds / 1e12,
            "share_of_ceiling": sum(floor.values()) / seconds,
            "ceiling": max(floor, key=floor.get),
        }


# What a session gives -------------------------------------------------------------------------------------------------

FIELDS = [
    *PROVENANCE,
    *("benchmark", "group", "variant", "dtype", "size", "clock", "rounds", "seconds_p50", "seconds_min", "bytes", "flops"),
    *("share_of_ceiling", "ceiling", "max_error", "rms_error", "first_call_seconds"),
]


def of_this_run(groups: list[tuple[str, list[dict]]]) -> dict[str, list[dict]]:
    """The timed benchmarks of pytest-benchmark's groups, without those of a saved run that this one is compared with."""
    found = {
        group or "": [one for one in benchmarks if one["path"] is None and "GB/s" in one["extra_info"]]
        for group, benchmarks in groups
    }
    return {group: benchmarks for group, benchmarks in found.items() if benchmarks}


def rows(groups: list[tuple[str, list[dict]]]) -> Iterator[dict[str, Any]]:
    """A row of `FIELDS` for each benchmark, for a file that rows are appended to."""
    for group, benchmarks in of_this_run(groups).items():
        for one in benchmarks:
            info = one["extra_info"]
            yield info["provenance"] | {
                **{name: f"{v:.4g}" if isinstance(v, float) else v for name, v in info.items() if name in FIELDS},
                **{"benchmark": one["name"], "group": group, "clock": one["options"]["timer"], "rounds": one["rounds"]},
                **{"seconds_p50": f"{one['median']:.6g}", "seconds_min": f"{one['min']:.6g}"},
            }


_COLUMNS = ("", "median", "x stock", "GB/s", "TFLOP/s", "of ceiling", "ceiling", "error")


def summary(groups: list[tuple[str, list[dict]]]) -> Iterator[str]:
    """Lines of a table of what each benchmark of this run reached, fastest first; `groups` are pytest-benchmark's.

    "x stock" is stock's median over this one's, within a group; "error" the RMS error against float64 or stock, as a part of
    the RMS of that. A share above 100 % is a CPU's, whose caches hold what a copy in memory cannot.
    """
    lines = [list(_COLUMNS)]
    for group, benchmarks in of_this_run(groups).items():
        lines.append([group])
        stock = next((one["median"] for one in benchmarks if one["extra_info"]["variant"] == "stock"), None)
        lines += [_cells(one, stock) for one in sorted(benchmarks, key=lambda one: one["median"])]
    if len(lines) == 1:
        return
    widths = [max(len(row[column]) for row in lines if len(row) > 1) for column in range(len(_COLUMNS))]
    for row in lines:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        yield "  ".join([row[0].ljust(widths[0]), *cells])


def _cells(one: dict, stock: float | None) -> list[str]:
    info, seconds = one["extra_info"], one["median"]
    unit, factor = next((u, f) for u, f, least in (("s", 1, 1), ("ms", 1e3, 1e-3), ("us", 1e6, 0)) if seconds >= least)
    return [
        f"  {info['variant']}",
        f"{seconds * factor:.2f} {unit}",
        "" if stock is None else f"{stock / seconds:.2f}",
        f"{info['GB/s']:.1f}",
        f"{info['TFLOP/s']:.4f}",
        f"{info['share_of_ceiling']:.1%}",
        info["ceiling"],
        f"{info['rms_error']:.1e}" if "rms_error" in info else "",
    ]
