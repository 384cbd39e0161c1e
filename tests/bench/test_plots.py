"""Plots of rows: what is drawn equals what was measured, and what was not measured is named."""

import math
import struct
import sys
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib")

from matplotlib.colors import to_hex

from benchmarks.pages.figures import color_of, ladder_figure, point_of, roofline_figure, scaling_figure
from benchmarks.pages.plots import draw_all, draw_ladder, draw_roofline, draw_scaling, latest, main
from benchmarks.shared.rows import append
from benchmarks.shared.shapes import QWEN_IMAGE, PictureCase

PLACE = {"machine": "made-up GPU", "model": "random, 60 layers, 24 x 128", "dtype": "bfloat16", "torch": "2", "commit": "abc"}
PLACE["date"] = "2026-11-27"


def row(rung: str = "stock diffusers", seconds: float | None = 10.0, **changes) -> dict[str, str]:
    """A row of the ladder; without seconds one that was not measured."""
    case = {"width": 1024, "height": 1024, "steps": 50, "cfg": True, "batch": 1, "text_tokens": 128}
    given = PLACE | case | {"rung": rung, "lossy": False, "status": "ok", "reason": "", "measured_steps": 4}
    figures = {"share_of_floor": 0.5, "max_difference": 1e-3, "psnr_db": 80.0, "speedup_image": 10 / (seconds or 1)}
    if seconds is None:
        given |= {"status": "not measured", "reason": "needs a CUDA device", "image_s_p50": "", **dict.fromkeys(figures, "")}
    else:
        given |= figures | {"image_s_p20": 0.9 * seconds, "image_s_p50": seconds, "image_s_p80": 1.2 * seconds}
        given["step_ms_p50"] = 20 * seconds
    return {name: str(value) for name, value in (given | changes).items()}


LADDER = [
    row(psnr_db=math.inf, speedup_image=""),
    row("stock + regional compile", 8.0),
    row("+ CUDA graph", None),
    row("qwen_fast as enabled", 5.0, psnr_db=math.inf),
    row("+ broken", 4.0, status="wrong result", reason="latents differ", speedup_image=""),
    row("torchao", 3.0, lossy=True, psnr_db=31.4),
]
CEILINGS = [
    PLACE | {"what": "copy", "detail": "bfloat16", "rate": "4e12"},
    PLACE | {"what": "matrix product", "detail": "bfloat16", "rate": "7e14"},
    PLACE | {"what": "attention", "detail": "bfloat16, cudnn", "rate": "5.5e14"},
]


def operator(group: str, variant: str, nbytes: int, flops: int, seconds: float) -> dict[str, str]:
    given = {"group": group, "variant": variant, "bytes": nbytes, "flops": flops, "seconds_p50": seconds}
    given |= {"benchmark": f"test_speed[{group}-{variant}]", "size": "4126 rows"}
    return PLACE | {name: str(value) for name, value in given.items()}


OPERATORS = [
    operator("euler_step: bf16 cuda", "op", 3_000_000, 1_000_000, 1e-6),
    operator("euler_step: bf16 cuda", "stock", 3_000_000, 1_000_000, 5e-6),
    operator("linear_gelu: bf16 cuda", "compiled", 10**8, 3 * 10**11, 5e-4),
    operator("linear_gelu: bf16 cuda", "reference", 10**8, 3 * 10**11, 5e-3),
    operator("flow_match_schedule: Qwen-Image cuda", "op", 164, 160, 1e-5),
]


def texts(figure) -> list[str]:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    return [*found, *(text.get_text() for text in figure.texts)]


