"""`qwen-fast doctor`: what this machine has, what runs accelerated on it, and whether the arithmetic is right."""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import io
import json
import platform
import sys
from typing import Any

SUMMARY = "versions, GPU, what is accelerated here and what is not, and a self-check"
DESCRIPTION = """\
Show versions and hardware, say what will be accelerated on this machine and what will not and why, and check
that schedule and Euler step equal diffusers' own, bit for bit. With --prove, every kernel proves itself on every GPU
here: its result against float64, and the same bits in 20 launches, in a process of its own with a time limit."""
EPILOG = """\
examples:
  qwen-fast doctor
  qwen-fast doctor --prove                 after a new driver, torch or Triton, or where a kernel was said to be wrong
  qwen-fast doctor --json > doctor.json    for a bug report

Exit code: 0 healthy, 1 not."""

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy")
OPTIONAL = {"peft": "generate --lora", "matplotlib": "schedule --plot FILE.png, bench --plot"}
STEPS = (1, 2, 4, 8, 20, 50)
IMAGE_SEQ_LENS = (1024, 4096, 6889, 16384)  # 512, 1024, 1328 and 2048 pixels squared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--prove", action="store_true", help="let every kernel prove itself anew on every GPU, and keep the verdicts"
    )


def run(args: argparse.Namespace) -> int:
    """0 when all checks pass, 1 when one fails."""
    findings = examine(kernels=args.prove)
    print(json.dumps(findings, indent=1) if args.json else _text(findings))
    return 0 if findings["healthy"] else 1


def examine(kernels: bool = False) -> dict[str, Any]:
    """Everything that the command reports, JSON-ready. Never raises: what is broken becomes a failed check.

    Args:
        kernels: let every kernel prove itself anew, before the checks run them in this process.
    """
    findings: dict[str, Any] = {
        "versions": {"qwen_fast": None, "python": platform.python_version(), "platform": platform.platform()}
        | {name: _version(name) for name in (*PACKAGES, *OPTIONAL)},
        "devices": [],
        "accelerated": {},
        "checks": [],
    }
    heard = _Heard()
    try:
        with contextlib.redirect_stderr(heard):
            import qwen_fast

            findings["versions"]["qwen_fast"] = qwen_fast.__version__
            findings["devices"] = devices()
            findings["accelerated"] = accelerated()
    except Exception as error:  # the doctor exists for broken installations, of whatever kind
        findings["checks"].append({"name": "import", "ok": False, "detail": f"{type(error).__name__}: {error}"})
    else:
        served = [d["device"] for d in findings["devices"] if d["why_not"] is None]
        if kernels:
            findings["kernels"] = {device: [] for device in served}
            for device, rows in findings["kernels"].items():
                findings["checks"].append(_attempt(functools.partial(prove, rows=rows), device, "kernels"))
        for device in ["cpu", *served]:
            for check in (check_schedule, check_euler_step, check_transformer):
                findings["checks"].append(_attempt(check, device))
    findings["healthy"] = all(check["ok"] for check in findings["checks"])
    findings["said_at_import"] = heard.stop()
    return findings


class _Heard(io.StringIO):
    """A stderr for the time of the imports: what other packages say there, which log handlers made meanwhile keep."""

    def __init__(self):
        super().__init__()
        self._listens, self._stderr = True, sys.stderr

    def write(self, text: str) -> int:
        return super().write(text) if self._listens else self._stderr.write(text)

    def stop(self) -> list[str]:
        """The lines, each once."""
        self._listens = False
        return list(dict.fromkeys(line.strip() for line in self.getvalue().splitlines() if line.strip()))


def prove(device: str, rows: list[dict[str, Any]]) -> tuple[bool, str]:
    """A verdict on every kernel, added to `rows` and told on stderr as soon as it is there."""
    from ..common import proofs

    def each(problem: Any, verdict: Any) -> None:
        rows.append({"kernel": str(problem)} | dataclasses.asdict(verdict))
        print(_kernel_line(rows[-1]), file=sys.stderr, flush=True)

    proofs.prove_again(device, each)
    right = sum(row["right"] for row in rows)
    return right == len(rows), f"{right} of {len(rows)} proved right"


