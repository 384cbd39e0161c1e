"""`qwen-fast generate`: prompts in, PNGs out."""

import argparse
import contextlib
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ..common.options import DTYPES
from ..demo import checkpoint
from ..pipelines.opening import library_output, load_pipeline
from ..schedule.configs import load_config
from . import arguments
from .arguments import positive_int
from .pngs import PngWriter

SUMMARY = "draw pictures from prompts"
DESCRIPTION = """\
Draw pictures from prompts and save them as PNGs, with every setting in the metadata.

Without --model the small demo checkpoint of the package is used. It knows coloured shapes and nothing else: "a large
red circle on a white background", "a small blue cross on the left of a black background"."""
EPILOG = """\
examples:
  qwen-fast generate --prompt "a large red circle on a white background"
  qwen-fast generate --model Qwen/Qwen-Image --prompt "a red fox" --prompt "a blue bird" --out pictures
  qwen-fast generate --model path/to/Qwen-Image --prompt-file prompts.txt --num-images 4 --size 1328x1328
  qwen-fast generate --model Qwen/Qwen-Image --prompt "a red fox" --prompt "a tower" --size 1328x1328 928x1664
  qwen-fast generate --model Qwen/Qwen-Image --prompt "a red fox" --steps 8 --cfg 1 --config lightning \\
      --lora Qwen-Image-Lightning-8steps.safetensors
  qwen-fast generate --prompt "two green squares on a white background" --stock --out stock.png    by diffusers alone

Picture n (from 0) of a run is drawn with seed + n, so any of them can be drawn again alone. Guidance
(--cfg above 1) costs a second forward per step. LoRAs that shorten a model to 4 or 8 steps need --config lightning; the
demo checkpoint has one: --lora lightning --config lightning --steps 4 --cfg 1."""