def test_bars_are_as_long_as_the_seconds():
    figure = ladder_figure(LADDER)
    (axes,) = figure.axes
    bars = {round(bar.get_y() + bar.get_height() / 2): bar for bar in axes.patches}
    assert {y: bar.get_width() for y, bar in bars.items()} == {0: 10.0, 1: 8.0, 3: 5.0, 4: 4.0, 5: 3.0}
    assert [label.get_text() for label in axes.get_yticklabels()] == [row["rung"] for row in LADDER]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # stock on top
    whiskers = [line.get_segments()[0][:, 0].tolist() for line in axes.collections]
    assert whiskers == [pytest.approx([0.9 * s, 1.2 * s]) for s in (10.0, 8.0, 5.0, 4.0, 3.0)]
    (baseline,) = (line for line in axes.lines if line.get_linestyle() == "--")
    assert set(baseline.get_xdata()) == {10.0}
    colors = {y: to_hex(bar.get_facecolor()) for y, bar in bars.items()}
    assert colors == {0: "#7a7a7a", 1: "#b4b4b4", 3: "#2f6fb3", 4: "#ffffff", 5: "#3f9c6b"}
    assert bars[5].get_hatch() == "///" and bars[3].get_hatch() is None


def test_what_stands_beside_the_bars():
    figure = ladder_figure(LADDER)
    shown = texts(figure)
    assert figure.get_suptitle() == "1024x1024, 50 steps, CFG, batch 1, text 128 tokens"
    for text in ("2.000x", "1.250x", "50%", "equal", "1.0e-03 lossy", "31 dB", "not measured: needs a CUDA device"):
        assert text in shown, text
    assert "1024x1024, 50 steps, CFG, batch 1, text 128 tokens" in shown or ladder_figure(LADDER).get_suptitle().startswith(
        "1024"
    )
    assert any("computed from 4 measured steps" in text for text in shown) and any("made-up GPU" in text for text in shown)


def test_a_wrong_result_shows_no_speedup():
    shown = texts(ladder_figure([row(), row("+ broken", 4.0, status="wrong result", reason="no", speedup_image="2.5")]))
    assert "wrong result" in shown and "2.500x" not in shown


def test_the_case_with_most_rungs_is_drawn():
    others = [row(seconds=7.0, width=512), row("qwen_fast as enabled", 1.0, width=512)]
    (axes,) = ladder_figure(others + LADDER).axes
    assert [bar.get_width() for bar in axes.patches][0] == 10.0


@pytest.mark.parametrize(
    ("rung", "color"),
    [
        ("stock diffusers", "#7a7a7a"),
        ("+ packed CFG", "#2f6fb3"),
        ("cache-dit", "#3f9c6b"),
        ("packed, our attention", "#2f6fb3"),
    ],
)
def test_color(rung, color):
    assert color_of(rung) == color


def lines(axes) -> dict[str, tuple[list, list]]:
    return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_gid()}


def test_points_lie_under_their_roofs():
    (axes,) = roofline_figure(OPERATORS, CEILINGS).axes
    drawn = lines(axes)
    assert drawn["euler_step, ours"] == (pytest.approx([1 / 3]), pytest.approx([1.0]))  # FLOPs per byte, TFLOP/s
    assert drawn["euler_step, stock"] == (pytest.approx([1 / 3]), pytest.approx([0.2]))
    assert drawn["linear_gelu, compiled"] == (pytest.approx([3000]), pytest.approx([600]))
    assert drawn["products in BF16"][1] == pytest.approx([700, 700])
    assert drawn["attention (cudnn)"][1] == pytest.approx([550, 550])
    assert drawn["products in BF16"][0][0] == pytest.approx(175) == drawn["copy"][0][1]  # the ridge: 700 / 4
    for x, y in zip(*drawn["copy"], strict=True):
        assert y == pytest.approx(4 * x)
    assert not any("reference" in name or "schedule" in name for name in drawn)
    assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_ylabel() == "TFLOP/s"


def test_the_highest_of_several_rates_is_the_roof_and_of_attentions_the_fastest():
    more = [PLACE | {"what": "matrix product", "detail": "bfloat16", "rate": "6e14"}]
    more += [PLACE | {"what": "attention", "detail": "bfloat16, flash", "rate": "3e14"}]
    (axes,) = roofline_figure(OPERATORS, CEILINGS + more).axes
    drawn = lines(axes)
    assert drawn["products in BF16"][1] == pytest.approx([700, 700])
    assert "attention (cudnn)" in drawn and "attention (flash)" not in drawn


def test_slow_machines_show_gflops():
    slow = [one | {"rate": str(float(one["rate"]) / 1e4)} for one in CEILINGS]
    (axes,) = roofline_figure(OPERATORS, slow).axes
    assert axes.get_ylabel() == "GFLOP/s" and lines(axes)["euler_step, ours"][1] == pytest.approx([1000])


