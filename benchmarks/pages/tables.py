"""The tables of README and docs, from the committed rows: each stands between `<!-- table: NAME -->` and `<!-- /table -->`.

    python -m benchmarks.pages.tables [--check]

`--check` changes nothing and fails where a table is not what the rows say. A table more is a function more in `TABLES`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable

from ..shared.source import ROOT
from .committed import (
    CASE,
    COMPILED,
    ENABLED,
    STOCK,
    Row,
    case_name,
    cells,
    guidance,
    heading,
    measured_on_gpu,
    newest,
    on_gpu,
    rows_of,
)
from .family import edits, invariant, lora, sizes, whole
from .memory import measured_memory, measured_recipes, resident_memory

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)


def _pair(row: Row) -> tuple[str, str]:
    """Stock's seconds; ours and the ratio."""
    return f"{float(row['stock_p50']):.3f} s", f"{float(row['fast_p50']):.3f} s, {float(row['ratio_p50']):.3f}x"


def _difference(value: str) -> str:
    return "equal to the bit" if float(value) == 0 else f"at most {float(value):.1e} apart"


def pipeline_lines(rows: Iterable[Row] | None = None) -> list[str]:
    """Whole pictures of small models on the CPU."""
    lines = []
    for row in newest(rows_of("pipeline"), "model", "pixels", "steps", "true_cfg_scale") if rows is None else rows:
        what = f"{row['model']} model, {row['pixels']}x{row['pixels']}, {row['steps']} steps, {guidance(row)}"
        lines.append(cells(what, *_pair(row), f"fp32; latents {_difference(row['max_latent_difference'])}"))
    return lines


def vae_lines() -> list[str]:
    """The VAE at its full width on the CPU."""
    lines = []
    for row in newest(rows_of("vae"), "what", "pixels", "dtype"):
        what = f"VAE {row['what']}, full width, {row['pixels']}x{row['pixels']}"
        lines.append(cells(what, *_pair(row), f"{row['dtype']}; {_difference(row['max_difference'])}"))
    return lines


def text_lines() -> list[str]:
    """Prompt and negative prompt through a text encoder with the real vocabulary, and prompts that are in the cache."""
    lines = []
    for row in newest(rows_of("text"), "dtype", "layers", "width", "tokens", "negative_tokens", "what"):
        if row["tokens"] != row["negative_tokens"]:
            continue  # a table is short
        if row["what"] == "encode":
            size = f"{row['layers']} layers {row['width']} wide"
            what = f"text encoder, {size}, {row['tokens']} + {row['negative_tokens']} tokens"
            lines.append(cells(what, *_pair(row), f"{row['dtype']}; {_difference(row['max_difference'])}"))
        elif row["what"] == "hit":
            what = f"a prompt of {row['tokens']} tokens in the cache"
            lines.append(cells(what, "", f"{float(row['fast_p50']) * 1e3:.2f} ms", row["dtype"]))
    return lines


def cpu() -> list[str]:
    """Everything that was measured on one thread of a CPU."""
    lines = [line for found in (pipeline_lines, vae_lines, text_lines) for line in found()]
    return heading("one CPU thread", "stock diffusers", "qwen_fast", "") + lines


def gpu() -> list[str]:
    """The full-size model on GPUs, or that there is no such row."""
    lines = []
    for row in (row for row in measured_on_gpu(ENABLED) if row["batch"] == "1"):
        computed = "" if row["measured_steps"] == row["steps"] else f", computed from {row['measured_steps']} steps"
        stock, ours = f"{float(row['stock_image_s']):.2f} s", f"{float(row['image_s_p50']):.2f} s"
        where = f"{row['machine']}, {row['dtype']}{computed}"
        lines.append(cells(case_name(row), stock, ours, f"{float(row['speedup_image']):.2f}x", where))
    if not lines:
        return ["No GPU result is committed yet, and none is claimed."]
    return heading("one picture", "stock diffusers", "qwen_fast", "speed-up", "measured on") + lines


