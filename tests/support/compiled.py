"""Enabled pipelines whose transformer is compiled, and a backend that counts what it compiles."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import qwen_fast
from benchmarks.shared.stock import draw, stock
from support.pipelines import GUIDED

ARGUMENTS = GUIDED | {"prompt": "a red circle", "num_inference_steps": 3}
SHORT = {"num_inference_steps": 2, "negative_prompt": None}  # where stock's blocks are traced, which takes seconds


class Backend:
    """A backend of torch.compile that counts what it compiles: through AOTAutograd, or as Dynamo has traced it."""

    def __init__(self, through_aot: bool):
        self.compiled, self.through_aot = 0, through_aot

    def __call__(self, graph, inputs):
        self.compiled += 1
        return aot_eager(graph, inputs) if self.through_aot else graph


TRACED = pytest.mark.parametrize("backend", [False], indirect=True, ids=["traced"])  # as good here, in half the time


def regional(pipe, **how):
    pipe.transformer.compile_repeated_blocks(**how)


def in_place(pipe, **how):
    pipe.transformer.compile(**how)


def around(pipe, **how):
    pipe.transformer = torch.compile(pipe.transformer, **how)


def made(checkpoint, way, backend, order="after", options=None, **how):
    """An enabled pipeline with its transformer compiled."""
    pipe, how = stock(checkpoint), {"fullgraph": True, "backend": backend} | how
    if order == "before":
        way(pipe, **how)
    qwen_fast.enable(pipe, **({"strict": True} if options is None else options))
    if order == "after":
        draw(pipe, **ARGUMENTS | {"num_inference_steps": 1, "negative_prompt": None})
        way(pipe, **how)
    return pipe


def compiled_blocks(pipe) -> int:
    return qwen_fast.report(pipe).calls.get("compiled block", 0)
