"""A stand-in for the capture of CUDA graphs, and a pair of pipelines, of which the second captures."""

import pytest

import qwen_fast
from benchmarks.shared.stock import stock
from qwen_fast.denoise import graph


@pytest.fixture
def captures(monkeypatch) -> list:
    """Each captured step, with its number of replays."""
    monkeypatch.setattr(graph, "AUTO", True)
    log = []

    def capture(step, device):  # which computes nothing, as a real capture does
        log.append(0)
        index = len(log) - 1

        def replay():
            log[index] += 1
            step()

        return replay

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "DEVICES", ("cpu", "cuda"))
    return log


@pytest.fixture
def pair(checkpoint):
    return stock(checkpoint), qwen_fast.enable(stock(checkpoint), cuda_graph=True)
