"""Stock pipelines on the small checkpoint, shared by the tests of what people do to a pipeline."""

from pathlib import Path

import diffusers
import pytest
import torch

from support.field import Field


@pytest.fixture(scope="session")
def field(checkpoint: Path) -> Field:
    diffusers.utils.logging.disable_progress_bar()
    return Field(checkpoint)


@pytest.fixture
def compiler():
    """torch.compile without what tests before have left in it."""
    torch.compiler.reset()
    yield torch.compiler
    torch.compiler.reset()
