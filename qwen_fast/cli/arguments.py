"""argparse types of all commands; each refuses a value with what would work."""

import argparse
import contextlib
import math

from ..common.family import PIXELS_PER_TOKEN


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0 and up to 3600")
    return value


def size(text: str) -> tuple[int, int]:
    width, x, height = text.lower().partition("x")
    if not x:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 1024x1024")
    return pixels(width), pixels(height)


def seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2**63 - 1")
    return value


def cfg(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of at least 0 (up to 1: no guidance)")
    return value


def lora(text: str) -> tuple[str, float]:
    path, colon, scale = text.rpartition(":")
    if colon:
        with contextlib.suppress(ValueError):
            value = float(scale)
            if not path or not math.isfinite(value):
                raise argparse.ArgumentTypeError(f"{text!r} is not PATH or PATH:SCALE, such as style.safetensors:0.8")
            return path, value
    return text, 1.0


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def pixels(text: str) -> int:
    """argparse type: a width or height, a multiple of 16. diffusers would round it down and only warn."""
    value = positive_int(text)
    if value % PIXELS_PER_TOKEN:
        below = value // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
        nearest = f"{below} or {below + PIXELS_PER_TOKEN}" if below else str(PIXELS_PER_TOKEN)
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of {PIXELS_PER_TOKEN} pixels; {nearest} would do")
    return value


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def flag(name: str) -> str:
    """The command's flag for an option of `enable`."""
    return f"--{name.replace('_', '-')}"


def vae_memory(text: str) -> int | str:
    """argparse type: bytes, "auto" or "none"."""
    if text in ("auto", "none"):
        return text
    try:
        return positive_int(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor none nor a number of bytes of at least 1") from None
