"""What people do to a pipeline, done to stock's and to an enabled one: the same picture, and their code called as often.

A situation is a function of a `Run` that changes the run's pipeline, or a class, and may note what it sees. `compare`
draws with it on stock and on an enabled pipeline. Classes that a situation changes are as before when the run ends.
"""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from torch import nn

import qwen_fast

SMALL = {"prompt": "a red circle", "height": 64, "width": 96, "num_inference_steps": 3, "output_type": "latent"}
GUIDED = SMALL | {"negative_prompt": "blurry", "true_cfg_scale": 3.7}
TEXT_TO_IMAGE = diffusers.QwenImagePipeline
IMAGE_TO_IMAGE = diffusers.QwenImageImg2ImgPipeline
INPAINT = diffusers.QwenImageInpaintPipeline
# When the situation comes: before `enable`, or after it and a first call.
ORDERS = ("before", "after")
TOLERANCE = 2e-6
STRICT = "strict=True"


@functools.cache
def picture() -> PIL.Image.Image:
    """A picture with noise in it, for image-to-image."""
    noise = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return PIL.Image.fromarray(noise.numpy())


@functools.cache
def mask() -> PIL.Image.Image:
    """A rectangle inside `picture()`."""
    drawn = PIL.Image.new("L", (96, 64))
    drawn.paste(255, (24, 16, 60, 48))
    return drawn


def guided(cls: type = TEXT_TO_IMAGE, **changes: Any) -> dict[str, Any]:
    """Arguments of a guided call of `cls`."""
    if cls is TEXT_TO_IMAGE:
        return GUIDED | changes
    return GUIDED | {"image": picture(), "strength": 0.8} | ({"mask_image": mask()} if cls is INPAINT else {}) | changes


def draw(pipe: Any, seed: int = 7, **arguments: Any) -> Any:
    """The images of one call, its noise seeded."""
    arguments.setdefault("generator", torch.Generator().manual_seed(seed))
    return pipe(**arguments).images


def described(value: Any) -> Any:
    """What of an argument has to be as in stock: shapes and dtypes of tensors, the values of plain objects."""
    if isinstance(value, torch.Tensor):
        return "tensor", tuple(value.shape), str(value.dtype)
    if isinstance(value, nn.Module | diffusers.DiffusionPipeline | diffusers.SchedulerMixin):
        return "self"
    if isinstance(value, list | tuple):
        return tuple(described(one) for one in value)
    if isinstance(value, dict):
        return tuple((key, described(one)) for key, one in sorted(value.items()))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__


