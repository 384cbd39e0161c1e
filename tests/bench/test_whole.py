"""The benchmark of pictures from their prompt: its seconds add up, and a wrong picture is no result."""

import sys

import pytest

import qwen_fast
from benchmarks.parts import whole
from benchmarks.shared.rows import read


@pytest.fixture
def run(tmp_path, monkeypatch):
    def called() -> tuple[int, list[dict[str, str]]]:
        monkeypatch.setattr(sys, "argv", ["whole", "--append", str(tmp_path / "whole.csv")])
        return whole.main(), read(tmp_path / "whole.csv")

    return called


def test_every_way_draws_stocks_picture(run, monkeypatch):
    draw, calls = whole.draw, []

    def noted(pipe, prompt, *others):
        images, seconds = draw(pipe, prompt, *others)
        calls.append((prompt, f"{seconds.whole:.4g}"))
        return images, seconds

    monkeypatch.setattr(whole, "draw", noted)
    code, rows = run()
    assert code == 0 and [row["way"] for row in rows] == list(whole.WAYS) and {row["status"] for row in rows} == {"ok"}
    for row in rows:
        parts = sum(float(row[name]) for name in ("before_s", "steps_s", "behind_s"))
        assert parts == pytest.approx(float(row["image_s"]), rel=0.01)
        assert bool(row["known_s"]) == bool(row["psnr_db"]) == (row["way"] != "stock")
    assert all(float(row["psnr_db"]) > 100 for row in rows[1:])
    for row in rows:
        names = ("first_s", "image_s", "known_s")[: 2 + (row["way"] != "stock")]
        own, compared = [calls.pop(0) for _ in names], calls.pop(0)
        assert [row[name] for name in names] == [seconds for _, seconds in own]
        assert len({prompt for prompt, _ in [*own, compared]}) == 3, "all are new but the known one"
        assert len(own) == 2 or own[2][0] == own[1][0]


def test_another_picture_is_no_result(run, monkeypatch):
    enable = qwen_fast.enable

    def louder(pipe, **options):
        enable(pipe, **options)
        pipe.transformer.proj_out.weight.data.mul_(1.5)

    monkeypatch.setattr(qwen_fast, "enable", louder)
    monkeypatch.setattr(whole, "WAYS", {way: whole.WAYS[way] for way in ("stock", "ours")})
    code, rows = run()
    assert code == 1 and [row["status"] for row in rows] == ["ok", "wrong result"]
