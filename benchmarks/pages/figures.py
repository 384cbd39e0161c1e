"""The figures of `plots`: axes and marks from rows, nothing of files.

Rows are of ladder.csv, ceilings.csv and operators.csv, as text, by column.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qwen_fast.cli.plot import new_figure

from ..shared.shapes import PictureCase, Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, str]
CASE = ("width", "height", "steps", "cfg", "batch", "text_tokens")
_STOCK, _OURS, _BEST = "stock diffusers", "qwen_fast", "qwen_fast as enabled"
_GREY, _PALE, _BLUE, _GREEN, _RED = "#7a7a7a", "#b4b4b4", "#2f6fb3", "#3f9c6b", "#c0392b"
_COLORS = (  # dark ones, then their light companions
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#000000"),
    *("#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#dbdb8d", "#9edae5", "#c7c7c7"),
)
_VARIANTS = {"ours": ("o", "qwen_fast"), "compiled": ("^", "torch.compile"), "stock": ("x", "stock diffusers")}
_NO_RATE = {"flow_match_schedule", "schedule"}  # 160 FLOPs: a latency


def is_measured(row: Row) -> bool:
    return row["status"] == "ok" and bool(row["image_s_p50"])


def case_name(row: Row) -> str:
    guidance = "CFG" if row["cfg"] == "True" else "no CFG"
    size = f"{row['width']}x{row['height']}, {row['steps']} steps, {guidance}, batch {row['batch']}"
    return f"{size}, text {row['text_tokens']} tokens"


def place(row: Row) -> str:
    """Where a row was measured, for a title."""
    model = row.get("model", "").replace("random, ", "random weights, ")
    parts = [row["machine"], model, _dtype(row["dtype"]), f"torch {row['torch']}", f"commit {row['commit'].split(' ')[0]}"]
    return " · ".join(part for part in parts if part)


# Ladder ---------------------------------------------------------------------------------------------------------------


def ladder_figure(rows: Sequence[Row]) -> "Figure":
    if not rows:
        raise ValueError("there are no rows of a ladder to draw")
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), []).append(row)
    rungs = max(cases.values(), key=len)
    timed = [row for row in rungs if row["image_s_p50"]]
    if not any(is_measured(row) for row in rungs):
        raise ValueError(f"no rung of {case_name(rungs[0])} was measured: {rungs[0]['status']}: {rungs[0]['reason']}")

    figure = new_figure((10, 1.3 + 0.42 * len(rungs)), "a plot", layout=None)
    axes = figure.subplots()
    # Room for the columns at the right, whose places are in parts of the axes' own width.
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.23, right=0.605, top=1 - 0.85 / height, bottom=0.72 / height)
    for y, row in enumerate(rungs):
        if row["image_s_p50"]:
            _bar(axes, y, row)
        else:
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            why = _shortened(f"{row['status']}: {row['reason']}")
            axes.text(0.012, y, why, **_inside(axes), style="italic", color=_GREY, bbox=behind)
    axes.set_yticks(range(len(rungs)), [row["rung"] for row in rungs], fontsize=9.5)
    axes.set_ylim(len(rungs) - 0.4, -0.6)
    axes.set_xlim(0, 1.06 * max(float(row["image_s_p80"]) for row in timed))
    axes.set_xlabel("seconds per image (median, whiskers from p20 to p80)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    stock = next((row for row in rungs if row["rung"] == _STOCK and is_measured(row)), None)
    if stock is not None:
        axes.axvline(float(stock["image_s_p50"]), color=_GREY, linestyle="--", linewidth=1, zorder=0)
    _columns(axes, rungs)
    figure.suptitle(case_name(rungs[0]), x=0.01, ha="left", fontsize=12, fontweight="bold", y=1 - 0.12 / height, va="top")
    figure.text(0.01, 1 - 0.40 / height, place(rungs[0]), fontsize=8.5, color=_GREY, va="top")
    computed = sorted({row["measured_steps"] for row in timed if row["measured_steps"] != row["steps"]})
    notes = [f"computed from {' or '.join(computed)} measured steps"] if computed else ["all steps measured"]
    notes.append("ceiling: products and attention of a step at this machine's own sustained rates")
    figure.text(0.01, 0.06 / height, "; ".join(notes), fontsize=8, color=_GREY)
    return figure


def _bar(axes: "Axes", y: int, row: Row) -> None:
    low, median, high = (float(row[f"image_s_{part}"]) for part in ("p20", "p50", "p80"))
    wrong, lossy = row["status"] != "ok", row["lossy"] == "True"
    hatch = "xxx" if wrong else "///" if lossy else None
    axes.barh(
        y, median, 0.66, color="white" if wrong else color_of(row["rung"]), edgecolor=_RED if wrong else "white", hatch=hatch
    )
    axes.errorbar(median, y, xerr=[[median - low], [high - median]], color="black", linewidth=1, capsize=2)


def color_of(rung: str) -> str:
    """Stock dark grey, what else stock can do pale, ours blue, others' work green."""
    if rung == _STOCK:
        return _GREY
    if rung.startswith("stock"):
        return _PALE
    return _BLUE if rung.startswith(("+", "packed", _OURS)) else _GREEN