def changing() -> list[str]:
    """A new size and another prompt length with each call."""
    right = [row for row in rows_of("changing") if on_gpu(row) and row["status"] == "ok" and row["rung"] == ENABLED]
    lines = []
    for row in newest(right, "machine", "model", "dtype", "width", "height", "steps", "cfg"):
        seconds = (f"{float(row[name]):.2f} s" for name in ("stock_new_s", "new_s_p50", "repeated_s"))
        lines.append(cells(f"about {case_name(row)}", *seconds, f"{float(row['speedup_new']):.2f}x", row["machine"]))
    if not lines:
        return ["No such row is committed yet; `qwen-fast bench --changing 1024x1024,50` makes them."]
    return heading("pictures of", "stock, a new size", "qwen_fast, a new size", "the same again", "speed-up", "card") + lines


def first_call() -> list[str]:
    """The first picture of a size in a process, beside the later ones."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in measured_on_gpu(STOCK, COMPILED, ENABLED):
        if row["first_image_s"]:
            found.setdefault((row["machine"], case_name(row)), {})[row["rung"]] = row
    lines = []
    for (machine, case), rungs in found.items():
        pairs = (rungs.get(rung) for rung in (STOCK, COMPILED, ENABLED))
        figures = (
            "" if row is None else f"{float(row['first_image_s']):.1f} s, {float(row['image_s_p50']):.1f} s" for row in pairs
        )
        lines.append(cells(case, *figures, machine))
    if not lines:
        return ["No row of a GPU is committed yet."]
    return heading("the first picture, a later one", "stock", "stock with regional compile", "qwen_fast", "card") + lines


def ladder() -> list[str]:
    """Every rung of the newest whole ladder, on a GPU if there is one."""
    rows = rows_of("ladder")
    rows = [row for row in rows if on_gpu(row)] or rows
    rungs: list[Row] = []
    if rows:
        complete = [row for row in rows if row["rung"] == "+ fused transformer"]  # other cases have a few rungs
        same = ("machine", "model", "dtype", *CASE)
        last = tuple((complete or rows)[-1][name] for name in same)
        rows = [row for row in rows if tuple(row[name] for name in same) == last]
        rungs = newest([row for row in rows if row["commit"] == (complete or rows)[-1]["commit"]], "rung")
        known = {row["rung"] for row in rungs}  # what the whole run has not is of another one, and says so
        others = newest([row for row in rows if row["rung"] not in known], "rung")
        rungs += [row | {"rung": f"{row['rung']} ({row['commit'].split()[0]})"} for row in others]
    if not rungs:
        return ["No ladder is committed yet, neither of a GPU nor of a CPU; `qwen-fast bench` measures one."]
    first = rungs[0]
    title = f"{case_name(first)}, text {first['text_tokens']} tokens; {first['model']}; {first['dtype']}, {first['machine']}"
    lines = [f"{title}, commit {first['commit']}.", ""]
    lines += heading("rung", "s an image", "ms a step", "speed-up", "of the ceiling", "largest latent difference")
    for row in rungs:
        if row["status"] != "ok":
            lines.append(cells(row["rung"], f"{row['status']}: {row['reason']}".replace("|", "/"), "", "", "", ""))
            continue
        speed = f"{float(row['speedup_image']):.3f}x" if row["speedup_image"] else ""
        lossy = ", lossy" if row["lossy"] == "True" else ""
        figures = f"{float(row['image_s_p50']):.4g}", f"{float(row['step_ms_p50']):.4g}", speed
        share, difference = f"{float(row['share_of_floor']):.0%}", f"{float(row['max_difference']):.1e}{lossy}"
        lines.append(cells(row["rung"], *figures, share, difference))
    return lines


QUALITY = ("width", "height", "steps")


def quality_rows() -> list[Row]:
    """Of all prompts: for each mode and setting the row of the most pictures, the last of them."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows_of("quality"):
        key = (row["mode"], *(row[name] for name in QUALITY))
        if row["things"] == "all" and int(row["pictures"]) >= int(best.get(key, {"pictures": 0})["pictures"]):
            best[key] = row
    return list(best.values())


