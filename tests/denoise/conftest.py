"""A stand-in for the capture of CUDA graphs, and a pair of pipelines, of which the second captures."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import qwen_fast
from benchmarks.shared.stock import stock
from qwen_fast.denoise import graph


class Recorder(TorchDispatchMode):
    """Operator calls with their very tensors and numbers, which is what a graph holds; nothing of them stays computed."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, list]] = []
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for value, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._before.append((value, value.clone()))
        self._before += [(value, value.clone()) for name, value in kwargs.items() if name == "out"]
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(result)))
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self._before):
            tensor.copy_(before)

    def replay(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for func, args, kwargs, results in self.calls:
                for old, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                    if new.data_ptr() != old.data_ptr():
                        old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [one for one in tree_flatten(result)[0] if isinstance(one, torch.Tensor)]


@pytest.fixture
def captures(monkeypatch) -> list:
    """Each captured step, with its number of replays."""
    log = []

    def capture(step, device):  # which computes nothing, as a real capture does
        log.append(0)
        index, recorder = len(log) - 1, Recorder()
        with recorder:
            step()
        recorder.undo()

        def replay():
            log[index] += 1
            recorder.replay()

        return replay

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "DEVICES", ("cpu", "cuda"))
    return log


@pytest.fixture
def pair(checkpoint):
    return stock(checkpoint), qwen_fast.enable(stock(checkpoint), cuda_graph=True)
