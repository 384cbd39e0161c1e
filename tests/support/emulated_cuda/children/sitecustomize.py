"""Python imports this at its start where this folder is on its path: the process then has an emulated CUDA device."""

import json
import os

from support import interpreter
from support.emulated_cuda.device import emulated_cuda

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.install()
_device = emulated_cuda(**json.loads(os.environ["EMULATED_CUDA"]))
_device.__enter__()
