"""Streams, events and graphs of the emulated device.

Work runs at once, in the order in which the host launches it. What a GPU would be free to do in another order is found by
clocks: each stream counts its work and knows how far it has waited for the others, and work that touches memory that
another stream wrote, without having waited for it, is noted as a race.

A capture runs nothing: what the work would write stays as it was, and new memory stays poisoned. `replay` runs what was
recorded, in order, on the same memory. Of memory that was not allocated in the capture a graph holds nothing, as on a GPU: a
replay that reads some that was freed since is an error here.
"""

import itertools
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable

import torch

from support.emulated_cuda import notes as kinds
from support.emulated_cuda.memory import Block, Memory, on_host, poison
from support.emulated_cuda.notes import Notes

_ids = itertools.count()
_WATCHED = 2**20  # bytes of pinned memory that are compared with what they were
_OWN = os.path.dirname(os.path.abspath(__file__))


class IllegalInCapture(RuntimeError):
    """What CUDA refuses while a stream is captured."""


class Stream:
    """A stream of the emulated device, with what is asked of torch.cuda.Stream."""

    def __init__(self, device=None, priority: int = 0, *, timeline: "Timeline | None" = None, **_ignored):
        self.id = self.cuda_stream = next(_ids)
        self.device = torch.device("cuda", 0)
        self.priority = priority
        self.clock: dict[int, int] = {self.id: 0}
        self.graph: Graph | None = None  # that captures it
        self._timeline = timeline or Timeline.current

    def wait_stream(self, other: "Stream") -> None:
        self._join(other.clock, other.graph)

    def wait_event(self, event: "Event") -> None:
        self._join(event.clock, event.graph)

    def _join(self, clock: dict[int, int], graph: "Graph | None") -> None:
        _join(self.clock, clock)
        if self.graph is None and graph is not None and graph.capturing:
            self.graph = graph  # work that waits for captured work is captured too
            graph.streams.append(self)

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._timeline.host_waits("stream.synchronize", self.clock)

    def query(self) -> bool:
        self._timeline.refuse("stream.query")
        return True

    def __enter__(self) -> "Stream":
        self._timeline.push(self)
        return self

    def __exit__(self, *_) -> None:
        self._timeline.pop()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)


