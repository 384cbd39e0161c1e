"""`qwen-fast profile`: where the time of a picture goes, as a trace and as tables."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.options import DTYPES
from ..demo import checkpoint
from ..pipelines.opening import library_output, load_pipeline
from . import arguments
from .arguments import positive_int
from .bench import SHAPES
from .benchmarks import benchmarks
from .generate import DEMO_SIZE

if TYPE_CHECKING:
    import torch

_TEXT_TOKENS = 30  # of a short prompt

SUMMARY = "where the time of a picture goes: trace, kernels, waits, gaps, memory"
DESCRIPTION = """\
Draw one picture under torch's profiler, after it was drawn once to warm up, and write into a folder:

  trace.json.gz   for ui.perfetto.dev or chrome://tracing, with the stages and operators as ranges
  kernels.csv     every kernel of the denoising loop: launches, time, GB/s, TFLOP/s, share of this machine's ceilings
  memory.csv      memory over time, and memory.png; with --snapshot on CUDA memory_snapshot.pickle for
                  pytorch.org/memory_viz
  report.txt      what is printed: stages, kernels, host synchronisations and idle gaps of the device in the loop

A few steps are enough: all but the first are alike. On a CPU torch's operators take the kernels' place."""
EPILOG = """\
examples:
  qwen-fast profile
  qwen-fast profile --shape qwen-image --size 1024x1024 --steps 4      full size, without a checkpoint
  qwen-fast profile --shape qwen-image --size 1024x1024 --stock --out profile-stock
  qwen-fast profile --nvtx       under nsys or ncu, as the printed command lines do"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", metavar="MODEL", help="a checkpoint's folder or hub id (default: the demo)")
    model.add_argument("--shape", choices=SHAPES, help="seeded random weights instead, made on the device (qwen-image: 41 GB)")
    parser.add_argument("--prompt", default="a red circle on a white background", help="(default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=4, metavar="N", help="denoising steps (default: %(default)s)")
    parser.add_argument(
        "--size", type=arguments.size, metavar="WxH", help="default: 1024x1024 on cuda with a model, else 256x256"
    )
    parser.add_argument("--cfg", type=arguments.cfg, default=4.0, metavar="SCALE", help="1: no guidance (default: %(default)s)")
    parser.add_argument("--stock", action="store_true", help="profile stock diffusers, to compare")
    parser.add_argument(
        "--graph",
        action="store_true",
        help="steps as CUDA graphs where a run would use them; a graph's kernels do not say which operator they are",
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: bf16 on cuda, fp32 on the CPU")
    parser.add_argument("--out", type=Path, default=Path("profile"), metavar="DIR", help="folder (default: %(default)s)")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="of this machine, measured before; or left there")
    parser.add_argument("--snapshot", action="store_true", help="memory_snapshot.pickle too: tens of MB")
    parser.add_argument("--nvtx", action="store_true", help="no trace and no files: NVTX ranges for nsys and ncu")


def run(args: argparse.Namespace) -> int:
    """Draw, profile, write and print.

    Raises:
        ValueError: no such device, --nvtx without CUDA, too little memory. OSError: the folder cannot be written.
    """
    from ..common.hardware import device_and_dtype

    if args.stock and args.graph:
        args.parser.error("--graph is an option of qwen_fast; it cannot go with --stock")
    device, dtype = device_and_dtype(args.device, args.dtype)
    if args.nvtx and device.type != "cuda":
        raise ValueError(f"--nvtx: NVTX ranges are for Nsight on a CUDA device, and this run is on {device}; leave it out.")
    profiling = benchmarks("profiling.run")
    files = profiling.Files(args.out)
    if not args.nvtx:
        files.prepare()
    width, height = args.size or _default_size(args, device)
    with library_output(False, verbosity=False):
        pipe, prompts = _pipeline(args, device, dtype, (width, height))
    pipe.set_progress_bar_config(disable=True)

    import torch

    from ..common.stages import record, stage_table, staged

    def draw() -> None:
        with staged(pipe) if args.stock else contextlib.nullcontext():
            pipe(
                **prompts,
                true_cfg_scale=args.cfg,
                width=width,
                height=height,
                num_inference_steps=args.steps,
                generator=torch.Generator().manual_seed(0),
            )

    print(
        f"{'stock diffusers' if args.stock else 'qwen_fast'}, {args.model or args.shape or 'demo model'}, {width}x{height}, "
        f"{args.steps} steps, cfg {args.cfg:g}, {str(dtype).removeprefix('torch.')} on {device}",
        flush=True,
    )
    for _ in range(2 if args.graph else 1):  # the second call of a size captures
        draw()
    if args.nvtx:
        with profiling.nvtx_ranges(device):
            draw()
        return 0
    # Of a picture of its own: the profiler makes the host slow, and recording waits for the device after each stage.
    with record() as recorder:
        draw()
    table = stage_table(recorder, recorder.wall)
    print(f"{table}\n", flush=True)
    waits = profiling.host_waits(draw) if device.type == "cuda" else None
    ceilings = _ceilings(args.ceilings, device, dtype)
    trace = profiling.profile_call(draw, files, device, snapshot=args.snapshot)
    print(profiling.write(trace, files, ceilings, waits, table))
    print(f"\nwritten to {args.out.resolve()}; {files.trace.name} opens in ui.perfetto.dev")
    print("the same run under Nsight Systems and Nsight Compute, on a CUDA device:")
    for command in profiling.nsight_commands(_arguments(args), args.out):
        print(f"  {command}")
    return 0


def _pipeline(
    args: argparse.Namespace, device: "torch.device", dtype: "torch.dtype", size: tuple[int, int]
) -> tuple[Any, dict]:
    """The pipeline, and what it takes for prompts."""
    from .. import enable

    guided = args.cfg > 1
    if args.shape is None:
        pipe = load_pipeline(args.model or str(checkpoint()), device, dtype, stock=True)
        prompts = {"prompt": args.prompt, "negative_prompt": " " if guided else None}
    else:
        models, grid = benchmarks("ladder.models"), benchmarks("shared.shapes")
        shape = grid.SHAPES[args.shape]
        case = grid.PictureCase(*size, args.steps, guided, 1, _TEXT_TOKENS, shape)
        models.check_memory([case], device, dtype)
        pipe = models.random_pipeline(shape, device, dtype)
        # It has no text encoder.
        prompts = {name: value for name, value in models.call_arguments(pipe, case).items() if "prompt" in name}
    return pipe if args.stock else enable(pipe, cuda_graph="auto" if args.graph else False), prompts


def _default_size(args: argparse.Namespace, device: "torch.device") -> tuple[int, int]:
    large = device.type == "cuda" and (args.model is not None or args.shape == "qwen-image")
    return (1024, 1024) if large else DEMO_SIZE


def _ceilings(path: Path | None, device: "torch.device", dtype: "torch.dtype") -> Any:
    """What this machine can do at best; on a CPU at a size that takes a moment."""
    ceilings, grid = benchmarks("shared.ceilings"), benchmarks("shared.shapes")
    if device.type == "cuda":
        return ceilings.kept_ceilings(path, device, dtype, seconds=0.5)
    return ceilings.kept_ceilings(path, device, dtype, seconds=0.05, shape=grid.SHAPES["middle"], tokens=256 + 16)


def _arguments(args: argparse.Namespace) -> list[str]:
    """The arguments that make the same run again."""
    names = ("model", "shape", "prompt", "steps", "cfg", "device", "dtype")
    given = [part for name in names if getattr(args, name) is not None for part in (f"--{name}", f"{getattr(args, name)}")]
    size = ["--size", f"{args.size[0]}x{args.size[1]}"] if args.size else []
    return given + size + [f"--{name}" for name in ("stock", "graph") if getattr(args, name)]
