"""Pictures too large for the memory at hand, in bands of rows: each with the rows around it that its own depend on, so that
the result is that of the whole picture.

Layers that need every row (the attention of the middle block) run whole; so do those before or after the bands that fit.
Of the ways that fit, the one that computes the fewest rows twice is taken.
"""

import math
from typing import NamedTuple

import torch

from ..common.hardware import free_bytes
from .layers import Layer, Stream, channels_last

# Elements of a tensor on CUDA: torch's upsampling counts in 32 bits, and older cuDNN does.
MOST_ON_CUDA = 2**31 - 1
USABLE = 0.9  # of the free memory: allocators round up, and a convolution may want scratch
_PARTS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)  # bands of a picture that are considered


class Plan(NamedTuple):
    """Which layers run in bands.

    Attributes:
        first, last: layers[first:last]; none where they are equal.
        rows: of a band, where the last of them ends.
        bands: how many.
        peak: bytes that the activations take at most, by the layers' own estimates.
        overhead: FLOPs of the convolutions beyond those of the whole picture, as a part of them.
    """

    first: int
    last: int
    rows: int
    bands: int
    peak: int
    overhead: float


class Sizes:
    """Rows, columns and channels between the layers: entry i goes into layer i.

    Args:
        layers: of an encoder or a decoder.
        shape: `[B, C, H, W]` of what goes into the first.
        itemsize: bytes of an element.
    """

    def __init__(self, layers: list[Layer], shape: torch.Size, itemsize: int):
        self.layers, batch = layers, shape[0]
        self.channels, self.rows, self.columns = [shape[1]], [shape[2]], [shape[3]]
        for layer in layers:
            self.channels.append(layer.channels)
            self.rows.append(self.rows[-1] * layer.up // layer.down)
            self.columns.append(self.columns[-1] * layer.up // layer.down)
        self._of_column = [batch * columns for columns in self.columns]
        self._itemsize = itemsize

    def peak(self, index: int, rows: int | None = None) -> int:
        """Bytes alive during a layer that gets `rows` rows, or all."""
        elements = self.layers[index].peak * self._of_column[index] * (self.rows[index] if rows is None else rows)
        return elements * self._itemsize

    def largest(self, index: int, rows: int | None = None) -> int:
        """Elements of the largest tensor of a layer that gets `rows` rows, or all."""
        return self.layers[index].largest * self._of_column[index] * (self.rows[index] if rows is None else rows)

    def between(self, index: int) -> int:
        """Bytes of the picture that goes into a layer."""
        return self.channels[index] * self._of_column[index] * self.rows[index] * self._itemsize

    def ranges(self, first: int, last: int, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows needed before each of layers[first:last] so that rows start to stop come out, and these behind."""
        found = [(start, stop)]
        for index in range(last - 1, first - 1, -1):
            layer = self.layers[index]
            step = layer.down
            # The first row of a band has to be the first row of an output row too.
            start = max((start // layer.up * step - layer.reach) // step * step, 0)
            stop = min(-(-(-(-stop // layer.up) * step + layer.reach) // step) * step, self.rows[index])
            found.append((start, stop))
        return found[::-1]

    def flops(self, first: int, last: int, ranges: list[tuple[int, int]] | None = None) -> int:
        """Of layers[first:last] on these rows, or on all."""
        rows = self.rows[first:last] if ranges is None else [stop - start for start, stop in ranges]
        return sum(
            layer.flops * count * columns
            for layer, count, columns in zip(self.layers[first:last], rows, self.columns[first:last], strict=False)
        )


def whole_peak(layers: list[Layer], shape: torch.Size, itemsize: int) -> int:
    """Bytes that the activations of the whole picture take at most, by the layers' own estimates."""
    sizes = Sizes(layers, shape, itemsize)
    return max(sizes.peak(index) for index in range(len(layers)))


def choose(layers: list[Layer], shape: torch.Size, itemsize: int, limit: int | None, most: int | None = None) -> Plan:
    """The plan that fits into `limit` bytes with the least work; where none fits, the one that needs the least memory.

    Args:
        layers, shape, itemsize: as of `Sizes`.
        limit: bytes, or None.
        most: elements of the largest tensor, or None.
    """
    sizes, count = Sizes(layers, shape, itemsize), len(layers)
    limit, most = math.inf if limit is None else limit, math.inf if most is None else most
    whole = Plan(count, count, sizes.rows[-1], 1, whole_peak(layers, shape, itemsize), 0.0)
    countable = max(map(sizes.largest, range(count))) <= most
    if whole.peak <= limit and countable:
        return whole
    total = sizes.flops(0, count)
    attention = [index for index, layer in enumerate(layers) if layer.reach is None]
    free, taken = (attention[0], attention[-1] + 1) if attention else (count, 0)
    plans = [whole] if countable else []
    for first, last in [(0, last) for last in range(1, free + 1)] + [(first, count) for first in range(taken, count)]:
        height = sizes.rows[last]
        around = (*range(first), *range(last, count))
        if any(sizes.largest(index) > most for index in around):
            continue
        others = [sizes.peak(index) for index in around]
        kept = sizes.between(first) + sizes.between(last)
        factor = max(height // sizes.rows[first], 1)
        for rows in dict.fromkeys(-(-height // (parts * factor)) * factor for parts in _PARTS if parts <= height):
            if rows >= height:
                continue
            bands = -(-height // rows)
            start = bands // 2 * rows if bands > 2 else 0
            ranges = sizes.ranges(first, last, start, min(start + rows, height))
            if any(sizes.largest(first + i, stop - start) > most for i, (start, stop) in enumerate(ranges[:-1])):
                continue
            inside = max(sizes.peak(first + i, stop - start) for i, (start, stop) in enumerate(ranges[:-1]))
            more = bands * sizes.flops(first, last, ranges) - sizes.flops(first, last)
            plans.append(Plan(first, last, rows, bands, max([kept + inside, *others]), more / total))
    plans = plans or [whole]
    fitting = [plan for plan in plans if plan.peak <= limit]
    best = min(fitting, key=lambda plan: plan.overhead) if fitting else min(plans, key=lambda plan: plan.peak)
    if best is whole:
        return best
    every = [sizes.flops(best.first, best.last, ranges) for _, _, ranges in _bands(sizes, best)]
    return best._replace(overhead=(sum(every) - sizes.flops(best.first, best.last)) / total)


def _bands(sizes: Sizes, plan: Plan):
    for start in range(0, sizes.rows[plan.last], plan.rows):
        stop = min(start + plan.rows, sizes.rows[plan.last])
        yield start, stop, sizes.ranges(plan.first, plan.last, start, stop)


def run(layers: list[Layer], x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """`x` `[B, C, H, W]` through the layers; in bands B has to be 1. The result is contiguous and may not be an alias."""
    stream = Stream(channels_last(x), own=False)
    for layer in layers[: plan.first]:
        stream = layer.run(stream)
    if plan.first < plan.last:
        stream = Stream(_in_bands(layers, stream.total(), plan, x.shape))
    for layer in layers[plan.last :]:
        stream = layer.run(stream)
    return stream.total().contiguous()


def _in_bands(layers: list[Layer], kept: torch.Tensor, plan: Plan, shape: torch.Size) -> torch.Tensor:
    sizes = Sizes(layers, shape, kept.element_size())
    out = torch.empty(
        (kept.shape[0], sizes.channels[plan.last], sizes.rows[plan.last], sizes.columns[plan.last]),
        dtype=kept.dtype,
        device=kept.device,
        memory_format=torch.channels_last,
    )
    for start, stop, ranges in _bands(sizes, plan):
        first, end = ranges[0]
        band = Stream(kept[:, :, first:end].clone(memory_format=torch.channels_last))
        for layer, (wanted, end) in zip(layers[plan.first : plan.last], ranges[1:], strict=True):
            band = layer.run(band)
            # At a cut the convolutions saw zeros; the rows that these reached are left out.
            first = first * layer.up // layer.down
            band.value, band.branch = (
                None if part is None else part[:, :, wanted - first : end - first] for part in (band.value, band.branch)
            )
            first = wanted
        out[:, :, start:stop] = band.total()
    return out


def memory_limit(option: int | str | None, device: torch.device, enough: float = math.inf) -> int | None:
    """Bytes that the activations may take: what the option says, on CUDA what is free, or None for no limit.

    Args:
        enough: more need not be counted, see `free_bytes`.
    """
    if option != "auto":
        return option
    free = free_bytes(device, enough=enough / USABLE)
    return None if free is None else int(USABLE * free)
