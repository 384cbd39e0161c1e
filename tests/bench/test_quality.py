"""The quality harness: its modes, its noise, a cut run that goes on, what --check catches, bad input."""

import contextlib
import csv
import dataclasses
import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("skimage", reason="the quality harness needs scikit-image")

from benchmarks.quality import pictures as quality_pictures
from benchmarks.quality import run as quality
from benchmarks.quality.metrics import latent_differences
from benchmarks.quality.modes import MODES, Mode, Setting, enabled, stock, wrong_schedule
from benchmarks.quality.pictures import Model, Pictures, Store, cases, draw, initial_noise
from benchmarks.quality.sheet import FRAME, GAP, LABEL
from benchmarks.shared.stock import stock as stock_pipeline
from qwen_fast.demo import LIGHTNING
from qwen_fast.demo.judge import Verdict
from qwen_fast.demo.scenes import lay_out, render

TINY = Setting(32, 32, 2)
GOOD = Verdict(count=True, background=True, colour=True, shape=True, both=True, size=None, place=True)
BAD = dataclasses.replace(GOOD, shape=False, both=False)
CPU = torch.device("cpu")


def run(*arguments: object) -> int:
    return quality.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory) -> Model:
    """The small checkpoint with a few-step LoRA of its own, of random weights."""
    peft = pytest.importorskip("peft", reason="a LoRA needs peft")
    folder = tmp_path_factory.mktemp("quality") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    transformer = stock_pipeline(folder).transformer
    transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "img_mod.1"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(transformer)
    diffusers.QwenImagePipeline.save_lora_weights(folder / LIGHTNING, transformer_lora_layers=layers)
    return Model(folder, CPU)


# Modes


@pytest.mark.parametrize("name", MODES)
def test_a_mode_leaves_the_pipeline_as_it_was(name, model):
    mode = MODES[name]
    pipe = model.pipe(mode.dtype)
    before = type(pipe), pipe.scheduler, type(pipe.transformer), set(pipe.__dict__), dict(pipe.scheduler.config)
    with pytest.raises(KeyError), mode.prepare(pipe, TINY):
        changes = name not in ("stock", "stock-alone", "stock-bf16", "no-cfg", "steps-8", "steps-4")
        assert changes == (before[:2] != (type(pipe), pipe.scheduler))
        raise KeyError
    assert before == (type(pipe), pipe.scheduler, type(pipe.transformer), set(pipe.__dict__), dict(pipe.scheduler.config))
    assert not getattr(pipe.transformer, "peft_config", None)


@pytest.mark.parametrize(
    ("name", "largest"), [("error-mu", 2.1), ("error-linspace", 5.1), ("error-stretch", 62.7), ("error-all", 13.5)]
)
def test_the_historical_errors_are_drawn_with(name, largest, model):
    """Their largest timestep error at 512x512 and 20 steps, as diffusers' loop would see it."""
    pipe, setting = model.pipe(torch.float32), Setting(512, 512, 20)
    arguments = {"sigmas": np.linspace(1, 1 / 20, 20), "mu": 0.5387096774193548, "device": CPU}
    pipe.scheduler.set_timesteps(**arguments)
    right = pipe.scheduler.timesteps.clone()
    with MODES[name].prepare(pipe, setting):
        pipe.scheduler.set_timesteps(**arguments)
        assert f"{(pipe.scheduler.timesteps - right).abs().max():.1f}" == str(largest)
        with pytest.raises(ValueError, match="8 steps asked of a schedule of 20"):
            pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))


def test_an_error_that_the_scheduler_cannot_show(model):
    pipe = model.pipe(torch.float32)
    right = pipe.scheduler
    pipe.scheduler = type(right).from_config({**right.config, "shift_terminal": None})
    try:
        with pytest.raises(ValueError, match="'no stretch'.*it shows mu through ln/exp"):
            with wrong_schedule("no stretch")(pipe, TINY):
                pass
    finally:
        pipe.scheduler = right


def test_references_come_first_and_once():
    assert list(quality.with_references(["precise-bf16", "ours-bf16", "ours"])) == [
        *("stock", "precise-bf16", "stock-bf16", "ours-bf16", "stock-alone", "ours")
    ]


# Drawing


def test_cases_are_held_out_and_a_longer_list_begins_with_the_shorter():
    assert all(case.request.held_out for case in cases(40)) and cases(40)[:7] == cases(7)
    assert {len(case.request.things) for case in cases(40)} == {1, 2}


