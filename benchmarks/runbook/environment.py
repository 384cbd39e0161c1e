"""What this machine has, and whether the attention kernel computes rightly on it: the run-book goes on with what is right.

    python -m benchmarks.runbook.environment --out environment.json [--ptxas PATH] [--device cpu]
    python -m benchmarks.runbook.environment --launch-all         every kernel once, small: for compute-sanitizer

Triton 3.6 assembles sm_90 code with ptxas 12.8, which is reported to miscompile matrix products with operands in registers,
and every flash attention has them. So attention is checked with Triton's own ptxas and with `--ptxas`; see
attention/check.py. Where only a way is right that the operator would not choose, a file of launch configurations makes it
choose that one. Needs torch and Triton, not diffusers.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from qwen_fast_kernels._triton import capability

from ..attention import check as attention_check
from ..operators.cases import CASES, Maker
from ..shared.budget import results

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "numpy"),
    *("peft", "pillow", "pytest", "pytest-benchmark", "pytest-xdist", "matplotlib", "cache-dit", "torchao", "sageattention"),
)
TOOLS = ("nvidia-smi", "compute-sanitizer", "ncu", "nsys", "cuobjdump", "nvcc")


def launch_all(device: torch.device) -> int:
    """Every kernel once, each way of calling it that the tests compile, at a small size; how many launches."""
    cases = [case.small() for case in CASES if case.default]
    for case in cases:
        arguments = case.arguments(Maker(device))
        config = case.config(capability(device), arguments)
        results(case.op, case.launch(arguments, config), arguments)
        torch.cuda.synchronize(device)
        print(case, flush=True)
    return len(cases)


def describe(device: torch.device) -> dict:
    """Versions, tools and the GPU, as far as they can be read."""
    found = {"python": platform.python_version(), "cpus": os.cpu_count(), "device": str(device), "packages": {}, "tools": {}}
    for name in PACKAGES:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][name] = None
    found["tools"] = {tool: shutil.which(tool) is not None for tool in TOOLS}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "l2": properties.L2_cache_size,
            "cuda": torch.version.cuda,
        }
        if found["tools"]["nvidia-smi"]:
            found["nvidia-smi"] = subprocess.run(
                ["nvidia-smi", "-q", "-d", "CLOCK,POWER"], capture_output=True, text=True
            ).stdout
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("environment.json"))
    parser.add_argument("--ptxas", help="another assembler to compare with Triton's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--launch-all", action="store_true", help="every kernel once, small; needs a CUDA device")
    parser.add_argument("--seconds", type=float, default=30.0, help="for which a way of launching attention may take")
    options = parser.parse_args()
    device = torch.device(options.device)
    importlib.import_module("qwen_fast_kernels")
    if options.launch_all:
        if device.type != "cuda":
            parser.error("--launch-all needs a CUDA device")
        print(f"{launch_all(device)} launches")
        return 0
    found = describe(device)
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")

    write()
    print(json.dumps({name: value for name, value in found.items() if name != "nvidia-smi"}, indent=1), flush=True)
    assemblers = {attention_check.OWN: ""} | ({"carried ptxas": options.ptxas} if options.ptxas else {})
    logs = options.out.parent / "logs"
    found["attention"] = attention_check.check_all(options.device, assemblers, logs, options.seconds)
    choice = attention_check.choose(found["attention"])
    found["ptxas"] = assemblers[choice[0]] if choice else None  # "": Triton's own; None: attention is wrong with each
    found["way"] = choice[1] if choice else None
    if choice and choice[1] != "operator" and device.type == "cuda":
        print(f"from now on in {attention_check.write_config(choice[1], device)}: {choice[1]}")
    write()
    print(f"attention: {f'go on with {choice[0]}, {choice[1]}' if choice else 'WRONG in every way'}")
    return 0 if choice else 1


if __name__ == "__main__":
    raise SystemExit(main())
