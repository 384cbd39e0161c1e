"""What a profiler's trace says: kernels with their work, host synchronisations, idle gaps of the device, memory over time.

Pure functions over the events of a trace of torch.profiler ("traceEvents" of its JSON; times in microseconds). On a CPU,
where nothing is launched, the operators take the kernels' place.
"""

import ast
import bisect
import gzip
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..operators.arguments import TRAFFIC

RANGE = "qwen_fast::"  # of the stages, and of the operators' own names
LOOP = "qwen_fast::denoise"
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_RUNTIME = ("cuda_runtime", "cuda_driver")
_WAITS = re.compile(r"^(?:cuda|cu)(?:Stream|Device|Event|Ctx)Synchronize")
_ALLOCATIONS = re.compile(r"^(?:cuda|cu)(?:Malloc|Free|HostAlloc|FreeHost|MemAlloc|MemFree)(?!.*Async)")
_TYPES = {
    "c10::BFloat16": torch.bfloat16,
    "c10::Half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
    "int": torch.int32,
    "long int": torch.int64,
    "long": torch.int64,
    "bool": torch.bool,
    "unsigned char": torch.uint8,
    "signed char": torch.int8,
    "c10::Float8_e4m3fn": torch.float8_e4m3fn,
}


def load(path: Path) -> list[dict]:
    """The events of a .json or .json.gz."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]


@dataclass
class Launch:
    """What the host did where a device activity, or a call of the runtime, began.

    Attributes:
        op: the operator's event: one of ours if there is one around it, else the innermost; None outside of all.
        stage: the innermost range around it, without "qwen_fast::".
    """

    name: str
    begin: float
    duration: float
    op: dict | None
    stage: str | None


@dataclass
class Activity:
    """Something that a device did, or an operator on a CPU.

    Attributes:
        launch: None if the trace does not say who launched it.
        own: microseconds without nested ones.
    """

    name: str
    begin: float
    duration: float
    device: int
    stream: int
    launch: Launch | None
    own: float

    @property
    def end(self) -> float:
        return self.begin + self.duration


@dataclass
class Trace:
    """The events that matter, put in relation."""

    activities: list[Activity] = field(default_factory=list)
    calls: list[tuple[Launch, int | None]] = field(default_factory=list)  # of the runtime, with their correlation
    ranges: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    memory: list[dict] = field(default_factory=list)
    on_device: bool = False

    @property
    def loop(self) -> tuple[float, float] | None:
        """Begin and end of the denoising loop on the host."""
        spans = self.ranges.get(LOOP)
        return (min(b for b, _ in spans), max(e for _, e in spans)) if spans else None

    def in_loop(self) -> list[Activity]:
        """What the loop launched; everything where the trace has no loop."""
        loop = self.loop
        if loop is None:
            return self.activities
        return [a for a in self.activities if a.launch is not None and loop[0] <= a.launch.begin <= loop[1]]


def read(events: Iterable[dict]) -> Trace:
    """Put a trace's events in relation: who launched what, inside which operator and which stage."""
    trace, host, device, by_correlation = Trace(), {}, [], {}
    for event in events:
        kind = event.get("cat")
        if event.get("name") == "[memory]":
            trace.memory.append(event)
        elif event.get("ph") != "X":
            continue
        elif kind in _DEVICE:
            device.append(event)
        elif kind in ("cpu_op", "user_annotation", *_RUNTIME):
            host.setdefault((event["pid"], event["tid"]), []).append(event)
            if kind == "user_annotation":
                begin = event["ts"]
                trace.ranges.setdefault(event["name"], []).append((begin, begin + event["dur"]))
    operators = []
    for thread in host.values():
        for event, stack in _nested(thread):
            if event["cat"] in _RUNTIME:
                launch = Launch(event["name"], event["ts"], event["dur"], _owner(stack), _stage(stack))
                correlation = event["args"].get("correlation")
                by_correlation[correlation] = launch
                trace.calls.append((launch, correlation))
            elif event["cat"] == "cpu_op":
                operators.append((event, [one for one in stack if one["cat"] == "cpu_op"], _stage(stack)))
    trace.on_device = bool(device)
    if device:
        for event in device:
            launch = by_correlation.get(event["args"].get("correlation"))
            where = event["args"].get("device", 0), event["args"].get("stream", 0)
            trace.activities.append(Activity(event["name"], event["ts"], event["dur"], *where, launch, event["dur"]))
    else:
        trace.activities = _operators(operators)
    trace.activities.sort(key=lambda activity: activity.begin)
    trace.memory.sort(key=lambda event: event["ts"])
    return trace


def _nested(events: list[dict]):
    """Each event of a thread with those around it, the outermost first."""
    stack: list[dict] = []
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        yield event, stack
        if event["cat"] not in _RUNTIME:
            stack.append(event)