class Event:
    """An event of the emulated device; its times are the host's."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_ignored):
        self.clock: dict[int, int] = {}
        self.graph: Graph | None = None
        self._timed, self._seconds = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or Timeline.current.stream
        self.clock, self.graph, self._seconds = dict(stream.clock), stream.graph, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or Timeline.current.stream).wait_event(self)

    def synchronize(self) -> None:
        Timeline.current.host_waits("event.synchronize", self.clock, kinds.EVENT)

    def query(self) -> bool:
        Timeline.current.refuse("event.query")
        return True

    def elapsed_time(self, other: "Event") -> float:
        if not (self._timed and other._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        return 1e3 * (other._seconds - self._seconds)


class Timeline:
    """The order of all work of a device: which stream is current in which thread, what waits for what.

    Args:
        notes: where races and illegal things go.
        memory: whose blocks the work reads and writes.
    """

    current: "Timeline | None" = None  # of the device that is emulated now

    def __init__(self, notes: Notes, memory: Memory):
        self.notes, self.memory = notes, memory
        self.default = Stream(timeline=self)
        self.sync_debug_mode = 0
        self._threads = threading.local()
        self._host: dict[int, int] = {}
        self._arriving: list[tuple[int, int, Callable[[], None]]] = []
        self._leaving: list[Block] = []  # freed while another stream than their own may still use them

    @property
    def _stack(self) -> list[Stream]:
        if not hasattr(self._threads, "stack"):
            self._threads.stack = [self.default]
        return self._threads.stack

    @property
    def stream(self) -> Stream:
        return self._stack[-1]

    def push(self, stream: Stream) -> None:
        self._stack.append(stream)

    def pop(self) -> None:
        self._stack.pop()

    def set(self, stream: Stream) -> None:
        self._stack[-1] = stream

    @property
    def graph(self) -> "Graph | None":
        """That captures the current stream."""
        return self.stream.graph

    def work(self, what: str, reads: Iterable[Block], writes: Iterable[Block]) -> "Graph | None":
        """Note work on the current stream; the graph that records it, or None: it runs now."""
        stream = self.stream
        begun = getattr(self._threads, "begun", None)
        if begun is not None and begun.capturing and stream.graph is None:
            self.refuse(f"{what} on a stream that is not captured", always=True)
        _join(stream.clock, self._host)
        stream.clock[stream.id] += 1
        if stream.graph is not None:
            return stream.graph  # nothing runs: the replay reads and writes
        count = stream.clock[stream.id]
        for block in reads:
            self._ordered(stream, block.written, what, "reads what", block)
            block.read[stream.id] = count
        for block in writes:
            self._ordered(stream, block.written, what, "writes over what", block)
            for other in block.read.items():
                self._ordered(stream, other, what, "writes over what is read by what", block)
            block.written, block.read = (stream.id, count), {}
        return stream.graph

    def _ordered(self, stream: Stream, earlier: tuple[int, int] | None, what: str, does: str, block: Block) -> None:
        if earlier is not None and stream.clock.get(earlier[0], 0) < earlier[1]:
            self.notes.add(kinds.RACE, f"{what} {does} another stream does, {block.nbytes} bytes, without waiting for it")

    def host_waits(self, what: str, clock: dict[int, int] | None = None, kind: str = kinds.SYNC) -> None:
        """The host waits for a stream's work so far, for all of it by default."""
        self.refuse(what)
        self.notes.add(kind, what, waits=True)
        self.host_arrives(clock)

    def warn(self, what: str) -> None:
        """What torch.cuda.set_sync_debug_mode asked for: of work that makes the host wait, not of a wait by name."""
        if self.sync_debug_mode == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")
        if self.sync_debug_mode == 1:
            warnings.warn(f"called a synchronizing CUDA operation ({what})", stacklevel=_outside())

    def host_arrives(self, clock: dict[int, int] | None = None) -> None:
        """The host is behind the current stream's work now, or behind `clock`; so is whatever it launches next."""
        _join(self._host, self.stream.clock if clock is None else clock)
        arrived = [copy for copy in self._arriving if self._host.get(copy[0], 0) >= copy[1]]
        self._arriving = [copy for copy in self._arriving if copy not in arrived]
        for _, _, copy in arrived:
            copy()

    def leaves_later(self, what: str, source: torch.Tensor) -> None:
        """A copy from pinned memory that the host has not waited for: what it writes there meanwhile may be copied."""
        if source.nbytes <= _WATCHED:
            seen = source.clone()
            self._arriving_add(lambda: self._unchanged(what, source, seen))

    def _unchanged(self, what: str, source: torch.Tensor, seen: torch.Tensor) -> None:
        if not torch.equal(source.view(torch.uint8), seen.view(torch.uint8)):
            self.notes.add(kinds.RACE, f"the host wrote over pinned memory before it was copied: {what}")

    def arrives_later(self, copy: Callable[[], None]) -> None:
        """A copy to the host that the host has not waited for: it is made when it has."""
        self._arriving_add(copy)

    def _arriving_add(self, then: Callable[[], None]) -> None:
        stream = self.stream
        self._arriving.append((stream.id, stream.clock[stream.id], then))

    def refuse(self, what: str, *, always: bool = False) -> None:
        """Raise what CUDA raises for something that a capture cannot hold, if this thread captures."""
        begun = getattr(self._threads, "begun", None)
        if always or self.stream.graph is not None or (begun is not None and begun.capturing):
            self.notes.add(kinds.ILLEGAL, what, capturing=True)
            raise IllegalInCapture(f"CUDA error: operation not permitted when stream is capturing ({what}).")

    def begin(self, graph: "Graph | None") -> None:
        self._threads.begun = graph

    def freed(self, block: Block) -> None:
        """A block's memory goes back to its stream: the next to get it may write while another stream still reads."""
        used = {**block.read, **({block.written[0]: block.written[1]} if block.written else {})}
        if any(stream not in block.shared_with and stream != block.stream.id for stream in used):
            self._leaving.append(block)

    def allocated(self, what: str) -> None:
        """Called at each allocation: are the blocks that left meanwhile really free for this stream?"""
        if not self._leaving:
            return
        own = [block for block in self._leaving if block.stream == self.stream]
        self._leaving = [block for block in self._leaving if block.stream != self.stream]
        for block in own:
            for earlier in (*block.read.items(), *([block.written] if block.written else ())):
                if earlier[0] not in block.shared_with and self._behind(earlier):
                    self.notes.add(
                        kinds.RACE, f"{what} may get {block.nbytes} bytes that were freed while another stream uses them"
                    )

    def _behind(self, earlier: tuple[int, int]) -> bool:
        return max(self.stream.clock.get(earlier[0], 0), self._host.get(earlier[0], 0)) < earlier[1]


