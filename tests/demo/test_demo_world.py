"""The demo's world: sentences and scenes, their renders, and a judge that is right about every one of them."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from qwen_fast.demo.judge import Verdict, judge, read, summary
from qwen_fast.demo.scenes import COLOURS, HELD_OUT, SHAPES, Request, Scene, lay_out, render, requests, sample_request


def picture(*scenes: Scene, width: int = 64, height: int = 64) -> np.ndarray:
    """uint8 `[N, H, W, 3]`."""
    return (render(scenes, width, height) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def scene(prompt: str, width: int = 64, height: int = 64, seed: int = 0) -> Scene:
    return lay_out(Request.parse(prompt), width, height, random.Random(seed))


def test_every_request_has_a_sentence_of_its_own():
    everything = requests()
    prompts = {request.prompt for request in everything}
    assert len(prompts) == len(everything) == 14_784
    for request in everything[::7]:
        assert Request.parse(request.prompt) == request
    shown, held_out = requests(held_out=False), requests(held_out=True)
    assert len(shown) + len(held_out) == len(everything) and len(HELD_OUT) == 29
    assert not any((*thing, request.background) in HELD_OUT for request in shown for thing in request.things)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat", "is no sentence of the demo's world"),
        ("a red circle on a red background", "cannot be seen"),
        ("a pink circle on a red background", "colour 'pink' is not one of red, green"),
        ("a red hexagon on a blue background", "shape 'hexagon' is not one of circle"),
        ("a orange circle on a blue background", "should read 'an orange circle on a blue background'"),
        ("a large red circle on the left of a blue background", "a large thing lies in the middle"),
        ("two red circles on the left of a blue background", "size and place go with one thing only"),
        ("a red circle and a red circle on a blue background", "arrangement 'and' is not one of None"),
    ],
)
def test_sentences_that_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Request.parse(prompt)


@pytest.mark.parametrize(
    ("prompt", "layout"),
    [
        ("a red circle on a blue background", [(48, 32, 21.8)]),
        ("a small red circle on a blue background", [(48, 32, 13.4)]),
        ("a red circle on the left of a blue background", [(16, 32, 13.4)]),
        ("a red circle on the right of a blue background", [(80, 32, 13.4)]),
        ("a red circle on the top of a blue background", [(48, 16, 13.4)]),
        ("a red circle on the bottom of a blue background", [(48, 48, 13.4)]),
        ("two red circles on a blue background", [(32, 32, 13.4), (64, 32, 13.4)]),
        ("a red circle and a green cross on a blue background", [(32, 32, 13.4), (64, 32, 13.4)]),
        ("a red circle above a green cross on a blue background", [(48, 16, 13.4), (48, 48, 13.4)]),
    ],
)
def test_words_say_where(prompt, layout):
    """x to the right, y down; in 96x64."""
    assert np.allclose(scene(prompt, 96, 64).layout, layout, atol=1.0)
    first, *second = layout
    seen = picture(scene(prompt, 96, 64), width=96)[0]
    assert tuple(seen[round(first[1]), round(first[0])]) == COLOURS["red"]
    if second and "green" in prompt:
        assert tuple(seen[round(second[0][1]), round(second[0][0])]) == COLOURS["green"]


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96)])
def test_the_judge_is_right_about_every_render(size):
    rng = random.Random(1)
    scenes = [lay_out(sample_request(rng, held_out=None), *size, rng) for _ in range(150)]
    pictures = picture(*scenes, width=size[0], height=size[1])
    wrong = [scene for scene, seen in zip(scenes, pictures, strict=True) if not judge(seen, scene.request).everything]
    assert not wrong
    for scene, seen in zip(scenes, pictures, strict=True):
        found = sorted(((thing.x, thing.y, thing.half) for thing in read(seen).things), key=sum)
        assert np.allclose(found, sorted(scene.layout, key=sum), atol=1.0)


@pytest.mark.parametrize(
    ("shown", "asked", "wrong"),
    [
        ("a red circle on a blue background", "a green circle on a blue background", {"colour", "both"}),
        ("a red circle on a blue background", "a red square on a blue background", {"shape", "both"}),
        ("a red circle on a blue background", "a red circle on a black background", {"background"}),
        ("a large red circle on a blue background", "a small red circle on a blue background", {"size"}),
        ("a small red cross on the top of a blue background", "a red cross on the bottom of a blue background", {"place"}),
        ("a large red cross on a blue background", "a red cross on the left of a blue background", {"place"}),
        ("two red circles on a blue background", "a small red circle on a blue background", "count"),
        ("a red circle on a blue background", "two red circles on a blue background", "count"),
        (
            "a red circle and a green square on a white background",
            "a green circle and a red square on a white background",
            {"both", "place"},
        ),
        (
            "a red circle and a green square on a white background",
            "a green square and a red circle on a white background",
            {"place"},
        ),
        (
            "a red circle and a green square on a white background",
            "a red circle above a green square on a white background",
            {"place"},
        ),
    ],
)
def test_the_judge_sees_what_is_wrong(shown, asked, wrong):
    verdict = judge(picture(scene(shown))[0], asked)
    if wrong == "count":
        wrong = {"count", "colour", "shape", "both"} | ({"size"} if "small" in asked else set())
    assert {part for part in Verdict.__annotations__ if getattr(verdict, part) is False} == wrong
    assert not verdict.everything and judge(picture(scene(shown))[0], shown).everything


def test_the_judge_names_no_shape_of_a_blob_and_no_colour_of_its_own():
    seen = picture(scene("a large red square on a white background"))[0]
    seen[:, 28:36] = seen[0, 0]  # cut in two
    assert len(read(seen).things) == 2 and not judge(seen, "a large red square on a white background").count
    seen = picture(scene("a large red square on a white background"))[0]
    seen[32:, 32:] = seen[0, 0]  # a corner is missing
    (thing,) = read(seen).things
    assert thing.shape is None and thing.colour == "red"
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert read(grey).background is None and read(grey).things == ()
    speck = picture(scene("a red circle on a white background"))[0]
    speck[2:4, 2:4] = 0
    assert judge(speck, "a red circle on a white background").everything


@pytest.mark.parametrize("half", [10, 14, 22])
@pytest.mark.parametrize(("top", "shape"), [(0.0, "triangle"), (0.3, "triangle"), (0.5, None)])
def test_the_judge_forgives_a_blunt_tip_and_no_more(half, top, shape):
    """A trapezoid as high as wide, its top so many times as wide as its base."""
    y, x = np.mgrid[:64, :64] + 0.5 - 32
    width = half * (top + (1 - top) * (y + half) / (2 * half))
    seen = np.full((64, 64, 3), COLOURS["white"], np.uint8)
    seen[(abs(y) < half) & (abs(x) < width)] = COLOURS["red"]
    (thing,) = read(seen).things
    assert (thing.colour, thing.shape) == ("red", shape), thing


def test_the_judge_refuses_what_is_no_picture():
    for wrong in (np.zeros((64, 64, 3)), np.zeros((3, 64, 64), np.uint8), np.zeros((64, 64), np.uint8)):
        with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] is needed"):
            read(wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_renders_are_exact(shape):
    """Area against geometry, symmetry, and colours of inside and outside to the bit."""
    request = Request((("red", shape),), "blue")
    seen = render([Scene(request, ((32.0, 32.0, 20.0),))], 64, 64)[0]
    red, blue = (torch.tensor(COLOURS[name]) / 255 for name in ("red", "blue"))
    assert torch.equal(seen[:, 0, 0], blue) and torch.equal(seen[:, 36, 32], red)
    share = ((seen - blue[:, None, None])[0] / (red - blue)[0]).sum()
    areas = {"circle": np.pi * 400, "square": 1600, "triangle": 800, "cross": 1600 * (2 * 0.36 - 0.36**2)}
    assert float(share) == pytest.approx(areas[shape], rel=0.01)
    assert torch.allclose(seen, seen.flip(2), atol=1e-6)


def test_summary_counts_only_what_was_asked():
    good = Verdict(True, True, True, True, True, None, None)
    bad = replace(good, shape=False, both=False, place=False)
    shares = summary([good, bad])
    assert shares["colour"] == 1 and shares["both"] == 0.5 and shares["place"] == 0 and "size" not in shares
    assert shares["everything"] == 0.5
