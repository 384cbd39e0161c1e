"""The tables of the README, from the committed rows: each stands between `<!-- table: NAME -->` and `<!-- /table -->`.

    python -m benchmarks.pages.tables [--check]

`--check` changes nothing and fails where a table is not what the rows say. A file of results more is a function more in
`MEASURED`, which gives lines of the first table.
"""

import argparse
import csv
import math
import re
import sys
from collections.abc import Callable, Iterable

from ..shared.source import RESULTS, ROOT

README = ROOT / "README.md"
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)

Row = dict[str, str]


def rows_of(name: str) -> list[Row]:
    """All rows of results/NAME.csv and, in their order, of name-1.csv and so on; none where there is no such file."""
    numbered = {path: re.fullmatch(rf"{name}(?:-(\d+))?", path.stem) for path in RESULTS.glob(f"{name}*.csv")}
    files = sorted((path for path, match in numbered.items() if match), key=lambda path: int(numbered[path][1] or 0))
    rows = []
    for path in files:
        with path.open(newline="") as file:
            rows += csv.DictReader(file)
    return rows


def newest(rows: Iterable[Row], *key: str) -> list[Row]:
    """The last row of each case, in the order in which the cases first came."""
    last: dict[tuple[str, ...], Row] = {}
    for row in rows:
        last[tuple(row[name] for name in key)] = row
    return list(last.values())


def cells(*values: str) -> str:
    return f"| {' | '.join(values)} |"


def _pair(row: Row) -> tuple[str, str]:
    """Stock's seconds; ours and the ratio."""
    return f"{float(row['stock_p50']):.3f} s", f"{float(row['fast_p50']):.3f} s, {float(row['ratio_p50']):.3f}x"


def _guidance(row: Row) -> str:
    return "CFG" if row.get("cfg") == "True" or float(row.get("true_cfg_scale") or 0) > 1 else "no CFG"


def pipeline_lines() -> list[str]:
    """Whole pictures of small models on the CPU."""
    lines = []
    for row in newest(rows_of("pipeline"), "model", "pixels", "steps", "true_cfg_scale"):
        what = f"{row['model']} model, {row['pixels']}x{row['pixels']}, {row['steps']} steps, {_guidance(row)}"
        lines.append(cells(what, *_pair(row), "1 CPU thread, fp32; latents within 2e-6"))
    return lines


def vae_lines() -> list[str]:
    """The VAE at its full width on the CPU."""
    lines = []
    for row in newest(rows_of("vae"), "what", "pixels", "dtype"):
        what = f"VAE {row['what']}, full width, {row['pixels']}x{row['pixels']}, {row['dtype']}"
        difference = float(row["max_difference"])
        near = "equal to the bit" if difference == 0 else f"within {10 ** math.ceil(math.log10(difference)):.0e}"
        lines.append(cells(what, *_pair(row), f"1 CPU thread; {near.replace('e-0', 'e-')}"))
    return lines


def text_lines() -> list[str]:
    """Prompt and negative prompt through a text encoder with the real vocabulary, and prompts that are in the cache."""
    lines = []
    for row in newest(rows_of("text"), "dtype", "layers", "width", "tokens", "negative_tokens", "what"):
        if row["tokens"] != row["negative_tokens"]:
            continue  # a first screen is short
        if row["what"] == "encode":
            near = "equal to the bit" if float(row["max_difference"]) == 0 else f"within {row['max_difference']}"
            what = (
                f"text encoder, {row['layers']} layers {row['width']} wide, {row['tokens']} + {row['negative_tokens']} tokens"
            )
            lines.append(cells(f"{what}, {row['dtype']}", *_pair(row), f"1 CPU thread; {near}"))
        elif row["what"] == "hit":
            what = f"a prompt of {row['tokens']} tokens in the cache, {row['dtype']}"
            lines.append(cells(what, "", f"{float(row['fast_p50']) * 1e3:.2f} ms", "1 CPU thread"))
    return lines


