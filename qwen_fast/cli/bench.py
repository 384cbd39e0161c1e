"""`qwen-fast bench`: stock diffusers against qwen_fast on this machine, rung by rung, with quality beside speed."""

import argparse
from pathlib import Path

from ..common.options import DTYPES
from . import arguments
from .arguments import positive_int
from .benchmarks import benchmarks

SUMMARY = "measure stock diffusers against qwen_fast on this machine"
DESCRIPTION = """\
Measure stock diffusers, what else a user would pick, and qwen_fast on this machine, each rung adding one thing.

On a GPU the model is Qwen-Image's transformer at its full size and its VAE, with random weights made there within
seconds; on the CPU a small one. A result is compared with stock's before its time is believed: a wrong one gets no
speed-up. Every figure is the median of pairs of stock and rung, taken by turns."""
EPILOG = """\
examples:
  qwen-fast bench                                   the ladder at 1024x1024, stock and ours for other sizes
  qwen-fast bench --size 1328x1328 --steps 8 --no-cfg   the ladder for one case
  qwen-fast bench --case 512x512,20 --case 1024x1024,8,no-cfg   the ladder for two, on one model
  qwen-fast bench --case 1024x1024,8,no-cfg,batch=4 --only enabled --only batch_invariant   what invariance costs
  qwen-fast bench --changing 512x512,20             another size and prompt each call
  qwen-fast bench --layers 30                       half the model, for a GPU with less memory
  qwen-fast bench --model path/to/Qwen-Image        a checkpoint, prompts through its text encoder
  qwen-fast bench --full --estimate                 how long the whole grid would take
  qwen-fast bench --plot                            pictures of the rows that are there

Four steps of each picture are done, since later ones take as long; --whole does them all. Rows go to ladder.csv and
ceilings.csv in --out, one at a time, so an interrupted run keeps what it has. A file that was cut off or has other
columns is left as it is, and a new one is begun beside it.
Exit code: 0 done, 1 a result was wrong or a rung of stock or ours failed."""

SHAPES = ("qwen-image", "middle", "tiny")
_CASE = "WxH,STEPS[,no-cfg][,batch=N]"


def _case(text: str) -> tuple[tuple[int, int], int, bool, int]:
    """Size, steps, guidance, and pictures at once."""
    size, *more = text.lower().split(",")
    batch = positive_int(more.pop().removeprefix("batch=")) if more and more[-1].startswith("batch=") else 1
    if not more or more[1:] not in ([], ["no-cfg"]):
        raise argparse.ArgumentTypeError(f"{text!r} is not {_CASE}, such as 512x512,20 or 1024x1024,8,no-cfg,batch=4")
    return arguments.size(size), positive_int(more[0]), len(more) == 1, batch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="FOLDER", help="a checkpoint instead of random weights")
    model.add_argument("--shape", choices=SHAPES, help="of random weights (default: qwen-image on cuda, middle on the CPU)")
    model.add_argument("--layers", type=positive_int, metavar="N", help="of random weights, where memory is short")
    model.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    model.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: bf16 on cuda, fp32 on the CPU")

    what = parser.add_argument_group("what is measured (any of the first five: that one case, on every rung)")
    what.add_argument("--size", type=arguments.size, metavar="WxH", help="multiples of 16")
    what.add_argument("--steps", type=positive_int, metavar="N", help="inference steps")
    what.add_argument("--no-cfg", action="store_true", help="without guidance: one prediction a step")
    what.add_argument("--batch", type=positive_int, metavar="N", help="prompts at once, of different lengths")
    what.add_argument("--text", type=positive_int, metavar="N", help="tokens of the longest prompt")
    what.add_argument("--case", action="append", default=[], type=_case, metavar=_CASE, help="such a case; repeat it")
    what.add_argument(
        "--changing",
        action="append",
        default=[],
        type=_case,
        metavar="WxH,STEPS[,no-cfg]",
        help="about that size, but another size and prompt each call, instead of the ladder or after --case; repeat it",
    )
    what.add_argument("--full", action="store_true", help="every size, step count, guidance, batch and text length: hours")
    what.add_argument("--whole", action="store_true", help="do every step, instead of taking the later ones for equal")
    what.add_argument("--repeats", type=positive_int, default=3, metavar="N", help="pairs (default: %(default)s)")
    what.add_argument("--skip", action="append", default=[], metavar="NAME", help="leave out rungs, such as compile; repeat it")
    what.add_argument("--only", action="append", default=[], metavar="NAME", help="stock and these rungs; repeat it")
    what.add_argument(
        "--limit", type=arguments.seconds, metavar="SECONDS", help="a rung that takes longer hangs: the run ends with code 7"
    )
    what.add_argument("--seconds", type=arguments.seconds, default=2.0, help="for which each ceiling is sustained (default: 2)")
    what.add_argument("--threads", type=positive_int, default=1, help="of the CPU; 1: CPU time, else wall time (default: 1)")
    what.add_argument("--estimate", action="store_true", help="print what would be measured and how long it takes on an H200")

    output = parser.add_argument_group("output")
    output.add_argument("--resume", action="store_true", help="do not measure again what ladder.csv in --out has")
    output.add_argument(
        "--ceilings", type=Path, metavar="FILE", help="ceilings of this machine, measured before; or left there"
    )
    output.add_argument("--out", metavar="DIR", help="folder of the rows (benchmarks/results, or ./qwen-fast-results)")
    drawn = "measure nothing: draw ladder, roofline and scaling from the rows in --out, as png (default) or svg"
    output.add_argument("--plot", nargs="?", const="png", choices=("png", "svg"), help=drawn)


