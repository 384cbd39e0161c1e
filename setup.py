"""Packaging of qwen_fast and qwen_fast_kernels.

`kernels/` is a source root, not a package: PyPI's `kernels` owns that import name, and diffusers imports it.
"""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """`__version__` of qwen_fast, read without importing it: torch is not there while a wheel is built."""
    for node in ast.parse((ROOT / "qwen_fast" / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError("qwen_fast/__init__.py has no __version__")


BENCHMARKS = {  # installed name: folder
    ".".join(["qwen_fast_benchmarks", *package.split(".")[1:]]): package.replace(".", "/")
    for package in find_packages(str(ROOT), include=["benchmarks", "benchmarks.*"])
}
PACKAGES = find_packages(str(ROOT), include=["qwen_fast", "qwen_fast.*"]) + ["qwen_fast_kernels", *BENCHMARKS]

setup(
    name="qwen-fast",
    version=version(),
    description="Qwen-Image through diffusers: the same picture, the sampler fused into Triton kernels. Drop-in pipelines.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"qwen_fast_kernels": "kernels/qwen_fast_kernels", **BENCHMARKS},
    package_data={
        "qwen_fast.demo": ["checkpoint/*", "checkpoint/*/*"],
        "qwen_fast_kernels": ["configs/*.json"],
    },
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "diffusers>=0.38,<0.43",
        "transformers>=4.57,<6",
        "accelerate>=1.0",
        "safetensors>=0.4",
        "numpy>=2.0",
        "packaging",
        "pillow",
    ],
    extras_require={
        "lora": ["peft"],
        "plot": ["matplotlib"],
        "test": [
            "build",
            "cache-dit",
            "gguf",
            "kernels",
            "matplotlib",
            "optimum-quanto",
            "peft",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "ruff",
            "scikit-image",
            "scipy",
            "sdnq",
            "setuptools",
            "torchao",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["qwen-fast = qwen_fast.cli:main"]},
)
