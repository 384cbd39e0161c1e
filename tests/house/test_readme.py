"""Every figure in the README comes from a committed row or from the code."""

import re
from pathlib import Path

import pytest

from benchmarks.ladder.session import FIELDS
from benchmarks.pages import tables as readme
from benchmarks.shared.rows import RowFile
from qwen_fast import Schedule
from qwen_fast.schedule.comparison import historical_errors
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_errors_of_the_story():
    rows = re.findall(r"^\| (\d+)x(\d+), (\d+) steps \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for width, height, steps, *shown in rows:
        tokens = int(width) * int(height) // 256
        right = Schedule.from_config(QWEN_IMAGE_SCHEDULER_CONFIG, int(steps), image_seq_len=tokens)
        wrong = historical_errors(QWEN_IMAGE_SCHEDULER_CONFIG, int(steps), tokens).values()
        assert [f"{(schedule.timesteps - right.timesteps).abs().max():.1f}" for schedule in wrong] == shown


def test_the_tables_are_what_the_rows_say():
    assert not readme.outdated(README), "run python -m benchmarks.pages.tables"
    assert set(readme.TABLES) == {match[2] for match in readme._MARKED.finditer(README)}


def test_a_figure_that_was_changed_by_hand_is_found_and_put_right():
    line = next(line for line in README.splitlines() if line.startswith("| tiny model"))
    wrong = README.replace(line, re.sub(r"\d\.\d{3}x", "9.999x", line))
    assert wrong != README and readme.outdated(wrong) == ["measured"] and readme.filled(wrong) == README
    with pytest.raises(ValueError, match="unknown"):
        readme.filled("<!-- table: unknown -->\n<!-- /table -->")


def test_every_row_that_is_shown_is_within_the_contract():
    for row in readme.newest(readme.rows_of("pipeline"), "model", "pixels", "steps", "true_cfg_scale"):
        assert float(row["max_latent_difference"]) <= 2e-6
    for row in readme.newest(readme.rows_of("vae"), "what", "pixels", "dtype"):
        assert float(row["max_difference"]) <= (1e-5 if row["dtype"] == "float32" else 0.1)


LADDER = {
    **dict.fromkeys(FIELDS, ""),
    **{"machine": "NVIDIA H200", "model": "random, 60 layers, 24 x 128", "dtype": "bfloat16", "commit": "abc"},
    **{"width": "1024", "height": "1024", "steps": "50", "cfg": "True", "batch": "1", "text_tokens": "128"},
    **{"status": "ok", "lossy": "False", "measured_steps": "4", "image_s_p50": "11.0", "step_ms_p50": "215"},
    **{"share_of_floor": "0.91", "max_difference": "0.004"},
}


def rungs(**common) -> list[dict]:
    fast = {"speedup_image": "1.6364", "stock_image_s": "18.0"}
    return [
        LADDER | common | {"rung": "stock diffusers", "image_s_p50": "18.0"},
        LADDER | common | {"rung": "+ packed CFG", **fast},
        LADDER | common | {"rung": "qwen_fast as enabled", **fast},
        LADDER | common | {"rung": "torchao", "status": "failed", "reason": "a | b", "image_s_p50": "", "lossy": "True"},
    ]


def test_without_a_ladder_the_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "No ladder is committed yet" in readme.ladder()[0]
    assert readme.gpu_lines() == [
        "| on a GPU | not measured yet | not measured yet | no GPU result is committed; none is claimed |"
    ]


def test_a_gpu_s_ladder_comes_before_a_cpu_s(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    for row in [*rungs(), *rungs(machine="x86_64 CPU, 1 thread", width="256")]:
        RowFile(tmp_path / "ladder.csv", FIELDS).add(row)
    for row in rungs(image_s_p50="10.0"):
        RowFile(tmp_path / "ladder-1.csv", FIELDS).add(row)  # what a later run wrote beside a damaged file
    assert readme.gpu_lines() == [
        "| 1024x1024, 50 steps, CFG | 18.000 s | 10.000 s, 1.636x "
        "| NVIDIA H200, bfloat16, random, 60 layers, 24 x 128, from 4 steps |"
    ]
    title, _, _, _, stock, packed, enabled, failed = readme.ladder()
    assert title.startswith("1024x1024, 50 steps, CFG, text 128 tokens; random") and "NVIDIA H200" in title
    assert stock == "| stock diffusers | 18 | 215 |  | 91% | 4.0e-03 |"
    assert enabled == "| qwen_fast as enabled | 10 | 215 | 1.636x | 91% | 4.0e-03 |" and "+ packed" in packed
    assert failed == "| torchao | failed: a / b |  |  |  |  |"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    readme.README.write_text("before\n<!-- table: ladder -->\nold\n<!-- /table -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    assert readme.main() == 1 and "ladder: not what" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["readme"])
    assert readme.main() == 0
    monkeypatch.setattr("sys.argv", ["readme", "--check"])
    assert readme.main() == 0
    text = readme.README.read_text()
    assert text.startswith("before\n<!-- table") and text.endswith("<!-- /table -->\nafter\n") and "old" not in text


def test_quality_of_the_row_with_the_most_pictures_the_last_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert "No row is committed yet" in readme.quality()[0] and "No row" in readme.schedule_errors()[0]
    common = {"about": "ours", "reference": "stock", "width": "64", "height": "64", "steps": "8", "psnr_p50": "inf"}
    common |= {"things": "all", "everything": "0.9", "latent_max": "1e-6"}
    rows = RowFile(tmp_path / "quality.csv", [*common, "mode", "pictures", "same_verdict"])
    for mode, pictures, verdict in (("ours", 128, 0.5), ("ours", 128, 0.25), ("ours", 64, 1), ("error-mu", 64, 0.75)):
        rows.add(common | {"mode": mode, "pictures": pictures, "same_verdict": verdict})
    rows.add(common | {"mode": "ours", "pictures": 999, "same_verdict": 1, "things": "one"})
    (line,) = readme.quality()[2:]
    assert line == "| ours, to stock diffusers | 64x64, 8 steps | 128 | 90.0% | 25.0% | equal | 1.0e-06 |"
    heading, _, line = readme.schedule_errors()
    assert heading.endswith("| 64x64, 8 steps |") and line == "| ours | equal, 75.0% |"
