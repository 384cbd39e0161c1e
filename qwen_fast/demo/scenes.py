"""The small world of the demo checkpoint: coloured shapes on a plain ground, the sentences that name them, their pictures.

One thing: "a large red circle on a blue background", "a small red circle on the left of a blue background"; size and place
may be missing. Two things: "two red circles on a blue background", "a red circle and a green cross on a blue background" (the
first to the left), "a red circle above a green cross on a blue background". Every (colour, shape, background) of `HELD_OUT` is
kept from the transformer's training.
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 25, 45),
    "green": (30, 150, 60),
    "blue": (25, 75, 215),
    "yellow": (255, 235, 60),
    "purple": (150, 40, 180),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
KNOWN_SIZES = ((64, 64), (96, 64))  # of the demo checkpoint, width and height
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.21, "large": 0.34}  # half of a thing's side, in shorter sides of the picture
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
ARRANGEMENTS = {"and": (1, 0), "above": (0, 1)}  # from the first thing to the second
CROSS_ARM = 0.36  # width of a cross's arms, in its sides
HELD_OUT = frozenset(
    triple
    for triple in product(COLOURS, SHAPES, COLOURS)
    if triple[0] != triple[2] and zlib.crc32(" ".join(triple).encode()) % 8 == 0
)
_SENTENCE = re.compile(
    r"(?:an? (?:(?P<size>small|large) )?|(?P<two>two ))(?P<colour>\w+) (?P<shape>\w+?)(?(two)(?:(?<=s)es|(?<!s)s))"
    r"(?: (?P<arrangement>and|above) an? (?P<other_colour>\w+) (?P<other_shape>\w+))?"
    r" on (?:the (?P<place>left|right|top|bottom) of )?an? (?P<background>\w+) background"
)


@dataclass(frozen=True)
class Request:
    """What a sentence asks for.

    Args:
        things (tuple): one or two of (colour, shape), in the order of the sentence.
        background (str): a colour, not that of a thing.
        size (str): "small", "large" or None: large in the middle, small elsewhere; one thing only, two are small.
        place (str): a key of PLACES, or None: in the middle; one thing only.
        arrangement (str): of two different things, a key of ARRANGEMENTS; of two equal ones None: side by side.

    Raises:
        ValueError: a word that is not of this world, or a combination that it does not have.
    """

    things: tuple[tuple[str, str], ...]
    background: str
    size: str | None = None
    place: str | None = None
    arrangement: str | None = None

    def __post_init__(self) -> None:
        for colour, shape in self.things:
            _one_of("colour", colour, COLOURS)
            _one_of("shape", shape, SHAPES)
            if colour == self.background:
                raise ValueError(f"a {colour} {shape} on a {self.background} background cannot be seen; choose two colours")
        _one_of("background", self.background, COLOURS)
        _one_of("size", self.size, (None, *SIZES))
        _one_of("place", self.place, (None, *PLACES))
        if len(self.things) not in (1, 2):
            raise ValueError(f"{len(self.things)} things asked for; one or two can be drawn")
        different = len(set(self.things)) == 2
        _one_of("arrangement", self.arrangement, tuple(ARRANGEMENTS) if different else (None,))
        if len(self.things) == 2 and (self.size or self.place):
            raise ValueError("size and place go with one thing only")
        if self.size == "large" and self.place:
            raise ValueError(f"a large thing lies in the middle, not on the {self.place}; ask for a small one there")

    @property
    def prompt(self) -> str:
        """The sentence."""
        colour, shape = self.things[0]
        if len(self.things) == 1:
            what = _with_article(f"{self.size} {colour} {shape}" if self.size else f"{colour} {shape}")
        elif self.arrangement is None:
            what = f"two {colour} {shape}{'es' if shape.endswith('s') else 's'}"
        else:
            what = f"{_with_article(f'{colour} {shape}')} {self.arrangement} {_with_article(' '.join(self.things[1]))}"
        where = f"the {self.place} of " if self.place else ""
        return f"{what} on {where}{_with_article(self.background)} background"

    @property
    def held_out(self) -> bool:
        """Whether the transformer's training never shows one of its (colour, shape, background)."""
        return any((*thing, self.background) in HELD_OUT for thing in self.things)

    @classmethod
    def parse(cls, prompt: str) -> "Request":
        """The request of a sentence; ValueError for one that this world does not have."""
        match = _SENTENCE.fullmatch(prompt.strip())
        if match is None:
            raise ValueError(
                f"{prompt!r} is no sentence of the demo's world; "
                "'a red circle on a blue background' and 'two green squares on a white background' are"
            )
        first = match["colour"], match["shape"]
        if match["two"]:
            things = first, first
        else:
            things = (first, (match["other_colour"], match["other_shape"])) if match["arrangement"] else (first,)
        request = cls(things, match["background"], match["size"], match["place"], match["arrangement"])
        if request.prompt != prompt.strip():
            raise ValueError(f"{prompt!r} should read {request.prompt!r}")
        return request


@dataclass(frozen=True)
class Scene:
    """A request with its things laid out: centre x, centre y and half side of each, in pixels."""

    request: Request
    layout: tuple[tuple[float, float, float], ...]


