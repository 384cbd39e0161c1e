"""The child of a proof on the stand-in for a GPU: `python stand_in_child.py '{"ada_layer_norm": "wrong scale"}' cpu`."""

import json
import os
import sys
from pathlib import Path

# Before the first `import triton`, as in conftest.py.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/, where `support` lies

import torch

from qwen_fast_kernels import proof
from support import interpreter, stand_in

interpreter.install()
torch.set_num_threads(1)
stand_in.interpret(setattr, json.loads(sys.argv.pop(1)))
proof.serve()
