"""What a measurement was taken on, and what its GPU did meanwhile: clocks, power, throttling."""

import datetime
import importlib.metadata
import platform
import statistics
import subprocess
import threading

import torch

from .source import source_key

PROVENANCE = (
    *("date", "commit", "dirty", "machine", "driver", "sm_clock_mhz", "sm_clock_max_mhz", "memory_clock_mhz"),
    *("power_limit_w", "throttling", "torch", "cuda", "triton", "diffusers", "transformers"),
)
# Bits of nvidia-smi's clocks_throttle_reasons.active. Idle and settings of the user's own are no throttling.
THROTTLING = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}
_STATIC = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "clocks_throttle_reasons.active")
_SAMPLED = ("clocks.sm", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active")


def provenance(device: torch.device | str = "cpu") -> dict[str, str]:
    """Where and with what a row was measured, by the names in `PROVENANCE`; what does not apply or is not known is empty.

    Clocks are those of this moment, in MHz; `Sampler` records them during a run.
    """
    device, (key, dirty) = torch.device(device), source_key()
    known = {
        "date": datetime.date.today().isoformat(),
        "commit": key,  # and a hash of the sources
        "dirty": dirty,
        "machine": machine_name(device),
        "cuda": (torch.version.cuda or "") if device.type == "cuda" else "",
    }
    known |= {name: _version(name) for name in ("torch", "triton", "diffusers", "transformers")}
    if device.type == "cuda":
        values = dict(zip(_STATIC, query(_STATIC, device), strict=False))
        known |= {
            "driver": values.get("driver_version", ""),
            "sm_clock_mhz": values.get("clocks.sm", ""),
            "sm_clock_max_mhz": values.get("clocks.max.sm", ""),
            "memory_clock_mhz": values.get("clocks.mem", ""),
            "power_limit_w": values.get("power.limit", ""),
            "throttling": throttling([values.get("clocks_throttle_reasons.active", "")]),
        }
    return {name: known.get(name, "") for name in PROVENANCE}


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


def throttling(bits: list[str]) -> str:
    """Names of the reasons in nvidia-smi's bit masks, "none" when they name none, "" when they could not be read."""
    masks = [int(mask, 16) for mask in bits if mask.startswith("0x")]
    if not masks:
        return ""
    return " + ".join(name for bit, name in THROTTLING.items() if any(mask & bit for mask in masks)) or "none"


def query(names: tuple[str, ...], device: torch.device) -> list[str]:
    """Values of nvidia-smi's fields for a CUDA device; empty without nvidia-smi or where it fails."""
    try:
        done = subprocess.run(_command(names, device), capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.strip().splitlines()
    return _values(lines[0]) if done.returncode == 0 and lines else []


class Sampler:
    """Context that records clocks, power, temperature and throttling of a GPU while it is open; nothing on a CPU.

    One nvidia-smi in a process of its own, read by a thread: the measured process hardly notices.

    Args:
        device: what is sampled.
        milliseconds: between two samples.
    """

    def __init__(self, device: torch.device | str, milliseconds: int = 500):
        self.device, self._milliseconds = torch.device(device), milliseconds
        self.samples: list[list[str]] = []
        self._process: subprocess.Popen | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Sampler":
        if self.device.type == "cuda":
            command = [*_command(_SAMPLED, self.device), f"--loop-ms={self._milliseconds}"]
            try:
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            except OSError:
                return self  # no nvidia-smi: the columns stay empty
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout:
            values = _values(line)
            if len(values) == len(_SAMPLED):
                self.samples.append(values)

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()
            self._process.stdout.close()

    def summary(self) -> dict[str, str]:
        """Lowest and median SM clock in MHz, highest power in W and temperature in degrees C, throttling; "" if unknown."""
        clocks, power, temperature = (_numbers(column) for column in list(zip(*self.samples, strict=True))[:3] or [()] * 3)
        return {
            "sm_clock_min_mhz": f"{min(clocks):.0f}" if clocks else "",
            "sm_clock_p50_mhz": f"{statistics.median(clocks):.0f}" if clocks else "",
            "power_max_w": f"{max(power):.0f}" if power else "",
            "temperature_max_c": f"{max(temperature):.0f}" if temperature else "",
            "throttling_seen": throttling([sample[3] for sample in self.samples]),
        }


def _command(names: tuple[str, ...], device: torch.device) -> list[str]:
    # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not nvidia-smi's.
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    identifier = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", f"--id={identifier}"]


def _values(line: str) -> list[str]:
    unknown = ("[N/A]", "[Not Supported]", "[Unknown Error]")
    return ["" if value.strip() in unknown else value.strip() for value in line.split(",")]


def _numbers(values: tuple[str, ...]) -> list[float]:
    return [float(value) for value in values if value.replace(".", "", 1).isdigit()]


def _version(name: str) -> str:
    if name == "torch":
        return torch.__version__  # with the build, such as +cpu, which the installed metadata may leave out
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