CASE = ("width", "height", "steps", "cfg", "batch", "text_tokens")
ENABLED = "qwen_fast as enabled"


def on_gpu(row: Row) -> bool:
    return " CPU, " not in row["machine"]


def case_name(row: Row) -> str:
    name = f"{row['width']}x{row['height']}, {row['steps']} steps, {_guidance(row)}"
    return name if row["batch"] == "1" else f"{name}, batch {row['batch']}"


def gpu_lines() -> list[str]:
    """The full-size model on GPUs, or that there is no such row."""
    right = [row for row in rows_of("ladder") if on_gpu(row) and row["status"] == "ok" and row["rung"] == ENABLED]
    lines = []
    for row in newest(right, "machine", "model", "dtype", *CASE):
        computed = "" if row["measured_steps"] == row["steps"] else f", from {row['measured_steps']} steps"
        ours = f"{float(row['image_s_p50']):.3f} s, {float(row['speedup_image']):.3f}x"
        where = f"{row['machine']}, {row['dtype']}, {row['model']}{computed}"
        lines.append(cells(case_name(row), f"{float(row['stock_image_s']):.3f} s", ours, where))
    return lines or [cells("on a GPU", "not measured yet", "not measured yet", "no GPU result is committed; none is claimed")]


MEASURED: tuple[Callable[[], list[str]], ...] = (pipeline_lines, vae_lines, text_lines, gpu_lines)


def measured() -> list[str]:
    """Stock and ours, each with where it was measured."""
    heading = [cells("measured", "stock diffusers", "qwen_fast", "where"), "|---|---|---|---|"]
    return heading + [line for lines in MEASURED for line in lines()]


def ladder() -> list[str]:
    """Every rung of the newest whole ladder, on a GPU if there is one."""
    rows = rows_of("ladder")
    rows = [row for row in rows if on_gpu(row)] or rows
    rungs: list[Row] = []
    if rows:
        complete = [row for row in rows if row["rung"] == "+ fused transformer"]  # other cases have a few rungs
        same = ("machine", "model", "dtype", *CASE)
        last = tuple((complete or rows)[-1][name] for name in same)
        rungs = newest([row for row in rows if tuple(row[name] for name in same) == last], "rung")
    if not rungs:
        return ["No ladder is committed yet, neither of a GPU nor of a CPU; `qwen-fast bench` measures one."]
    first = rungs[0]
    title = f"{case_name(first)}, text {first['text_tokens']} tokens; {first['model']}; {first['dtype']}, {first['machine']}"
    lines = [f"{title}, commit {first['commit']}.", ""]
    lines += [cells("rung", "s an image", "ms a step", "speed-up", "of the ceiling", "largest latent difference")]
    lines += ["|---|---|---|---|---|---|"]
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
    lines = [cells("mode", "setting", "pictures", "as the prompt says", "same verdict", "PSNR", "largest latent difference")]
    lines += ["|---|---|---|---|---|---|---|"]
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
    lines = [cells("PSNR to the right schedule's picture, same verdict", *settings), "|---" * (len(settings) + 1) + "|"]
    for mode in dict.fromkeys(row["about"] for row in rows):
        found = {_setting(row): row for row in rows if row["about"] == mode}
        shown = (f"{float(row['psnr_p50']):.1f} dB, {float(row['same_verdict']):.1%}" for row in map(found.get, settings))
        lines.append(cells(mode, *(text.replace("inf dB", "equal") for text in shown)))
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "measured": measured,
    "ladder": ladder,
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
    text = README.read_text(encoding="utf-8")
    names = outdated(text)
    if not options.check:
        README.write_text(filled(text), encoding="utf-8")
        print(f"{README}: {', '.join(names) or 'nothing'} changed")
        return 0
    if names:
        print(
            f"{README}: {', '.join(names)}: not what benchmarks/results says; run python -m benchmarks.pages.tables",
            file=sys.stderr,
        )
    return 1 if names else 0


if __name__ == "__main__":
    raise SystemExit(main())
