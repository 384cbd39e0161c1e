"""The figures of `plots`: axes and marks from rows, nothing of files.

Rows are of ladder.csv, ceilings.csv and operators.csv, as text, by column.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qwen_fast.cli.plot import new_figure

from ..shared.shapes import PictureCase, Shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Row = dict[str, str]
CASE = ("width", "height", "steps", "cfg", "batch", "text_tokens")
_STOCK, _OURS, _BEST = "stock diffusers", "qwen_fast", "qwen_fast as enabled"
_GREY, _PALE, _BLUE, _GREEN, _RED = "#7a7a7a", "#b4b4b4", "#2f6fb3", "#3f9c6b", "#c0392b"
_VARIANTS = {  # marker, colour, name
    "ours": ("o", _BLUE, "qwen_fast"),
    "compiled": ("^", _GREEN, "torch.compile"),
    "stock": ("X", _GREY, "stock diffusers"),
}
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


def _dtype(name: str) -> str:
    """A dtype as people write it."""
    return {"bfloat16": "BF16", "float16": "FP16", "float32": "FP32", "float8_e4m3fn": "FP8"}.get(name, name)


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
    from matplotlib.patches import Patch

    used = {color_of(row["rung"]) for row in timed}
    kinds = [Patch(color=color, label=name) for color, name in _KINDS.items() if color in used]
    at = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.2 / height), "handlelength": 1.2, "columnspacing": 1.2}
    figure.legend(handles=kinds, **at, ncols=len(kinds), frameon=False, fontsize=8.5)
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


_KINDS = {_GREY: "stock diffusers", _PALE: "what else stock can do", _BLUE: "qwen_fast", _GREEN: "other projects"}


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
    rate: float  # FLOP/s


def point_of(row: Row) -> Point | None:
    """Where a row of the operators or of the ladder lies; None if it has no place: not measured, its work not known, or
    another variant than those that are drawn."""
    if "bytes" in row:
        name, variant = row["group"].split(":")[0], {"op": "ours", "fast": "ours"}.get(row["variant"], row["variant"])
        if name in _NO_RATE or variant not in _VARIANTS:
            return None
        flops, moved = float(row["flops"]), float(row["bytes"])
        return Point(name, variant, flops / moved, flops / float(row["seconds_p50"]))
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
    return Point(name, variant, flops / (moved * size), flops / float(row["step_ms_p50"]) * 1e3)


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

    figure = new_figure((10, 5.2), "a plot")
    axes = figure.subplots()
    unit, scale = ("TFLOP/s", 1e12) if max(products.values()) >= 1e12 else ("GFLOP/s", 1e9)
    if any(row["dtype"] in products for row in rows):  # a roof of another dtype says nothing of these points
        products = {detail: rate for detail, rate in products.items() if detail in {row["dtype"] for row in rows}}
    ridge = max(products.values()) / copy
    low = min(ridge / 4, *(point.intensity / 2 for point in points))
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
    names = dict.fromkeys(point.name for point in sorted(points, key=lambda point: point.intensity))
    for number, name in enumerate(names):
        same = [point for point in points if point.name == name]
        ends = sorted(same, key=lambda point: point.rate)
        xs, ys = [end.intensity for end in ends], [end.rate / scale for end in ends]
        axes.plot(xs, ys, color=_PALE, linewidth=1, zorder=1)
        under = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 8}
        axes.annotate(
            name.removeprefix("step, ").replace(", batch 1", ""), (xs[0], ys[0]), (0, -8 - 11 * (number % 3)), **under
        )
        for variant, (marker, color, _) in _VARIANTS.items():
            mine = [point for point in same if point.variant == variant]
            if mine:
                xs, ys = [point.intensity for point in mine], [point.rate / scale for point in mine]
                axes.plot(xs, ys, marker, color=color, markersize=8, gid=f"{name}, {variant}")
    for variant, (marker, color, label) in _VARIANTS.items():
        if any(point.variant == variant for point in points):
            axes.plot([], [], marker, color=color, markersize=8, label=label)
    axes.legend(loc="lower right", fontsize=9)
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis)
    axes.set_ylim(bottom=axes.get_ylim()[0] / 1.5)  # room for the names
    axes.grid(alpha=0.25, which="both")
    axes.set_title(place(rows[-1]), fontsize=8.5, color=_GREY, loc="left")
    figure.suptitle("Roofline, from rates sustained for seconds", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def _plain_ticks(axis: "Axis") -> None:
    """1, 2, 5, 10, 20 ... on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