def test_a_picture_is_the_one_that_a_user_gets_from_its_seed(model, tmp_path):
    todo = cases(5)
    drawn = draw(model, "stock", MODES["stock"], TINY, todo, 1, Store(tmp_path, {}))
    pipe = stock_pipeline(model.folder)
    for case, picture, latents in zip(todo, drawn.pictures, drawn.latents, strict=True):
        call = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 2, "height": 32, "width": 32}
        arguments = [{**call, "generator": torch.Generator().manual_seed(case.seed)} for _ in range(2)]
        assert np.array_equal(picture, np.asarray(pipe(case.request.prompt, **arguments[0]).images[0]))
        assert np.array_equal(latents, pipe(case.request.prompt, **arguments[1], output_type="latent").images[0].numpy())


def test_batches_keep_the_order_of_the_seeds(model, tmp_path, monkeypatch):
    """Prompts are grouped by their length inside; a picture must come back at its own place."""
    todo, store, sizes, call = cases(20), Store(tmp_path, {}), {}, quality_pictures._call

    def count(*args: object) -> tuple:
        sizes.setdefault(mode, []).append(len(args[3]))
        return call(*args)

    monkeypatch.setattr(quality_pictures, "_call", count)
    drawn = {}
    for mode in ("stock", "stock-alone"):
        drawn[mode] = draw(model, mode, MODES[mode], TINY, todo, 4, store)
    assert sum(sizes["stock"]) == 20 and 1 < max(sizes["stock"]) <= 4 and sizes["stock-alone"] == [1] * 20
    difference, _ = latent_differences(drawn["stock"].latents, drawn["stock-alone"].latents)
    assert difference.max() < 2e-6


@pytest.mark.parametrize("name", ["ours", "no-cfg", "error-stretch"])
def test_every_mode_starts_from_the_same_noise(name, model):
    pipe = model.pipe(torch.float32)
    expected = initial_noise(pipe, TINY, 3)
    with MODES[name].prepare(pipe, TINY):
        assert torch.equal(initial_noise(pipe, TINY, 3), expected)


def test_fewer_steps_are_those_of_the_mode(model, tmp_path):
    store, todo = Store(tmp_path, {}), cases(1)
    few = draw(model, "steps-4", MODES["steps-4"], TINY, todo, 1, store)
    same = draw(model, "stock", MODES["stock"], Setting(32, 32, 4), todo, 1, store)
    assert np.array_equal(few.latents, same.latents)


