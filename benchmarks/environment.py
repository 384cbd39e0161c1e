"""What this machine has, and whether the kernels compute rightly on it: the first stage of the run-book.

    python -m benchmarks.environment --out environment.json [--ptxas PATH] [--device cpu]
    python -m benchmarks.environment --launch-all         every kernel once, small: for compute-sanitizer

Triton 3.6 assembles sm_90 code with ptxas 12.8, which is reported to miscompile matrix products with operands in registers,
and every flash attention has them. So attention is compared with float64 in one process with Triton's own ptxas and in one
with `--ptxas`; the first that is right is the one to go on with. Needs torch and Triton, not diffusers.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from qwen_fast_kernels._triton import capability

from .budget import in_float64, over_budget, results
from .cases import BF16, CASES, FP16, PACKED, Case, Maker, Size

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "numpy"),
    *("peft", "pillow", "pytest", "pytest-benchmark", "pytest-xdist", "matplotlib", "cache-dit", "torchao", "sageattention"),
)
TOOLS = ("nvidia-smi", "compute-sanitizer", "ncu", "nsys", "cuobjdump", "nvcc")
# Lengths that no tile divides, and few heads: the oracle holds every score.
_SIZES = {"one sequence": Size((77,), (1000,), 2, 128), "packed": Size(PACKED.txt, PACKED.img, 2, 128)}
_SMALL = {"one sequence": Size((7,), (60,), 2, 32)}


def attention_faults(device: torch.device) -> dict[str, str | None]:
    """What is wrong with the attention kernel, by way of launching it; None where it is right."""
    sizes = _SIZES if device.type == "cuda" else _SMALL
    found = {}
    for dtype in (BF16, FP16):
        for name, size in sizes.items():
            for masked in (False, True):
                case = Case("joint_attention", name, dtype, size, {"masked": masked})
                arguments = case.arguments(Maker(device))
                oracle, reference = case.reference(*in_float64(arguments)), case.reference(*arguments)
                for way, run in _ways(case, arguments, device).items():
                    label = f"{str(dtype).removeprefix('torch.')}, {name}{', masked' * masked}, {way}"
                    try:
                        found[label] = over_budget(run(), reference, oracle)
                    except Exception as error:
                        found[label] = f"{type(error).__name__}: {error}"
    return found


def _ways(case: Case, arguments: tuple, device: torch.device) -> dict:
    module = case.module()
    ways = {"operator": lambda: torch.ops.qwen_fast.joint_attention(*arguments)}
    if device.type == "cuda" and case.dtype == BF16:
        # Without tensor descriptors, and with them but without specialised warps.
        masked = case.variant["masked"]
        dims = case.size.head_dim, 2
        pointers = module.default_config(80, *dims, masked)
        ways["pointers"] = lambda: module.launch_joint_attention(*arguments, config=pointers)
        if capability(device) >= 90:
            described = module.default_config(90, *dims, True)
            ways["descriptors"] = lambda: module.launch_joint_attention(*arguments, config=described)
    return ways


def attention_in_a_process(device: str, ptxas: str) -> dict[str, str | None]:
    """`attention_faults` with this assembler ("": Triton's own), which a process chooses once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_PTXAS_PATH"}
    environment |= {"TRITON_PTXAS_PATH": ptxas} if ptxas else {}
    command = [sys.executable, "-m", "benchmarks.environment", "--attention", "--device", device]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"the process": f"ended with {done.returncode}: {done.stderr.strip()[-500:]}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


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
    parser.add_argument("--attention", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    importlib.import_module("qwen_fast_kernels")
    if options.launch_all:
        if device.type != "cuda":
            parser.error("--launch-all needs a CUDA device")
        print(f"{launch_all(device)} launches")
        return 0
    if options.attention:
        print(json.dumps(attention_faults(device)))
        return 0
    found = describe(device)
    assemblers = [""] + [options.ptxas] * bool(options.ptxas)
    with ThreadPoolExecutor() as pool:  # most of it is compilation
        faults = list(pool.map(lambda ptxas: attention_in_a_process(options.device, ptxas), assemblers))
    tried = dict(zip(assemblers, faults, strict=True))
    right = [ptxas for ptxas, found_wrong in tried.items() if not any(found_wrong.values())]
    found["attention"] = {ptxas or "Triton's own ptxas": reasons for ptxas, reasons in tried.items()}
    found["ptxas"] = right[0] if right else None  # "": Triton's own; None: attention is wrong with each
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({name: value for name, value in found.items() if name != "nvidia-smi"}, indent=1))
    print(f"attention: {'right with ' + (right[0] or 'own ptxas') if right else 'WRONG with every ptxas tried'}")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