def _inside(axes: "Axes") -> dict:
    return {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5}


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


_HEADINGS = ("s/image", "against stock", "of ceiling", "max difference", "PSNR")
_COLUMN_X = (1.13, 1.37, 1.57, 1.85, 2.01)  # right edges, in widths of the axes


def _columns(axes: "Axes", rungs: list[Row]) -> None:
    for x, heading in zip(_COLUMN_X, _HEADINGS, strict=True):
        axes.text(x, -0.75, heading, **_inside(axes), ha="right", color=_GREY)
    for y, row in enumerate(rungs):
        if not row["image_s_p50"]:
            continue
        if row["status"] == "ok":
            speedup = "1" if row["rung"] == _STOCK else f"{float(row['speedup_image']):.3f}x" if row["speedup_image"] else ""
            cells = [f"{float(row['image_s_p50']):.4g}", speedup, f"{float(row['share_of_floor']):.0%}", *_quality(row)]
        else:
            cells = [f"{float(row['image_s_p50']):.4g}", row["status"], "", *_quality(row)]
        for x, cell in zip(_COLUMN_X, cells, strict=True):
            color = _RED if row["status"] != "ok" else "black"
            axes.text(x, y, cell, **_inside(axes), ha="right", color=color)


def _quality(row: Row) -> tuple[str, str]:
    """Largest difference from stock's latents and PSNR."""
    if row["rung"] == _STOCK:
        return "", ""
    if math.isinf(float(row["psnr_db"])):
        return "equal", ""
    lossy = " lossy" if row["lossy"] == "True" else ""
    return f"{float(row['max_difference']):.1e}{lossy}", f"{float(row['psnr_db']):.0f} dB"


# Roofline -------------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """One measurement under a roof; `name` is the operator's or the step's, `variant` one of `_VARIANTS`."""

    name: str
    variant: str
    intensity: float  # FLOPs per byte
    rate: float  # FLOP/s, of the median
    least: float  # of the 80th percentile of the time, where that is known
    most: float  # of the 20th, or of the shortest time


def point_of(row: Row) -> Point | None:
    """Where a row of the operators or of the ladder lies; None if it has no place: not measured, its work not known, or
    another variant than those that are drawn."""
    if "bytes" in row:
        name, variant = row["group"].split(":")[0], {"op": "ours", "fast": "ours"}.get(row["variant"], row["variant"])
        if name in _NO_RATE or variant not in _VARIANTS:
            return None
        flops, moved = float(row["flops"]), float(row["bytes"])
        seconds = (float(row[f"seconds_{part}"]) for part in ("p50", "p50", "min"))
        return Point(name, variant, flops / moved, *(flops / one for one in seconds))
    model = re.fullmatch(r"random, (\d+) layers, (\d+) x (\d+)", row["model"])
    variant = {_STOCK: "stock", _BEST: "ours", "stock + regional compile": "compiled"}.get(row["rung"])
    if model is None or variant is None or not is_measured(row):
        return None
    width, height, steps, batch, text = (int(row[name]) for name in ("width", "height", "steps", "batch", "text_tokens"))
    work = PictureCase(width, height, steps, row["cfg"] == "True", batch, text, Shape(*map(int, model.groups()))).work()
    size = 4 if row["dtype"] == "float32" else 2
    moved = sum((m * k + k * n + m * n) * count for m, k, n, count in work.products)
    moved += sum(2 * (queries + keys) * heads * dim * count for queries, keys, heads, dim, count in work.attentions)
    flops = work.product_flops + work.attention_flops
    name = f"step, {width}x{height}, batch {batch}, {'CFG' if row['cfg'] == 'True' else 'no CFG'}"
    seconds = (float(row[f"step_ms_{part}"]) / 1e3 for part in ("p50", "p80", "p20"))
    return Point(name, variant, flops / (moved * size), *(flops / one for one in seconds))