def test_an_interrupted_run_goes_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality_pictures, "BLOCK", 2)
    arguments = ["--model", model.folder, "--modes", "precise-bf16", "--sizes", "32x32", "--steps", 2, "--seeds", 5]
    assert run(*arguments, "--out", tmp_path / "whole") == 0
    block, calls = quality_pictures._draw_block, []

    def cut(*args: object) -> Pictures:
        calls.append(args)
        if len(calls) == 5:  # three blocks of stock, one of the mode
            raise KeyboardInterrupt
        return block(*args)

    monkeypatch.setattr(quality_pictures, "_draw_block", cut)
    assert run(*arguments, "--out", tmp_path / "cut", "--append", tmp_path / "rows.csv") == 130
    assert "the same command goes on" in capsys.readouterr().err
    halves = sorted((tmp_path / "cut").rglob("*.safetensors"))
    assert len(halves) == 4
    halves[1].write_bytes(halves[1].read_bytes()[:-9])  # as a full disk would leave it
    halves[1].with_suffix(".part").write_bytes(b"half")
    assert run(*arguments, "--out", tmp_path / "cut", "--append", tmp_path / "rows.csv") == 0
    assert f"{halves[1]} is damaged" in capsys.readouterr().out and len(calls) == 5 + 3
    for path in sorted((tmp_path / "whole").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes()
    assert run(*arguments, "--out", tmp_path / "cut") == 0 and len(calls) == 8  # nothing is drawn twice
    assert not list(tmp_path.rglob("*.part"))
    with (tmp_path / "rows.csv").open() as file:
        assert [(row["mode"], row["things"]) for row in csv.DictReader(file)] == [
            (mode, things) for mode in ("stock", "precise-bf16") for things in ("one", "two", "all")
        ]


def test_more_seeds_keep_whole_blocks_and_draw_a_cut_one_again(model, tmp_path, monkeypatch):
    monkeypatch.setattr(quality_pictures, "BLOCK", 2)
    store, drawn, block = Store(tmp_path, {}), [], quality_pictures._draw_block
    monkeypatch.setattr(quality_pictures, "_draw_block", lambda *args: drawn.append(len(args[3])) or block(*args))
    few = draw(model, "stock", MODES["stock"], TINY, cases(3), 8, store)
    many = draw(model, "stock", MODES["stock"], TINY, cases(6), 8, store)
    assert drawn == [2, 1, 2, 2] and len(many.pictures) == 6
    assert np.array_equal(many.pictures[:2], few.pictures[:2]) and len(few.pictures) == 3


# --check


def verdict_result(name: str, verdicts: list[Verdict], latent_max: list[float]) -> quality.Result:
    pictures = Pictures(np.zeros((len(verdicts), 32, 32, 3), np.uint8), np.zeros((len(verdicts), 4, 64), np.float32))
    return quality.Result(
        name, MODES[name], TINY, pictures, verdicts, [GOOD] * len(verdicts), {"latent_max": latent_max}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong", "latent_max", "device", "message"),
    [
        ("ours", 0, 2e-6, "cpu", None),
        ("ours", 0, 2.1e-6, "cpu", r"latents of seed 0 \('an? .* background'\) differ from stock-alone's by 2.1e-06"),
        ("ours", 0, math.nan, "cpu", "latents of seed 0 .* by nan"),
        ("ours", 2, 1e-3, "cuda", None),
        ("ours", 3, 1e-3, "cuda", "98.5% of 200 verdicts are those of stock-alone; 99% are needed"),
        ("ours-bf16", 2, 0.1, "cpu", None),
        ("ours-bf16", 3, 0.1, "cpu", "98.5% of 200 verdicts are those of stock-bf16"),
        ("ours-bf16", 0, math.nan, "cpu", "not finite"),
        ("precise-bf16", 200, 1.0, "cpu", None),
    ],
)
def test_what_breaks_the_contract(name, wrong, latent_max, device, message):
    result = verdict_result(name, [BAD] * wrong + [GOOD] * (200 - wrong), [latent_max] + [0.0] * 199)
    found = quality.breaches([result], cases(200), torch.device(device))
    if message is None:
        assert found == []
    else:
        (line,) = found
        assert re.search(message, line), line


@contextlib.contextmanager
def _shifted(pipe, setting):
    """Ours, with a schedule whose mu is off by about a millionth."""
    right = pipe.scheduler
    with enabled()(pipe, setting):
        pipe.scheduler = type(right).from_config({**right.config, "max_shift": 0.9001})
        try:
            yield
        finally:
            pipe.scheduler = right


def test_check_catches_a_mode_that_is_not_what_it_claims(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODES, "broken", Mode("broken", _shifted, lossless=True))
    arguments = ["--model", model.folder, "--sizes", "32x32", "--steps", 3, "--seeds", 2, "--out", tmp_path / "out"]
    assert run(*arguments, "--modes", "ours", "broken", "--check") == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken 32x32-3")]
    assert len([line for line in lines if "max|latent|" in line]) == 2
    assert run(*arguments, "--modes", "ours", "broken") == 0  # told, but not asked
    assert "max|latent|" in capsys.readouterr().out
    assert run(*arguments, "--modes", "ours", "--check") == 0


def test_a_mode_of_ours_that_stock_would_draw_is_an_error(model, tmp_path):
    pipe = model.pipe(torch.float32)
    right = pipe.scheduler
    pipe.scheduler = type(right).from_config({**right.config, "stochastic_sampling": True})
    try:
        with pytest.raises(RuntimeError, match="would run on stock"):
            draw(model, "ours", MODES["ours"], TINY, cases(1), 1, Store(tmp_path, {}))
    finally:
        pipe.scheduler = right


# The whole


def test_all_modes_end_to_end(model, tmp_path, capsys):
    rows, sheet = tmp_path / "rows.csv", tmp_path / "sheet.png"
    arguments = ["--model", model.folder, "--sizes", "32x32", "--steps", 3, "--seeds", 4, "--out", tmp_path / "out"]
    assert run(*arguments, "--append", rows, "--sheet", sheet, "--columns", 3) == 0
    with rows.open() as file:
        found = {(row["mode"], row["things"]): row for row in csv.DictReader(file)}
    assert {mode for mode, _ in found} == set(MODES)
    counts = [sum(len(case.request.things) == things for case in cases(4)) for things in (1, 2)]
    assert [int(found["ours", scope]["pictures"]) for scope in ("one", "two", "all")] == [*counts, 4]
    assert found["ours", "all"]["checkpoint_sha256"] == model.sha256 and found["ours", "all"]["lossless"] == "True"
    assert found["stock", "all"]["psnr_p50"] == "inf" and float(found["stock", "all"]["latent_max"]) == 0
    assert 0 < float(found["ours", "all"]["latent_max"]) < 2e-6 < float(found["stock-bf16", "all"]["latent_max"])
    assert found["steps-8", "all"]["steps"] == "8"
    assert float(found["lightning-4", "all"]["latent_max"]) > 1e-2 and found["ours-lightning-4", "all"]["steps"] == "4"
    assert 0 < float(found["ours-lightning-4", "all"]["latent_max"]) < 2e-6  # to stock with the same LoRA
    assert found["lightning-4", "all"]["latent_max"] != found["bare-lightning-4", "all"]["latent_max"]
    output = capsys.readouterr().out
    assert "| no stretch | 32x32, 3 |" in output and "32x32-3 error-all: 4/4 pictures" in output
    pages = [Image.open(path) for path in (sheet, *(sheet.with_stem(f"sheet-{n}") for n in (2, 3)))]
    assert {page.size[0] for page in pages} == {GAP + LABEL + 3 * (128 + 2 * FRAME + GAP)}
    assert max(page.size[1] for page in pages) < 1300 and not sheet.with_stem("sheet-4").exists()


def test_a_checkpoint_without_a_few_step_lora(checkpoint, tmp_path, capsys):
    arguments = ["--model", checkpoint, "--sizes", "32x32", "--steps", 2, "--seeds", 1]
    assert run(*arguments, "--out", tmp_path / "all") == 0  # all modes that it has
    out = capsys.readouterr().out
    assert "bare-lightning-4: 1/1" in out and " lightning-4: " not in out and "ours-lightning-4" not in out
    assert run(*arguments, "--out", tmp_path / "one", "--modes", "ours-lightning-4") == 2
    assert f"--modes lightning-4 needs {checkpoint / LIGHTNING}" in capsys.readouterr().err


def test_true_pictures_are_judged_right_and_wrong_ones_wrong(model, tmp_path, monkeypatch):
    """Modes that hand out the renderer's pictures, for their own prompts and for their neighbours'."""
    todo = cases(24)
    scenes = [lay_out(case.request, 64, 64, random.Random(case.seed)) for case in todo]
    pictures = (render(scenes, 64, 64).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    latents = np.ones((24, 16, 64), np.float32)

    def drawn(model, name, *_):
        return Pictures(pictures if name == "stock" else np.roll(pictures, 1, 0), latents)

    monkeypatch.setattr(quality, "draw", drawn)
    modes = {"stock": MODES["stock"], "rolled": Mode("rolled", stock), "same": Mode("same", stock, reference="rolled")}
    right, wrong, same = quality.measure(model, modes, Setting(64, 64, 20), todo, 8, Store(tmp_path, {}))
    assert right.scope(todo, (1, 2))["everything"] == 1 and right.scope(todo, (2,))["count"] == 1
    figures = wrong.scope(todo, (1, 2))
    assert figures["everything"] == figures["same_verdict"] == 0 and figures["psnr_p50"] < 20 and figures["ssim_mean"] < 0.9
    assert same.scope(todo, (1, 2))["same_picture"] == same.scope(todo, (1, 2))["same_verdict"] == 1


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "ours", "fast"], "--modes fast: no such mode; there are stock, stock-alone, ours"),
        (["--modes", "steps-8", "--check"], "nothing to check: name one of ours, ours-bf16"),
        (["--sheet", "a.jpg"], "--sheet a.jpg: a name ending in .png"),
        (["--model", "nowhere/at/all"], "nowhere"),
    ],
)
def test_bad_arguments_are_named_before_any_work(arguments, message, tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.setattr(quality, "measure", lambda *_: pytest.fail("work was done"))
    given = [] if "--model" in arguments else ["--model", checkpoint]
    assert run(*arguments, *given, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--sizes", "60x64"], ["--sizes", "64"], ["--batch", "x"]])
def test_bad_numbers_end_in_the_parser(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2 and f"argument {arguments[0]}: " in capsys.readouterr().err


def test_pictures_of_another_run_are_not_mixed_in(model, tmp_path):
    Store(tmp_path / "out", {"checkpoint": "a", "batch": "4"})
    Store(tmp_path / "out", {"checkpoint": "a", "batch": "4"})
    with pytest.raises(ValueError, match="another run: batch 4 there, 8 now. Name another"):
        Store(tmp_path / "out", {"checkpoint": "a", "batch": "8"})
    (tmp_path / "out" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        Store(tmp_path / "out", {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="has other contents"):
        Store(tmp_path / "other", {})


def test_the_identity_sees_a_changed_weight_and_changed_code(model, tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = quality_pictures.digest(tmp_path, "*.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"2")
    assert quality_pictures.digest(tmp_path, "*.safetensors") != before
    here = quality_pictures.identity(model, 4)
    monkeypatch.setattr(quality_pictures, "digest", lambda folder, pattern: f"{Path(folder).name}{pattern}")
    assert quality_pictures.identity(model, 4)["code"] != here["code"] and json.dumps(here)
    assert here["checkpoint"] == model.sha256 and sys.modules["torch"].__version__.split("+")[0] in here["versions"]
