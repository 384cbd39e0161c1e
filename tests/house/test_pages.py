"""Every figure on a page comes from a committed row or from the code; every link leads somewhere; the first page is short."""

import csv
import re
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from benchmarks.ladder.session import FIELDS
from benchmarks.pages import committed, memory, tables
from benchmarks.shared.rows import RowFile
from qwen_fast import Schedule
from qwen_fast.common.options import NAMES, VALUES
from qwen_fast.schedule.comparison import historical_errors
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("", "docs", "examples", "benchmarks/results", "qwen_fast/demo/checkpoint")
PAGES = sorted({path for folder in FOLDERS for path in (ROOT / folder).glob("*.md")})
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in _LINK.findall(path.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{path.name}: {link}"


def test_the_first_page_is_short_and_leads_to_all_others():
    assert len(README.splitlines()) <= 100
    linked = set(_LINK.findall(README))
    assert {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} <= linked
    assert "`make demo`" in README and "`make test`" in README


def test_the_errors_of_the_story():
    rows = re.findall(r"^\| (\d+)x(\d+), (\d+) steps \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page("schedule"), re.MULTILINE)
    assert len(rows) == 4
    for width, height, steps, *shown in rows:
        tokens = int(width) * int(height) // 256
        right = Schedule.from_config(QWEN_IMAGE_SCHEDULER_CONFIG, int(steps), image_seq_len=tokens)
        wrong = historical_errors(QWEN_IMAGE_SCHEDULER_CONFIG, int(steps), tokens).values()
        assert [f"{(schedule.timesteps - right.timesteps).abs().max():.1f}" for schedule in wrong] == shown


def test_the_tables_are_what_the_rows_say():
    used = set()
    for path in tables.PAGES:
        text = path.read_text(encoding="utf-8")
        assert not tables.outdated(text), f"{path.name}: run python -m benchmarks.pages.tables"
        used |= {match[2] for match in tables._MARKED.finditer(text)}
    assert used == set(tables.TABLES), "a table that no page shows"


def test_a_figure_that_was_changed_by_hand_is_found_and_put_right():
    right = page("benchmarks")
    line = next(line for line in right.splitlines() if line.startswith("| middle model"))
    wrong = right.replace(line, re.sub(r"\d\.\d{3}x", "9.999x", line))
    assert wrong != right and tables.outdated(wrong) == ["cpu"] and tables.filled(wrong) == right
    with pytest.raises(ValueError, match="unknown"):
        tables.filled("<!-- table: unknown -->\n<!-- /table -->")


def test_every_row_that_is_shown_is_within_the_contract():
    for row in committed.newest(committed.rows_of("pipeline"), "model", "pixels", "steps", "true_cfg_scale"):
        assert float(row["max_latent_difference"]) <= 2e-6
    for row in committed.newest(committed.rows_of("vae"), "what", "pixels", "dtype"):
        assert float(row["max_difference"]) <= (1e-5 if row["dtype"] == "float32" else 0.1)


def test_the_parameters_are_counted():
    """Of the configurations of Qwen/Qwen-Image, without weights."""
    wide = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    wide |= {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "num_heads": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=wide, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        transformer, vae = diffusers.QwenImageTransformer2DModel(), diffusers.AutoencoderKLQwenImage()
        encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)

    def count(module, *without: str) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if not any(part in name for part in without))

    assert count(transformer) == memory.TRANSFORMER
    assert count(transformer) - count(transformer, "_mod.") == memory.MODULATION
    assert count(transformer.transformer_blocks[0]) == memory.BLOCK and count(vae) == memory.VAE
    assert count(encoder) == memory.TEXT_ENCODER and count(encoder, "visual", "lm_head") == memory.TEXT_ENCODER_READ
    assert encoder.get_input_embeddings().weight.numel() == memory.LAYER
    for figure in (memory.TRANSFORMER, memory.TEXT_ENCODER, memory.VAE):
        assert f"{figure:,}" in page("memory")
    resident = "\n".join(memory.resident_memory())
    assert "53.7 GiB" in resident and "41.1 GiB" in resident and "53.7 GiB" in README and "41.1 GiB" in README


def test_the_options_are_listed_with_their_values():
    rows = {}
    for name, values in re.findall(r"^\| `(\w+)` \| (.+?) \|", page("coverage").split("## Options")[1], re.MULTILINE):
        rows[name] = re.findall(r"`([^`]+)`", values)
    assert rows.keys() == set(NAMES)
    for name, known in VALUES.items():
        assert {value.strip('"') for value in rows[name]} == {str(value) for value in known}


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


def test_without_rows_the_tables_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    assert "No ladder is committed yet" in tables.ladder()[0] and "No GPU result is committed" in tables.gpu()[0]
    assert "No such row" in tables.changing()[0]
    assert "No row" in tables.first_call()[0] and "No row" in tables.measured_memory()[0]


def test_a_gpu_s_ladder_comes_before_a_cpu_s(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    for row in [*rungs(), *rungs(machine="x86_64 CPU, 1 thread", width="256")]:
        RowFile(tmp_path / "ladder.csv", FIELDS).add(row)
    for row in rungs(image_s_p50="10.0"):
        RowFile(tmp_path / "ladder-1.csv", FIELDS).add(row)  # what a later run wrote beside a damaged file
    assert tables.gpu()[2:] == [
        "| 1024x1024, 50 steps, CFG | 18.00 s | 10.00 s | 1.64x | NVIDIA H200, bfloat16, computed from 4 steps |"
    ]
    title, _, _, _, stock, packed, enabled, failed = tables.ladder()
    assert title.startswith("1024x1024, 50 steps, CFG, text 128 tokens; random") and "NVIDIA H200" in title
    assert stock == "| stock diffusers | 18 | 215 |  | 91% | 4.0e-03 |"
    assert enabled == "| qwen_fast as enabled | 10 | 215 | 1.636x | 91% | 4.0e-03 |" and "+ packed" in packed
    assert failed == "| torchao | failed: a / b |  |  |  |  |"


def test_first_calls_and_memory_of_the_newest_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    for row in rungs(first_image_s="20.0", peak_gib="40.0", resident_gib="38.0"):
        RowFile(tmp_path / "ladder.csv", FIELDS).add(row)
    assert tables.first_call()[2:] == ["| 1024x1024, 50 steps, CFG | 20.0 s, 18.0 s |  | 20.0 s, 11.0 s | NVIDIA H200 |"]
    line = "| 1024x1024, 50 steps, CFG | 38.0 GiB | 40.0 GiB | 40.0 GiB | NVIDIA H200, bfloat16 |"
    assert tables.measured_memory()[2:] == [line]


def test_a_new_size_each_call(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    row = LADDER | {"rung": "qwen_fast as enabled", "new_s_p50": "3", "repeated_s": "2", "stock_new_s": "6", "speedup_new": "2"}
    with (tmp_path / "changing.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([row | {"new_s_p50": "9"}, row, row | {"rung": "stock diffusers"}])
    assert tables.changing()[2:] == ["| about 1024x1024, 50 steps, CFG | 6.00 s | 3.00 s | 2.00 s | 2.00x | NVIDIA H200 |"]


def test_the_command(tmp_path, monkeypatch, capsys):
    pages = (tmp_path / "README.md", tmp_path / "memory.md")
    monkeypatch.setattr(tables, "PAGES", pages)
    for path in pages:
        path.write_text("before\n<!-- table: ladder -->\nold\n<!-- /table -->\nafter\n")
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    assert tables.main() == 1
    said = capsys.readouterr().err
    assert "README.md: ladder: not what" in said and "memory.md: ladder" in said
    monkeypatch.setattr("sys.argv", ["tables"])
    assert tables.main() == 0
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    assert tables.main() == 0
    for path in pages:
        text = path.read_text()
        assert text.startswith("before\n<!-- table") and text.endswith("<!-- /table -->\nafter\n") and "old" not in text


def test_quality_of_the_row_with_the_most_pictures_the_last_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(committed, "RESULTS", tmp_path)
    assert "No row is committed yet" in tables.quality()[0] and "No row" in tables.schedule_errors()[0]
    common = {"about": "ours", "reference": "stock", "width": "64", "height": "64", "steps": "8", "psnr_p50": "inf"}
    common |= {"things": "all", "everything": "0.9", "latent_max": "1e-6"}
    rows = RowFile(tmp_path / "quality.csv", [*common, "mode", "pictures", "same_verdict"])
    for mode, pictures, verdict in (("ours", 128, 0.5), ("ours", 128, 0.25), ("ours", 64, 1), ("error-mu", 64, 0.75)):
        rows.add(common | {"mode": mode, "pictures": pictures, "same_verdict": verdict})
    rows.add(common | {"mode": "ours", "pictures": 999, "same_verdict": 1, "things": "one"})
    (line,) = tables.quality()[2:]
    assert line == "| ours, to stock diffusers | 64x64, 8 steps | 128 | 90.0% | 25.0% | equal | 1.0e-06 |"
    heading, _, line = tables.schedule_errors()
    assert heading.endswith("| 64x64, 8 steps |") and line == "| ours | equal, 75.0% |"
