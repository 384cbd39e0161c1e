"""Whether everything that the run-book needs can be imported here, in a few seconds: its first stage.

    python -m benchmarks.runbook.smoke [--device cuda]

Exit code: 0 all is there, 1 something is missing that every measurement needs; what only tests need is said.
"""

import argparse
import importlib
import importlib.metadata
import time

# Every measurement needs these; the order is that in which a failure says most.
NEEDED = ("torch", "numpy", "triton", "accelerate", "transformers", "diffusers", "qwen_fast_kernels", "qwen_fast")
FOR_TESTS = ("pytest", "pytest_timeout", "xdist", "pytest_benchmark")


def failure(name: str) -> str | None:
    """Why a module cannot be imported, or None."""
    begin = time.perf_counter()
    try:
        module = importlib.import_module(name)
    except BaseException as error:  # an extension of another build raises what it likes
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    print(f"{name} {getattr(module, '__version__', '')} in {time.perf_counter() - begin:.1f} s", flush=True)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    needed = [name for name in NEEDED if name != "triton" or device == "cuda"]
    missing = {name: why for name in needed if (why := failure(name))}
    for name in FOR_TESTS:
        if why := failure(name):
            print(f"{name} is not there, which only tests need: {why}")
    if "torch" not in missing:
        missing |= no_device(device)
    for name, why in missing.items():
        print(f"MISSING {name}: {why}")
    return int(bool(missing))


def no_device(device: str) -> dict[str, str]:
    """Why nothing can be computed on the device; nothing where something can."""
    import torch

    try:
        if device == "cuda" and not torch.cuda.is_available():
            return {"cuda": "torch sees no CUDA device here; --dry-run does every stage at a small size on the CPU."}
        (torch.ones(8, device=device) * 2).sum().item()
        if device == "cuda":
            print(f"{torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}")
    except Exception as error:
        return {device: f"{type(error).__name__}: {error}"}
    return {}


if __name__ == "__main__":
    raise SystemExit(main())