def _owner(stack: list[dict]) -> dict | None:
    operators = [event for event in stack if event["cat"] == "cpu_op"]
    ours = [event for event in operators if event["name"].startswith(RANGE)]
    return ours[0] if ours else operators[-1] if operators else None


def _stage(stack: list[dict]) -> str | None:
    names = [e["name"] for e in stack if e["cat"] == "user_annotation" and e["name"].startswith(RANGE)]
    return names[-1].removeprefix(RANGE) if names else None


def _operators(operators: list[tuple[dict, list[dict], str | None]]) -> list[Activity]:
    """A CPU's operators in a kernel's place; what runs inside one of ours is its own time."""
    found: dict[int, Activity] = {}
    for event, around, stage in operators:
        owner = _owner(around)
        if owner is not None and owner["name"].startswith(RANGE):
            continue
        launch = Launch(event["name"], event["ts"], event["dur"], event, stage)
        found[id(event)] = Activity(event["name"], event["ts"], event["dur"], -1, 0, launch, event["dur"])
        if around and id(around[-1]) in found:
            found[id(around[-1])].own -= event["dur"]
    return list(found.values())


# Kernels --------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One kernel as one operator launches it.

    Attributes:
        microseconds: of all launches. share: of the time of all rows.
        bytes, flops: of those launches whose work is known, which took `known` microseconds.
    """

    kernel: str
    op: str
    launches: int = 0
    microseconds: float = 0.0
    share: float = 0.0
    bytes: int = 0
    flops: int = 0
    known: float = 0.0

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.known / 1e3 if self.known and self.bytes else None

    @property
    def tflop_per_s(self) -> float | None:
        return self.flops / self.known / 1e6 if self.known and self.flops else None

    def of_ceiling(self, bytes_per_s: float, matmul_flops_per_s: float, attention_flops_per_s: float) -> float | None:
        """The least time that this work takes at these rates, as a part of the time that it took."""
        if not self.known or not (self.bytes or self.flops):
            return None
        rate = attention_flops_per_s if "attention" in self.op else matmul_flops_per_s
        return max(self.bytes / bytes_per_s, self.flops / rate) * 1e6 / self.known


def kernel_table(activities: list[Activity]) -> list[Row]:
    """Rows by kernel and operator, the longest first. An operator's work counts for the longest of its kernels."""
    longest: dict[int, Activity] = {}
    for one in activities:
        if one.launch is not None and one.launch.op is not None:
            key = id(one.launch.op)
            if key not in longest or one.own > longest[key].own:
                longest[key] = one
    rows: dict[tuple[str, str], Row] = {}
    for one in activities:
        op = one.launch.op if one.launch is not None else None
        row = rows.setdefault((one.name, op["name"] if op else ""), Row(one.name, op["name"] if op else ""))
        row.launches += 1
        row.microseconds += one.own
        if op is not None and longest[id(op)] is one:
            work = work_of(op)
            if work is not None:
                row.bytes, row.flops, row.known = row.bytes + work[0], row.flops + work[1], row.known + one.own
    total = sum(row.microseconds for row in rows.values())
    for row in rows.values():
        row.share = row.microseconds / total if total else 0.0
    return sorted(rows.values(), key=lambda row: -row.microseconds)


def work_of(op: dict) -> tuple[int, int] | None:
    """(bytes, FLOPs) of an operator's call as recorded with its shapes, or None where they are not known.

    Ours declare them; of torch's, products and attention are known. Bytes are 0 where only the FLOPs are.
    """
    try:
        arguments = _arguments(op["args"])
        if op["name"].startswith(RANGE):
            return _ours(op["name"].removeprefix(RANGE), arguments)
        return _torchs(op["name"].removeprefix("aten::"), arguments)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError):
        return None  # recorded without shapes, or with other ones than this version knows


def _arguments(args: dict) -> list:
    """Tensors as tensors without data, numbers as numbers, what is left out as None."""
    found = []
    for dims, kind, concrete in zip(args["Input Dims"], args["Input type"], args["Concrete Inputs"], strict=True):
        if kind in _TYPES:
            found.append(torch.empty(dims, dtype=_TYPES[kind], device="meta"))
        else:
            found.append(ast.literal_eval(concrete) if concrete else None)
    return found


def _ours(op: str, arguments: list) -> tuple[int, int]:
    if op == "joint_attention":
        # Spans lie on the device: as long as the call allows for, cut to the rows there are. Exact for equal ones.
        sequences, rows, longest = arguments[3].shape[0], arguments[0].shape[0], arguments[4]
        bounds = [min(n * longest, rows) for n in range(sequences + 1)]
        arguments[3] = torch.tensor(list(itertools.pairwise(bounds)))
    moved, flops = TRAFFIC[op](*arguments)
    return int(moved), int(flops)


