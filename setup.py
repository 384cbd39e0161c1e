"""Packaging of qwen_fast and qwen_fast_kernels.

`kernels/` is a source root, not a package: PyPI's `kernels` owns that import name, and diffusers imports it.
"""

import ast
import os
import re
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

# Where the repository is published, such as https://github.com/OWNER/qwen_fast; a release is built with it.
URL = os.environ.get("QWEN_FAST_URL", "").rstrip("/")
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:)([^)\s]+)\)")


def index_page(text: str, url: str) -> str:
    """README for a package index, where no file of the repository lies beside it: links absolute, or, without a URL, gone."""

    def absolute(match: re.Match) -> str:
        picture, name, target = match.groups()
        if not url:
            return "" if picture else name
        return f"{picture}[{name}]({url}/{'raw' if picture else 'blob'}/main/{target})"

    return _LINK.sub(absolute, text)


setup(
    name="qwen-fast",
    version=version(),
    description="Qwen-Image through diffusers: the same picture, the sampler fused into Triton kernels. Drop-in pipelines.",
    long_description=index_page((ROOT / "README.md").read_text(encoding="utf-8"), URL),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    url=URL or None,
    project_urls={"Documentation": f"{URL}/tree/main/docs", "Changes": f"{URL}/blob/main/CHANGELOG.md"} if URL else {},
    keywords=["diffusers", "Qwen-Image", "text-to-image", "Triton", "inference"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),
        "Topic :: Multimedia :: Graphics",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=PACKAGES,
    package_dir={"qwen_fast_kernels": "kernels/qwen_fast_kernels", **BENCHMARKS},
    package_data={
        "qwen_fast": ["py.typed"],
        "qwen_fast.demo": ["checkpoint/*", "checkpoint/*/*"],
        "qwen_fast_kernels": ["configs/*.json", "py.typed"],
    },
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        # No caps: qwen_fast.versions warns of what is newer than what was compared with stock.
        "diffusers>=0.38",
        "transformers>=4.57",
        "httpx",  # diffusers 0.38 imports it and does not ask for it
        "accelerate>=1.0",
        "safetensors>=0.4",
        "numpy>=2.0",
        "packaging",
        "pillow",
    ],
    extras_require={
        "bench": ["matplotlib", "pytest", "pytest-benchmark", "scikit-image"],
        "lora": ["peft"],
        "plot": ["matplotlib"],
        "serve": ["fastapi", "uvicorn"],
        "slow": ["playwright", "ray[data]"],
        "test": [
            "build",
            "cache-dit",
            "fastapi",
            "gguf",
            "kernels",
            "matplotlib",
            "mypy",
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
            "uvicorn",
            "wheel",
        ],
    },
    entry_points={"console_scripts": ["qwen-fast = qwen_fast.cli:main"]},
)
