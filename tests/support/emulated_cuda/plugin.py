"""A pytest plugin: the whole run has an emulated CUDA device, and so the tests marked gpu run.

PYTHONPATH=kernels:.:tests python -m pytest -p support.emulated_cuda.plugin -m gpu tests/denoise/test_graph.py
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the first `import triton`
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest

from support import interpreter
from support.emulated_cuda.device import emulated_cuda

interpreter.install()
_device = emulated_cuda()
_device.__enter__()  # before tests/conftest.py asks whether there is a CUDA device


def pytest_unconfigure(config: pytest.Config) -> None:
    _device.__exit__(None, None, None)
