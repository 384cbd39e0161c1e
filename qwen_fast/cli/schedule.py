"""`qwen-fast schedule`: print, compare and plot a schedule, and write golden vectors for ports in other languages."""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.family import PIXELS_PER_TOKEN, image_tokens
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


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def pixels(text: str) -> int:
    """argparse type: a width or height, a multiple of 16. diffusers would round it down and only warn."""
    value = positive_int(text)
    if value % PIXELS_PER_TOKEN:
        below = value // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN
        nearest = f"{below} or {below + PIXELS_PER_TOKEN}" if below else str(PIXELS_PER_TOKEN)
        raise argparse.ArgumentTypeError(f"{value} is not a multiple of {PIXELS_PER_TOKEN} pixels; {nearest} would do")
    return value


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


def load_config(name: str, model: str | None = None) -> tuple[dict[str, Any], str]:
    """A scheduler's config and what to call it.

    Args:
        name: "base", "lightning" or a JSON file; ignored when `model` is given.
        model: a checkpoint's folder.
    Raises:
        FileNotFoundError, ValueError: no such file, or it does not hold a scheduler's config.
    """
    if model is None and name in ("base", "lightning"):
        from .. import testing

        known = {"base": testing.QWEN_IMAGE_SCHEDULER_CONFIG, "lightning": testing.LIGHTNING_SCHEDULER_CONFIG}
        return dict(known[name]), name
    path = Path(model, "scheduler", "scheduler_config.json") if model is not None else Path(name)
    if not path.is_file():
        if model is not None:
            raise FileNotFoundError(f"--model {model}: {path} does not exist; a checkpoint's local folder is needed.")
        raise FileNotFoundError(f"--config {name}: no such file; use base, lightning or a scheduler_config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a scheduler's config (a JSON object) is needed.")
    for key in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "shift", "num_train_timesteps"):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{path}: {key} is {value!r}; a number is needed.")
    if config.get("base_image_seq_len", 256) == config.get("max_image_seq_len", 4096):
        raise ValueError(f"{path}: base_image_seq_len equals max_image_seq_len; a line needs two points.")
    return config, str(path)


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


def compare(
    config: Mapping[str, Any], schedule: "Schedule", image_seq_len: int, sigmas: list[float] | None
) -> tuple[str, bool]:
    """Compare with diffusers' scheduler, driven as its pipeline drives it: a sentence, and whether all is well."""
    import diffusers
    import numpy as np
    import torch
    from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    ours = schedule.num_inference_steps
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(image_seq_len, *(scheduler.config[key] for key in keys))
    with np.errstate(divide="ignore", invalid="ignore"):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / ours, ours) if sigmas is None else sigmas, mu=mu, device="cpu")
    name = f"diffusers {diffusers.__version__} FlowMatchEulerDiscreteScheduler"
    if scheduler.sigmas.isnan().any() and schedule.sigmas.isfinite().all():
        return f"{name}: gives NaN here, 0 / 0 in its stretch to shift_terminal; ours leaves the stretch out.", True
    pairs = ((schedule.sigmas.cpu(), scheduler.sigmas), (schedule.timesteps.cpu(), scheduler.timesteps))
    if all(torch.equal(a, b) for a, b in pairs):
        return f"{name}: sigmas and timesteps equal bit for bit.", True
    largest = [(a - b).abs().max().item() for a, b in pairs]
    return f"{name}: DIFFERENT, by up to {largest[0]:.3g} in sigma and {largest[1]:.3g} in timestep.", False


def historical_errors(config: Mapping[str, Any], steps: int, image_seq_len: int) -> dict[str, "Schedule"]:
    """The schedule with each of the three errors of the implementation that this project corrects.

    mu was interpolated geometrically (through ln and exp) instead of along a straight line; the input sigmas ran to
    shift_terminal instead of 1/N; the stretch to shift_terminal was missing. What a config cannot show is left out.
    """
    import numpy as np

    from ..schedule import Schedule

    wrong = {}
    if config.get("use_dynamic_shifting", False):
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        if 0 < base != top > 0:
            mu = math.exp(math.log(base) + (image_seq_len - low) / (high - low) * math.log(top / base))
            wrong["mu through ln/exp"] = Schedule.from_config(config, steps, mu=mu)
    terminal = config.get("shift_terminal")
    if terminal:
        sigmas = np.linspace(1.0, terminal, steps)
        wrong["linspace to shift_terminal"] = Schedule.from_config(config, image_seq_len=image_seq_len, sigmas=sigmas)
        unstretched = {**config, "shift_terminal": None}
        wrong["no stretch"] = Schedule.from_config(unstretched, steps, image_seq_len=image_seq_len)
    return wrong


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
