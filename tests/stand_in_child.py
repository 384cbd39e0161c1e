"""The child of a proof on the stand-in for a GPU: `python stand_in_child.py '{"ada_layer_norm": "wrong scale"}' cpu`."""

import json
import os
import sys

# Before the first `import triton`, as in conftest.py.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

import interp_shim
import stand_in
from qwen_fast_kernels import proof

interp_shim.install()
torch.set_num_threads(1)
stand_in.interpret(setattr, json.loads(sys.argv.pop(1)))
proof.serve()