def roofline_figure(rows: Sequence[Row], ceilings: Sequence[Row]) -> "Figure":
    points = [point for point in map(point_of, rows) if point is not None]
    if not points:
        raise ValueError("there are no rows of operators or steps to draw under a roofline")
    rates: dict[tuple[str, str], float] = {}
    for row in ceilings:  # a card's rate depends on how warm it is: the highest one is the roof
        key = row["what"], row["detail"]
        rates[key] = max(float(row["rate"]), rates.get(key, 0.0))
    copy = next((rate for (what, _), rate in rates.items() if what == "copy"), None)
    products = {detail: rate for (what, detail), rate in rates.items() if what == "matrix product"}
    if copy is None or not products:
        raise ValueError("there are no ceilings (a copy and a matrix product) to draw a roofline from")

    figure = new_figure((10, 5), "a plot")
    axes = figure.subplots()
    unit, scale = ("TFLOP/s", 1e12) if max(products.values()) >= 1e12 else ("GFLOP/s", 1e9)
    ridge = max(products.values()) / copy
    low = min(ridge / 8, *(point.intensity / 2 for point in points))
    high = 2 * max(2 * ridge, *(point.intensity for point in points))
    roofs = [(f"products in {_dtype(detail)}", rate, "-", "bottom") for detail, rate in products.items()]
    attention = [(rate, detail) for (what, detail), rate in rates.items() if what == "attention"]
    roofs += [(f"attention ({detail.split(', ')[-1]})", rate, "--", "top") for rate, detail in sorted(attention)[-1:]]
    for name, rate, style, side in roofs:
        axes.plot([rate / copy, high], [rate / scale] * 2, color="black", linewidth=1.2, linestyle=style, gid=name)
        # Left of the ridge no point can lie; the attention's stands lower, since its rate is close to a product's.
        text = {"textcoords": "offset points", "ha": "right", "va": side, "fontsize": 8.5}
        axes.annotate(f"{name}: {rate / scale:.4g} {unit}", (rate / copy, rate / scale), (-12, 0), **text)
    axes.plot([low, ridge], [low * copy / scale, ridge * copy / scale], color="black", linewidth=1.2, gid="copy")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte", ylabel=unit, xlim=(low, high))
    middle = math.sqrt(low * ridge)
    label = f"copy: {copy / 1e9:.4g} GB/s"
    axes.annotate(label, (middle, middle * copy / scale), (-6, 4), textcoords="offset points", ha="right", fontsize=8.5)
    names = list(dict.fromkeys(point.name for point in points))
    for name, color in zip(names, itertools.cycle(_COLORS), strict=False):
        for variant, (marker, _) in _VARIANTS.items():
            mine = [point for point in points if (point.name, point.variant) == (name, variant)]
            if mine:
                xs, ys = [point.intensity for point in mine], [point.rate / scale for point in mine]
                spread = [[(point.rate - point.least) / scale for point in mine], [(p.most - p.rate) / scale for p in mine]]
                axes.errorbar(xs, ys, yerr=spread, fmt="none", ecolor=color, capsize=3, linewidth=1)
                axes.plot(xs, ys, marker, color=color, fillstyle=_fill(marker), markersize=7, gid=f"{name}, {variant}")
        axes.plot([], [], "s", color=color, markersize=7, label=name)
    for variant in dict.fromkeys(point.variant for point in points):
        marker, label = _VARIANTS[variant]
        axes.plot([], [], marker, color=_GREY, fillstyle=_fill(marker), markersize=7, label=label)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8.5)
    _plain_ticks(axes.xaxis, low, high)
    _plain_ticks(axes.yaxis, *axes.get_ylim())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(place(rows[-1]), fontsize=8.5, color=_GREY, loc="left")
    figure.suptitle("Roofline, from rates sustained for seconds", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _dtype(name: str) -> str:
    """A dtype as people write it."""
    return {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32", "float8_e4m3fn": "FP8"}.get(name, name)


def _fill(marker: str) -> str:
    return "none" if marker == "^" else "full"


# Scaling --------------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """Steps that differ in one thing: its name, a title, what the x axis says, and the rows."""

    title: str
    xlabel: str
    rows: list[Row]


def scaling_figure(rows: Sequence[Row]) -> "Figure":
    rungs = [_STOCK, "stock + regional compile", _BEST]
    measured = [row for row in rows if is_measured(row) and (row["rung"] in rungs or row["lossy"] == "True")]
    panels = [panel for panel in map(_panel, ("size, CFG", "size, no CFG", "batch"), [measured] * 3) if panel.rows]
    if not panels:
        raise ValueError(
            "no two measured rows differ in size or batch alone: measure more cases, such as `qwen-fast bench --full` or "
            "several runs with --size or --batch"
        )
    figure = new_figure((max(8.2, 4.6 * len(panels)), 4.6), "a plot")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        _curves(axes, panel)
    low, high = figure.axes[0].get_ylim()
    figure.axes[0].set_ylim(low / 1.25, high)  # room for the words below the lowest curve
    _plain_ticks(figure.axes[0].yaxis, *figure.axes[0].get_ylim())
    figure.axes[0].set_ylabel("milliseconds a step")
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("A step, and how many times as fast as stock", x=0.01, ha="left", fontsize=12, fontweight="bold")
    where = figure.axes[0].annotate(place(measured[-1]), (0, 1), (0, 24), "axes fraction", "offset points", fontsize=8.5)
    where.set(color=_GREY, in_layout=False)  # longer than the first panel is wide
    figure.axes[0].set_title(f"\n\n{figure.axes[0].get_title(loc='left')}", fontsize=10, loc="left")
    return figure


def _panel(kind: str, rows: list[Row]) -> Panel:
    """The largest set of rows that agree in all but the number of steps and what is varied; no rows if all are of one case."""
    varied = ("batch",) if kind == "batch" else ("width", "height")
    if kind != "batch":
        rows = [row for row in rows if row["cfg"] == str(kind == "size, CFG")]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in CASE if name not in (*varied, "steps")), []).append(row)

    def values(group: list[Row]) -> int:
        return len({tuple(row[name] for name in varied) for row in group})

    largest = max(groups.values(), key=lambda group: (values(group), len(group)), default=[])
    if not largest or values(largest) < 2:
        return Panel("", "", [])
    guidance = "with guidance" if largest[0]["cfg"] == "True" else "without guidance"
    if kind == "batch":
        return Panel(f"{largest[0]['width']}x{largest[0]['height']}, {guidance}", "pictures at once", largest)
    return Panel(guidance + (f", batch {largest[0]['batch']}" if largest[0]["batch"] != "1" else ""), "picture", largest)