class Graph:
    """torch.cuda.CUDAGraph: what was launched between `capture_begin` and `capture_end`, to be run again."""

    def __init__(self, keep_graph: bool = False):
        self.streams: list[Stream] = []
        self.steps: list[tuple[str, list, Callable[[], None]]] = []
        self.capturing = False
        self.held: list[torch.Tensor] = []  # the pool
        self._captured = False
        self._outside: dict[int, Block] = {}
        self._written: dict[int, Block] = {}

    def capture_begin(self, pool=None, capture_error_mode: str = "global", **_ignored) -> None:
        timeline = Timeline.current
        stream = timeline.stream
        if stream == timeline.default:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        timeline.notes.add(kinds.CAPTURE, "capture_begin")
        self.capturing, stream.graph = True, self
        self.streams.append(stream)
        timeline.begin(self)

    def capture_end(self) -> None:
        timeline = Timeline.current
        unjoined = [s for s in self.streams[1:] if self.streams[0].clock.get(s.id, 0) < s.clock[s.id]]
        for stream in self.streams:
            stream.graph = None
        self.capturing, self._captured = False, True
        timeline.begin(None)
        if unjoined:
            timeline.notes.add(kinds.ILLEGAL, "a stream that joined the capture was not waited for", capturing=True)
            raise IllegalInCapture("CUDA error: capturing stream has unjoined work.")

    def record(self, what: str, outside: list[Block], step: Callable[[], None], written: Iterable[Block] = ()) -> None:
        """Keep a piece of work.

        Args:
            outside: the blocks that it reads or writes and the graph does not hold.
            written: the blocks that it writes.
        """
        self.steps.append((what, outside, step))
        self._outside.update((id(block), block) for block in outside)
        self._written.update((id(block), block) for block in written)

    def replay(self) -> None:
        if not self._captured:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        timeline = Timeline.current
        timeline.refuse("graph.replay")
        timeline.notes.add(kinds.REPLAY, f"{len(self.steps)} pieces of work")
        dead = [what for what, outside, _ in self.steps if not all(block.alive for block in outside)]
        if dead:
            raise RuntimeError(
                f"the graph uses memory that was freed since the capture: in {dead[0]} and {len(dead) - 1} more."
            )
        timeline.work("graph.replay", self._outside.values(), self._written.values())
        for tensor in self.held:
            poison(on_host(tensor))
        for _, _, step in self.steps:
            step()

    def reset(self) -> None:
        self.__init__()

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def register_generator_state(self, generator) -> None:
        pass

    def instantiate(self) -> None:
        pass

    def enable_debug_mode(self) -> None:
        pass


def _outside() -> int:
    """How many frames up the code is that called torch."""
    depth, frame = 2, sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_OWN):
        depth, frame = depth + 1, frame.f_back
    return depth


def _join(clock: dict[int, int], other: dict[int, int]) -> None:
    for stream, count in other.items():
        if clock.get(stream, 0) < count:
            clock[stream] = count