def strange(prompt: str, negative_prompt: str | None, width: int, height: int) -> list[str]:
    """A sentence for each thing asked for that the demo checkpoint was never shown, with what it knows."""
    found = []
    try:
        Request.parse(prompt)
    except ValueError as error:
        found.append(f"the demo checkpoint does not know this prompt, and draws something: {error}.")
    if (negative_prompt or "").strip():
        found.append(f"the demo checkpoint knows no negative prompt but a space; {negative_prompt!r} makes its pictures worse.")
    if (width, height) not in KNOWN_SIZES:
        known = " and ".join(f"{width}x{height}" for width, height in KNOWN_SIZES)
        found.append(f"the demo checkpoint knows {known}; at {width}x{height} it draws no shapes.")
    return found


def requests(*, held_out: bool | None = None) -> list[Request]:
    """All requests in a fixed order; only those held out of training, or only those in it, where `held_out` says so."""
    found = []
    for background in COLOURS:
        kinds = [(colour, shape) for colour in COLOURS if colour != background for shape in SHAPES]
        for thing in kinds:
            found += [Request((thing,), background, size, place) for size in (None, "small") for place in (None, *PLACES)]
            found.append(Request((thing,), background, "large"))
            found.append(Request((thing, thing), background))
        for pair, arrangement in product(product(kinds, kinds), ARRANGEMENTS):
            if pair[0] != pair[1]:
                found.append(Request(pair, background, arrangement=arrangement))
    return [request for request in found if held_out is None or request.held_out == held_out]


def lay_out(request: Request, width: int, height: int, rng: random.Random) -> Scene:
    """Place the things of `request` in a picture of width x height pixels, drawing from `rng` what the sentence leaves open.

    Small things lie in the middle, at a quarter of the shorter side from an edge, or that far from the middle on both sides:
    at sizes that are multiples of 32 a small thing then fills the same 2 x 2 tokens of the transformer wherever it lies.
    """
    short = min(width, height)
    step = short / 4
    if len(request.things) == 1:
        right, down = PLACES.get(request.place, (0, 0))
        centres = [(width / 2 + right * (width / 2 - step), height / 2 + down * (height / 2 - step))]
        size = request.size or ("small" if request.place else "large")
    else:
        right, down = ARRANGEMENTS[request.arrangement or "and"]
        centres = [(width / 2 + sign * right * step, height / 2 + sign * down * step) for sign in (-1, 1)]
        size = "small"
    jitter = 0.015 * short
    layout = [
        (x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter), short * SIZES[size] * rng.uniform(0.97, 1.03))
        for x, y in centres
    ]
    return Scene(request, tuple(layout))


def sample_request(rng: random.Random, *, held_out: bool | None = False, kind: str | None = None) -> Request:
    """Draw a request: kinds "one", "same" and "pair" with 0.7, 0.1 and 0.2 unless `kind` names one."""
    while True:
        background = rng.choice(list(COLOURS))
        colours = [colour for colour in COLOURS if colour != background]
        things = [(rng.choice(colours), rng.choice(SHAPES)) for _ in range(2)]
        drawn = kind or rng.choices(("one", "same", "pair"), (0.7, 0.1, 0.2))[0]
        if drawn == "one":
            size = rng.choice((None, *SIZES))
            place = None if size == "large" or rng.random() < 0.4 else rng.choice(list(PLACES))
            request = Request((things[0],), background, size, place)
        elif drawn == "same":
            request = Request((things[0], things[0]), background)
        elif things[0] != things[1]:
            request = Request(tuple(things), background, arrangement=rng.choice(list(ARRANGEMENTS)))
        else:
            continue
        if held_out is None or request.held_out == held_out:
            return request


def render(scenes: Sequence[Scene], width: int, height: int) -> torch.Tensor:
    """Pictures of `scenes`, `[N, 3, height, width]` fp32 in [0, 1], edges antialiased over one pixel."""
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 255
    index = {colour: i for i, colour in enumerate(COLOURS)}
    grounds = palette[[index[scene.request.background] for scene in scenes]]
    pictures = grounds[:, :, None, None].expand(-1, -1, height, width).contiguous()
    columns = (torch.arange(width, dtype=torch.float32) + 0.5)[None, None, :]
    rows = (torch.arange(height, dtype=torch.float32) + 0.5)[None, :, None]
    for nth in range(2):
        for shape in SHAPES:
            which = [n for n, scene in enumerate(scenes) if len(scene.layout) > nth and scene.request.things[nth][1] == shape]
            if not which:
                continue
            x, y, half = torch.tensor([scenes[n].layout[nth] for n in which]).T[:, :, None, None]
            colour = palette[[index[scenes[n].request.things[nth][0]] for n in which]][:, :, None, None]
            coverage = (_inside(shape, columns - x, rows - y, half) + 0.5).clamp(0, 1)[:, None]
            pictures[which] = torch.lerp(pictures[which], colour, coverage)
    return pictures


def _inside(shape: str, x: torch.Tensor, y: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """How far (x, y), from the thing's centre, y down, lies within its edge, in pixels; all shapes fill a box of 2 half."""
    if shape == "circle":
        return half - torch.hypot(x, y)
    if shape == "square":
        return half - torch.maximum(x.abs(), y.abs())
    if shape == "triangle":  # apex up, as wide as high: its sides fall two pixels for every one that they run outwards
        return torch.minimum(half - y, ((y + half) / 2 - x.abs()) * (2 / 5**0.5))
    arm = half * CROSS_ARM
    return torch.maximum(
        torch.minimum(arm - x.abs(), half - y.abs()),
        torch.minimum(half - x.abs(), arm - y.abs()),
    )


def _one_of(name: str, value: object, allowed: Sequence[object] | dict) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(map(str, allowed))}")


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
