"""What a mode does to the pictures: do they follow their prompts, and how far are they from the lossless ones?

    python -m benchmarks.quality [--modes ours steps-8 ...] [--seeds N] [--sizes WxH ...] [--steps N ...] [--out DIR]
                                 [--append benchmarks/results/quality.csv] [--sheet FILE.png] [--check]

Every mode draws the same noise for the same held-out prompts. Finished blocks stay in --out: the same
command goes on where it was cut. --check: exit code 1 if a mode that claims to be lossless breaks the numerical contract.
scikit-image and scipy, which the `test` extra brings, are needed.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from qwen_fast.cli import arguments
from qwen_fast.cli.arguments import positive_int
from qwen_fast.cli.pngs import save_png
from qwen_fast.common.hardware import check_device
from qwen_fast.demo import checkpoint
from qwen_fast.demo.judge import Verdict, judge

from ..shared.machine import PROVENANCE, provenance
from ..shared.rows import RowFile
from .metrics import FIELDS as METRICS
from .metrics import Perceptual, latent_differences, psnr, ssim, summarise
from .modes import MODES, Mode, Setting
from .pictures import Model, Pictures, SeededRequest, Store, cases, draw, identity
from .sheet import Line, contact_sheet

LATENT_LIMIT = 2e-6  # fp32 on the CPU: largest difference in units of the picture's largest latent
VERDICT_LIMIT = 0.99  # elsewhere: share of pictures with the reference's verdict
PAGE = 6  # modes on a page of the contact sheet: as high as a screen
SCOPES = {"one": (1,), "two": (2,), "all": (1, 2)}  # things in the prompt
FIELDS = [*PROVENANCE, "checkpoint_sha256", "mode", "about", "dtype", "reference", "lossless", "width", "height", "steps"]
FIELDS += ["things", "pictures", *METRICS]


@dataclass(frozen=True)
class Result:
    """A mode's pictures in a setting, judged and compared with its reference's, picture by picture."""

    name: str
    mode: Mode
    setting: Setting
    drawn: Pictures
    verdicts: list[Verdict]
    references: list[Verdict]
    distances: dict[str, list[float]]

    def scope(self, cases: Sequence[SeededRequest], things: tuple[int, ...]) -> dict[str, Any] | None:
        """The figures over prompts of so many things; None: there is no such prompt."""
        which = [i for i, case in enumerate(cases) if len(case.request.things) in things]
        if not which:
            return None
        distances = {name: [values[i] for i in which] for name, values in self.distances.items()}
        verdicts, references = ([found[i] for i in which] for found in (self.verdicts, self.references))
        return {"pictures": len(which)} | summarise(verdicts, references, distances)


def measure(
    model: Model, modes: dict[str, Mode], setting: Setting, todo: list[SeededRequest], batch: int, store: Store
) -> list[Result]:
    """Draw, judge and compare every mode; references come before the modes that need them in `modes`."""
    perceptual = Perceptual(model.pipe(torch.float32).vae)
    drawn: dict[str, Pictures] = {}
    verdicts: dict[str, list[Verdict]] = {}
    results = []
    for name, mode in modes.items():
        drawn[name] = draw(model, name, mode, setting, todo, batch, store)
        verdicts[name] = [judge(picture, case.request) for picture, case in zip(drawn[name].pictures, todo, strict=True)]
        ours, theirs = drawn[name], drawn[mode.reference]
        pairs = list(zip(ours.pictures, theirs.pictures, strict=True))
        largest, mean = latent_differences(ours.latents, theirs.latents)
        distances = {
            "psnr": [psnr(*pair) for pair in pairs],
            "ssim": [ssim(*pair) for pair in pairs],
            "perceptual": perceptual(ours.pictures, theirs.pictures),
            "latent_max": largest.tolist(),
            "latent_mean": mean.tolist(),
        }
        results.append(Result(name, mode, setting, ours, verdicts[name], verdicts[mode.reference], distances))
    return results


def breaches(results: Sequence[Result], todo: Sequence[SeededRequest], device: torch.device) -> list[str]:
    """Where a mode that claims to be lossless is not, one line each."""
    found = []
    for result in results:
        if not result.mode.lossless:
            continue
        title = f"{result.name} {result.setting.name}"
        if result.mode.dtype == torch.float32 and device.type == "cpu":
            for case, difference in zip(todo, result.distances["latent_max"], strict=True):
                if not difference <= LATENT_LIMIT:  # NaN is one too
                    found.append(
                        f"{title}: latents of seed {case.seed} ({case.request.prompt!r}) differ from {result.mode.reference}'s "
                        f"by {difference:.2g} x max|latent|; {LATENT_LIMIT:g} is allowed"
                    )
            continue
        if not np.isfinite(result.distances["latent_max"]).all():
            found.append(f"{title}: latents are not finite")
        same = float(np.mean([a == b for a, b in zip(result.verdicts, result.references, strict=True)]))
        if same < VERDICT_LIMIT:
            found.append(
                f"{title}: {same:.1%} of {len(todo)} verdicts are those of {result.mode.reference}; "
                f"{VERDICT_LIMIT:.0%} are needed"
            )
    return found


def table(results: Sequence[Result], todo: Sequence[SeededRequest]) -> str:
    """Markdown: one line for each mode and setting; prompt following with its interval of 95 %, then the distances."""
    parts = ("colour", "shape", "both")
    heads = ["mode", "size, steps", *(f"{part}, one thing" for part in parts), "all, one thing", "all, two things"]
    heads += ["same verdict", "PSNR, dB", "SSIM", "perceptual", "largest latent difference"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        one, two, every = (result.scope(todo, things) for things in SCOPES.values())
        setting = result.setting
        cells = [result.mode.about, f"{setting.width}x{setting.height}, {setting.steps}"]
        cells += [_share(one, part) for part in (*parts, "everything")] + [_share(two, "everything")]
        if result.name == result.mode.reference:
            cells += [""] * 5
        else:
            cells += [f"{100 * every['same_verdict']:.1f} %", f"{every['psnr_p50']:.1f}", f"{every['ssim_mean']:.4f}"]
            cells += [f"{every['perceptual_mean']:.2g}", f"{every['latent_max']:.2g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(figures: dict[str, Any] | None, part: str) -> str:
    if figures is None or part not in figures:
        return "-"
    value, low, high = (100 * figures[name] for name in (part, f"{part}_low", f"{part}_high"))
    return f"{value:.1f} % [{low:.1f}, {high:.1f}]"


def rows(results: Sequence[Result], todo: Sequence[SeededRequest], model: Model) -> list[dict[str, Any]]:
    """One row for each mode, setting and number of things in the prompt."""
    where = provenance(model.device)
    found = []
    for result in results:
        mode, setting = result.mode, result.setting
        what = {"checkpoint_sha256": model.sha256, "mode": result.name, "about": mode.about, "reference": mode.reference}
        what |= {"dtype": str(mode.dtype).removeprefix("torch."), "lossless": mode.lossless}
        what |= {"width": setting.width, "height": setting.height}
        what["steps"] = mode.call.get("num_inference_steps", setting.steps)
        for scope, things in SCOPES.items():
            figures = result.scope(todo, things)
            if figures is not None:
                rounded = {key: value if isinstance(value, int) else f"{value:.6g}" for key, value in figures.items()}
                found.append(where | what | {"things": scope} | rounded)
    return found


def with_references(names: Sequence[str]) -> dict[str, Mode]:
    """The modes of these names and all that they are compared with, each after its reference.

    Raises:
        ValueError: a name that is not of MODES.
    """
    chosen: dict[str, Mode] = {}

    def add(name: str) -> None:
        if name not in MODES:
            raise ValueError(f"--modes {name}: no such mode; there are {', '.join(MODES)}")
        if name not in chosen:
            if MODES[name].reference != name:
                add(MODES[name].reference)
            chosen[name] = MODES[name]

    for name in names:
        add(name)
    return chosen


def distance_note(every: Mapping[str, Any], reference: str) -> str:
    """How far a mode's pictures are from its reference's, for people."""
    equal = math.isinf(every["psnr_p50"])
    figures = "equal" if equal else f"PSNR {every['psnr_p50']:.1f} dB, SSIM {every['ssim_mean']:.3f}"
    return f"{figures}\n{textwrap.fill(f'to {reference}', 32)}"


def sheets(results: Sequence[Result], todo: Sequence[SeededRequest], columns: int) -> list[Any]:
    """The contact sheets of one setting's results, `PAGE` modes on each; stock's pictures head every page."""
    setting = results[0].setting
    lines = []
    for result in results:
        every = result.scope(todo, SCOPES["all"])
        note = f"follows the prompt: {100 * every['everything']:.1f} %\n(of {len(todo)} pictures)"
        if result.name != result.mode.reference:
            note += f"\n{distance_note(every, MODES[result.mode.reference].about)}"
        lines.append(Line(result.mode.about, note, result.drawn.pictures[:columns], result.verdicts[:columns]))
    captions = [f"seed {case.seed}: {case.request.prompt}" for case in todo[:columns]]
    pages = [
        lines[:PAGE],
        *([lines[0], *more] for more in (lines[n : n + PAGE - 1] for n in range(PAGE, len(lines), PAGE - 1))),
    ]
    title = f"{setting.width}x{setting.height}, {setting.steps} steps"
    numbered = [title if len(pages) == 1 else f"{title}, page {n} of {len(pages)}" for n in range(1, len(pages) + 1)]
    return [contact_sheet(one, captions, page) for one, page in zip(numbered, pages, strict=True)]


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--modes", nargs="+", metavar="MODE", help=f"default: all that the checkpoint has of {', '.join(MODES)}")
    found.add_argument("--seeds", type=positive_int, default=200, metavar="N", help="pictures a mode (default: 200)")
    found.add_argument("--sizes", type=arguments.size, nargs="+", default=[(64, 64)], metavar="WxH", help="default: 64x64")
    found.add_argument("--steps", type=positive_int, nargs="+", default=[20], metavar="N", help="default: 20")
    found.add_argument("--model", metavar="FOLDER", help="a checkpoint of the demo's world (default: the demo's)")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    found.add_argument("--batch", type=positive_int, default=16, metavar="N", help="most pictures in a call (default: 16)")
    found.add_argument("--out", type=Path, default=Path("quality"), metavar="DIR", help="pictures (default: quality)")
    found.add_argument("--append", type=Path, metavar="FILE.csv", help="gets one row a mode, setting and number of things")
    found.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="of the first setting, more pages beside it; others in --out"
    )
    found.add_argument("--columns", type=positive_int, default=10, metavar="N", help="of the sheet (default: 10)")
    found.add_argument("--check", action="store_true", help="exit code 1 if a lossless mode breaks the numerical contract")
    return found


def _fits(mode: Mode, folder: Path) -> bool:
    return mode.needs is None or (folder / mode.needs).is_dir()


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, print, append, check; 130 when interrupted."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    try:
        folder = Path(options.model or checkpoint())
        modes = with_references(options.modes or [name for name, mode in MODES.items() if _fits(mode, folder)])
        for name, mode in modes.items():
            if not _fits(mode, folder):
                raise ValueError(f"--modes {name} needs {folder / mode.needs}, which this checkpoint does not have")
        if options.check and not any(mode.lossless for mode in modes.values()):
            lossless = [name for name, mode in MODES.items() if mode.lossless]
            raise ValueError(f"--check has nothing to check: name one of {', '.join(lossless)} in --modes")
        if options.sheet is not None and options.sheet.suffix.lower() != ".png":
            raise ValueError(f"--sheet {options.sheet}: a name ending in .png is needed")
        model = Model(folder, check_device(options.device))
        store = Store(options.out, identity(model, options.batch))
        table_of_rows = RowFile(options.append, FIELDS) if options.append else None
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if table_of_rows is not None and table_of_rows.note:
        print(table_of_rows.note)
    todo, settings = cases(options.seeds), [Setting(*size, steps) for size in options.sizes for steps in options.steps]
    results: list[Result] = []
    try:
        for setting in settings:
            found = measure(model, modes, setting, todo, options.batch, store)
            path = options.sheet if options.sheet and setting is settings[0] else options.out / f"{setting.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            for number, page in enumerate(sheets(found, todo, options.columns), 1):
                file = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
                save_png(page, file, {}, overwrite=True, find_free_name=False)
                print(f"contact sheet: {file}")
            results += found
    except KeyboardInterrupt:
        print(f"interrupted; finished blocks are in {options.out}, and the same command goes on from there", file=sys.stderr)
        return 130
    print(f"\n{table(results, todo)}\n")
    if table_of_rows is not None:
        for row in rows(results, todo, model):
            table_of_rows.add(row)
        print(f"rows appended to {table_of_rows.path}")
    broken = breaches(results, todo, model.device)
    print("\n".join(broken) or f"lossless modes keep the contract: {_lossless(results)}")
    return int(bool(broken) and options.check)


def _lossless(results: Sequence[Result]) -> str:
    return ", ".join(f"{result.name} {result.setting.name}" for result in results if result.mode.lossless) or "none was drawn"


if __name__ == "__main__":
    raise SystemExit(main())
