"""A contact sheet: a row for each mode, a column for each seed and prompt, what the judge found wrong below each picture."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qwen_fast.demo.judge import Verdict

CELL, FRAME, GAP = 128, 4, 14  # pixels: a picture's longer side, its frame, what lies between
LABEL, HEADER, MARK = 250, 96, 32  # left margin, top margin, two lines of text below each picture
RIGHT, WRONG, INK, FAINT = (30, 140, 60), (200, 40, 40), (20, 20, 20), (110, 110, 110)
# A wrong number of things makes every other part wrong too, so it is named alone; likewise colour and shape before both.
NAMED = ("count", "background", "colour", "shape", "both", "size", "place")


@dataclass(frozen=True)
class Line:
    """A row of the sheet: its title, a line below it, its pictures `[N, H, W, 3]` uint8 and their verdicts."""

    title: str
    note: str
    pictures: np.ndarray
    verdicts: Sequence[Verdict]


def contact_sheet(title: str, captions: Sequence[str], lines: Sequence[Line]) -> Image.Image:
    """The sheet, as an RGB image; a green frame says that the judge found all that the caption asks for.

    Args:
        captions: one a column; each line has as many pictures.
    """
    height, width = lines[0].pictures.shape[1:3]
    scale = CELL / max(height, width)
    size = round(width * scale), round(height * scale)
    pitch = size[0] + 2 * FRAME + GAP, size[1] + 2 * FRAME + MARK + GAP
    top = GAP + 24 + HEADER
    sheet = Image.new("RGB", (GAP + LABEL + pitch[0] * len(captions), top + pitch[1] * len(lines)), "white")
    pen = ImageDraw.Draw(sheet)
    large, middle, small = (ImageFont.load_default(points) for points in (18, 15, 12))
    pen.text((GAP, GAP), title, INK, large)
    letters = int(pitch[0] / pen.textlength("n", small))
    for column, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(caption, letters))
        pen.multiline_text((GAP + LABEL + column * pitch[0], top - 6), text, INK, small, anchor="ld")
    for number, line in enumerate(lines):
        y = top + number * pitch[1]
        pen.multiline_text((GAP, y + FRAME), textwrap.fill(line.title, 28), INK, middle)
        pen.multiline_text((GAP, y + 52), line.note, FAINT, small)
        for column, (picture, verdict) in enumerate(zip(line.pictures, line.verdicts, strict=True)):
            x = GAP + LABEL + column * pitch[0]
            colour = RIGHT if verdict.everything else WRONG
            pen.rectangle((x, y, x + size[0] + 2 * FRAME - 1, y + size[1] + 2 * FRAME - 1), colour)
            sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (x + FRAME, y + FRAME))
            text = "\n".join(textwrap.wrap(mark(verdict), letters, max_lines=2, placeholder=" ..."))
            pen.multiline_text((x, y + size[1] + 2 * FRAME + 1), text, colour, small, spacing=1)
    return sheet


def mark(verdict: Verdict) -> str:
    """ "right", or which parts are wrong."""
    if verdict.everything:
        return "right"
    wrong = [part for part in NAMED if getattr(verdict, part) is False]
    if "count" in wrong:
        return "not: count"
    if "colour" in wrong or "shape" in wrong:
        wrong.remove("both")
    return f"not: {', '.join(wrong)}"
