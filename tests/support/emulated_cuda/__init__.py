"""An emulated CUDA device: the code that only a GPU sees, run and watched without one.

    with emulated_cuda() as device:
        pipe = qwen_fast.enable(pipe.to("cuda"))
        pipe("a red circle")
        assert not device.notes.waits("step 1")

Tensors say cuda:0 and are plain tensors over host memory (memory.py); every operator on them is the CPU's (backend.py);
streams, events and graphs keep the order that a GPU would be held to (streams.py); a launch of a Triton kernel gives the
reference's values, is interpreted, or is compiled (launches.py); whatever a GPU would make the host wait for, whatever
crosses, mixes, races or is illegal in a capture is noted with its place (notes.py). device.py puts them together.

What it cannot show: speed, what a compiled kernel really computes, and the order in which a GPU runs what nothing orders.
"""

from .device import EmulatedCuda, emulated_cuda
from .steps import StepsBar
from .streams import IllegalInCapture

__all__ = ["EmulatedCuda", "IllegalInCapture", "StepsBar", "emulated_cuda"]
