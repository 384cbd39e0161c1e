"""What `qwen-fast bench` does: checks, the model, ceilings, the ladder, one table."""

import gc
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qwen_fast.common.hardware import check_device
from qwen_fast.common.options import writable_folder

from ..shared.ceilings import kept_ceilings, known_ceilings
from ..shared.machine import PROVENANCE, Sampler, provenance
from ..shared.measure import silence
from ..shared.rows import RowFile, of_this_state
from ..shared.shapes import QWEN_IMAGE, PictureCase, Shape, default_cases, full_cases, small_cases
from ..shared.source import RESULTS
from . import changing, estimate, models
from .rung import Rung
from .rungs import ENABLED, LOSSY, all_rungs, chosen_rungs
from .session import FIELDS, Session
from .stock import COMPILED, STOCK

CEILING_FIELDS = [*PROVENANCE, *Sampler("cpu").summary(), "model", "what", "detail", "rate", "unit", "seconds", "clock"]


@dataclass
class Options:
    """What to measure, and where the rows go.

    Attributes:
        device, dtype: of the model.
        shape: of a model with random weights.
        model: a checkpoint's folder instead.
        cases: what is measured, each on every rung; None: the default for the device.
        changing: cases that are measured with a new size and prompt each call (see changing.py).
        full: every case of the grid, with regional compilation beside stock and ours.
        whole: every step of every picture.
        repeats: pairs of stock and rung.
        skip: parts of names; rungs that have one are left out, stock excepted.
        only: parts of names; stock and the rungs that have one are measured.
        ceiling_seconds: how long each ceiling is sustained.
        ceilings: file of ceilings that were measured before, or that are left there.
        limit: seconds of a rung, behind which it counts as hanging.
        resume: rows that the file in `out` has already are not measured again.
        out: folder of ladder.csv and ceilings.csv.
    """

    device: torch.device
    dtype: torch.dtype
    shape: Shape = QWEN_IMAGE
    model: str | None = None
    cases: list[PictureCase] | None = None
    changing: tuple[PictureCase, ...] = ()
    full: bool = False
    whole: bool = False
    repeats: int = 3
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    ceiling_seconds: float = 2.0
    ceilings: Path | None = None
    limit: float | None = None
    resume: bool = False
    out: Path | None = None


def default_folder() -> Path:
    """benchmarks/results of the checkout that this is; elsewhere a folder in the current one."""
    return RESULTS if RESULTS.parent.name == "benchmarks" else Path("qwen-fast-results")


def plan(options: Options) -> list[tuple[PictureCase, list[Rung]]]:
    """The whole ladder for cases that were asked for and for the first of the others; for the rest of these stock and ours,
    with `full` the compiled stock too."""
    if options.cases is not None:
        cases = options.cases
    elif options.full:
        cases = full_cases(options.shape)
    else:
        cases = default_cases(options.shape) if options.device.type == "cuda" else small_cases(options.shape)
    ladder = all_rungs()
    for option in ("skip", "only"):
        for part in getattr(options, option):
            if not any(part in rung.name for rung in ladder[1:]):
                names = ", ".join(rung.name for rung in ladder[1:])
                raise ValueError(f"--{option} {part}: no rung has that in its name. They are: {names}.")
    rungs = [STOCK, ENABLED, *LOSSY, COMPILED] if options.full else chosen_rungs()
    whole = len(cases) if options.cases is not None else 1
    planned = [(case, ladder if index < whole else rungs) for index, case in enumerate(cases)]
    return [(case, [rung for rung in rungs if _wanted(rung, options)]) for case, rungs in planned]


def _wanted(rung: Rung, options: Options) -> bool:
    if rung is STOCK:
        return True
    chosen = not options.only or any(part in rung.name for part in options.only)
    return chosen and not any(part in rung.name for part in options.skip)


