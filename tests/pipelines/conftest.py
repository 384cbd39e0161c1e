"""Fixtures of the tests of compiled transformers."""

import pytest
import torch
from torch._dynamo.utils import counters

from benchmarks.shared.stock import draw, stock
from support.compiled import ARGUMENTS, Backend


@pytest.fixture(params=[True], ids=["aot"])
def backend(request):
    torch.compiler.reset()
    counters.clear()
    yield Backend(request.param)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def plain(checkpoint):
    """Stock, never changed, and its pictures."""
    pipe, drawn = stock(checkpoint), {}

    def picture(**changes):
        key = repr(changes)
        if key not in drawn:
            drawn[key] = draw(pipe, **ARGUMENTS | changes)
        return drawn[key]

    return picture
