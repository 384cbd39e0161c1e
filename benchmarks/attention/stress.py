"""Whether attention is ever wrong: several processes at once on one card, many launches, all memory around them full of NaN.

    python -m benchmarks.attention.stress --out DIR [--device cuda] [--processes 3]

Spans change between launches, the rows between them hold NaN, and so do the outputs and whatever memory was freed before. Each
variant of the kernel runs in processes of its own, which have a limit, so that a hang costs only itself: first what the driver
uses, and beside it the demo checkpoint with and without a CUDA graph ("pictures", see pictures.py). The kernels with
specialised warps, the known suspects, come last, when nothing else runs. A row of each variant, way and process goes to
attention_stress.csv. Exit code: 1 if something that the driver uses, or a picture, was wrong or gave no answer. At most 45
seconds on an H100.
"""

import argparse
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from qwen_fast_kernels._triton import capability
from qwen_fast_kernels.joint_attention import default_config, joint_attention, joint_attention_reference, launch_joint_attention

from ..shared.machine import PROVENANCE, provenance
from ..shared.processes import start, stop
from ..shared.rows import RowFile
from .counts import Found

FIELDS = [*PROVENANCE, *("variant", "way", "process", "status", "reason", "seconds")]
FIELDS += ["launches", "bad", "whole", "partial", "gaps", "different", "sequences"]
PICTURES = "pictures"
USED = ("operator", "descriptors", "pointers")
SUSPECTS = ("specialised, 2 stages", "specialised, 3 stages")  # on an H100 with Triton 3.6: NaN now and then; NaN always
WAYS = ("blocks", "eager", "graph")  # several blocks of keys a sequence; many short sequences, launched and replayed
PICTURE_WAYS = {f"cuda_graph={value}": value for value in (True, False)}
# Heads and their width are the demo checkpoint's, whose pictures were NaN.
HEADS, DIM, DTYPE = 4, 64, torch.bfloat16
# Seconds from the start, importing and compiling included: until what the driver uses, and until the suspects have to be done.
# What no GPU bounds has time.
FIRST, LAST, UNBOUNDED = 32.0, 40.0, 300.0
_REPORT = 2.0  # before their limit pictures end by themselves
# Sequences, and launches of a round.
LONG, SHORT = {"cuda": (3, 20), "cpu": (3, 3)}, {"cuda": (64, 80), "cpu": (6, 3)}
_SAME = 6  # rounds with the same inputs
_NAN = float("nan")


# What is launched -----------------------------------------------------------------------------------------------------


class Batch:
    """Sequences of random lengths in query, key and value; rows between them are nobody's and NaN.

    Args:
        count: of the sequences.
        lengths, gaps: the least and the most rows of a sequence, and behind one.
    Attributes:
        data, spans (Tensor): at the same addresses after every `renew`, as a captured graph wants them.
        places, inside, expected: first row and end of each sequence, which rows are a sequence's, the exact output.
    """

    def __init__(self, device: torch.device, count: int, lengths: tuple[int, int], gaps: tuple[int, int], seed: int):
        self.lengths, self.gaps, self.longest = lengths, gaps, lengths[1]
        self._random = torch.Generator().manual_seed(seed)
        self._values = torch.Generator(device).manual_seed(seed)
        self.spans = torch.zeros((count, 2), dtype=torch.int32, device=device)
        shape = (gaps[1] + count * (lengths[1] + gaps[1]), HEADS, DIM)
        self.data = [torch.empty(shape, dtype=DTYPE, device=device) for _ in range(3)]
        self.renew()

    def renew(self) -> None:
        self.places, first = [], self._some(self.gaps)
        for _ in range(len(self.spans)):
            self.places.append((first, first + self._some(self.lengths)))
            first = self.places[-1][1] + self._some(self.gaps)
        self.spans.copy_(torch.tensor(self.places, dtype=torch.int32))
        inside = torch.zeros(len(self.data[0]), dtype=torch.bool)
        for begin, end in self.places:
            inside[begin:end] = True
        self.inside = inside.to(self.spans.device)
        for one in self.data:
            one.normal_(generator=self._values).masked_fill_(~self.inside[:, None, None], _NAN)
        self.expected = joint_attention_reference(*(one.float() for one in self.data), self.spans, self.longest)

    def _some(self, bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=self._random))