def _curves(axes: "Axes", panel: Panel) -> None:
    """A curve for each rung, with whiskers from p20 to p80, and how many times as fast as stock each of ours is."""
    names = {_place_on(row, panel): f"{row['width']}x{row['height']}" for row in panel.rows}
    names = dict(sorted(names.items()))
    if panel.xlabel != "picture":
        names = {value: str(value) for value in names}
    last = {(row["rung"], _place_on(row, panel)): row for row in panel.rows}  # of several step counts the last one
    for rung in dict.fromkeys(row["rung"] for row in panel.rows):
        mine = [row for (name, _), row in sorted(last.items(), key=lambda one: one[0][1]) if name == rung]
        low, middle, high = ([float(row[f"step_ms_{part}"]) for row in mine] for part in ("p20", "p50", "p80"))
        whiskers = [[b - a for a, b in zip(low, middle, strict=True)], [b - a for a, b in zip(middle, high, strict=True)]]
        places = [_place_on(row, panel) for row in mine]
        style = "--" if mine[0]["lossy"] == "True" else "-"
        how = {"color": color_of(rung), "label": rung, "markersize": 5, "capsize": 3, "fmt": "o" + style}
        axes.errorbar(places, middle, yerr=whiskers, gid=rung, **how)
        for x, y, row in zip(places, middle, mine, strict=True):
            if rung == _BEST and row["speedup_step"]:
                text = f"{float(row['speedup_step']):.2g}x"
                axes.annotate(text, (x, y), (0, -13), textcoords="offset points", ha="center", color=_BLUE, fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel=panel.xlabel)
    axes.set_xticks(list(names), list(names.values()))
    axes.set_xlim(min(names) / 1.35, 1.35 * max(names))
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(panel.title, fontsize=10, loc="left")


def _place_on(row: Row, panel: Panel) -> int:
    return (int(row["width"]) // 16) * (int(row["height"]) // 16) if panel.xlabel == "picture" else int(row["batch"])


def _plain_ticks(axis, low: float, high: float) -> None:
    """Ticks at 1, 2 and 5 times the powers of ten, written out: 20, 50, 100 and not powers."""
    values = [step * 10.0**power for power in range(-6, 7) for step in (1, 2, 5)]
    axis.set_ticks([value for value in values if low <= value <= high])
    axis.set_ticklabels([f"{value:g}" for value in values if low <= value <= high])
    axis.set_ticks([], minor=True)
