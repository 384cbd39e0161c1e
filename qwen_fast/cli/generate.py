"""`qwen-fast generate`: prompts in, PNGs out."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.options import DTYPES, VALUES
from ..demo import CHECKPOINT, checkpoint
from ..pipelines.opening import check_loras, library_output, load_pipeline
from ..schedule.configs import load_config
from . import arguments
from .arguments import positive_int
from .jobs import Job, contact_sheet, lines_of, read_jobs, runs, slug
from .pngs import PngWriter, is_drawn, save_png

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
  qwen-fast generate --jobs jobs.jsonl --out pictures    each line: {"prompt": "a red fox", "seed": 7, "size": "1024x768"}

A job file has a JSON object a line: prompt, and what differs from the command line of negative_prompt, seed, steps, size,
cfg, name. What is drawn already is skipped, so that the same command resumes where it stopped; contact-sheet.png shows all.

Picture n (from 0) of a run is drawn with seed + n, so any of them can be drawn again alone. Guidance
(--cfg above 1) costs a second forward per step. LoRAs that shorten a model to 4 or 8 steps need --config lightning; the
demo checkpoint has one: --lora lightning --config lightning --steps 4 --cfg 1."""

DEMO_STEPS, MODEL_STEPS = 20, 50
SHEET = "contact-sheet.png"
_SURROUNDINGS = ("versions", "Software", "device")  # what a run may differ in that goes on with another's pictures
_GRAPH = {"auto": "auto", "on": True, "off": False}
DEMO_SIZE = (64, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    prompts = parser.add_argument_group("what to draw")
    source = prompts.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="repeat it for several prompts")
    source.add_argument("--prompt-file", metavar="FILE", help="one prompt a line, UTF-8; empty lines and # skipped; '-': stdin")
    source.add_argument("--jobs", metavar="FILE", help="a JSON object a line, each with its own settings; '-': stdin")
    prompts.add_argument("--keep-going", action="store_true", help="with --jobs: leave bad lines out, and exit with 1")
    prompts.add_argument("--negative-prompt", default=" ", metavar="TEXT", help="what to keep out (default: a space)")
    prompts.add_argument("--num-images", type=positive_int, default=1, metavar="N", help="per prompt (default: 1)")
    prompts.add_argument(
        "--size",
        type=arguments.size,
        metavar="WxH",
        nargs="+",
        help="multiples of 16, one for all or one for each prompt (default: the model's, demo 64x64)",
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
    sampling.add_argument("--stock", action="store_true", help="draw with stock diffusers instead, to compare")

    fast = parser.add_argument_group("acceleration", "options of qwen_fast.enable; docs/coverage.md describes them")
    for name in ("modulation", "attention", "vae_mode", "text_encoder_mode"):
        fast.add_argument(arguments.flag(name), choices=VALUES[name], help=f"default: {VALUES[name][0]}")
    fast.add_argument("--cuda-graph", choices=tuple(_GRAPH), help="default: auto")
    fast.add_argument("--vae-memory", type=arguments.vae_memory, metavar="BYTES", help="or auto or none (default: auto)")
    fast.add_argument("--prompt-cache", metavar="FOLDER", help="or memory or none (default: memory)")
    for name, what in (
        ("precise_sampler", "keep latents in fp32 between steps"),
        ("check_nan", "say after which step latents were not finite"),
        ("strict", "fail where a call would run on stock diffusers"),
    ):
        fast.add_argument(arguments.flag(name), action="store_true", default=None, help=what)

    output = parser.add_argument_group("output")
    output.add_argument("--out", default=".", metavar="PATH", help="a folder, or a .png for one picture (default: this folder)")
    output.add_argument("--overwrite", action="store_true", help="replace existing files, instead of taking a free name")
    output.add_argument("--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Draw all pictures, one at a time; Ctrl-C leaves the finished ones and gives 130."""
    options = _options(args)
    if args.stock and options:
        args.parser.error(f"{arguments.flag(next(iter(options)))} is an option of qwen_fast; it cannot go with --stock")
    jobs, bad = _jobs(args)
    folder, file = _destination(args.out, len(jobs), args.overwrite)
    if args.jobs is not None and file is not None:
        args.parser.error(f"--out {args.out}: pictures of --jobs go into a folder")
    model = str(CHECKPOINT) if args.model is None else args.model
    check_loras(args.lora, model)
    config, _ = (None, None) if args.config is None else load_config(args.config)
    for sentence in bad:
        print(sentence, file=sys.stderr)
    bars = not args.quiet and sys.stderr.isatty()
    if bars:
        print(f"loading {'the demo checkpoint' if args.model is None else model}", file=sys.stderr, flush=True)

    started = time.perf_counter()
    from ..common.hardware import device_and_dtype
    from ..common.stages import Span, record, stage, stage_table, staged

    with record() as recorder:
        recorder.spans.append(Span("import", started, time.perf_counter(), recorder.thread))
        with stage("load"):
            device, dtype = device_and_dtype(args.device, args.dtype)
            if args.model is None:
                with library_output(bars):
                    model = str(checkpoint())
                print(f"model: the demo checkpoint in {model}")
                print("       it knows coloured shapes and nothing else; --model names another")
        with library_output(bars):
            pipe = load_pipeline(model, device, dtype, stock=args.stock, loras=args.lora, options=options)
        if config is not None:
            pipe.scheduler = type(pipe.scheduler).from_config(config)
        loaded = time.perf_counter() - started

        side = pipe.default_sample_size * pipe.vae_scale_factor
        size, steps = (DEMO_SIZE, DEMO_STEPS) if args.model is None else ((side, side), MODEL_STEPS)
        jobs = [dataclasses.replace(job, size=job.size or size, steps=job.steps or steps) for job in jobs]
        if args.model is None:
            _say_what_is_strange(jobs)
        common = _settings(args, options, device, dtype)
        for (width, height), number, cfg in dict.fromkeys((job.size, job.steps, job.cfg) for job in jobs):
            print(f"{width}x{height}, {number} steps, cfg {cfg:g}, {common['dtype']} on {device}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        pipe.set_progress_bar_config(disable=not bars)
        todo = jobs if args.jobs is None or args.overwrite else _missing(jobs, folder, common)
        writer = PngWriter()
        try:
            with staged(pipe) if args.stock else contextlib.nullcontext(), writer:
                for together in runs(todo):
                    _draw(pipe, together, writer, folder, file, common, args)
        except KeyboardInterrupt:
            print(f"interrupted; {len(writer.saved)} of {len(todo)} pictures are finished.", file=sys.stderr)
            return 130
    wall = time.perf_counter() - started
    names = f"{len(todo)} picture{'s' if len(todo) != 1 else ''}"
    print(f"{names} in {wall - loaded:.2f} s after {loaded:.2f} s of loading, in {folder.resolve()}")
    if args.jobs is not None:
        sheet = contact_sheet([(folder / f"{job.name}.png", f"{job.name}") for job in jobs])
        save_png(sheet, folder / SHEET, {}, overwrite=True, find_free_name=False)
        print(f"all {len(jobs)} in {folder / SHEET}; {len(jobs) - len(todo)} were there already")
    print(stage_table(recorder, wall, pictures=max(1, len(todo))))
    print(_drawn_by(pipe, args.stock))
    return 1 if bad else 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `enable`."""
    names = ("modulation", "attention", "vae_mode", "text_encoder_mode", "cuda_graph", "vae_memory", "prompt_cache")
    given = {name: getattr(args, name) for name in (*names, "precise_sampler", "check_nan", "strict")}
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"cuda_graph": _GRAPH[given["cuda_graph"]]} if "cuda_graph" in given else {}
    return {name: None if value == "none" else value for name, value in given.items()}


def _jobs(args: argparse.Namespace) -> tuple[list[Job], list[str]]:
    """The pictures to draw, and what was left out of a job file."""
    sizes = args.size or [None]
    defaults = Job("", args.seed, args.negative_prompt, args.steps, sizes[0], args.cfg)
    if args.keep_going and args.jobs is None:
        args.parser.error("--keep-going is for --jobs")
    if args.jobs is not None:
        if args.num_images > 1:
            args.parser.error("--num-images cannot go with --jobs; repeat the line with another seed")
        if len(sizes) > 1:
            args.parser.error("--size names several sizes; with --jobs each line has its own")
        return read_jobs(args.jobs, defaults, keep_going=args.keep_going)
    prompts = args.prompt if args.prompt_file is None else read_prompts(args.prompt_file)
    total = len(prompts) * args.num_images
    if args.seed + total - 1 >= 2**63:
        args.parser.error(f"--seed {args.seed} leaves no seeds for {total} pictures")
    if len(sizes) not in (1, len(prompts)):
        args.parser.error(f"--size names {len(sizes)} sizes for {len(prompts)} prompts; one for all or one for each")
    pairs = zip(prompts, sizes * (len(prompts) // len(sizes)), strict=True)
    each = [pair for pair in pairs for _ in range(args.num_images)]
    jobs = [
        dataclasses.replace(defaults, prompt=prompt, size=size, seed=args.seed + index)
        for index, (prompt, size) in enumerate(each)
    ]
    return [dataclasses.replace(job, name=f"{slug(job.prompt)}-seed{job.seed}") for job in jobs], []


def _say_what_is_strange(jobs: Sequence[Job]) -> None:
    """Once each: what the demo checkpoint was never shown."""
    from ..demo.scenes import strange

    found = (strange(job.prompt, job.negative_prompt if job.cfg > 1 else None, *job.size) for job in jobs)
    for sentence in dict.fromkeys(sentence for sentences in found for sentence in sentences):
        print(f"note: {sentence}", file=sys.stderr, flush=True)


def _missing(jobs: Sequence[Job], folder: Path, common: dict[str, str]) -> list[Job]:
    """Those of a job file that are not drawn yet.

    Raises:
        FileExistsError: a file of a job's name holds something else.
    """
    found = []
    for job in jobs:
        path = folder / f"{job.name}.png"
        text = {name: value for name, value in _text(job, common).items() if name not in _SURROUNDINGS}
        if not path.exists():
            found.append(job)
        elif not is_drawn(path, text):
            raise FileExistsError(f"{path} exists and was drawn with other settings; --overwrite draws all of --jobs again.")
    return found


def _draw(
    pipe: Any,
    jobs: Sequence[Job],
    writer: PngWriter,
    folder: Path,
    file: Path | None,
    common: dict[str, str],
    args: argparse.Namespace,
) -> None:
    """Draw jobs of equal settings with seeds ascending by one, and give them to the writer."""
    from .. import generate

    first = jobs[0]
    width, height = first.size
    pictures = generate(
        pipe,
        [job.prompt for job in jobs],
        seed=first.seed,
        negative_prompt=first.negative_prompt if first.cfg > 1 else None,
        true_cfg_scale=first.cfg,
        width=width,
        height=height,
        num_inference_steps=first.steps,
    )
    for index, image, seconds in pictures:
        job, drawn = jobs[index], sum(seconds.values())
        text = _text(job, common) | {"seconds": f"{drawn:.2f}"}
        text["stages"] = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        path, free = file or folder / f"{job.name}.png", file is None and args.jobs is None
        writer.submit(image, path, text, f"seed {job.seed}  {drawn:.2f} s", overwrite=args.overwrite, find_free_name=free)


def read_prompts(name: str) -> list[str]:
    """The prompts of a UTF-8 file, one a line, or of stdin for '-'."""
    prompts = [line for _, line in lines_of("--prompt-file", name)]
    if not prompts:
        raise ValueError(f"--prompt-file {name} holds no prompt; one a line is needed.")
    return prompts


def _text(job: Job, common: dict[str, str]) -> dict[str, str]:
    """A picture's metadata but for its times."""
    own = {
        "prompt": job.prompt,
        "seed": str(job.seed),
        "negative_prompt": job.negative_prompt if job.cfg > 1 else "",
        "steps": str(job.steps),
        "size": f"{job.size[0]}x{job.size[1]}",
        "cfg": f"{job.cfg:g}",
    }
    return own | common


def _settings(args: argparse.Namespace, options: dict[str, Any], device: Any, dtype: Any) -> dict[str, str]:
    """What goes into the metadata of every picture of a run."""
    import diffusers
    import torch
    import transformers

    from .. import __version__

    return {
        "model": args.model or "demo checkpoint",
        "lora": ", ".join(f"{name}:{scale:g}" for name, scale in args.lora),
        "schedule": args.config or "model",
        "sampler": "diffusers" if args.stock else "qwen_fast, precise" if options.get("precise_sampler") else "qwen_fast",
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


def _drawn_by(pipe: Any, stock: bool) -> str:
    import diffusers

    from .. import report

    return f"drawn by stock diffusers {diffusers.__version__}" if stock else str(report(pipe)).splitlines()[0]