def config_of(variant: str) -> dict:
    pointers = default_config(80, DIM, DTYPE.itemsize)
    if variant == "pointers":
        return pointers
    specialised = {"WARP_SPECIALIZE": True, "num_warps": 4}
    more = {"descriptors": {}, SUSPECTS[0]: specialised | {"BLOCK_N": 128, "num_stages": 2}, SUSPECTS[1]: specialised}
    return pointers | {"DESCRIPTORS": True} | more[variant]


def launcher(variant: str, batch: Batch) -> Callable[[], torch.Tensor]:
    """How `variant` computes what now lies in the batch."""
    if variant == "operator":
        return lambda: joint_attention(*batch.data, batch.spans, batch.longest)
    config = config_of(variant)
    return lambda: launch_joint_attention(*batch.data, batch.spans, batch.longest, config=config)


def variants_of(device: torch.device) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what the driver uses, the suspects) of what this device can launch."""
    if device.type != "cuda":
        return USED[:1], ()
    if not 90 <= capability(device) < 120:
        return ("operator", "pointers"), ()
    return USED, SUSPECTS if capability(device) < 100 else ()


def ways_of(variant: str, device: torch.device) -> tuple[str, ...]:
    return tuple(PICTURE_WAYS) if variant == PICTURES else WAYS if device.type == "cuda" else WAYS[:2]


# In a process ---------------------------------------------------------------------------------------------------------


def stressed(variant: str, way: str, device: torch.device, seconds: float, seed: int = 0) -> Found:
    """Launch for so many seconds, at least one round."""
    found, bounds = Found(), ((260, 300), (3, 9)) if way == "blocks" else ((25, 40), (4, 9))
    sequences, launches = (LONG if way == "blocks" else SHORT)[device.type]
    batch = Batch(device, sequences, *bounds, seed)
    run = launcher(variant, batch)
    one_round = replayed(run, launches) if way == "graph" else lambda: launched(run, launches, batch)
    end = time.monotonic() + seconds
    for number in itertools.count():
        if number and number % _SAME == 0:
            batch.renew()
        found.add_launches(one_round(), batch)
        if time.monotonic() >= end:
            return found


def launched(run: Callable[[], torch.Tensor], launches: int, batch: Batch) -> torch.Tensor:
    outs = []
    for _ in range(launches):
        torch.full_like(batch.data[0], _NAN)  # freed: the memory that the next output gets
        outs.append(run())
    return torch.stack(outs)


def replayed(run: Callable[[], torch.Tensor], launches: int) -> Callable[[], torch.Tensor]:
    """As many launches in one graph; what comes back replays it over outputs of NaN."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [run() for _ in range(launches)]

    def replay() -> torch.Tensor:
        for out in outs:
            out.fill_(_NAN)
        graph.replay()
        return torch.stack(outs)

    return replay


def work(variant: str, device: torch.device, number: int, seconds: float, until: float) -> None:
    """What one process does; a line of JSON for each way."""

    def say(entry: dict) -> None:
        print(json.dumps(entry), flush=True)

    if variant == PICTURES:
        from .pictures import draw  # and diffusers

        return draw(device, PICTURE_WAYS, until, say)
    for way in ways_of(variant, device):
        try:
            say({"way": way, "done": True, **asdict(stressed(variant, way, device, seconds, number))})
        except Exception as error:  # torch's refusals, and whatever a compiler raises
            say({"way": way, "reason": " ".join(f"{type(error).__name__}: {error}".split())[:200]})


# Beside it ------------------------------------------------------------------------------------------------------------


