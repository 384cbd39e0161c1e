"""`qwen-fast schedule`: print, compare and plot a schedule, and write golden vectors for ports in other languages."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.family import image_tokens
from ..schedule.configs import load_config
from .arguments import pixels, positive_int
from .plot import plot_png, terminal_plot

if TYPE_CHECKING:
    import numpy as np

    from ..schedule import Schedule

SUMMARY = "print, compare and plot a schedule; write golden vectors"
DESCRIPTION = """\
Print the sigmas and timesteps of a run, and compare them with diffusers' own scheduler, bit for bit."""
EPILOG = """\
examples:
  qwen-fast schedule --steps 20 --width 512 --height 512
  qwen-fast schedule --config lightning --steps 8
  qwen-fast schedule --model path/to/Qwen-Image --sigmas 1.0,0.75,0.5,0.25
  qwen-fast schedule --plot -                      draw it in the terminal
  qwen-fast schedule --steps 8 --plot schedule.png
  qwen-fast schedule --json vectors.json --grid    golden vectors for a port in another language"""

GRID_SIZES = ((512, 512), (1024, 1024), (1328, 1328), (1664, 928), (2048, 2048))
GRID_STEPS = (1, 2, 4, 8, 20, 50)


def _sigmas(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 1.0,0.75,0.5") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--steps", type=positive_int, metavar="N", help="number of inference steps (default: 20)")
    parser.add_argument("--width", type=pixels, metavar="PX", help="of the picture, a multiple of 16 (default: 1024)")
    parser.add_argument("--height", type=pixels, metavar="PX", help="of the picture, a multiple of 16 (default: 1024)")
    parser.add_argument(
        "--image-seq-len", type=positive_int, metavar="N", help="number of image tokens, instead of width and height"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", metavar="FOLDER", help="read scheduler/scheduler_config.json of this checkpoint")
    source.add_argument("--config", metavar="NAME", help="base, lightning or a JSON file (default: base)")
    parser.add_argument(
        "--sigmas", type=_sigmas, metavar="A,B,...", help="instead of linspace(1, 1/N, N); still shifted and stretched"
    )
    parser.add_argument("--device", default="cpu", help="where to compute it: cpu or cuda (default: %(default)s)")
    parser.add_argument("--plot", metavar="FILE.png", help="plot it beside three historical errors; '-' draws in the terminal")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="golden vectors, exact to the bit, to FILE or stdout"
    )
    parser.add_argument("--grid", action="store_true", help="with --json: 5 sizes x 6 step counts, not one schedule")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")


def run(args: argparse.Namespace) -> int:
    """Print, compare, plot, write. 1 when our schedule differs from diffusers'."""
    steps, image_seq_len, size = _resolve(args)
    outputs = [Path(name) for name in (args.plot, args.json) if name not in (None, "-")]
    for path in outputs:
        if path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists; --overwrite replaces it.")
    config, config_name = load_config(args.config or "base", args.model)

    from ..schedule import Schedule
    from ..schedule.comparison import compare, historical_errors

    if args.json is not None:
        runs = [(steps, size, image_seq_len)]
        if args.grid:
            runs = [(n, wh, image_tokens(*wh)) for wh in GRID_SIZES for n in GRID_STEPS]
        vectors = golden_vectors(config, runs, args.sigmas, args.device)
        if args.json == "-":
            json.dump(vectors, sys.stdout, indent=1)
            print()
        else:
            Path(args.json).write_text(json.dumps(vectors, indent=1) + "\n", encoding="utf-8")
            print(f"{len(vectors['vectors'])} golden vectors written to {args.json}")

    schedule = Schedule.from_config(config, steps, image_seq_len=image_seq_len, sigmas=args.sigmas, device=args.device)
    verdict, equal = compare(config, schedule, image_seq_len, args.sigmas)
    if args.json == "-":
        return 0 if equal else 1
    if not args.grid:
        print(table(schedule, config, f"{config_name}, {steps} steps, {size_text(size, image_seq_len)}", image_seq_len))
        print(verdict)
    if args.plot is not None:
        errors = {} if args.sigmas else historical_errors(config, steps, image_seq_len)
        title = f"{config_name}, {steps} steps, {size_text(size, image_seq_len)}"
        if args.plot == "-":
            print("\n" + terminal_plot(schedule, errors))
        else:
            plot_png(Path(args.plot), schedule, errors, title)
            print(f"plot written to {args.plot}")
    return 0 if equal else 1