def _torchs(op: str, arguments: list) -> tuple[int, int] | None:
    if op in ("mm", "bmm", "addmm", "baddbmm", "_addmm_activation"):
        left, right = arguments[:2] if op in ("mm", "bmm") else arguments[1:3]
        out = left.numel() // left.shape[-1] * right.shape[-1]
        return left.nbytes + right.nbytes + out * left.element_size(), 2 * out * left.shape[-1]
    if op.startswith(
        ("_scaled_dot_product_", "_cudnn_attention_forward", "_flash_attention_forward", "_efficient_attention_f")
    ):
        query, key, value = arguments[:3]
        if op.startswith(("_flash", "_efficient")):  # [B, S, H, D]; the others [B, H, S, D]
            query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        batch, heads, rows, dim = query.shape
        flops = 2 * batch * heads * rows * key.shape[2] * (dim + value.shape[3])
        return 2 * query.nbytes + key.nbytes + value.nbytes, flops
    return None


# Host synchronisations and idle gaps ----------------------------------------------------------------------------------


@dataclass
class Sync:
    """Calls in the loop in which the host waits for the device, or may."""

    kind: str  # "wait", "copy to the host" or "allocation"
    call: str
    op: str
    stage: str
    count: int = 0
    microseconds: float = 0.0


def synchronisations(trace: Trace) -> list[Sync]:
    """Host synchronisations between begin and end of the loop, the longest first."""
    to_host = {id(a.launch): a for a in trace.activities if a.launch is not None and "DtoH" in a.name}
    begin, end = trace.loop or (float("-inf"), float("inf"))
    found: dict[tuple, Sync] = {}
    for call, _ in trace.calls:
        if not begin <= call.begin <= end:
            continue
        kind = (
            "wait" if _WAITS.match(call.name) else "allocation" if _ALLOCATIONS.match(call.name) else
            "copy to the host" if id(call) in to_host else None
        )  # fmt: skip
        if kind is None:
            continue
        names = call.name, call.op["name"] if call.op else "", call.stage or ""
        sync = found.setdefault((kind, *names), Sync(kind, *names))
        sync.count += 1
        sync.microseconds += call.duration
    return sorted(found.values(), key=lambda sync: -sync.microseconds)


@dataclass
class Gap:
    """A time in which no stream of a device had anything to do."""

    device: int
    begin: float
    duration: float
    after: str
    before: str


def busy(activities: list[Activity]) -> dict[int, list[tuple[float, float]]]:
    """Intervals in which each device did something, on whatever stream."""
    found: dict[int, list[tuple[float, float]]] = {}
    for one in sorted(activities, key=lambda activity: activity.begin):
        spans = found.setdefault(one.device, [])
        if spans and one.begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], one.end))
        else:
            spans.append((one.begin, one.end))
    return found


def idle_gaps(activities: list[Activity], least: float = 1.0) -> list[Gap]:
    """Gaps of at least `least` microseconds between the first and the last activity of each device, the longest first."""
    gaps = []
    for device, spans in busy(activities).items():
        own = sorted((a for a in activities if a.device == device), key=lambda activity: activity.begin)
        begins = [activity.begin for activity in own]
        by_end = sorted(own, key=lambda activity: activity.end)
        ends = [activity.end for activity in by_end]
        for (_, idle_from), (idle_to, _) in zip(spans, spans[1:], strict=False):
            if idle_to - idle_from >= least:
                after = by_end[bisect.bisect_right(ends, idle_from) - 1].name
                gaps.append(Gap(device, idle_from, idle_to - idle_from, after, own[bisect.bisect_left(begins, idle_to)].name))
    return sorted(gaps, key=lambda gap: -gap.duration)


# Memory ---------------------------------------------------------------------------------------------------------------


def memory_timeline(trace: Trace) -> list[dict]:
    """Allocated and reserved bytes after every allocation, with seconds since the first one, device and stage."""
    if not trace.memory:
        return []
    start = trace.memory[0]["ts"]
    ours = [(name.removeprefix(RANGE), found) for name, found in trace.ranges.items() if name.startswith(RANGE)]
    spans = sorted((end - begin, begin, end, name) for name, found in ours for begin, end in found)  # inner ones first
    rows = []
    for event in trace.memory:
        args = event["args"]
        stage = next((name for _, begin, end, name in spans if begin <= event["ts"] <= end), "")
        rows.append(
            {
                "seconds": (event["ts"] - start) / 1e6,
                "device": "cpu" if args["Device Type"] == 0 else f"cuda:{args['Device Id']}",
                "allocated": args["Total Allocated"],
                "reserved": args["Total Reserved"],
                "stage": stage,
            }
        )
    return rows
