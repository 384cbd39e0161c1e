"""Does a picture show what its prompt asks for? Pixel rules alone, no model: colours, shapes, number, sizes and places.

Background: the nearest palette colour of the border's median. Things: connected regions off the background. Colour: the
nearest palette colour of a region's median. Shape: the one of four masks that covers the region in its box best; a triangle's
tip may be missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scenes import ARRANGEMENTS, COLOURS, CROSS_ARM, PLACES, SIZES, Request

CONTRAST = 40.0  # RGB distance from the background at which a pixel belongs to a thing; the palette is 107 apart at least
COLOUR_TOLERANCE = 53.0  # RGB distance from a palette colour beyond which a colour has no name: half of that
SMALLEST = 0.01  # regions below this share of the shorter side squared are specks
TIP = 1 / 8  # of a box: how far a triangle's tip may be missing above it; a pixel wide, it is the first that a blur takes
OVERLAP = 0.8  # intersection over union below which a region has no shape's name; true ones have more than 0.9


@dataclass(frozen=True)
class Thing:
    """A region: names (None: none fits), centre and half side in pixels, intersection over union with its shape."""

    colour: str | None
    shape: str | None
    x: float
    y: float
    half: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """What a picture shows."""

    background: str | None
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Verdict:
    """Which parts of a request a picture fulfils; None: not asked for. With a wrong number of things, no part counts."""

    count: bool
    background: bool
    colour: bool
    shape: bool
    both: bool  # every colour on its shape
    size: bool | None
    place: bool | None

    @property
    def everything(self) -> bool:
        """All that was asked for."""
        return self.count and self.background and self.both and self.size is not False and self.place is not False


def read(picture: np.ndarray) -> Reading:
    """Read a picture.

    Args:
        picture (array): `[H, W, 3]` uint8.

    Returns:
        Reading: largest thing first.

    Raises:
        ValueError: another shape or dtype.
    """
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture is {picture.dtype} {list(picture.shape)}; uint8 [H, W, 3] is needed")
    pixels = picture.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    short = min(picture.shape[:2])
    things = []
    for region in _regions(np.linalg.norm(pixels - ground, axis=2) > CONTRAST):
        ink = np.median(pixels[region], axis=0)
        # The edge is where a pixel is half thing, half ground.
        share = (pixels - ground) @ (ink - ground) / max((ink - ground) @ (ink - ground), 1.0)
        region = region & (share > 0.5)
        if region.sum() >= SMALLEST * short**2:
            things.append((region.sum(), _thing(region, ink)))
    things.sort(key=lambda entry: -entry[0])
    return Reading(_colour(ground), tuple(thing for _, thing in things))


def judge(picture: np.ndarray, request: Request | str) -> Verdict:
    """Compare a picture, `[H, W, 3]` uint8, with a request or its sentence."""
    request = Request.parse(request) if isinstance(request, str) else request
    reading = read(picture)
    height, width = picture.shape[:2]
    things = reading.things
    if len(things) != len(request.things):
        place = None if request.place is None and request.arrangement is None else False
        return Verdict(False, reading.background == request.background, False, False, False, request.size and False, place)
    found = [(thing.colour, thing.shape) for thing in things]
    size = place = None
    if request.size:
        middle = sum(SIZES.values()) / 2
        size = bool(things[0].half > middle * min(width, height)) == (request.size == "large")
    if request.place:
        right, down = PLACES[request.place]
        off = (things[0].x - width / 2) / width, (things[0].y - height / 2) / height
        place = bool(off[0] * right + off[1] * down > 0.05 and abs(off[0] * down) + abs(off[1] * right) < 0.1)
    elif request.arrangement:
        right, down = ARRANGEMENTS[request.arrangement]
        ordered = sorted(things, key=lambda thing: thing.x * right + thing.y * down)
        across = (ordered[1].x - ordered[0].x) / width, (ordered[1].y - ordered[0].y) / height
        apart = across[0] * right + across[1] * down > abs(across[0] * down) + abs(across[1] * right)
        place = bool(apart) and tuple((thing.colour, thing.shape) for thing in ordered) == request.things
    return Verdict(
        count=True,
        background=reading.background == request.background,
        colour=_same(found, request.things, 0),
        shape=_same(found, request.things, 1),
        both=_same(found, request.things, slice(2)),
        size=size,
        place=place,
    )


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Share of verdicts that hold, by part; parts that no request asked for are missing."""
    shares = {}
    for part in ("count", "background", "colour", "shape", "both", "size", "place", "everything"):
        asked = [getattr(verdict, part) for verdict in verdicts if getattr(verdict, part) is not None]
        if asked:
            shares[part] = sum(asked) / len(asked)
    return shares


def _same(found: list, asked: Sequence, part: int | slice) -> bool:
    return sorted(map(str, (thing[part] for thing in found))) == sorted(map(str, (thing[part] for thing in asked)))


def _colour(rgb: np.ndarray) -> str | None:
    distances = np.linalg.norm(np.array(list(COLOURS.values()), dtype=np.float64) - rgb, axis=1)
    return list(COLOURS)[int(distances.argmin())] if distances.min() < COLOUR_TOLERANCE else None


def _thing(region: np.ndarray, ink: np.ndarray) -> Thing:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, left = rows[0], columns[0]
    high, wide = rows[-1] + 1 - top, columns[-1] + 1 - left
    box = region[top : top + high, left : left + wide]
    v, u = np.meshgrid((np.arange(high) + 0.5) / high - 0.5, (np.arange(wide) + 0.5) / wide - 0.5, indexing="ij")
    masks = {
        "circle": u**2 + v**2 < 0.25,
        "square": np.ones_like(box),
        "triangle": abs(u) < (v + 0.5) / 2,
        "blunt triangle": abs(u) < (v + 0.5 + TIP) / (1 + TIP) / 2,
        "cross": (abs(u) < CROSS_ARM / 2) | (abs(v) < CROSS_ARM / 2),
    }
    overlaps = {shape: (box & mask).sum() / (box | mask).sum() for shape, mask in masks.items()}
    overlaps["triangle"] = max(overlaps["triangle"], overlaps.pop("blunt triangle"))
    best = max(overlaps, key=overlaps.get)
    named = overlaps[best] >= OVERLAP and 0.75 < wide / high < 4 / 3
    return Thing(
        _colour(ink), best if named else None, left + wide / 2, top + high / 2, (wide + high) / 4, float(overlaps[best])
    )


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """The 4-connected regions of a mask, as masks."""
    height, width = mask.shape
    left = mask.copy()
    regions = []
    for start in np.flatnonzero(mask):
        if not left.flat[start]:
            continue
        region = np.zeros_like(mask)
        stack = [int(start)]
        left.flat[start] = False
        while stack:
            here = stack.pop()
            region.flat[here] = True
            row, column = divmod(here, width)
            for near, exists in (
                (here - 1, column > 0),
                (here + 1, column + 1 < width),
                (here - width, row > 0),
                (here + width, row + 1 < height),
            ):
                if exists and left.flat[near]:
                    left.flat[near] = False
                    stack.append(near)
        regions.append(region)
    return regions