@dataclass
class Run:
    """One pipeline under a situation.

    Attributes:
        pipe: the pipeline.
        patch: replaces attributes of classes and modules until the run ends.
        later: undone when the run ends, in the opposite order.
        seen: what the user's code was called with, by name, in order.
    """

    pipe: Any
    patch: pytest.MonkeyPatch
    later: contextlib.ExitStack
    seen: dict[str, list] = field(default_factory=dict)

    @property
    def transformer(self) -> nn.Module:
        return self.pipe.transformer

    def block(self, index: int = 0) -> nn.Module:
        return self.transformer.transformer_blocks[index]

    def note(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.seen.setdefault(name, []).append((described(args), described(kwargs)))

    def wrap(self, owner: Any, name: str, change: Callable[[Any], Any] | None = None, inside: bool = False) -> None:
        """Replace a method or function by one that notes its arguments, calls it and changes what comes back.

        Args:
            owner: class, module or object that has it.
            name: of the attribute.
            change: of the result; None: a wrapper that only looks.
            inside: note and change only calls on modules of the transformer.
        """
        old = getattr(owner, name)

        @functools.wraps(old)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = old(*args, **kwargs)
            if inside and not any(args[0] is module for module in self.transformer.modules()):
                return result
            self.note(name, *args, **kwargs)
            return result if change is None else change(result)

        self.patch.setattr(owner, name, wrapped)


@dataclass
class Outcome:
    """What a run gave: a picture or an error, and what the user's code saw."""

    picture: Any = None
    error: Exception | None = None
    seen: dict[str, list] = field(default_factory=dict)


class Field:
    """Pipelines on the small checkpoint, copied instead of loaded, and stock's outcomes, each drawn once."""

    def __init__(self, checkpoint: Path):
        self.checkpoint = checkpoint
        self._loaded: dict[torch.dtype, Any] = {}
        self._drawn: dict[Any, Outcome] = {}

    def pipe(self, cls: type = TEXT_TO_IMAGE, dtype: torch.dtype = torch.float32, decodes: bool = True) -> Any:
        """A pipeline of diffusers of its own, silent; its VAE is not its own unless it `decodes`."""
        if dtype not in self._loaded:
            self._loaded[dtype] = self.load(dtype=dtype)
        loaded = self._loaded[dtype]
        # Copying the tokenizer takes as long as all the rest; a situation that changes it copies it itself.
        shared = [loaded.tokenizer] + ([] if decodes else [loaded.vae])
        pipe = copy.deepcopy(loaded, {id(part): part for part in shared})
        if cls is not TEXT_TO_IMAGE:
            pipe = cls(**pipe.components)
            pipe.set_progress_bar_config(disable=True)
        return pipe

    def load(self, cls: type = TEXT_TO_IMAGE, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
        """The same read from the files, for situations that are about loading."""
        pipe = cls.from_pretrained(self.checkpoint, **{dtype_argument(): dtype}, **arguments)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @contextlib.contextmanager
    def run(self, cls: type = TEXT_TO_IMAGE, dtype: torch.dtype = torch.float32, decodes: bool = True) -> Iterator[Run]:
        pipe = self.pipe(cls, dtype, decodes)
        try:
            with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as later:
                yield Run(pipe, patch, later)
        finally:
            if not decodes:
                with contextlib.suppress(Exception):
                    qwen_fast.disable(pipe)
                if any("forward" in vars(module) or "qwen_fast" in type(module).__module__ for module in pipe.vae.modules()):
                    del self._loaded[dtype]  # what failed left something in the VAE that others share

    def stock(
        self, situation: Any, act: Callable[[Run], Any], cls: type, dtype: torch.dtype, key: tuple, decodes: bool = True
    ) -> Outcome:
        """Stock's outcome; it is kept under the situation and `key`."""
        key = (situation, *key)
        if key not in self._drawn:
            with self.run(cls, dtype, decodes) as run:
                self._drawn[key] = outcome(run, situation, act)
        return self._drawn[key]


def dtype_argument() -> str:
    """What `from_pretrained` of this diffusers calls the dtype."""
    return "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"


def outcome(run: Run, situation: Callable[[Run], Any] | None, act: Callable[[Run], Any]) -> Outcome:
    try:
        if situation is not None:
            situation(run)
        return Outcome(act(run), seen=run.seen)
    except Exception as error:
        return Outcome(error=error, seen=run.seen)


def compare(
    field: Field,
    situation: Callable[[Run], Any] | None,
    order: str = "after",
    *,
    cls: type = TEXT_TO_IMAGE,
    dtype: torch.dtype = torch.float32,
    act: Callable[[Run], Any] | None = None,
    options: dict[str, Any] | None = None,
    tolerance: float = TOLERANCE,
    moves: bool = True,
    refused: str | None = None,
    first: bool = True,
    **arguments: Any,
) -> Run:
    """Stock and an enabled pipeline give the same in a situation, and the user's code sees the same calls.

    Args:
        field: the session's pipelines.
        situation: what the user does to the pipeline.
        order: one of ORDERS.
        cls, dtype: of the pipeline.
        act: what is done with the pipeline then; a guided call of `cls` with `arguments` otherwise.
        options: of `enable`.
        tolerance: largest difference over the largest value.
        moves: stock's picture is another one in this situation; without that the test would be blind.
        refused: a ValueError that says this is accepted too.
        first: with the order "after", an enabled pipeline draws once before the situation.
    Returns:
        The run of the enabled pipeline, for further questions.
    """
    decodes = act is not None or cls is not TEXT_TO_IMAGE or "output_type" in arguments
    act = act or functools.partial(_call, arguments=guided(cls, **arguments))
    key = (getattr(act, "func", act), repr(arguments), cls, dtype)
    expected = field.stock(situation, act, cls, dtype, key, decodes)
    if moves and expected.error is None:
        plain = field.stock(None, act, cls, dtype, key, decodes)
        assert plain.error is not None or distance(expected.picture, plain.picture) > 1e-3, "the situation shows nothing"
    with field.run(cls, dtype, decodes) as run:
        if order == "after":
            qwen_fast.enable(run.pipe, **(options or {}))
            if first:
                _call(run, guided(cls))

        def situated(run: Run) -> None:
            if situation is not None:
                situation(run)
            if order == "before":
                qwen_fast.enable(run.pipe, **(options or {}))

        actual = outcome(run, situated, act)
        if refused is not None and isinstance(actual.error, ValueError):
            assert re.search(refused, str(actual.error)), actual.error
            return run
        if expected.error is None and actual.error is not None:
            raise actual.error
        assert type(actual.error) is type(expected.error), f"stock: {expected.error!r}, qwen_fast: {actual.error!r}"
        if expected.error is None:
            assert_same(actual.picture, expected.picture, tolerance)
        assert_same_calls(actual.seen, expected.seen)
        assert qwen_fast.report(run.pipe).enabled
        assert type(qwen_fast.disable(run.pipe)) is cls
    return run


def _call(run: Run, arguments: dict[str, Any]) -> Any:
    return draw(run.pipe, **arguments)


def assert_not_stocks_own(
    field: Field, situation: Callable[[Run], Any], word: str, *, cls: type = TEXT_TO_IMAGE, **arguments: Any
) -> None:
    """What is not stock's own is named: by `report` after a call that met it, and by the error of a call with strict=True.

    Args:
        field, situation, cls, arguments: as for `compare`.
        word: a regular expression of the name.
    """
    with field.run(cls, decodes=cls is not TEXT_TO_IMAGE or "output_type" in arguments) as run:
        qwen_fast.enable(run.pipe)
        situation(run)
        draw(run.pipe, **guided(cls, **arguments))
        assert re.search(word, str(qwen_fast.report(run.pipe))), f"{word} is not in\n{qwen_fast.report(run.pipe)}"
        assert_strict_raises(run, word, cls, **arguments)


def assert_strict_raises(run: Run, word: str, cls: type = TEXT_TO_IMAGE, **arguments: Any) -> None:
    """With strict=True a call, or `enable`, raises and names what is not stock's own."""
    with pytest.raises(RuntimeError, match=STRICT) as raised:
        qwen_fast.enable(run.pipe, strict=True)
        draw(run.pipe, **guided(cls, **arguments))
    assert re.search(word, str(raised.value)), raised.value


def assert_same(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Tensors, or lists of them, of the same shape and dtype, within `tolerance` of the largest value."""
    if isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other, tolerance)
        return
    assert isinstance(expected, torch.Tensor) and isinstance(actual, torch.Tensor), (type(actual), type(expected))
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (actual.shape, actual.dtype)
    assert expected.isfinite().all(), "stock's picture is not finite"
    found = distance(actual, expected)
    assert found <= tolerance, f"{found:.2e} of the largest value from stock"


def distance(actual: Any, expected: Any) -> float:
    """Largest difference over the largest value; infinite where shapes differ or something is not finite."""
    if isinstance(expected, list | tuple):
        return max(distance(one, other) for one, other in zip(actual, expected, strict=True))
    if actual.shape != expected.shape or not actual.isfinite().all():
        return float("inf")
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_same_calls(actual: dict[str, list], expected: dict[str, list]) -> None:
    """The user's code was called as often as in stock, with the same names, shapes and plain values, in the same order."""
    ours, theirs = ({name: len(calls) for name, calls in seen.items()} for seen in (actual, expected))
    assert ours == theirs, f"calls by name: {ours}, in stock {theirs}"
    for name, calls in expected.items():
        for index, (ours, theirs) in enumerate(zip(actual[name], calls, strict=True)):
            assert ours == theirs, f"call {index} of {name}: {ours}, in stock {theirs}"
