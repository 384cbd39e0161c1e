"""`qwen-fast generate --jobs`: each line its own settings, what is drawn is skipped, and a bad line is named."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import qwen_fast
from qwen_fast.cli import generate, main
from qwen_fast.cli.jobs import Job, contact_sheet, runs, slug
from support.cli import refused

JOBS = [
    {"prompt": "a red fox"},
    {"prompt": "a red fox", "seed": 1},
    {"prompt": "a blue bird", "seed": 7, "size": "96x64", "steps": 3, "cfg": 1, "name": "bird"},
    {"prompt": "a dog", "negative_prompt": "blurry", "cfg": 3.5},
]


@pytest.fixture
def draw(checkpoint, tmp_path, monkeypatch):
    """`draw(lines, *argv)`: the job file of these lines, with the tiny checkpoint, into "out"."""
    monkeypatch.chdir(tmp_path)

    def run(lines, *argv: str) -> int:
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "jobs.jsonl").write_text("# a comment\n\n" + "\n".join(text) + "\n", encoding="utf-8")
        fixed = ["--model", str(checkpoint), "--device", "cpu", "--size", "64x64", "--steps", "2", "--out", "out"]
        return main(["generate", "--jobs", "jobs.jsonl", *fixed, *argv])

    return run


def pictures(tmp_path) -> dict[str, Image.Image]:
    return {path.name: Image.open(path) for path in sorted((tmp_path / "out").glob("*.png")) if path.name != generate.SHEET}


def test_each_line_is_drawn_with_its_own_settings(draw, checkpoint, tmp_path, capsys):
    assert draw(JOBS) == 0
    found = pictures(tmp_path)
    assert list(found) == ["0003-a-red-fox-seed0.png", "0004-a-red-fox-seed1.png", "0006-a-dog-seed0.png", "bird.png"]
    bird, dog = found["bird.png"], found["0006-a-dog-seed0.png"]
    assert bird.size == (96, 64) and dog.size == (64, 64)
    expected = {"seed": "7", "steps": "3", "size": "96x64", "cfg": "1", "prompt": "a blue bird", "negative_prompt": ""}
    assert bird.text.items() >= expected.items()
    assert dog.text["negative_prompt"] == "blurry" and dog.text["cfg"] == "3.5" and dog.text["steps"] == "2"
    assert "all 4 in out/contact-sheet.png; 0 were there already" in capsys.readouterr().out
    # Each is the picture that its settings alone draw.
    alone = ["--prompt", "a blue bird", "--seed", "7", "--size", "96x64", "--steps", "3", "--cfg", "1", "--out", "alone.png"]
    assert main(["generate", "--model", str(checkpoint), "--device", "cpu", *alone]) == 0
    assert np.array_equal(np.asarray(bird), np.asarray(Image.open("alone.png")))


def test_it_goes_on_where_it_stopped(draw, tmp_path, monkeypatch, capsys):
    drawn, drawing = [], generate._draw

    def stopped(pipe, jobs, *others):
        if len(drawn) == 1:
            raise KeyboardInterrupt
        drawn.append(jobs)
        drawing(pipe, jobs, *others)

    monkeypatch.setattr(generate, "_draw", stopped)
    assert draw(JOBS) == 130
    assert "interrupted; 2 of 4 pictures are finished" in capsys.readouterr().err
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in pictures(tmp_path)}
    assert len(before) == 2 and not (tmp_path / "out" / generate.SHEET).exists()
    monkeypatch.setattr(generate, "_draw", drawing)
    assert draw(JOBS) == 0
    assert "2 pictures in" in (out := capsys.readouterr().out) and "2 were there already" in out
    assert len(pictures(tmp_path)) == 4
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in before.items())
    monkeypatch.setattr(qwen_fast, "__version__", "99")  # a newer version goes on too
    assert draw(JOBS) == 0 and "0 pictures in" in capsys.readouterr().out


def test_a_damaged_picture_or_one_of_other_settings_stops_it(draw, tmp_path, capsys):
    assert draw(JOBS[:1]) == 0
    assert draw([JOBS[0] | {"cfg": 2}]) == 2
    assert "0003-a-red-fox-seed0.png exists and was drawn with other settings; --overwrite" in capsys.readouterr().err
    assert draw([JOBS[0] | {"cfg": 2}], "--overwrite") == 0
    assert pictures(tmp_path)["0003-a-red-fox-seed0.png"].text["cfg"] == "2"
    path = tmp_path / "out" / "0003-a-red-fox-seed0.png"
    path.write_bytes(path.read_bytes()[:200])
    capsys.readouterr()
    assert draw([JOBS[0] | {"cfg": 2}]) == 2 and "exists and was drawn" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('["a"]', "a list; an object"),
        ('{"seed": 1}', "`prompt` is missing"),
        ('{"prompt": " "}', "`prompt` is missing"),
        ('{"prompt": "a", "step": 3}', "unknown key `step`; did you mean `steps`?"),
        ('{"prompt": "a", "steps": "3"}', "`steps` is '3'"),
        ('{"prompt": "a", "steps": 0}', "`steps`: '0' is not a whole number of at least 1"),
        ('{"prompt": "a", "size": "100x64"}', "`size`: 100 is not a multiple of 16 pixels; 96 or 112 would do"),
        ('{"prompt": "a", "cfg": -1}', "`cfg`: '-1' is not a finite number"),
        ('{"prompt": "a", "seed": true}', "`seed` is True"),
        ('{"prompt": "a", "name": "../a"}', "`name` is '../a'; a file's name"),
        ('{"prompt": "a", "name": "same"}', "`name` 'same' is that of an earlier line too"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_loaded(draw, line, message, tmp_path, capsys):
    first = {"prompt": "b", "name": "same"}
    assert draw([first, line]) == 2
    captured = capsys.readouterr()
    assert "--jobs jobs.jsonl, line 4: " in captured.err and message in captured.err and "--keep-going" in captured.err
    assert captured.out == "" and not (tmp_path / "out").exists()


def test_with_keep_going_the_others_are_drawn(draw, tmp_path, capsys):
    assert draw([JOBS[0], "nonsense", JOBS[1]], "--keep-going") == 1
    captured = capsys.readouterr()
    assert "line 4: not JSON" in captured.err and "all 2 in" in captured.out and len(pictures(tmp_path)) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--jobs", "nowhere.jsonl"], "--jobs nowhere.jsonl: No such file"),
        (["--jobs", "empty.jsonl"], "--jobs empty.jsonl holds no job"),
        (["--jobs", "empty.jsonl", "--num-images", "2"], "--num-images cannot go with --jobs"),
        (["--prompt", "a", "--keep-going"], "--keep-going is for --jobs"),
        (["--jobs", "one.jsonl", "--out", "a.png"], "--out a.png: pictures of --jobs go into a folder"),
        (["--prompt", "a", "--stepss", "3"], "unrecognized arguments: --stepss 3; did you mean --steps?"),
        (["--prompt", "a", "--stock", "--attention", "triton"], "--attention is an option of qwen_fast"),
        (["--prompt", "a", "--vae-memory", "little"], "'little' is neither auto nor none nor a number of bytes"),
    ],
)
def test_refusals(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("# nothing\n")
    (tmp_path / "one.jsonl").write_text('{"prompt": "a"}\n')
    assert message in refused(capsys, "generate", *argv)


def test_options_of_enable_reach_the_pipeline(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen, loading = {}, generate.load_pipeline
    monkeypatch.setattr(generate, "load_pipeline", lambda *args, **kwargs: seen.setdefault("pipe", loading(*args, **kwargs)))
    argv = ["--modulation", "host", "--cuda-graph", "off", "--vae-memory", "1000000", "--prompt-cache", "none", "--strict"]
    size = ["--size", "64x64", "--steps", "2", "--device", "cpu"]
    assert main(["generate", "--model", str(checkpoint), "--prompt", "a", *size, *argv, "--text-encoder-mode", "offload"]) == 0
    options = seen["pipe"].fast_state.options
    assert (options.modulation, options.cuda_graph, options.vae_memory) == ("host", False, 1000000)
    assert (options.prompt_cache, options.strict, options.text_encoder_mode) == (None, True, "offload")
    assert options.attention == "auto"


def test_out_of_memory_comes_with_advice(checkpoint, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(generate, "load_pipeline", full)
    assert main(["generate", "--model", str(checkpoint), "--prompt", "a", "--device", "cpu"]) == 2
    assert "CUDA out of memory. Less is needed with --text-encoder-mode offload" in capsys.readouterr().err


def test_jobs_of_equal_settings_and_seeds_in_a_row_are_drawn_together():
    jobs = [Job("a", 3), Job("b", 4), Job("c", 6), Job("d", 7, steps=4), Job("e", 8, steps=4)]
    assert [[job.prompt for job in together] for together in runs(jobs)] == [["a", "b"], ["c"], ["d", "e"]]


def test_names_end_with_a_word():
    assert slug("a small blue cross on the left of a black background") == "a-small-blue-cross-on-the-left-of-a"
    assert slug("x" * 60) == "x" * 40 and slug("!?") == "picture"


def test_the_sheet_holds_every_picture(tmp_path):
    for index in range(8):
        Image.new("RGB", (64, 32), (30 * index, 0, 0)).save(tmp_path / f"{index}.png")
    sheet = contact_sheet([(tmp_path / f"{index}.png", "a long text " * 9) for index in range(8)])
    colours = {colour for _, colour in sheet.getcolors(1 << 16)}
    assert {(30 * index, 0, 0) for index in range(8)} <= colours and sheet.width < 1100