def test_a_step_has_a_place_under_the_roof():
    point = point_of(row(seconds=10.0))
    work = PictureCase(1024, 1024, 50, True, 1, 128, QWEN_IMAGE).work()
    assert point.variant == "stock" and point.rate == pytest.approx((work.product_flops + work.attention_flops) / 0.2)
    assert 500 < point.intensity < 5000  # far on the side of the products
    assert point_of(row(dtype="float32")).intensity == pytest.approx(point.intensity / 2)  # twice the bytes
    assert point_of(row(model="Qwen-Image")) is None and point_of(row("qwen_fast as enabled", None)) is None
    assert point_of(row("+ packed CFG")) is None


STOCK, OURS = "stock diffusers", "qwen_fast as enabled"
SCALING = [
    *(row(STOCK, seconds, width=side, height=side) for side, seconds in ((768, 5.0), (512, 2.0))),
    *(row(OURS, seconds, width=side, height=side) for side, seconds in ((512, 1.0), (768, 2.5))),
    *(row(rung, seconds, steps=steps) for steps, seconds in ((8, 1.6), (20, 4.0)) for rung in (STOCK, OURS)),
    row("+ packed CFG", 1.0, steps=8),
    row(OURS, 99.0, steps=30, status="wrong result"),
]


def curves(axes) -> dict[str, tuple[list, list]]:
    return {box.get_label(): (list(box.lines[0].get_xdata()), list(box.lines[0].get_ydata())) for box in axes.containers}


def test_scaling_draws_rows_that_differ_in_one_thing():
    tokens, steps = scaling_figure(LADDER + SCALING).axes
    drawn = curves(tokens)  # ms a step, whatever the number of steps
    assert drawn["stock diffusers"] == ([1024, 2304, 4096], [40.0, 100.0, 80.0])
    assert drawn["qwen_fast as enabled"] == ([1024, 2304, 4096], [20.0, 50.0, 80.0])
    assert drawn["torchao"] == ([4096], [60.0])
    drawn = curves(steps)
    assert drawn["stock diffusers"] == ([8, 20, 50], [1.6, 4.0, 10.0])
    assert drawn["qwen_fast as enabled"] == ([8, 20, 50], [1.6, 4.0, 5.0])  # not the wrong result
    assert "+ packed CFG" not in drawn
    assert tokens.get_title() == "CFG, batch 1" and tokens.get_xlabel() == "image tokens"
    assert [label.get_text() for label in tokens.get_xticklabels()][0] == "1024\n512x512"
    (bars,) = (box.lines[2][0].get_segments() for box in steps.containers if box.get_label() == "stock diffusers")
    assert [segment[:, 1].tolist() for segment in bars] == [pytest.approx([0.9 * s, 1.2 * s]) for s in (1.6, 4.0, 10.0)]


def test_scaling_has_a_panel_with_guidance_and_one_without():
    plain = [
        row(rung, seconds, width=side, height=side, cfg=False)
        for rung in (STOCK, OURS)
        for side, seconds in ((512, 1), (768, 2))
    ]
    with_cfg, without = scaling_figure(SCALING[:4] + plain).axes
    assert (with_cfg.get_title(), without.get_title()) == ("CFG, batch 1", "no CFG, batch 1")


def test_legends_say_what_colours_mean():
    legend = ladder_figure(LADDER).legends[0]
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["stock diffusers", "what else stock can do", "qwen_fast", "other projects"]
    (axes,) = roofline_figure(OPERATORS, CEILINGS).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["qwen_fast", "torch.compile", "stock diffusers"]
    labels = {label.get_text() for label in axes.get_xticklabels()}
    assert "100" in labels and not any("10^" in label for label in labels)


def test_a_roof_of_another_dtype_is_left_out():
    other = PLACE | {"what": "matrix product", "detail": "float8_e4m3fn", "rate": "1.2e15"}
    (axes,) = roofline_figure(OPERATORS, [*CEILINGS, other]).axes
    assert "products in BF16" in lines(axes) and "products in float8_e4m3fn" not in lines(axes)


