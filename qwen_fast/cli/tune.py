"""`qwen-fast tune`: measure launch configurations on this GPU and keep those that beat the operators' own."""

import argparse
import math
from pathlib import Path

from . import arguments
from .arguments import positive_int
from .benchmarks import benchmarks

SUMMARY = "measure launch configurations for this GPU"
DESCRIPTION = """\
Measure launch configurations of every tunable operator on this GPU at Qwen-Image's sizes, and write those that beat the
operators' own by more than 2 % and the noise into qwen_fast_kernels' folder, where the operators find them.

Each is compiled first (what spills or does not fit is left out), then checked against float64, then measured. Takes some
minutes. An interrupted run keeps what it has and goes on where it stopped."""
EPILOG = """\
examples:
  qwen-fast tune
  qwen-fast tune --ops joint_attention,linear_gelu --minutes 4
  qwen-fast tune --out configs --record configs/tuning.jsonl     somewhere else, to look at first"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--ops", metavar="OP,OP", help="operators, comma-separated; all tunable ones by default")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the configurations; by default the package's own")
    parser.add_argument(
        "--record",
        metavar="FILE",
        type=Path,
        default=Path("tuning.jsonl"),
        help="what was measured, a line per case; a run goes on behind its end (default: %(default)s)",
    )
    parser.add_argument("--minutes", type=arguments.minutes, default=math.inf, help="begin no case later than that")
    parser.add_argument("--jobs", type=positive_int, help="compilers at once; by default one per core")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        int: 0 done, 1 an operator's own configuration gives wrong results on this GPU.
    Raises:
        ValueError: no such GPU, or an operator that is not tunable. OSError: results cannot be written.
    """
    import torch

    from ..common.hardware import device_and_dtype, unsupported_reason

    if not torch.cuda.is_available():
        raise ValueError(
            f"tune measures on a GPU, and torch {torch.__version__} sees none here. Without measured configurations the "
            "operators use their own."
        )
    device, _ = device_and_dtype(args.device, "auto")
    if device.type != "cuda":
        raise ValueError(f"--device {args.device}: tune measures on a GPU; use cuda or cuda:N.")
    reason = unsupported_reason(device)
    if reason:
        raise ValueError(f"--device {args.device}: {reason}.")
    tunable = benchmarks("tuning.search").SPACES
    ops = args.ops.split(",") if args.ops else None
    unknown = sorted(set(ops or []) - set(tunable))
    if unknown:
        raise ValueError(f"--ops: {', '.join(unknown)} is not tunable; use some of {', '.join(tunable)}.")
    module = benchmarks("tuning.run")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return module.tune_device(
        device,
        ops=ops,
        folder=args.out or module.CONFIGS,
        record=args.record,
        minutes=args.minutes,
        jobs=args.jobs,
    )
