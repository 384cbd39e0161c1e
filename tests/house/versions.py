"""`make test-versions`: what is compared with stock, with the lowest, the newest and a set between of the supported packages.

Not part of CI: it makes three more environments, and takes 25 minutes on two cores. TORCH_LOWEST and TORCH_NEWEST name other
builds of torch. Says why each test was skipped: what a version lacks is seen there only.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("ops", "schedule", "transformer", "text", "vae", "denoise", "pipelines", "loading", "common", "field", "cli", "demo")
TOOLS = ["pytest", "pytest-xdist", "scipy", "accelerate>=1.0", "cache-dit", "gguf", "matplotlib", "optimum-quanto", "sdnq"]
SETS = {
    "lowest": [
        os.environ.get("TORCH_LOWEST", "torch==2.13.0"),
        "triton==3.4.0",
        "diffusers==0.38.0",
        "transformers==4.57.1",
        "numpy==2.0.2",
        "peft==0.18.0",
        "torchao==0.14.1",  # peft 0.18 cannot be imported beside newer ones
        "httpx",  # diffusers 0.38 imports it beside huggingface_hub 0.36, which does not bring it
    ],
    # Rotates by a table of functions, as 0.41 does.
    "between": [
        os.environ.get("TORCH_NEWEST", "torch==2.13.0"),
        "triton",
        "diffusers==0.40.0",
        "transformers<6",
        "peft",
        "torchao",
    ],
    "newest": [
        os.environ.get("TORCH_NEWEST", "torch==2.13.0"),
        "triton",
        "diffusers<0.43",
        "transformers<6",
        "peft",
        "torchao",
    ],
}


def main() -> int:
    """Exit code: the number of sets that failed."""
    failed = []
    for name, packages in SETS.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python = Path(folder, "bin", "python")
            subprocess.run([python, "-m", "pip", "install", "-q", *packages, *TOOLS], check=True)
            subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "-e", ROOT], check=True)
            print(f"== {name}: {', '.join(packages)}", flush=True)
            tests = [ROOT / "tests" / room for room in ROOMS]
            if subprocess.run([python, "-m", "pytest", "-q", "-rs", "-n", "2", *tests], cwd=ROOT).returncode:
                failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