def _kernel_line(row: dict[str, Any]) -> str:
    figure = "" if row["error"] is None else f"error {row['error']:.1e} of {row['limit']:.1e} allowed"
    verdict = "ok  " if row["right"] else "FAIL"
    return f"  {verdict} {row['kernel']:95s} {figure:33s} {row['seconds']:5.1f} s  {row['reason']}".rstrip()


def devices() -> list[dict[str, Any]]:
    """The CUDA devices: name, compute capability, GiB, and why one cannot be used (None: it can)."""
    import torch

    from ..common.hardware import unsupported_reason

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "sm": f"sm_{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "why_not": unsupported_reason(torch.device("cuda", index)),
            }
        )
    return found


def accelerated() -> dict[str, str | None]:
    """Every pipeline of the family in the installed diffusers: None when it is accelerated, else why it is not."""
    import diffusers

    from ..pipelines.family import ACCELERATED

    known = {stock.__name__ for stock in ACCELERATED}
    family = [name for name in dir(diffusers) if name.startswith("QwenImage") and name.endswith("Pipeline")]
    not_yet = "not yet; it runs on stock diffusers, unchanged"
    return {name: None if name in known else not_yet for name in sorted(family)}


def check_schedule(device: str) -> tuple[bool, str]:
    """Our schedule on `device` against diffusers', for the base and the Lightning config over sizes and step counts."""
    from ..schedule import Schedule
    from ..schedule.comparison import compare
    from ..schedule.configs import load_config

    count = 0
    for name in ("base", "lightning"):
        config, _ = load_config(name)
        for image_seq_len in IMAGE_SEQ_LENS:
            for steps in STEPS:
                schedule = Schedule.from_config(config, steps, image_seq_len=image_seq_len, device=device)
                verdict, equal = compare(config, schedule, image_seq_len, None)
                if not equal:
                    return False, f"{name}, {steps} steps, {image_seq_len} image tokens: {verdict}"
                count += 1
    return True, f"{count} schedules equal diffusers' bit for bit"


def check_euler_step(device: str) -> tuple[bool, str]:
    """Our Euler step on `device` against `FlowMatchEulerDiscreteScheduler.step`, over a whole run in three dtypes."""
    import numpy as np
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    from qwen_fast_kernels import euler_step

    from ..schedule.configs import load_config

    config, _ = load_config("lightning")  # no terminal stretch: a curved schedule with one mu for every size
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=config["max_shift"], device=device)
        latents, *velocities = (torch.randn(1, 77, 64, generator=generator).to(device, dtype) for _ in range(9))
        ours, stock = latents, latents
        for i, velocity in enumerate(velocities):
            index = torch.full((1,), i, dtype=torch.int32, device=device)
            ours = euler_step(ours, velocity, scheduler.sigmas, index)
            stock = scheduler.step(velocity, scheduler.timesteps[i], stock, return_dict=False)[0]
            if not torch.equal(ours, stock):
                worst = (ours - stock).abs().max().item()
                return False, f"{dtype}, step {i}: differs from diffusers' step by up to {worst:.3g}"
    return True, "8 steps in bf16, fp16 and fp32 equal diffusers' bit for bit"


