"""What was found out about a card, kept for other processes: one small file a finding, in a folder of its own per environment.

A finding holds for the card, driver, torch, Triton, assembler and sources that it was made with, so these name the folder.
"""

import contextlib
import functools
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ._triton import HAS_TRITON, triton

try:
    import fcntl
except ImportError:  # Windows, which has no Triton either
    fcntl = None

logger = logging.getLogger("qwen_fast_kernels")

_PACKAGE = Path(__file__).parent
_DRIVER = Path("/proc/driver/nvidia/version")


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """All that a finding about `device` depends on."""
    card, driver = "CPU", ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        card = f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
        with contextlib.suppress(OSError):
            driver = _DRIVER.read_text(encoding="utf-8").splitlines()[0]
        driver = f"CUDA {getattr(torch._C, '_cuda_getDriverVersion', int)()} {driver}".strip()
    return {
        "card": card,
        "driver": driver,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "assembler": _assemblers(),
        "sources": _sources(),
    }


def _triton_version() -> str:
    if not HAS_TRITON:
        return "none"
    parts = [triton.__version__]
    with contextlib.suppress(AttributeError):
        parts += ["interpreted"] * bool(triton.knobs.runtime.interpret)
        switches = triton._C.libtriton.get_cache_invalidating_env_vars()  # what else changes the code that Triton makes
        parts += [f"{name}={value}" for name, value in sorted(switches.items())]
    return " ".join(parts)


def _assemblers() -> str:
    """Those that Triton takes, TRITON_PTXAS_PATH considered; the size tells builds of one version apart."""
    if not HAS_TRITON:
        return "none"
    found = []
    for name in ("ptxas", "ptxas_blackwell"):
        try:
            tool = getattr(triton.knobs.nvidia, name)
            found.append(f"{name} {tool.version}, {Path(tool.path).stat().st_size} bytes")
        except (AttributeError, OSError, RuntimeError):
            found.append(f"no {name}")
    return "; ".join(found)


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted([*_PACKAGE.glob("*.py"), *_PACKAGE.glob("configs/*.json")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Kept:
    """Findings about one device by key, JSON-ready: in memory, and in `folder` where one is given and can be written.

    Args:
        device: whose `environment` they hold for.
        folder: the parent of the folders of all environments; None: memory only.
    Attributes:
        folder: of this environment; None where nothing is kept on disk.
    """

    def __init__(self, device: torch.device, folder: Path | None):
        self._findings: dict[str, Any] = {}
        self.folder = None
        if folder is None:
            return
        about = environment(device)
        own = folder / _name(json.dumps(about, sort_keys=True))
        try:
            own.mkdir(parents=True, exist_ok=True)
            if not (own / "environment.json").exists():
                self._write(own / "environment.json", about)
            self.folder = own
        except OSError as error:
            logger.warning("%s cannot be written (%s): what is found out about this card is not kept.", folder, error)

    def get(self, key: str) -> Any:
        """What was put under `key`, by this process or another; None where there is nothing, or a damaged file."""
        if key in self._findings or self.folder is None:
            return self._findings.get(key)
        try:
            found = json.loads(self._path(key).read_text(encoding="utf-8"))
            if found["key"] != key:
                raise ValueError(f"of {found['key']!r}")
            return found["value"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged and will be written anew: %s", self._path(key), error)
            return None

    def put(self, key: str, value: Any, *, disk: bool = True) -> None:
        """Keep `value`; with `disk` false for this process only. Whole or not at all, whatever other processes do."""
        self._findings[key] = value
        if disk and self.folder is not None:
            try:
                self._write(self._path(key), {"key": key, "value": value})
            except OSError as error:
                logger.warning("%s cannot be written any more: %s", self.folder, error)
                self.folder = None

    def forget(self, key: str) -> None:
        """Drop what is kept under `key`, on disk as well."""
        self._findings.pop(key, None)
        if self.folder is not None:
            with contextlib.suppress(OSError):
                self._path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def alone(self, seconds: float) -> Iterator[bool]:
        """Inside, no other process is inside for this environment; waits for it so long. False: nobody could tell."""
        if self.folder is None or fcntl is None:
            yield False
            return
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context((self.folder / "lock").open("a"))
                locked = _locked(file, seconds)
            except OSError:  # a file system without locks
                locked = False
            yield locked

    def _path(self, key: str) -> Path:
        return self.folder / f"{_name(key)}.json"

    @staticmethod
    def _write(path: Path, value: Any) -> None:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".scratch") as scratch:
            whole = Path(scratch, path.name)
            whole.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            whole.replace(path)


def _locked(file: Any, seconds: float) -> bool:
    """Whether this process got the lock, which it gives back when it closes the file or ends."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
