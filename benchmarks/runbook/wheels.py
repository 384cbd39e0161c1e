"""What a GPU machine without a network lacks: downloaded where there is one, installed there into a folder of its own.

The wheels are for Python 3.12 on x86-64 Linux. Nothing of the machine's own is replaced but for one process and its children.
"""

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..shared import source

# diffusers and the peers that install from wheels. Python has what diffusers needs of importlib_metadata.
PINNED = ("diffusers==0.42.1", "cache-dit==1.5.3", "torchao==0.18.0", "sageattention==1.0.6")
# Its assembler for Blackwell takes sm_90 too, and is newer than the one of the Triton that the machine has.
PTXAS_WHEEL, PTXAS = "triton==3.9.0", "triton/backends/nvidia/bin/ptxas-blackwell"
_PLATFORMS = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)] + ["--platform=manylinux2014_x86_64"]
_TARGET = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp", *_PLATFORMS]


def prepare(folder: Path) -> list[str]:
    """Download everything into `folder`, with the commit it goes with; names of its files, the largest first.

    Raises:
        RuntimeError: pip's own words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.whl"), folder / "ptxas.gz"):
        old.unlink(missing_ok=True)  # two versions of one package would stop the installation
    _pip("download", "--dest", str(folder), *_TARGET, *PINNED)
    with tempfile.TemporaryDirectory() as aside:
        _pip("download", "--dest", aside, *_TARGET, PTXAS_WHEEL)
        (wheel,) = Path(aside).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(PTXAS) as packed, gzip.open(folder / "ptxas.gz", "wb") as target:
            shutil.copyfileobj(packed, target)
    source.stamp(folder)
    files = sorted(folder.iterdir(), key=lambda path: -path.stat().st_size)
    return [f"{path.name} ({path.stat().st_size / 2**20:.1f} MiB)" for path in files]


def install(folder: Path, target: Path) -> None:
    """Install the wheels of `folder` into `target`, offline, and unpack ptxas beside them; once.

    Raises:
        ValueError: no wheels there. RuntimeError: pip's own words.
    """
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        raise ValueError(f"{folder}: no wheels there; `python -m benchmarks.runbook --prepare {folder}` downloads them.")
    done = target / ".installed"
    if done.exists() and done.read_text() == "\n".join(wheels):
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    _pip("install", "--no-index", "--no-deps", "--no-compile", "--target", str(target), *wheels)
    if (folder / "ptxas.gz").exists():
        with gzip.open(folder / "ptxas.gz") as packed, (target / "ptxas").open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
        os.chmod(target / "ptxas", 0o755)
    done.write_text("\n".join(wheels))


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", arguments[0], "-q", *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed: {(done.stderr or done.stdout).strip()[-1500:]}")