def test_the_last_row_of_each_counts():
    rows = [row(), row("+ x", 7.0), row(seconds=9.0), row(machine="other")]
    assert [one["image_s_p50"] for one in latest(rows, ["rung"], machine="made-UP")] == ["9.0", "7.0"]
    assert [one["machine"] for one in latest(rows, ["rung"])] == ["other"]
    with pytest.raises(ValueError, match="no rows of a machine named like 'H200'"):
        latest(rows, ["rung"], machine="H200")


DRAWINGS = {
    "ladder": lambda path: draw_ladder(LADDER, path),
    "roofline": lambda path: draw_roofline(OPERATORS, CEILINGS, path),
    "scaling": lambda path: draw_scaling(LADDER + SCALING, path),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_files(name, tmp_path):
    DRAWINGS[name](tmp_path / "plot.png")
    data = (tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    assert 900 <= width <= 1300 and 300 <= height <= 1000  # a README's width
    DRAWINGS[name](tmp_path / "plot.svg")
    assert ElementTree.parse(tmp_path / "plot.svg").getroot().tag.endswith("svg")
    with pytest.raises(ValueError, match="plot.gif is neither a .png nor a .svg"):
        DRAWINGS[name](tmp_path / "plot.gif")


@pytest.mark.parametrize("name", DRAWINGS)
def test_without_matplotlib(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'qwen-fast\[plot\]'"):
        DRAWINGS[name](tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda path: draw_ladder([], path), "no rows of a ladder"),
        (lambda path: draw_ladder([row(seconds=None)], path), "was measured: not measured: needs a CUDA device"),
        (lambda path: draw_roofline([], CEILINGS, path), "no rows of operators or steps"),
        (lambda path: draw_roofline(OPERATORS, CEILINGS[1:], path), "no ceilings"),
        (lambda path: draw_scaling([], path), "no two measured rows"),
        (lambda path: draw_scaling(LADDER, path), "no two measured rows"),
    ],
)
def test_nothing_to_draw(draw, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def write(folder, **tables) -> None:
    for name, rows in tables.items():
        fields = list(dict.fromkeys(key for one in rows for key in one))
        append(folder / f"{name}.csv", fields, [[one.get(field, "") for field in fields] for one in rows])


def test_from_tables_to_pictures(tmp_path, capsys, monkeypatch):
    """Rows of another machine, appended later, do not get into the pictures of the one that is named."""
    other = row(machine="x86_64 CPU", dtype="float32")
    write(tmp_path / "rows", ladder=[*LADDER, other], ceilings=CEILINGS, operators=OPERATORS)
    monkeypatch.setattr(
        sys, "argv", ["plots", "--rows", str(tmp_path / "rows"), "--out", str(tmp_path), "--machine", "gpu", "--svg"]
    )
    assert main() == 0
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["ladder.svg", "roofline.svg"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("ladder.svg") and printed[2].startswith("scaling.svg is not drawn: no two measured rows")
    drawn = (tmp_path / "ladder.svg").read_text()  # a comment beside each text's outlines has its words
    assert "made-up GPU" in drawn and "x86_64" not in drawn


def test_command(tmp_path, capsys):
    from qwen_fast.cli import main as qwen_fast_command

    write(tmp_path, ladder=LADDER + SCALING, ceilings=CEILINGS)
    assert qwen_fast_command(["bench", "--plot", "svg", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == ["ladder.svg", "roofline.svg", "scaling.svg"]
    assert qwen_fast_command(["bench", "--plot", "--out", str(tmp_path / "missing")]) == 2
    assert "missing is no folder" in capsys.readouterr().err
    table = tmp_path / "ladder.csv"
    table.write_bytes(table.read_bytes()[:-9])
    assert qwen_fast_command(["bench", "--plot", "--out", str(tmp_path)]) == 2
    assert "half-written" in capsys.readouterr().err


def test_a_folder_without_tables(tmp_path):
    written, left_out = draw_all(tmp_path, tmp_path / "out")
    assert not written and [line.split(" ")[0] for line in left_out] == ["ladder.png", "roofline.png", "scaling.png"]