def run(options: Options, say: Callable[[str], None] = print) -> list[dict[str, str]]:
    """Measure, and return the ladder's rows, which are in `options.out` too.

    Raises:
        ValueError: no such GPU or rung, an unwritable folder, no checkpoint, too little memory: all before any work.
        KeyboardInterrupt: after saying where the rows so far are.
    """
    check_device(options.device)
    folder = writable_folder("--out", options.out or default_folder())
    if options.model is not None:
        models.check_folder(options.model)
        options = replace(options, shape=models.shape_of(options.model))
        options = _of_shape(options, options.shape)
        models.check_memory(_cases(options), options.device, options.dtype, models.text_encoder_bytes(options.model))
    else:
        options = smaller(options, say)
    planned = plan(options)
    for case in options.changing:
        changing.varied(case)
    rows, ceiling_rows = RowFile(folder / "ladder.csv", FIELDS), RowFile(folder / "ceilings.csv", CEILING_FIELDS)
    changing_rows = RowFile(folder / "changing.csv", changing.FIELDS) if options.changing else None
    for note in filter(None, (one.note for one in (rows, ceiling_rows, changing_rows) if one is not None)):
        say(note)
    if options.device.type == "cuda":
        say(estimated(options))
    results: list[dict[str, str]] = of_this_state(rows.path, options.device) if options.resume else []
    try:
        with silence():
            changed = measure(options, planned, rows, ceiling_rows, changing_rows, results, say)
    except KeyboardInterrupt:
        say(f"interrupted: {len(results)} rows are finished and in {rows.path}.")
        raise
    say("")
    say(table(results))
    say(f"\n{'no lossy mode exists yet' if not LOSSY else 'lossy modes are marked'}; rows are in {rows.path}")
    if changing_rows is not None:
        say(f"a new size and prompt each call: {len(changed)} rows are in {changing_rows.path}")
    release(options.device)
    return results + changed


def release(device: torch.device) -> None:
    """Give back what a pipeline that is no longer there held: graphs, tensors, and the memory kept for the next ones."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def leave(code: int) -> None:
    """End the process here, with its output written, and without taking the interpreter apart.

    On an H100 (torch 2.11) the ladder, which captures CUDA graphs, printed everything and then died of "terminate called
    without an active exception" while Python shut down: some C++ thread that nobody joined, not found yet. The profile, which
    captures none, ended well. The exit code of that death is taken for a failed run.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _cases(options: Options) -> list[PictureCase]:
    """Every case that is drawn, also the sizes that change."""
    changed = [one for case in options.changing for one in changing.varied(case)]
    return [case for case, _ in plan(options)] + changed


def _of_shape(options: Options, shape: Shape) -> Options:
    cases = options.cases and [replace(case, shape=shape) for case in options.cases]
    changed = tuple(replace(case, shape=shape) for case in options.changing)
    return replace(options, shape=shape, cases=cases, changing=changed)


def smaller(options: Options, say: Callable[[str], None]) -> Options:
    """The same plan for a model of random weights with as many layers as there is room for.

    Raises:
        ValueError: no model fits.
    """
    cases = _cases(options)
    layers = models.layers_that_fit(cases, options.device, options.dtype)
    if layers >= options.shape.layers:
        return options
    if layers < 1:
        models.check_memory(cases, options.device, options.dtype)
    say(f"{options.device} has room for {layers} of the {options.shape.layers} layers: a SMALLER MODEL is measured")
    return _of_shape(options, replace(options.shape, layers=layers))


def estimated(options: Options) -> str:
    """What is measured, and how long that takes on an H200, in words."""
    planned = plan(options)
    seconds = [
        estimate.case_seconds(case, rungs, options.repeats, options.whole, options.model is None) for case, rungs in planned
    ]
    lines = [f"{case}, {len(rungs)} rungs: {time:.0f} s" for (case, rungs), time in zip(planned, seconds, strict=True)]
    rungs = [rung for rung in changing.RUNGS if _wanted(rung, options)]
    for case in options.changing:
        seconds.append(estimate.changing_seconds(changing.varied(case), rungs))
        lines.append(f"{case}, a new size each call, {len(rungs)} rungs: {seconds[-1]:.0f} s")
    total = sum(seconds) + estimate.start_seconds(options.ceiling_seconds)
    rows = sum(len(rungs) for _, rungs in planned) + len(rungs) * len(options.changing)
    shown = lines if len(lines) <= 12 else [*lines[:3], "...", *lines[-3:]]
    return "\n".join([*shown, f"{rows} rows, about {total / 60:.1f} minutes on an H200, by arithmetic"])


def is_fault(row: dict[str, str]) -> bool:
    """A wrong result, or a failure that is not a peer's or a lossy mode's."""
    return row["status"] == "wrong result" or (row["status"] == "failed" and row["lossy"] == "False")