def verdicts(log: Path, variant: str, ways: Sequence[str], ended: str) -> list[dict]:
    """The columns of each way from a process's log; a way that it did not end has failed, with how the process ended."""
    entries: dict[str, dict] = {}
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"way"') and line.endswith("}"):
            entry = json.loads(line)
            entries.setdefault(entry["way"], {}).update(entry)
    found = []
    for way in ways:
        entry = {"way": way} | entries.get(way, {})
        done, reason = entry.pop("done", False), entry.pop("reason", "")
        # A launch is the same to the bit each time; of whole pictures that is counted, and not asked.
        wrong = entry.get("bad", 0) or (variant != PICTURES and entry.get("different", 0))
        status = "wrong result" if wrong else "ok" if done else "failed"
        entry["sequences"] = " ".join(map(str, entry.get("sequences", ())))
        found.append(entry | {"status": status, "reason": reason or ("" if done else ended)})
    return found


def times_of(variant: str, device: torch.device) -> tuple[float, float]:
    """(when it begins to launch, when it is stopped), in seconds from the start; suspects import beside the others."""
    first, last = (FIRST, LAST) if device.type == "cuda" else (UNBOUNDED, 2 * UNBOUNDED)
    return (first, last) if variant in SUSPECTS else (0.0, first)


def run_all(device: torch.device, out: Path, processes: int, seconds: float, add: Callable[[dict], None]) -> None:
    """Every variant in its processes; `add` gets the columns of each way as soon as its process has ended."""
    begin, now, waiting = time.monotonic(), time.time(), {}
    used, suspects = variants_of(device)
    for variant, number in itertools.product((PICTURES, *used, *suspects), range(processes)):
        log = out / "logs" / f"stress-{variant.replace(',', '').replace(' ', '-')}-{number}.log"
        after, limit = times_of(variant, device)
        command = [sys.executable, "-m", "benchmarks.attention.stress", "--out", str(out), "--device", str(device)]
        command += ["--variant", variant, "--number", str(number), "--seconds", str(seconds)]
        command += ["--after", str(now + after), "--until", str(now + limit - _REPORT)]
        waiting[variant, number] = start(command, log, dict(os.environ)), log, limit
    while waiting:
        for (variant, number), (process, log, limit) in list(waiting.items()):
            code, taken = process.poll(), time.monotonic() - begin
            if code is None and taken < limit:
                continue
            stop(process, 0.2)
            ended = f"exit code {code}" if code is not None else f"no answer within {limit:g} s"
            for entry in verdicts(log, variant, ways_of(variant, device), ended):
                add({"variant": variant, "process": number, "seconds": f"{taken:.1f}"} | entry)
            del waiting[variant, number]
        time.sleep(0.05)


def measure(out: Path, device: torch.device, processes: int, seconds: float) -> list[dict]:
    """The rows, which are in attention_stress.csv of `out` too."""
    rows, found = RowFile(out / "attention_stress.csv", FIELDS), []

    def add(row: dict) -> None:
        found.append(provenance_here(device) | row)
        rows.add(found[-1])
        counts = " ".join(f"{name} {row[name]}" for name in FIELDS[-7:] if row.get(name) not in (None, ""))
        print(f"{row['variant']}, {row['way']}, {row['process']}: {row['status']}", counts, row["reason"], flush=True)

    run_all(device, out, processes, seconds, add)
    return found


# Once, and while the processes run: the first look at a GPU takes seconds.
provenance_here = functools.cache(provenance)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of attention_stress.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=3, help="of each variant, at the same time")
    parser.add_argument("--seconds", type=float, default=1.0, help="for which each way is launched")
    parser.add_argument("--variant", choices=(PICTURES, *USED, *SUSPECTS), help="be one process of it, and write no row")
    parser.add_argument("--number", type=int, default=0, help="of --variant: which process")
    parser.add_argument("--after", type=float, default=0.0, help="of --variant: when it begins, in seconds since 1970")
    parser.add_argument("--until", type=float, default=0.0, help="of --variant: when pictures end, likewise")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.variant:
        time.sleep(max(0.0, options.after - time.time()))
        torch.set_num_threads(1)
        with torch.no_grad():
            work(options.variant, device, options.number, options.seconds, options.until)
        return 0
    found = measure(options.out.resolve(), device, options.processes, options.seconds)
    wrong = [row for row in found if row["status"] != "ok" and row["variant"] not in SUSPECTS]
    print(f"{len(wrong)} of the rows of what the driver uses are not right" if wrong else "what the driver uses is right")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