def run(args: argparse.Namespace) -> int:
    """Measure; everything that can be wrong with the arguments is said before any work."""
    custom = args.no_cfg or any((args.size, args.steps, args.batch, args.text))
    several = bool(args.case or args.changing)
    if args.full and (custom or several):
        args.parser.error(
            "--full is every case; it cannot go with --size, --steps, --no-cfg, --batch, --text, --case, --changing"
        )
    if several and (args.size or args.steps or args.no_cfg or args.batch):
        args.parser.error(
            "--case and --changing say size, steps and guidance; they cannot go with --size, --steps, --no-cfg, --batch"
        )
    if any(batch > 1 for *_, batch in args.changing):
        args.parser.error("--changing draws one picture a call; batch= is of --case")
    if args.model and (args.shape or args.layers):
        args.parser.error("--shape and --layers are of random weights; they cannot go with --model")

    if args.plot:
        return _plot(Path(args.out).expanduser() if args.out else benchmarks("ladder.run").default_folder(), args.plot)

    import dataclasses

    import torch

    from ..common.hardware import device_and_dtype

    bench, grid = benchmarks("ladder.run"), benchmarks("shared.shapes")
    if args.estimate and args.device == "auto":
        device, dtype = torch.device("cuda"), torch.bfloat16  # what is estimated is a GPU's time
    else:
        device, dtype = device_and_dtype(args.device, args.dtype)
    on_gpu = device.type == "cuda"
    shape = grid.SHAPES[args.shape or ("qwen-image" if on_gpu else "middle")]
    if args.layers:
        shape = dataclasses.replace(shape, layers=args.layers)
    cases, changing = None, ()
    default = grid.default_cases(shape)[0] if on_gpu else grid.small_cases(shape)[0]
    if several:
        cases, changing = (
            [grid.PictureCase(*size, *others, args.text or default.text, shape) for size, *others in given]
            for given in (args.case, args.changing)
        )
    elif custom:
        (width, height), steps = args.size or (default.width, default.height), args.steps or default.steps
        text = args.text or default.text
        cases = [grid.PictureCase(width, height, steps, not args.no_cfg, args.batch or default.batch, text, shape)]
    options = bench.Options(
        device=device,
        dtype=dtype,
        shape=shape,
        model=args.model,
        cases=cases,
        changing=tuple(changing),
        full=args.full,
        whole=args.whole,
        repeats=args.repeats,
        skip=tuple(args.skip),
        only=tuple(args.only),
        ceiling_seconds=args.seconds,
        ceilings=args.ceilings,
        limit=args.limit,
        resume=args.resume,
        out=Path(args.out).expanduser() if args.out else None,
    )
    if args.estimate:
        print(bench.estimated(options))
        return 0
    if not on_gpu:
        torch.set_num_threads(args.threads)
    rows = bench.run(options, say=lambda text: print(text, flush=True))
    code = 1 if any(bench.is_fault(row) for row in rows) else 0
    if on_gpu and args.own_process:
        bench.leave(code)
    return code


def _plot(folder: Path, kind: str) -> int:
    """Draw what there are rows for, and say what there are none for."""
    written, left_out = benchmarks("pages.plots").draw_all(folder, folder, suffix=f".{kind}")
    for line in (*written, *left_out):
        print(line)
    return 0 if written else 1