def measure(
    options: Options,
    planned: list[tuple[PictureCase, list[Rung]]],
    rows: RowFile,
    ceiling_rows: RowFile,
    changing_rows: RowFile | None,
    results: list[dict[str, str]],
    say: Callable[[str], None],
) -> list[dict[str, str]]:
    """Ceilings, model and ladder, whose finished rows appear in `results`; the rows of sizes that change are returned."""
    shape, device = options.shape, options.device
    name = f"random, {shape.layers} layers, {shape.heads} x {shape.head_dim}"
    if options.model is not None:
        name = Path(options.model).name
    first = _cases(options)[0]
    tokens = first.image_tokens + first.text
    say(f"ceilings, sustained for {options.ceiling_seconds:g} s each")
    copied = None if device.type == "cuda" else 2**24
    known = known_ceilings(options.ceilings, device, options.dtype)
    with Sampler(device) as sampler:
        how = {"seconds": options.ceiling_seconds, "shape": shape, "tokens": tokens, "copy_bytes": copied}
        ceilings = kept_ceilings(options.ceilings, device, options.dtype, **how)
    common = (
        provenance(device) | sampler.summary() | {"model": name, "seconds": f"{ceilings.seconds:g}", "clock": ceilings.clock}
    )
    for row in ceilings.rows():
        if known is None:  # else whoever measured them has written them
            ceiling_rows.add(common | row)
        say(f"  {row['what']}, {row['detail']}: {float(row['rate']) / 1e12:.4g} T{row['unit']}")
    say(f"the model: {name}, {str(options.dtype).removeprefix('torch.')} on {device}")
    if options.model is not None:
        pipe = models.load_pipeline(options.model, device, options.dtype)
    else:
        pipe = models.random_pipeline(shape, device, options.dtype)
    how = {"say": say, "results": results, "limit": options.limit}
    Session(pipe, name, planned, rows, ceilings, options.repeats, options.whole, **how).run()
    if changing_rows is None:
        return []
    before = of_this_state(changing_rows.path, device) if options.resume else []
    rungs = [rung for rung in changing.RUNGS if _wanted(rung, options)]
    return changing.Changing(pipe, name, list(options.changing), rungs, changing_rows, before, options.limit, say).run()


COLUMNS = {  # heading: (field, how it is written); the rows hold more than fits into a terminal
    "s/image": ("image_s_p50", "{:.4g}"),
    "p20-p80": (None, ""),
    "ms/step": ("step_ms_p50", "{:.4g}"),
    "speed-up": ("speedup_image", "{:.3f}x"),
    "of ceiling": ("share_of_floor", "{:.0%}"),
    "peak GiB": ("peak_gib", "{:.1f}"),
    "1st image": ("first_image_s", "{:.3g} s"),
    "max diff": ("max_difference", "{:.1e}"),
    "PSNR": ("psnr_db", "{:.0f} dB"),
}


def table(results: list[dict[str, str]]) -> str:
    """All rows as text, one block a case; a figure that was not measured is a dash."""
    blocks, case = [], None
    width = max((len(row["rung"]) for row in results), default=0)
    timed = [row for row in results if row.get("step_ms_p50")]
    widths = {heading: max([len(heading), *(len(cell(row, heading)) for row in timed)]) for heading in COLUMNS}
    for row in results:
        key = tuple(row[name] for name in ("width", "height", "steps", "cfg", "batch", "text_tokens"))
        if key != case:
            case = key
            guidance = "CFG" if row["cfg"] == "True" else "no CFG"
            title = f"{key[0]}x{key[1]}, {key[2]} steps, {guidance}, batch {key[4]}, text {key[5]} tokens"
            blocks += ["", title, f"  {'':{width}}  " + "  ".join(f"{heading:>{widths[heading]}}" for heading in COLUMNS)]
        if not row.get("step_ms_p50"):
            blocks.append(f"  {row['rung']:{width}}  {row['status']}: {row['reason']}")
            continue
        cells = "  ".join(f"{cell(row, heading):>{widths[heading]}}" for heading in COLUMNS)
        computed = row["measured_steps"] != row["steps"]
        remarks = [row["detail"]] * bool(row["detail"]) + [f"from {row['measured_steps']} steps"] * computed
        remarks += ["lossy"] * (row["lossy"] == "True") + [f"{row['status']}: {row['reason']}"] * (row["status"] != "ok")
        blocks.append(f"  {row['rung']:{width}}  {cells}  {'; '.join(remarks)}".rstrip())
    return "\n".join(blocks[1:])


def cell(row: dict[str, str], heading: str) -> str:
    """One figure of the table."""
    name, form = COLUMNS[heading]
    if name is None:
        return f"{float(row['image_s_p20']):.3g}-{float(row['image_s_p80']):.3g}"
    value = row.get(name, "")
    if not value:
        return "-"
    number = float(value)
    return "equal" if name == "psnr_db" and math.isinf(number) else form.format(number)
