"""A new size and prompt each call: nothing is drawn twice but what is meant to, and only right latents get a speed-up."""

import contextlib
from dataclasses import replace

import pytest
import torch

from benchmarks.ladder import changing, models
from benchmarks.ladder.changing import Changing, varied
from benchmarks.ladder.rung import NotMeasured, Rung
from benchmarks.ladder.rungs import ENABLED, STEPS
from benchmarks.ladder.stock import STOCK
from benchmarks.shared.rows import RowFile, read
from benchmarks.shared.shapes import SHAPES, PictureCase
from qwen_fast.cli import main

CPU, TINY = torch.device("cpu"), SHAPES["tiny"]
CASE = PictureCase(128, 128, 6, True, 1, 16, TINY)


@pytest.fixture(scope="module")
def pipe():
    return models.random_pipeline(TINY, CPU, torch.float32)


@pytest.fixture
def run(pipe, tmp_path):
    """Measures rungs on one case; gives the rows by their rung, and what was said."""

    def measure(*rungs, case=CASE, before=()):
        said, rows = [], RowFile(tmp_path / "changing.csv", changing.FIELDS)
        found = Changing(pipe, "tiny", [case], list(rungs), rows, list(before), say=said.append).run()
        return {row["rung"]: row for row in found}, "\n".join(said), read(rows.path)

    return measure


def test_sizes_and_prompts_differ_and_their_token_counts_hardly():
    for case in (PictureCase(), PictureCase(512, 512), PictureCase(steps=8, cfg=False), CASE):
        cases = varied(case)
        assert cases[0] == case and len({(one.width, one.height) for one in cases}) == len({one.text for one in cases}) == 4
        assert all(one.width % 16 == one.height % 16 == 0 and one.steps == case.steps for one in cases)
        tokens = [one.image_tokens for one in cases]
        assert min(tokens) > 0.9 * max(tokens) and (case is CASE or len(set(tokens)) == 4)
    with pytest.raises(ValueError, match="too small for 4 sizes"):
        varied(PictureCase(32, 32, text=2, shape=TINY))


def test_every_way_draws_each_size_once_and_the_last_one_twice(run, pipe, monkeypatch):
    drawn, call = [], type(pipe).__call__

    def noted(self, *args, **kwargs):
        drawn.append((kwargs["width"], kwargs["height"], kwargs["prompt_embeds"].shape[1]))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", noted)
    rows, said, written = run(STOCK)
    assert drawn == [*((one.width, one.height, one.text) for one in varied(CASE)), drawn[-1]] and len(drawn) == 5
    assert rows[STOCK.name]["status"] == "ok" and written[0]["measured_steps"] == "4"
    assert written[0]["sizes"] == "144x112:12 160x96:5 96x160:8"


def test_stock_and_ours_under_the_same_treatment(run):
    rows, said, written = run(*changing.RUNGS)
    stock, enabled, no_graph = (rows[rung.name] for rung in changing.RUNGS)
    assert changing.RUNGS[:2] == (STOCK, ENABLED) and changing.RUNGS[2] is STEPS[-1]
    assert len(written) == 3 and "speedup_new" not in stock and stock["clock"] == "CPU time of one thread"
    for row in (enabled, no_graph):
        assert row["status"] == "ok" and float(row["max_difference"]) <= 2e-6 and float(row["speedup_new"]) > 0
        assert float(row["stock_new_s"]) == pytest.approx(float(stock["new_s_p50"]), rel=1e-3)
        assert float(row["new_s_p20"]) <= float(row["new_s_p50"]) <= float(row["new_s_p80"])
    assert "x the same size again" in said


def disturbed(size: float) -> Rung:
    @contextlib.contextmanager
    def enter(pipe, case):
        hook = pipe.transformer.register_forward_hook(lambda _module, _args, output: (output[0] + size,))
        yield ""
        hook.remove()

    return Rung("disturbed", enter)


@pytest.mark.parametrize("size", [1e-2, float("nan")])
def test_wrong_latents_get_no_speed_up(run, size):
    rows, said, _ = run(STOCK, disturbed(size))
    assert rows["disturbed"]["status"] == "wrong result" and "speedup_new" not in rows["disturbed"]
    assert rows["disturbed"]["reason"] in said


@pytest.mark.parametrize(
    ("error", "status"), [(NotMeasured("not here"), "not measured"), (torch.OutOfMemoryError("out\nof memory"), "failed")]
)
def test_a_failing_way_has_its_reason_and_the_next_goes_on(run, error, status):
    @contextlib.contextmanager
    def enter(pipe, case):
        raise error
        yield

    rows, said, written = run(STOCK, Rung("failing", enter), STEPS[-1])
    assert rows["failing"]["status"] == status and rows["failing"]["reason"] in said
    assert [row["status"] for row in written] == ["ok", status, "ok"]


def test_what_was_measured_before_is_not_again_but_stock_is_drawn_for_the_others(run):
    _, _, before = run(STOCK, STEPS[-1])
    rows, said, written = run(STOCK, ENABLED, STEPS[-1], before=before)
    assert len(rows) == 3 and len(written) == 3 and written[-1]["rung"] == ENABLED.name and written[-1]["speedup_new"]
    run(STOCK, ENABLED, STEPS[-1], before=written)
    rows, _, written = run(STOCK, case=replace(CASE, steps=3))
    assert len(written) == 4 and written[-1]["measured_steps"] == "3"


def test_the_command_measures_cases_and_changing_sizes_on_one_model(tmp_path, capsys):
    command = ["bench", "--shape", "tiny", "--device", "cpu", "--repeats", "1", "--seconds", "0.001", "--out", str(tmp_path)]
    cases = ["--case", "32x32,2", "--case", "48x32,2,no-cfg,batch=2", "--changing", "128x128,2", "--only", "VAE of pictures"]
    assert main([*command, *cases]) == 0
    told = capsys.readouterr().out
    assert told.count("the model: ") == 1 and "a new size and prompt each call: 2 rows are in" in told
    rungs = {(row["width"], row["cfg"] + row["batch"], row["rung"]) for row in read(tmp_path / "ladder.csv")}
    assert rungs == {(w, cfg, rung) for w, cfg in (("32", "True1"), ("48", "False2")) for rung in (STOCK.name, STEPS[-1].name)}
    assert [row["rung"] for row in read(tmp_path / "changing.csv")] == [STOCK.name, STEPS[-1].name]
    assert main(["bench", "--estimate", "--changing", "512x512,20"]) == 0
    assert "a new size each call, 3 rungs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--case", "512x512"],
        ["--changing", "512x512,8,cfg"],
        ["--changing", "512x512,8,batch=2"],
        ["--case", "64x64,2,batch=0"],
        ["--case", "batch=2"],
        ["--case", "64x64,2", "--steps", "3"],
        ["--full", "--case", "64x64,2"],
    ],
)
def test_cases_that_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_too_small_a_picture_is_named_before_any_work(tmp_path, capsys):
    assert main(["bench", "--shape", "tiny", "--device", "cpu", "--changing", "32x32,2", "--out", str(tmp_path)]) == 2
    assert "too small for 4 sizes" in capsys.readouterr().err and not list(tmp_path.glob("*.csv"))
