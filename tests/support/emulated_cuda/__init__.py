"""An emulated CUDA device: the code that only a GPU sees, run and watched without one.

    with emulated_cuda() as device:
        pipe = qwen_fast.enable(pipe.to("cuda"))
        pipe("a red circle")
        assert not device.notes.waits("step 1")

Tensors say cuda:0 and are plain tensors over host memory (memory.py); every operator on them is the CPU's (backend.py,
arguments.py), but for what a GPU does otherwise (operators.py); streams, events and graphs keep the order that a GPU would
be held to (streams.py); a launch of a Triton kernel gives the reference's values, is interpreted, or is compiled
(launches.py); whatever a GPU would make the host wait for, whatever crosses, mixes, races or is illegal in a capture is noted
with its place (notes.py). project.py answers what the project would find out about a card; device.py puts all together.
plugin.py and children/ give a device to a whole run of pytest and to processes that a test starts.

What it cannot show: speed, what a compiled kernel really computes, and the order in which a GPU runs what nothing orders.
"""

import json
import os
from pathlib import Path
from typing import Any

from support.emulated_cuda.device import EmulatedCuda, emulated_cuda
from support.emulated_cuda.notes import StepsBar
from support.emulated_cuda.streams import IllegalInCapture

__all__ = ["EmulatedCuda", "IllegalInCapture", "StepsBar", "emulated_cuda", "environment_of_children"]


def environment_of_children(**options: Any) -> dict[str, str]:
    """The environment of a process that has an emulated device from its start, as its own children have.

    Args:
        options: of `emulated_cuda`.
    """
    here = Path(__file__).resolve()
    root = here.parents[3]
    paths = (here.parent / "children", root / "kernels", root, root / "tests")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "EMULATED_CUDA": json.dumps(options),
        "TRITON_INTERPRET": "1",
    }
    if options.get("launches") == "compile":
        del environment["TRITON_INTERPRET"]
    return environment
