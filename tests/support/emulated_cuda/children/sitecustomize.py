"""Python imports this at its start where this folder is on its path: the process then has an emulated CUDA device."""

import json
import os

import interp_shim
from support.emulated_cuda.device import emulated_cuda

if os.environ.get("TRITON_INTERPRET") == "1":
    interp_shim.install()
_device = emulated_cuda(**json.loads(os.environ["EMULATED_CUDA"]))
_device.__enter__()
