"""Stock pipelines on the small checkpoint, shared by the tests of what people do to a pipeline."""

import gc
from collections.abc import Iterator
from pathlib import Path

import diffusers
import pytest
import torch

from support.field import Field


@pytest.fixture(scope="session")
def field(checkpoint: Path) -> Iterator[Field]:
    diffusers.utils.logging.disable_progress_bar()
    made = Field(checkpoint)
    made.pipe()
    # Copies of pipelines are many small objects: without this every so many of them all modules of torch are searched.
    gc.collect()
    gc.freeze()
    yield made
    gc.unfreeze()


@pytest.fixture
def compiler():
    """torch.compile without what tests before have left in it."""
    torch.compiler.reset()
    yield torch.compiler
    torch.compiler.reset()
