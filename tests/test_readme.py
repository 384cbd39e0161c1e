"""Every figure in the README comes from a committed row or from the code."""

import csv
import re
from pathlib import Path

from qwen_fast import Schedule
from qwen_fast.cli.schedule import historical_errors
from qwen_fast.testing import QWEN_IMAGE_SCHEDULER_CONFIG

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_errors_of_the_story():
    rows = re.findall(r"^\| (\d+)x(\d+), (\d+) steps \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 4
    for width, height, steps, *shown in rows:
        tokens = int(width) * int(height) // 256
        right = Schedule.from_config(QWEN_IMAGE_SCHEDULER_CONFIG, int(steps), image_seq_len=tokens)
        wrong = historical_errors(QWEN_IMAGE_SCHEDULER_CONFIG, int(steps), tokens).values()
        assert [f"{(schedule.timesteps - right.timesteps).abs().max():.1f}" for schedule in wrong] == shown


def test_the_measured_times():
    """Each line of the table is the newest committed row of its case."""
    with (ROOT / "benchmarks" / "results" / "pipeline.csv").open() as file:
        newest = {(row["model"], row["pixels"], row["steps"], row["true_cfg_scale"]): row for row in csv.DictReader(file)}
    lines = re.findall(
        r"^\| (\w+) model, (\d+)x\2, (\d+) steps, (no CFG|CFG) \| ([\d.]+) s \| ([\d.]+) s, ([\d.]+)x \|", README, re.MULTILINE
    )
    assert len(lines) == len(newest)
    for model, pixels, steps, cfg, stock, fast, ratio in lines:
        row = newest[model, pixels, steps, "4.0" if cfg == "CFG" else "1.0"]
        figures = [f"{float(row[field]):.3f}" for field in ("stock_p50", "fast_p50", "ratio_p50")]
        assert figures == [stock, fast, ratio] and float(row["max_latent_difference"]) <= 2e-6


def test_the_vae_times():
    with (ROOT / "benchmarks" / "results" / "vae.csv").open() as file:
        newest = {(row["what"], row["pixels"], row["dtype"]): row for row in csv.DictReader(file)}
    lines = re.findall(
        r"^\| VAE (\w+), full width, (\d+)x\2, (\w+) \| ([\d.]+) s \| ([\d.]+) s, ([\d.]+)x \|", README, re.MULTILINE
    )
    assert len(lines) == len(newest)
    for what, pixels, dtype, *shown in lines:
        row = newest[what, pixels, dtype]
        assert [f"{float(row[field]):.3f}" for field in ("stock_p50", "fast_p50", "ratio_p50")] == shown
        assert float(row["max_difference"]) <= (1e-5 if dtype == "float32" else 0.1)