def check_transformer(device: str) -> tuple[bool, str]:
    """The fused transformer on `device` against stock diffusers', at the real head size: errors against float64."""
    import copy

    import diffusers
    import torch

    from ..common.options import Options
    from ..common.state import State
    from ..testing import initialize
    from ..transformer.attach import attach
    from ..transformer.call import accelerated

    generator = torch.Generator().manual_seed(0)
    weights = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, num_attention_heads=2, joint_attention_dim=32
    )
    image, text = torch.randn(2, 8 * 12, 16, generator=generator), torch.randn(2, 37, 32, generator=generator)
    errors = []
    with torch.no_grad():
        initialize(weights, "transformer", 0)
        for dtype in (torch.bfloat16, torch.float16):
            # torch's own `to`: diffusers' warns of parts to be kept in fp32 where there are none.
            model = torch.nn.Module.to(copy.deepcopy(weights), device, dtype)
            state = State(Options(attention="triton", modulation="layers"))

            def run(model, dtype=dtype):
                inputs = {
                    "hidden_states": image.to(device, dtype),
                    "encoder_hidden_states": text.to(device, dtype),
                    "encoder_hidden_states_mask": torch.arange(37, device=device) < torch.tensor([[37], [5]], device=device),
                    "timestep": torch.full((2,), 0.75, dtype=dtype, device=device),
                    "img_shapes": [[(1, 8, 12)]] * 2,
                }
                return model(**inputs, return_dict=False)[0].double()

            stock = run(model)
            attach(model, state)
            with accelerated(model, state):
                fused = run(model)
            if state.calls["transformer"] != 1 or state.fallbacks:
                return False, f"{dtype}: stock diffusers ran: {dict(state.fallbacks)}"
            exact = run(copy.deepcopy(model).double(), torch.float64)
            ours, theirs = ((actual - exact).square().mean().sqrt().item() for actual in (fused, stock))
            if not ours <= 1.05 * theirs:
                return False, f"{dtype}: error {ours:.3g} against float64, stock's is {theirs:.3g}"
            errors.append(f"{str(dtype).removeprefix('torch.')} {ours / theirs:.2f}")
    return True, f"RMS error against float64, as a part of stock's: {', '.join(errors)}"


def _attempt(check: Any, device: str, name: str | None = None) -> dict[str, Any]:
    name = f"{name or check.__name__.removeprefix('check_')} on {device}"
    try:
        ok, detail = check(device)
    except Exception as error:  # as above: a check that cannot run is a failed check, not a traceback
        ok, detail = False, f"{type(error).__name__}: {error}"
    return {"name": name, "ok": ok, "detail": detail}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _text(findings: dict[str, Any]) -> str:
    lines = ["versions"]
    for name, version in findings["versions"].items():
        missing = f"not installed (needed for {OPTIONAL[name]})" if name in OPTIONAL else "not installed"
        lines.append(f"  {name:14s}{version or missing}")
    lines += ["", "GPU"]
    for device in findings["devices"]:
        lines.append(f"  {device['device']}: {device['name']}, {device['sm']}, {device['memory_gib']} GiB")
        why_not = device["why_not"]
        lines.append("    the kernels run here" if why_not is None else f"    stays on stock diffusers: {why_not}")
    if not findings["devices"]:
        lines.append("  none that PyTorch can use: pipelines run on the CPU, with the kernels' reference implementations")
    lines += ["", "pipelines"]
    for name, why_not in sorted(findings["accelerated"].items(), key=lambda item: item[1] is not None):
        lines.append(f"  {'yes' if why_not is None else 'no ':3s} {name}{'' if why_not is None else ': ' + why_not}")
    lines += ["", "self-check"]
    for check in findings["checks"]:
        lines.append(f"  {'ok  ' if check['ok'] else 'FAIL'} {check['name']}: {check['detail']}")
    for device, rows in findings.get("kernels", {}).items():
        lines += ["", f"kernels on {device}", *map(_kernel_line, rows)]
    if findings.get("kernels") == {}:
        lines += ["", "kernels: no CUDA device that serves; on the CPU torch's operators compute"]
    if findings["said_at_import"]:
        lines += ["", "said by other packages when they were imported"]
        lines += [f"  {line if len(line) <= 160 else line[:157] + '...'}" for line in findings["said_at_import"]]
    return "\n".join([*lines, "", "healthy" if findings["healthy"] else "NOT healthy: see the FAIL lines above"])