# Scaling --------------------------------------------------------------------------------------------------------------


class Panel(NamedTuple):
    """One plot: what differs between its points, what may differ too, and what is measured."""

    axis: str
    varied: tuple[str, ...]
    value: str  # column, without its percentile
    label: str


_PANELS = (  # a step's time does not depend on how many there are
    Panel("image tokens", ("width", "height", "steps"), "step_ms", "ms a step"),
    Panel("steps", ("steps",), "image_s", "seconds per image"),
    Panel("batch", ("batch",), "image_s", "seconds per image"),
)


def scaling_figure(rows: Sequence[Row]) -> "Figure":
    rungs = [_STOCK, "stock + regional compile", _BEST]
    measured = [row for row in rows if is_measured(row) and (row["rung"] in rungs or row["lossy"] == "True")]
    found = [(panel, series) for panel in _PANELS for series in _series(measured, panel)]
    if not found:
        raise ValueError(
            "no two measured rows differ in size, steps or batch alone: measure more cases, such as "
            "`qwen-fast bench --full` or several runs with --size, --steps or --batch"
        )
    figure = new_figure((5 * len(found), 4.2), "a plot")
    for axes, (panel, series) in zip(figure.subplots(1, len(found), squeeze=False)[0], found, strict=True):
        axes.set(xlabel=panel.axis, ylabel=panel.label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for rung in dict.fromkeys(row["rung"] for row in series):
            mine = {_value(row, panel.axis): row for row in series if row["rung"] == rung}
            mine = {value: mine[value] for value in sorted(mine)}
            ticks, points = list(mine), [_measure(row, panel.value) for row in mine.values()]
            low, middle, high = zip(*points, strict=True)
            errors = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
            style = "--" if next(iter(mine.values()))["lossy"] == "True" else "-"
            look = {"color": color_of(rung), "markersize": 6, "linewidth": 1.8, "capsize": 3}
            axes.errorbar(ticks, middle, yerr=errors, fmt="o" + style, label=rung, **look)
            axes.annotate(
                f"{middle[-1]:.4g}", (ticks[-1], middle[-1]), (0, 6), textcoords="offset points", ha="right", fontsize=8
            )
        axes.set_xticks(*_ticks(series, panel))
        axes.margins(x=0.08)
        axes.set_ylim(bottom=0, top=1.12 * axes.get_ylim()[1])
        axes.set_title(_fixed(series[0], panel.varied), fontsize=9.5)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(f"{place(measured[-1])}; medians, bars from p20 to p80", fontsize=8.5, color=_GREY)
    return figure


def _measure(row: Row, value: str) -> tuple[float, float, float]:
    """p20, p50, p80; the median alone where the others were not measured."""
    middle = float(row[f"{value}_p50"])
    return float(row.get(f"{value}_p20") or middle), middle, float(row.get(f"{value}_p80") or middle)


def _ticks(series: list[Row], panel: Panel) -> tuple[list[int], list[str]]:
    """Places and names: of image tokens with the size that they are of."""
    named = {_value(row, panel.axis): f"{row['width']}x{row['height']}" for row in series}
    values = sorted(named)
    size = panel.axis == "image tokens"
    return values, [f"{value}\n{named[value]}" if size else str(value) for value in values]


def _value(row: Row, axis: str) -> int:
    return (int(row["width"]) // 16) * (int(row["height"]) // 16) if axis == "image tokens" else int(row[axis])


def _series(rows: list[Row], panel: Panel) -> list[list[Row]]:
    """Rows that agree in everything but what a panel varies: with guidance and without, each the group of most values."""
    best: dict[str, list[Row]] = {}
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in CASE if name not in panel.varied), []).append(row)

    def values(group: list[Row]) -> int:
        return len({_value(row, panel.axis) for row in group})

    for group in groups.values():
        cfg = group[0]["cfg"]
        if values(group) > 1 and (values(group), len(group)) > (values(best.get(cfg, [])), len(best.get(cfg, []))):
            best[cfg] = group
    return [best[cfg] for cfg in ("True", "False") if cfg in best]


def _fixed(row: Row, varied: Sequence[str]) -> str:
    parts = {
        "width": f"{row['width']}x{row['height']}",
        "steps": f"{row['steps']} steps",
        "cfg": "CFG" if row["cfg"] == "True" else "no CFG",
        "batch": f"batch {row['batch']}",
    }
    return ", ".join(text for name, text in parts.items() if name not in varied)