def _resolve(args: argparse.Namespace) -> tuple[int, int, tuple[int, int] | None]:
    """Steps, image tokens and (width, height) of the arguments; contradictions end here, before torch is imported."""
    if args.image_seq_len is not None and (args.width or args.height):
        args.parser.error("--image-seq-len replaces --width and --height; give one or the other")
    if args.grid and args.json is None:
        args.parser.error("--grid needs --json")
    if args.grid and any((args.steps, args.width, args.height, args.image_seq_len, args.sigmas, args.plot)):
        args.parser.error("--grid has its own sizes and step counts; drop --steps, --width, --height, --sigmas, --plot")
    if args.json == "-" and args.plot == "-":
        args.parser.error("--json and --plot both want to print; give one of them a file")
    if args.plot not in (None, "-") and not args.plot.lower().endswith(".png"):
        args.parser.error(f"--plot {args.plot}: a name ending in .png is needed, or '-' for the terminal")
    if args.sigmas and args.steps not in (None, len(args.sigmas)):
        args.parser.error(f"--steps is {args.steps}, but --sigmas has {len(args.sigmas)} values; drop --steps")
    steps = len(args.sigmas) if args.sigmas else args.steps or 20
    if args.image_seq_len is not None:
        return steps, args.image_seq_len, None
    size = (args.width or 1024, args.height or 1024)
    return steps, image_tokens(*size), size


def size_text(size: tuple[int, int] | None, image_seq_len: int) -> str:
    """`512x512`, or the number of tokens where no size was given."""
    return "x".join(map(str, size)) if size else f"{image_seq_len} image tokens"


def table(schedule: "Schedule", config: Mapping[str, Any], title: str, image_seq_len: int) -> str:
    """The schedule as text: one line a step, and the timestep as a bf16 model sees it."""
    import torch

    mu = "no mu (static shift)" if schedule.mu is None else f"mu {schedule.mu:.6f}"
    seen = schedule.model_timesteps(torch.bfloat16).float().cpu() * 1000
    sigmas, timesteps = schedule.sigmas.cpu(), schedule.timesteps.cpu()
    lines = [
        f"schedule: {title}",
        f"{mu}, image_seq_len {image_seq_len}, shift_terminal {config.get('shift_terminal')}",
        "",
        "   i     sigma  timestep         dt  seen in bf16",
    ]
    for i, (sigma, timestep, dt) in enumerate(zip(sigmas, timesteps, sigmas.diff(), strict=False)):
        lines.append(f"{i:4d}  {sigma:.6f}  {timestep:8.2f}  {dt:9.6f}  {seen[i]:12.2f}")
    lines.append(f"{len(timesteps):4d}  {sigmas[-1]:.6f}\n")
    return "\n".join(lines)


def golden_vectors(
    config: Mapping[str, Any],
    runs: list[tuple[int, tuple[int, int] | None, int]],
    sigmas: list[float] | None,
    device: str,
) -> dict[str, Any]:
    """Schedules for a port to test against.

    Args:
        config: the scheduler's config.
        runs: (steps, (width, height) or None, image tokens) of each schedule.
        sigmas: the caller's sigmas, or None.
    Returns:
        dict: JSON-ready. Every fp32 number twice: the shortest decimal that rounds to it, and its 32 bits in hex.
    """
    from .. import __version__
    from ..schedule import Schedule

    vectors = []
    for steps, size, image_seq_len in runs:
        schedule = Schedule.from_config(config, steps, image_seq_len=image_seq_len, sigmas=sigmas, device=device)
        entry = {"num_inference_steps": steps, "image_seq_len": image_seq_len}
        if size:
            entry |= {"width": size[0], "height": size[1]}
        if sigmas:
            entry["input_sigmas"] = sigmas
        entry["mu"] = schedule.mu
        for name in ("sigmas", "timesteps"):
            values = getattr(schedule, name).cpu().numpy()
            entry[name], entry[f"{name}_hex"] = _decimals(values), [f"{bits:08x}" for bits in values.view("uint32")]
        vectors.append(entry)
    return {
        "about": "FlowMatchEulerDiscreteScheduler as Qwen-Image uses it. sigmas and timesteps are fp32: the shortest "
        "decimal that rounds to the value, and in *_hex its IEEE-754 bits. mu is fp64. The input sigmas are "
        "linspace(1, 1/N, N), rounded to fp32, unless input_sigmas says otherwise.",
        "generator": f"qwen_fast {__version__}",
        "config": dict(config),
        "vectors": vectors,
    }


def _decimals(values: "np.ndarray") -> list[float]:
    """fp32 values as Python floats whose repr is fp32's own shortest one, not the longer one of fp64."""
    return [float(str(value)) for value in values]
