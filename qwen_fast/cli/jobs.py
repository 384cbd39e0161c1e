"""Pictures to draw: one for each prompt of the command, or one for each line of a job file."""

import argparse
import dataclasses
import difflib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments

if TYPE_CHECKING:
    import PIL.Image

_LETTERS = 40  # of a file name that come from the prompt


@dataclasses.dataclass(frozen=True)
class Job:
    """One picture and its own settings; None: what the command line or the model says.

    Attributes:
        name: of its file, without ".png".
    """

    prompt: str
    seed: int = 0
    negative_prompt: str | None = None
    steps: int | None = None
    size: tuple[int, int] | None = None
    cfg: float | None = None
    name: str = ""

    def settings(self) -> tuple[Any, ...]:
        """What pictures that are drawn one after the other have in common."""
        return self.negative_prompt, self.steps, self.size, self.cfg


# How a line's value is read: by the argparse type of the option, from its text.
_KEYS: dict[str, tuple[type | tuple[type, ...], Callable[[Any], Any]]] = {
    "prompt": (str, str),
    "negative_prompt": (str, str),
    "seed": (int, lambda value: arguments.seed(str(value))),
    "steps": (int, lambda value: arguments.positive_int(str(value))),
    "size": (str, arguments.size),
    "cfg": ((int, float), lambda value: arguments.cfg(str(value))),
    "name": (str, str),
}


def read_jobs(name: str, defaults: Job, *, keep_going: bool) -> tuple[list[Job], list[str]]:
    """The jobs of a file, a JSON object a line; lines that are empty or begin with # are skipped.

    Args:
        name: of the file, or '-' for stdin.
        defaults: for what a line leaves out, but prompt and name.
        keep_going: leave bad lines out instead of raising.
    Returns:
        tuple: the jobs, and a sentence for each line that was left out.
    Raises:
        ValueError: a bad line, by number, and what would work; two jobs of one file; no job at all.
        FileNotFoundError: there is no such file.
    """
    found: dict[str, Job] = {}
    bad = []
    for number, line in lines_of("--jobs", name):
        try:
            job = _job(line, number, defaults)
            if job.name in found:
                raise ValueError(f"`name` {job.name!r} is that of an earlier line too")
        except ValueError as error:
            sentence = f"--jobs {name}, line {number}: {error}"
            if not keep_going:
                raise ValueError(f"{sentence}; --keep-going draws the others.") from None
            bad.append(f"{sentence}.")
        else:
            found[job.name] = job
    if not found:
        raise ValueError(f'--jobs {name} holds no job; one JSON object a line is needed, such as {{"prompt": "a red fox"}}.')
    return list(found.values()), bad


def _job(line: str, number: int, defaults: Job) -> Job:
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f'a {type(given).__name__}; an object such as {{"prompt": "a red fox"}} is needed')
    for key in given:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"unknown key `{key}`{meant} there are {', '.join(_KEYS)}".replace("? there", "? There"))
    values = {}
    for key, value in given.items():
        kinds, read = _KEYS[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"`{key}` is {value!r}")
        try:
            values[key] = read(value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"`{key}`: {error}") from None
    if not values.get("prompt", "").strip():
        raise ValueError("`prompt` is missing")
    job = dataclasses.replace(defaults, **values)
    name = values.get("name", f"{number:04d}-{slug(job.prompt)}-seed{job.seed}").removesuffix(".png")
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"`name` is {name!r}; a file's name without folders is needed")
    return dataclasses.replace(job, name=name)


def lines_of(option: str, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, or of stdin for '-', with their numbers; empty ones and comments are left out.

    Raises:
        ValueError, FileNotFoundError: naming the option.
    """
    try:
        data = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {name} is not UTF-8: {error}") from None
    except OSError as error:
        raise FileNotFoundError(f"{option} {name}: {error.strerror}.") from None
    for number, line in enumerate(data.splitlines(), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line.strip()


def runs(jobs: Sequence[Job]) -> list[list[Job]]:
    """Jobs in their order, those together that one `qwen_fast.generate` can draw: of equal settings, seeds ascending by one."""
    counted = enumerate(jobs)
    groups = itertools.groupby(counted, lambda item: (item[1].settings(), item[1].seed - item[0]))
    return [[job for _, job in group] for _, group in groups]


def slug(prompt: str) -> str:
    """A file name that every file system takes: the prompt's first words, letters and digits only."""
    whole = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    if len(whole) > _LETTERS:
        whole = whole[: _LETTERS + 1].rpartition("-")[0] or whole[:_LETTERS]
    return whole or "picture"


def contact_sheet(pictures: Sequence[tuple[Path, str]], width: int = 160, columns: int = 6) -> "PIL.Image.Image":
    """Small copies of the pictures with a line of text below each.

    Args:
        pictures: (file, text).
    """
    from PIL import Image, ImageDraw, ImageFont

    gap, line = 8, 16
    font, small = ImageFont.load_default(11), []
    for path, text in pictures:
        with Image.open(path) as image:
            copy = image.convert("RGB")
        copy.thumbnail((width, width))
        small.append((copy, text))
    columns = min(columns, len(small))
    sheet = Image.new("RGB", (columns * (width + gap) + gap, -(-len(small) // columns) * (width + line + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (copy, text) in enumerate(small):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (width + line + gap)
        sheet.paste(copy, (x, y))
        while text and pen.textlength(text, font) > width:
            text = text[:-2].rstrip() + "…" if not text.endswith("…") else text[:-2] + "…"
        pen.text((x, y + width + 1), text, (60, 60, 60), font)
    return sheet
