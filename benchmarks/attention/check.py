"""Whether the attention kernel computes rightly here: each way of launching it in a process of its own, with a time limit.

    python -m benchmarks.attention.check --way pointers [--device cuda]      what a process does

A hang, a crash or a wrong assembler costs the way in which it came up, and no other. A way is right when every form agrees
with float64 and comes out the same to the bit in many launches: a race moves from launch to launch.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qwen_fast_kernels._triton import capability

from ..operators.arguments import DIMENSIONS
from ..operators.cases import BF16, FP16, Maker, OperatorCase, Size
from ..shared.budget import LAUNCHES, LIMIT
from ..shared.processes import start, stop

# The order of preference: as the operator chooses, descriptors without specialised warps, no descriptors.
WAYS = ("operator", "descriptors", "pointers")
OWN = "own ptxas"
_FULL, _RAGGED = Size((30, 6), (4096, 4096)), Size((30, 77, 11), (1024, 517, 777))
FORMS: dict[str, tuple[Size, dict]] = {
    "dense": (Size((30,), (4096,)), {}),
    "packed": (_FULL, {}),
    "ragged": (_RAGGED, {}),
    "masked": (_RAGGED, {"masked": True}),
}
_SMALL = Size((7, 5), (60, 40), 2, 32)


# In the process -------------------------------------------------------------------------------------------------------


def launcher(way: str, case: OperatorCase, arguments: tuple) -> Callable[[], torch.Tensor] | None:
    """How `way` runs these arguments; None where it is no way of its own on this device."""
    if way == "operator":
        case.module()  # registers it
        return lambda: torch.ops.qwen_fast.joint_attention(*arguments)
    device = arguments[0].device
    if device.type != "cuda" or (way == "descriptors" and capability(device) < 90):
        return None
    config = config_of(way, case, arguments)
    return lambda: case.launch(arguments, config)


def config_of(way: str, case: OperatorCase, arguments: tuple) -> dict:
    pointers = case.module().default_config(80, *DIMENSIONS["joint_attention"](*arguments))
    return pointers | {"DESCRIPTORS": way == "descriptors"}


def fault_of(case: OperatorCase, arguments: tuple, run: Callable[[], torch.Tensor]) -> tuple[str | None, float]:
    """(what is wrong or None, relative RMS error), of the first and the last head."""
    result = run()
    if not result.isfinite().all():
        return "the result is not finite", float("inf")
    error = 0.0
    for head in {0, case.size.heads - 1}:
        own = [a[:, head : head + 1].double() for a in arguments[:3]]
        exact = case.reference(*own, *arguments[3:])[:, 0]
        error = max(error, ((result[:, head] - exact).square().mean() / exact.square().mean()).sqrt().item())
    if not error <= LIMIT:
        return f"relative RMS error {error:.2e}, more than {LIMIT:g}", error
    for launch in range(1, LAUNCHES):
        if not torch.equal(run(), result):
            return f"launch {launch + 1} differs from the first", error
    return None, error


@torch.no_grad()
def check_way(way: str, device: torch.device, say: Callable[[dict], None]) -> None:
    """Every form in both dtypes; `say` gets each finding as soon as it is there."""
    for dtype in (BF16, FP16):
        for name, (size, variant) in FORMS.items():
            if device.type != "cuda":
                size = _SMALL
            case = OperatorCase("joint_attention", name, dtype, size, variant)
            found = {"form": f"{str(dtype).removeprefix('torch.')}, {name}"}
            try:
                arguments = case.arguments(Maker(device))
                if (run := launcher(way, case, arguments)) is None:
                    say(found | {"skipped": True})
                    continue
                say(found | {"begun": True})
                fault, error = fault_of(case, arguments, run)
                say(found | {"fault": fault, "error": error})
            except Exception as error:  # torch's refusals, and whatever a compiler raises
                say(found | {"fault": " ".join(f"{type(error).__name__}: {error}".split())[:300], "error": None})
            if device.type == "cuda":
                torch.cuda.empty_cache()


# Beside it ------------------------------------------------------------------------------------------------------------


def check_all(device: str, assemblers: dict[str, str], folder: Path, seconds: float) -> dict[str, dict[str, dict]]:
    """Findings by assembler and way: {"right": bool, "faults": {form: why}, "worst_error": float, "seconds": float}.

    Args:
        assemblers: paths by name; "" is Triton's own.
        folder: of the processes' logs.
        seconds: a process that is not done then is killed, and the form that it was at is at fault.
    """
    begin, running = time.monotonic(), {}
    for assembler, path in assemblers.items():
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_PTXAS_PATH"}
        environment |= {"TRITON_PTXAS_PATH": path} if path else {}
        for way in WAYS:
            log = folder / f"attention-{assembler.replace(' ', '-')}-{way}.log"
            command = [sys.executable, "-m", "benchmarks.attention.check", "--way", way, "--device", device]
            running[assembler, way] = start(command, log, environment), log
    found: dict[str, dict[str, dict]] = {assembler: {} for assembler in assemblers}
    waiting = dict(running)
    while waiting:
        late = time.monotonic() - begin > seconds
        for (assembler, way), (process, log) in list(waiting.items()):
            code = process.poll()
            if code is None and not late:
                continue
            ended = f"exit code {code}" if code is not None else f"no answer within {seconds:g} s"
            stop(process, 0.5)
            found[assembler][way] = verdict(log, ended) | {"seconds": round(time.monotonic() - begin, 1)}
            print(f"attention, {assembler}, {way}: {described(found[assembler][way])}", flush=True)
            del waiting[assembler, way]
        time.sleep(0.05)
    return found


def verdict(log: Path, ended: str) -> dict:
    """What a process found, from its log; a form that it began and did not end is at fault, with how the process ended."""
    entries: dict[str, dict] = {}
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith('{"form"'):
            entry = json.loads(line)
            entries.setdefault(entry["form"], {}).update(entry)
    faults = {}
    for form, entry in entries.items():
        if "skipped" not in entry and entry.get("fault", ended) is not None:
            faults[form] = entry.get("fault", ended)
    tried = [entry for entry in entries.values() if "skipped" not in entry]
    if len(entries) < 2 * len(FORMS) and not faults:
        faults["the process"] = ended
    errors = [entry["error"] for entry in tried if entry.get("error") is not None]
    return {"right": bool(tried) and not faults, "faults": faults, "worst_error": max(errors, default=None)}


def described(verdict: dict) -> str:
    if verdict["right"]:
        return f"right, worst relative RMS error {verdict['worst_error']:.1e}, after {verdict['seconds']} s"
    if not verdict["faults"]:
        return "no way of its own here"
    return "WRONG: " + "; ".join(f"{form}: {why}" for form, why in verdict["faults"].items())


def choose(found: dict[str, dict[str, dict]]) -> tuple[str, str] | None:
    """(assembler, way) to go on with: the operator's own way before others, Triton's own assembler before another."""
    order = [(assembler, way) for way in WAYS for assembler in found]
    return next(((a, w) for a, w in order if found[a].get(w, {}).get("right")), None)


def write_config(way: str, device: torch.device) -> Path:
    """Make the operator launch this way on this GPU, for every length and flag: a file of launch configurations."""
    from qwen_fast_kernels import tuning

    entries = []
    for dtype in (BF16, FP16):
        for size, variant in FORMS.values():
            case = OperatorCase("joint_attention", way, dtype, size, variant)
            arguments = case.arguments(Maker("meta", fake=True))
            default, dims = case.module().default_config, DIMENSIONS["joint_attention"](*arguments)
            named = tuning.dims_of(default, dims)
            entry = {"dims": named, "config": config_of(way, case, arguments), "triton": tuning.triton.__version__}
            if entry not in entries:
                entries.append(entry)
    name = tuning.device_name(device)
    tuning.CONFIGS.mkdir(exist_ok=True)
    path = tuning.CONFIGS / tuning.file_name("joint_attention", entries[0]["dims"], name)
    path.write_text(json.dumps({"op": "joint_attention", "device": name, "entries": entries}, indent=1) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_way(options.way, torch.device(options.device), lambda finding: print(json.dumps(finding), flush=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
