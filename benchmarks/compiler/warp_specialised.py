"""Whether a warp-specialised kernel keeps each tile until the last product has read it, by the TTGIR that Triton made of it.

One group of warps loads tiles into buffers of shared memory, others multiply them. A load waits for the buffer's "empty"
barriers and fires its "full" one; a group that has read the buffer arrives at its own empty barrier. An arrive before the
product lets the next load write into a tile that is still being read: nothing but a GPU's luck shows it in the results.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

_BARRIER = re.compile(r"\bmbarrier\.(init|inval)\.")
_REGION = re.compile(r"\s*(?:(default)\b|(partition\d+)\((.*?)\)\s*num_warps)")
_VIEW = re.compile(r"\s*(%[\w#]+) = ttg\.memdesc_\w+ (%[\w#]+)(?:\[([^\]]*)\])?")
_OP = re.compile(r"\s*(?:(%[\w#]+)(?::\d+)? = )?\"?(\w+\.\w+)\"?")
_NAME = re.compile(r"%[\w#]+")
# What takes a buffer without reading it, or reads barriers only.
_NO_READS = {
    "ttng.wait_barrier", "ttng.arrive_barrier", "ttng.barrier_expect", "ttng.init_barrier", "ttng.inval_barrier",
    "ttng.async_tma_copy_global_to_local", "ttg.warp_specialize", "ttg.local_dealloc",
}  # fmt: skip


@dataclass
class _Region:
    """The code of one group of warps, line by line, with the buffers under the names that they have outside."""

    name: str
    outer: dict[str, str]
    lines: list[str] = field(default_factory=list)
    views: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> buffer, slot

    def buffer(self, name: str) -> tuple[str, str]:
        return self.views.get(name) or (self.outer.get(name, name), "")

    def operations(self) -> Iterator[tuple[int, str, str]]:
        """(line, operation, the rest of the line without its types); `views` grows on the way."""
        for number, line in enumerate(self.lines):
            if view := _VIEW.match(line):
                name, base, slot = view.groups()
                buffer, outer_slot = self.buffer(base)
                self.views[name] = buffer, slot or outer_slot
            elif found := _OP.match(line):
                yield number, found[2], line[found.end() :].split(" : ")[0]


def _regions(ttgir: str) -> list[_Region]:
    captured: list[str] = []
    regions: list[_Region] = []
    for line in ttgir.splitlines():
        if "ttg.warp_specialize(" in line:
            captured = _NAME.findall(line.split("ttg.warp_specialize(")[1].split(")")[0])
        elif captured and (found := _REGION.match(line)):
            arguments = re.findall(r"(%[\w#]+):", found[3] or "")
            regions.append(_Region(found[1] or found[2], dict(zip(arguments, captured, strict=False))))
        elif regions:
            regions[-1].lines.append(line)
    return regions


def _copies(region: _Region) -> Iterator[tuple[str, set[str]]]:
    """The buffers that a region fills, each with the barriers that it waited for since the last one."""
    waited: set[str] = set()
    for _, operation, rest in region.operations():
        if operation == "ttng.wait_barrier":
            waited.add(region.buffer(_NAME.search(rest)[0])[0])
        elif operation == "ttng.async_tma_copy_global_to_local":
            # %descriptor[%row, %column] %buffer, %barrier, %predicate
            yield region.buffer(_NAME.search(rest.split("]")[1])[0])[0], waited
            waited = set()


def _finished(reads: list[tuple[int, str, str, bool]], waits: list[tuple[int, int]]) -> Iterator[tuple[int, str, str]]:
    """(line, buffer, slot) of each read, with the line at which it is over: an asynchronous product's is its wait."""
    products = sorted({line for line, _, _, asynchronous in reads if asynchronous})
    for line, buffer, slot, asynchronous in reads:
        over = line
        if asynchronous:
            done = [at for at, pending in waits if at > line and sum(line < one < at for one in products) >= pending]
            over = min(done, default=10**9)
        yield over, buffer, slot


def early_releases(ttgir: str) -> list[str] | None:
    """What is released before it was read, or cannot be told; None of a kernel whose warps all do the same."""
    regions = _regions(ttgir)
    if not regions:
        return None
    empties: dict[str, set[str]] = {}
    for region in regions:
        for buffer, barriers in _copies(region):
            empties.setdefault(buffer, set()).update(barriers)
    found, released = [], set()
    for region in regions:
        reads, waits, arrives = [], [], []
        for line, operation, rest in region.operations():
            if operation == "ttng.warp_group_dot_wait":
                waits.append((line, int(re.search(r"pendings = (\d+)", rest)[1])))
            elif operation == "ttng.arrive_barrier":
                arrives.append((line, *region.buffer(_NAME.search(rest)[0])))
            elif operation not in _NO_READS:
                used = {region.buffer(name) for name in _NAME.findall(rest)}
                asynchronous = "isAsync = true" in rest or operation.startswith("ttng.tc_gen5")
                reads += [(line, *one, asynchronous) for one in used if one[0] in empties]
        over = list(_finished(reads, waits))
        for line, barrier, slot in arrives:
            for buffer in (buffer for buffer, barriers in empties.items() if barrier in barriers):
                released.add(buffer)
                mine = [(end, where) for end, one, where in over if one == buffer]
                if not mine:
                    found.append(f"{region.name} releases {buffer} and never reads it")
                elif any(end > line or where != slot for end, where in mine):
                    found.append(f"{region.name} releases {buffer} before it is read")
    return found + [f"{buffer} is never released" for buffer in empties if buffer not in released]


def stale_barriers(ptx: str) -> int:
    """Barriers that a kernel's PTX initialises and does not invalidate.

    Its warps may be specialised for a part of the program only, and the memory of a barrier that is over goes to a tile: a
    barrier that was not invalidated before may still be written to. Triton 3.6 leaves 6 to 28 in the attention, 3.9 none.
    """
    found = Counter(_BARRIER.findall(ptx))
    return found["init"] - found["inval"]
