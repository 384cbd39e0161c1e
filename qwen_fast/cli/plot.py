"""Plots of a schedule beside the three historical errors, as PNG and in the terminal."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..schedule import Schedule

MARKERS = "oxl-"  # one per curve of the terminal plot, the right schedule first


def terminal_plot(schedule: "Schedule", errors: Mapping[str, "Schedule"], rows: int = 16) -> str:
    """Two plain-text plots: the timesteps, and each error's difference from the right ones."""
    curves = {"right": schedule.timesteps.tolist()}
    curves |= {name: wrong.timesteps.tolist() for name, wrong in errors.items()}
    plots = [_text_plot("timestep over step", curves, MARKERS, rows)]
    if errors:
        right = curves.pop("right")
        differences = {
            f"{name} (at most {max(abs(a - b) for a, b in zip(wrong, right, strict=True)):.1f})": [
                a - b for a, b in zip(wrong, right, strict=True)
            ]
            for name, wrong in curves.items()
        }
        plots.append(_text_plot("difference from the right timestep", differences, MARKERS[1:], rows))
    return "\n\n".join(plots)


def _text_plot(title: str, curves: Mapping[str, list[float]], markers: str, rows: int) -> str:
    columns = max(20, min(shutil.get_terminal_size().columns, 100) - 12)
    values = [value for curve in curves.values() for value in curve]
    low, high = min(0.0, *values), max(values + [0.0])
    if high - low < 1e-9:
        high = low + 1.0
    cells = [[" "] * columns for _ in range(rows)]
    # Later curves do not hide earlier ones: the right schedule comes first.
    for curve, marker in zip(curves.values(), markers, strict=False):
        for i, value in enumerate(curve):
            column = round(i * (columns - 1) / max(len(curve) - 1, 1))
            row = round((high - value) / (high - low) * (rows - 1))
            if cells[row][column] == " ":
                cells[row][column] = marker
    steps = len(next(iter(curves.values())))
    lines = [title]
    for row, cell in enumerate(cells):
        label = f"{high - (high - low) * row / (rows - 1):8.1f}" if row % 5 == 0 or row == rows - 1 else " " * 8
        lines.append(f"{label} |{''.join(cell).rstrip()}")
    lines.append(" " * 9 + "+" + "-" * columns)
    lines.append(" " * 10 + "0" + f"{steps - 1}".rjust(columns - 1))
    lines += [f"{marker:>10} {name}" for name, marker in zip(curves, markers, strict=False)]
    return "\n".join(lines)


def new_figure(
    size: tuple[float, float], what: str, instead: str = "or leave it out", layout: str | None = "constrained"
) -> "Figure":
    """An empty figure of `size` inches, with matplotlib's `layout`.

    Raises:
        ImportError: matplotlib is not installed; names `what` needs it, how to install it, and what to do `instead`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            f"{what} needs matplotlib, which is not installed: `pip install matplotlib` or `pip install 'qwen-fast[plot]'`, "
            f"{instead}."
        ) from None
    # No pyplot: it would choose a backend and touch the display.
    figure = Figure(figsize=size, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def plot_png(path: Path, schedule: "Schedule", errors: Mapping[str, "Schedule"], title: str) -> None:
    """The same plots as a PNG."""
    # No errors to show (own sigmas, Lightning): one panel.
    figure = new_figure((11 if errors else 5.5, 4.5), "--plot FILE.png", "or draw in the terminal with `--plot -`")
    left, *others = figure.subplots(1, 2 if errors else 1, squeeze=False)[0]
    steps, timesteps = range(schedule.num_inference_steps), schedule.timesteps.cpu()
    left.plot(steps, timesteps, "k.-", linewidth=2, label="right (diffusers, qwen_fast)")
    left.set(ylabel="timestep", title="timesteps")
    for right in others:
        right.set(ylabel="timestep difference", title="difference from the right schedule")
        right.axhline(0.0, color="black", linewidth=0.8)
        for (name, wrong), color in zip(errors.items(), ("tab:blue", "tab:orange", "tab:red"), strict=False):
            difference = wrong.timesteps - timesteps
            left.plot(steps, wrong.timesteps, ".--", color=color, linewidth=1, label=name)
            right.plot(steps, difference, ".-", color=color, label=f"{name} (at most {difference.abs().max():.1f})")
    for axes in (left, *others):
        axes.set(xlabel="step")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120, format="png")