def _setting(row: Row) -> str:
    return f"{row['width']}x{row['height']}, {row['steps']} steps"


def quality() -> list[str]:
    """What each mode does to the demo checkpoint's pictures."""
    rows = [row for row in quality_rows() if not row["mode"].startswith(("error-", "stock-alone"))]
    if not rows:
        return ["No row is committed yet; `python -m benchmarks.quality` makes them."]
    names = ("mode", "setting", "pictures", "as the prompt says", "same verdict", "PSNR", "largest latent difference")
    lines = heading(*names)
    for row in rows:
        compared = row["mode"] != row["reference"]
        names = {"stock": "stock diffusers", "stock-alone": "stock, one picture a call", "stock-bf16": "stock in bf16"}
        names |= {"lightning-4": "stock with the same LoRA"}
        to = f", to {names.get(row['reference'], row['reference'])}" if compared else ""
        figures = (f"{float(row['same_verdict']):.1%}", f"{float(row['psnr_p50']):.1f} dB", f"{float(row['latent_max']):.1e}")
        figures = tuple(figure.replace("inf dB", "equal") for figure in figures) if compared else ("", "", "")
        lines.append(cells(f"{row['about']}{to}", _setting(row), row["pictures"], f"{float(row['everything']):.1%}", *figures))
    return lines


def schedule_errors() -> list[str]:
    """What the historical schedules do to the demo checkpoint's pictures: distance to the right ones and verdicts."""
    rows = [row for row in quality_rows() if row["mode"].startswith("error-")]
    settings = list(dict.fromkeys(_setting(row) for row in sorted(rows, key=lambda row: [int(row[name]) for name in QUALITY])))
    if not rows:
        return ["No row is committed yet; `python -m benchmarks.quality` makes them."]
    lines = heading("PSNR to the right schedule's picture, same verdict", *settings)
    for mode in dict.fromkeys(row["about"] for row in rows):
        found = {_setting(row): row for row in rows if row["about"] == mode}
        shown = (f"{float(row['psnr_p50']):.1f} dB, {float(row['same_verdict']):.1%}" for row in map(found.get, settings))
        lines.append(cells(mode, *(text.replace("inf dB", "equal") for text in shown)))
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "gpu": gpu,
    "whole": whole,
    "cpu": cpu,
    "ladder": ladder,
    "changing": changing,
    "first-call": first_call,
    "edits": edits,
    "lora": lora,
    "invariant": invariant,
    "sizes": sizes,
    "resident-memory": resident_memory,
    "measured-memory": measured_memory,
    "measured-recipes": measured_recipes,
    "quality": quality,
    "schedule-errors": schedule_errors,
}


def filled(text: str) -> str:
    """`text` with every table as the rows say.

    Raises:
        ValueError: a marker names no table.
    """

    def table(match: re.Match) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"<!-- table: {match[2]} --> names none of {', '.join(TABLES)}")
        return match[1] + "\n".join(TABLES[match[2]]()) + "\n" + match[4]

    return _MARKED.sub(table, text)


def outdated(text: str) -> list[str]:
    """Names of the tables of `text` that are not what the rows say."""
    now = {match[2]: match[3] for match in _MARKED.finditer(text)}
    then = {match[2]: match[3] for match in _MARKED.finditer(filled(text))}
    return [name for name in now if now[name] != then[name]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where a table is not what the rows say; change nothing")
    options = parser.parse_args()
    wrong = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        names = outdated(text)
        if names and options.check:
            wrong += 1
            said = "not what benchmarks/results says; run python -m benchmarks.pages.tables"
            print(f"{page}: {', '.join(names)}: {said}", file=sys.stderr)
        elif names:
            page.write_text(filled(text), encoding="utf-8")
            print(f"{page}: {', '.join(names)} changed")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