DEMO_STEPS, MODEL_STEPS = 20, 50
DEMO_SIZE = (64, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    prompts = parser.add_argument_group("what to draw")
    source = prompts.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for several prompts")
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt a line, UTF-8, empty lines skipped; '-': stdin")
    prompts.add_argument("--negative-prompt", default=" ", metavar="TEXT", help="what to keep out (default: a space)")
    prompts.add_argument("--num-images", type=positive_int, default=1, metavar="N", help="per prompt (default: 1)")
    prompts.add_argument(
        "--size",
        type=arguments.size,
        nargs="+",
        metavar="WxH",
        help="multiples of 16; one for all, or one for each prompt (default: the model's, demo 64x64)",
    )
    prompts.add_argument("--seed", type=arguments.seed, default=0, metavar="N", help="of the first picture (default: 0)")

    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help="a checkpoint's folder or hub id (default: the demo)")
    model.add_argument(
        "--lora",
        type=arguments.lora,
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="a LoRA file, folder or hub id (OWNER/REPO or OWNER/REPO/FILE), or a folder in the model's own (the demo has "
        "'lightning'); scale 1 by default; repeat it for several",
    )
    model.add_argument("--config", metavar="NAME", help="schedule: base, lightning or a file (default: the model's)")
    model.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    model.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: bf16 on cuda, fp32 on the CPU")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--steps", type=positive_int, metavar="N", help=f"inference steps (default: {MODEL_STEPS}, demo {DEMO_STEPS})"
    )
    sampling.add_argument(
        "--cfg", type=arguments.cfg, default=4.0, metavar="SCALE", help="true_cfg_scale; 1: no guidance (default: %(default)s)"
    )
    sampling.add_argument("--precise-sampler", action="store_true", help="keep latents in fp32 between steps")
    sampling.add_argument("--stock", action="store_true", help="draw with stock diffusers instead, to compare")

    output = parser.add_argument_group("output")
    output.add_argument("--out", default=".", metavar="PATH", help="a folder, or a .png for one picture (default: this folder)")
    output.add_argument("--overwrite", action="store_true", help="replace existing files, instead of taking a free name")
    output.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Draw all pictures, one at a time; Ctrl-C leaves the finished ones and gives 130."""
    if args.stock and args.precise_sampler:
        args.parser.error("--precise-sampler is an option of our sampler; it cannot go with --stock")
    prompts = args.prompt if args.prompt_file is None else read_prompts(args.prompt_file)
    total = len(prompts) * args.num_images
    if args.seed + total - 1 >= 2**63:
        args.parser.error(f"--seed {args.seed} leaves no seeds for {total} pictures")
    if args.size is not None and len(args.size) not in (1, len(prompts)):
        args.parser.error(f"--size names {len(args.size)} sizes for {len(prompts)} prompts; one for all or one for each")
    folder, file = _destination(args.out, total, args.overwrite)
    if args.config is not None:
        config, _ = load_config(args.config)

    started = time.perf_counter()
    from .. import generate
    from ..common.hardware import device_and_dtype
    from ..common.stages import Span, record, stage, stage_table, staged

    with record() as recorder:
        recorder.spans.append(Span("import", started, time.perf_counter(), recorder.thread))
        with stage("load"):
            device, dtype = device_and_dtype(args.device, args.dtype)
            bars = not args.quiet and sys.stderr.isatty()
            with library_output(bars):
                model = args.model or str(checkpoint())
            if args.model is None:
                print(f"model: the demo checkpoint in {model}")
                print("       it knows coloured shapes and nothing else; --model names another")
        with library_output(bars):
            pipe = load_pipeline(model, device, dtype, stock=args.stock, precise_sampler=args.precise_sampler, loras=args.lora)
        if args.config is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(config)
        loaded = time.perf_counter() - started

        side = pipe.default_sample_size * pipe.vae_scale_factor
        sizes = args.size or [DEMO_SIZE if args.model is None else (side, side)]
        sizes = sizes * (len(prompts) // len(sizes))  # one for all, or one for each
        steps = args.steps or (DEMO_STEPS if args.model is None else MODEL_STEPS)
        settings = _settings(args, pipe, model, device, dtype, steps)
        names = " ".join(dict.fromkeys(f"{width}x{height}" for width, height in sizes))
        print(f"{names}, {steps} steps, cfg {args.cfg:g}, {settings['dtype']} on {device}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        pipe.set_progress_bar_config(disable=not bars)
        each = [pair for pair in zip(prompts, sizes, strict=True) for _ in range(args.num_images)]
        pictures = generate(
            pipe,
            [prompt for prompt, _ in each],
            seed=args.seed,
            negative_prompt=args.negative_prompt if args.cfg > 1 else None,
            true_cfg_scale=args.cfg,
            width=[width for _, (width, _) in each],
            height=[height for _, (_, height) in each],
            num_inference_steps=steps,
        )
        writer = PngWriter()
        try:
            with staged(pipe) if args.stock else contextlib.nullcontext(), writer:
                for index, image, seconds in pictures:
                    (prompt, (width, height)), seed, drawn = each[index], args.seed + index, sum(seconds.values())
                    text = {"prompt": prompt, "seed": str(seed), **settings, "size": f"{width}x{height}"}
                    text["seconds"] = f"{drawn:.2f}"
                    text["stages"] = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
                    path = file or folder / f"{_slug(prompt)}-seed{seed}.png"
                    note = f"seed {seed}  {drawn:.2f} s"
                    writer.submit(image, path, text, note, overwrite=args.overwrite, find_free_name=file is None)
        except KeyboardInterrupt:
            print(f"interrupted; {len(writer.saved)} of {total} pictures are finished.", file=sys.stderr)
            return 130
    wall = time.perf_counter() - started
    names = f"{total} picture{'s' if total > 1 else ''}"
    print(f"{names} in {wall - loaded:.2f} s after {loaded:.2f} s of loading, in {folder.resolve()}")
    print(stage_table(recorder, wall, pictures=total))
    print(_drawn_by(pipe, args.stock))
    return 0


def read_prompts(name: str) -> list[str]:
    """The non-empty lines of a UTF-8 file, or of stdin for '-'."""
    try:
        data = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {name} is not UTF-8: {error}") from None
    except OSError as error:
        raise FileNotFoundError(f"--prompt-file {name}: {error.strerror}.") from None
    prompts = [line.strip() for line in data.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompt-file {name} holds no prompt; one a line is needed.")
    return prompts


def _settings(args: argparse.Namespace, pipe: Any, model: str, device: Any, dtype: Any, steps: int) -> dict[str, str]:
    """What goes into every picture's metadata beside prompt, seed and size."""
    import diffusers
    import torch
    import transformers

    from .. import __version__

    return {
        "negative_prompt": args.negative_prompt if args.cfg > 1 else "",
        "steps": str(steps),
        "cfg": f"{args.cfg:g}",
        "model": args.model or "demo checkpoint",
        "lora": ", ".join(f"{name}:{scale:g}" for name, scale in args.lora),
        "schedule": args.config or "model",
        "sampler": "diffusers" if args.stock else "qwen_fast, precise" if args.precise_sampler else "qwen_fast",
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": f"qwen_fast {__version__}, diffusers {diffusers.__version__}, "
        f"transformers {transformers.__version__}, torch {torch.__version__}",
        "Software": f"qwen-fast {__version__}",
    }


def _destination(out: str, total: int, overwrite: bool) -> tuple[Path, Path | None]:
    """(folder, None), or (folder, file) when --out names a single PNG; refused before any work."""
    path = Path(out).expanduser()
    if path.is_dir() or not path.suffix:
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"--out {out} is a file without .png; name a folder or a .png.")
        _check_writable(out, path)
        return path, None
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: PNGs carry the settings; use a name ending in .png, or a folder.")
    if total > 1:
        raise ValueError(f"--out {out} is one file for {total} pictures; name a folder.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"--out {out} exists; --overwrite replaces it, and a folder gets a free name.")
    _check_writable(out, path.parent)
    return path.parent, path


def _check_writable(out: str, folder: Path) -> None:
    """Before weights are loaded: could `folder` be made, and written in? Nothing is left behind."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"--out {out}: nothing can be written in {there}: {error.strerror or error}.") from None


def _slug(prompt: str) -> str:
    """A file name that every file system takes: the prompt's first letters and digits."""
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"


def _drawn_by(pipe: Any, stock: bool) -> str:
    import diffusers

    from .. import report

    return f"drawn by stock diffusers {diffusers.__version__}" if stock else str(report(pipe)).splitlines()[0]
