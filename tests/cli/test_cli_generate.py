"""`qwen-fast generate`, in process: what it draws, what it writes, and what it says about bad input."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops

from qwen_fast import demo
from qwen_fast.cli import main, pngs
from qwen_fast.demo.judge import judge
from qwen_fast.pipelines import generate as drawing
from support.cli import refused


@pytest.fixture
def draw(checkpoint, tmp_path, monkeypatch):
    """`draw(*argv)`: generate 64x64 pictures in 2 steps with the tiny checkpoint, in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str, model: Path | None = checkpoint) -> int:
        chosen = ["--model", str(model)] if model else []
        return main(["generate", *chosen, "--device", "cpu", "--size", "64x64", "--steps", "2", *argv])

    return run


def test_generate_writes_a_picture_with_its_settings(draw, tmp_path, checkpoint, capsys):
    prompt, negative = "Ein roter Füchs, 一只狐狸", "blurry"
    arguments = ["--prompt", prompt, "--negative-prompt", negative, "--seed", "7", "--size", "96x64", "--cfg", "3.7"]
    assert draw(*arguments) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*.png")
    assert path.name in out and "96x64, 2 steps, cfg 3.7, float32 on cpu" in out
    assert str(tmp_path) in out and " s after " in out
    last = out.splitlines()[-1]
    assert last == "qwen_fast: QwenImagePipeline is accelerated; 8 fast calls, 0 on stock diffusers"
    image = Image.open(path)
    assert image.size == (96, 64)
    expected = {
        "prompt": prompt,
        "negative_prompt": negative,
        "seed": "7",
        "steps": "2",
        "size": "96x64",
        "cfg": "3.7",
        "model": str(checkpoint),
        "lora": "",
        "schedule": "model",
        "sampler": "qwen_fast",
        "dtype": "float32",
    }
    assert image.text.items() >= expected.items()
    assert f"diffusers {diffusers.__version__}" in image.text["versions"]


def test_each_prompt_has_a_size_of_its_own(draw, tmp_path, capsys):
    arguments = ["--prompt", "x", "--prompt", "y", "--size", "96x64", "48x80", "--num-images", "2", "--cfg", "1"]
    assert draw(*arguments) == 0
    assert "96x64, 2 steps, cfg 1, float32 on cpu\n48x80, 2 steps, cfg 1" in capsys.readouterr().out
    found = {}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            found[image.text["prompt"], image.text["seed"]] = image.size, image.text["size"]
    wide, high = ((96, 64), "96x64"), ((48, 80), "48x80")
    assert found == {("x", "0"): wide, ("x", "1"): wide, ("y", "2"): high, ("y", "3"): high}


def test_generate_draws_what_stock_diffusers_draws(draw, checkpoint, capsys):
    assert draw("--prompt", "a cat", "--seed", "3", "--out", "ours.png") == 0
    assert draw("--prompt", "a cat", "--seed", "3", "--out", "stock.png", "--stock") == 0
    assert f"drawn by stock diffusers {diffusers.__version__}" in capsys.readouterr().out
    ours, stock = Image.open("ours.png"), Image.open("stock.png")
    # 1 of 255: the sum of a norm may be taken in another order.
    assert max(high for _, high in ImageChops.difference(ours, stock).getextrema()) <= 1
    assert (ours.text["sampler"], stock.text["sampler"]) == ("qwen_fast", "diffusers")
    pipe = diffusers.QwenImagePipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    arguments = dict(negative_prompt=" ", true_cfg_scale=4.0, num_inference_steps=2, width=64, height=64)
    assert np.array_equal(np.asarray(pipe("a cat", generator=generator, **arguments).images[0]), np.asarray(stock))


def test_generate_one_seed_per_picture(draw, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red fox\r\n\r\n  ein blauer Vogel  \n".encode())
    assert draw("--prompt-file", "prompts.txt", "--num-images", "2", "--seed", "5", "--out", "a/b", "--cfg", "1") == 0
    assert "4 pictures in " in capsys.readouterr().out
    pictures = {path.name: Image.open(path).text for path in Path("a/b").iterdir()}
    assert {name: (text["prompt"], text["seed"]) for name, text in pictures.items()} == {
        "a-red-fox-seed5.png": ("a red fox", "5"),
        "a-red-fox-seed6.png": ("a red fox", "6"),
        "ein-blauer-vogel-seed7.png": ("ein blauer Vogel", "7"),
        "ein-blauer-vogel-seed8.png": ("ein blauer Vogel", "8"),
    }
    assert draw("--prompt", "a red fox", "--seed", "6", "--out", "alone.png", "--cfg", "1", "--precise-sampler") == 0
    assert np.array_equal(np.asarray(Image.open("alone.png")), np.asarray(Image.open("a/b/a-red-fox-seed6.png")))
    assert Image.open("alone.png").text["sampler"] == "qwen_fast, precise"


def test_generate_never_overwrites_unasked(draw, tmp_path, capsys):
    for _ in range(3):
        assert draw("--prompt", "x", "--out", "pictures") == 0
    names = {path.name for path in Path("pictures").iterdir()}
    assert names == {"x-seed0.png", "x-seed0-1.png", "x-seed0-2.png"}
    assert draw("--prompt", "x", "--out", "pictures", "--overwrite", "--cfg", "1") == 0
    assert len(list(Path("pictures").iterdir())) == 3
    assert Image.open("pictures/x-seed0.png").text["cfg"] == "1"

    mine = tmp_path / "mine.png"
    mine.write_text("mine")
    capsys.readouterr()
    command = ["generate", "--prompt", "x", "--out", str(mine)]
    assert "mine.png exists; --overwrite replaces it" in refused(capsys, *command)
    assert mine.read_text() == "mine"
    with pytest.raises(FileExistsError):  # it appeared while we drew
        pngs.save_png(Image.new("RGB", (1, 1)), mine, {}, overwrite=False, find_free_name=False)
    assert mine.read_text() == "mine"
    assert draw("--prompt", "x", "--out", str(mine), "--overwrite") == 0
    with Image.open(mine) as picture:
        assert picture.format == "PNG"


def test_interrupt_leaves_the_finished_pictures(draw, monkeypatch, capsys):
    finish = drawing._call

    def interrupted(pipe, prompts, index, *args):
        if index == 1:
            raise KeyboardInterrupt
        return finish(pipe, prompts, index, *args)

    monkeypatch.setattr(drawing, "_call", interrupted)
    assert draw("--prompt", "one", "--prompt", "two", "--prompt", "three") == 130
    assert "1 of 3 pictures are finished" in capsys.readouterr().err
    assert [path.name for path in Path().glob("*.png")] == ["one-seed0.png"]


def test_interrupt_while_loading(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_fast.common.hardware.device_and_dtype", interrupted)
    assert main(["generate", "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_generate_draws_the_demo_without_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "--prompt", demo.PROMPTS[0], "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert str(demo.CHECKPOINT) in captured.out and captured.err == ""
    assert "64x64, 20 steps, cfg 4, float32 on cpu" in captured.out
    (path,) = tmp_path.glob("*.png")
    picture = Image.open(path)
    assert picture.text["model"] == "demo checkpoint"
    assert judge(np.asarray(picture), demo.PROMPTS[0]).everything


def test_generate_says_what_the_demo_does_not_know(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    known = ["--prompt", demo.PROMPTS[0], "--prompt", "a red circle", "--prompt", "a cat", "--steps", "1", "--device", "cpu"]
    assert main(["generate", *known, "--size", "80x64", "--negative-prompt", "red"]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 4 and all(note.startswith("note: the demo checkpoint ") for note in notes)
    assert "'a red circle' is no sentence" in "".join(notes) and "knows 64x64 and 96x64; at 80x64" in "".join(notes)
    assert "'red' makes its pictures worse" in "".join(notes)
    assert main(["generate", *known[:2], *known[6:], "--size", "96x64", "--cfg", "1", "--negative-prompt", "red"]) == 0
    assert capsys.readouterr().err == "", "without guidance nothing reads the negative prompt"


def test_generate_names_a_damaged_demo_checkpoint(tmp_path, monkeypatch, capsys):
    damaged = tmp_path / "checkpoint"
    shutil.copytree(demo.CHECKPOINT, damaged)
    (damaged / "vae" / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "CHECKPOINT", damaged)
    assert main(["generate", "--prompt", "x", "--out", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert str(damaged / "vae" / "config.json") in err and "is damaged" in err and "qwen_fast.demo.train" in err
    assert not (tmp_path / "x.png").exists()


def test_generate_refuses_an_edit_checkpoint(draw, checkpoint, tmp_path, capsys):
    edit = tmp_path / "edit"
    shutil.copytree(checkpoint, edit)
    index = edit / "model_index.json"
    index.write_text(index.read_text().replace("QwenImagePipeline", "QwenImageEditPlusPipeline"))
    assert draw("--prompt", "x", model=edit) == 2
    assert "edit is a QwenImageEditPlusPipeline; generate draws from text alone" in capsys.readouterr().err


def test_generate_with_loras_and_another_schedule(draw, checkpoint, tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="LoRAs need peft")
    pipe = diffusers.QwenImagePipeline.from_pretrained(checkpoint)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    for name in ("style", "other"):
        diffusers.QwenImagePipeline.save_lora_weights(tmp_path / name, transformer_lora_layers=layers)
    file = tmp_path / "style" / "pytorch_lora_weights.safetensors"

    assert draw("--prompt", "x", "--out", "plain.png") == 0
    assert draw("--prompt", "x", "--out", "off.png", "--lora", f"{file}:0") == 0
    assert draw("--prompt", "x", "--out", "one.png", "--lora", f"{file}:1.5") == 0
    assert draw("--prompt", "x", "--out", "two.png", "--lora", "style:0.5", "--lora", "other") == 0
    pixels = {name: np.asarray(Image.open(f"{name}.png")) for name in ("plain", "off", "one", "two")}
    assert np.array_equal(pixels["plain"], pixels["off"])
    assert not np.array_equal(pixels["plain"], pixels["one"])
    difference = np.abs(pixels["one"].astype(int) - pixels["two"].astype(int))
    assert difference.max() <= 1  # the same sum, added in another order
    assert Image.open("two.png").text["lora"] == "style:0.5, other:1"
    own = tmp_path / "with its own"
    shutil.copytree(checkpoint, own)
    shutil.move(tmp_path / "other", own / "short")  # a LoRA that comes with the model goes by its folder's name
    assert draw("--prompt", "x", "--out", "own.png", "--lora", "short:1.5", model=own) == 0
    assert np.array_equal(pixels["one"], np.asarray(Image.open("own.png")))
    assert draw("--prompt", "x", "--out", "short.png", "--config", "lightning") == 0
    assert not np.array_equal(pixels["plain"], np.asarray(Image.open("short.png")))
    capsys.readouterr()

    (tmp_path / "broken.safetensors").write_bytes(b"not a LoRA")
    assert draw("--prompt", "x", "--lora", "broken.safetensors") == 2
    assert "--lora broken.safetensors cannot be loaded" in capsys.readouterr().err
    stranger = {f"transformer.elsewhere.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    safetensors.torch.save_file(stranger, tmp_path / "stranger.safetensors")
    assert draw("--prompt", "x", "--lora", "stranger.safetensors") == 2
    assert "--lora stranger.safetensors" in capsys.readouterr().err
    assert draw("--prompt", "x", "--lora", "./missing.safetensors") == 2
    assert "--lora ./missing.safetensors: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "one of the arguments --prompt --prompt-file --jobs is required"),
        (["--prompt", "x", "--prompt-file", "y"], "not allowed with argument"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt: No such file or directory"),
        (["--prompt-file", "empty.txt"], "--prompt-file empty.txt holds no prompt"),
        (["--prompt-file", "latin.txt"], "--prompt-file latin.txt is not UTF-8"),
        (["--prompt", "x", "--size", "64"], "'64' is not WIDTHxHEIGHT"),
        (["--prompt", "x", "--size", "64x70"], "70 is not a multiple of 16 pixels; 64 or 80 would do"),
        (["--prompt", "x", "--size", "0x64"], "'0' is not a whole number of at least 1"),
        (["--prompt", "x", "--size", "64x64", "96x64"], "--size names 2 sizes for 1 prompts; one for all or one for each"),
        (["--prompt", "x", "--steps", "-3"], "'-3' is not a whole number of at least 1"),
        (["--prompt", "x", "--num-images", "0"], "'0' is not a whole number of at least 1"),
        (["--prompt", "x", "--seed", "-1"], "'-1' is not a whole number from 0"),
        (["--prompt", "x", "--num-images", "2", "--seed", str(2**63 - 1)], "leaves no seeds for 2 pictures"),
        (["--prompt", "x", "--cfg", "nan"], "'nan' is not a finite number"),
        (["--prompt", "x", "--lora", ":0.5"], "':0.5' is not PATH or PATH:SCALE"),
        (["--prompt", "x", "--lora", "a:inf"], "'a:inf' is not PATH or PATH:SCALE"),
        (["--prompt", "x", "--stock", "--precise-sampler"], "cannot go with --stock"),
        (["--prompt", "x", "--out", "x.jpg"], "a name ending in .png"),
        (["--prompt", "x", "--out", "empty.txt"], "a name ending in .png"),
        (["--prompt", "x", "--out", "plain"], "--out plain is a file without .png"),
        (["--prompt", "x", "--prompt", "y", "--out", "x.png"], "--out x.png is one file for 2 pictures"),
        (["--prompt", "x", "--config", "missing.json"], "--config missing.json: no such file"),
        (["--prompt", "x", "--device", "cuda"], "sees no CUDA GPU here"),
        (["--prompt", "x", "--device", "toaster"], "--device toaster: no such device"),
        (["--prompt", "x", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["--prompt", "x", "--model", "empty-folder"], "empty-folder"),
        (["--prompt", "x", "--model", "./nowhere"], "nowhere: no such folder"),
    ],
)
def test_generate_refuses(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("empty.txt").write_text("\n \n")
    Path("latin.txt").write_bytes("Füchs".encode("latin-1"))
    Path("plain").write_text("")
    Path("empty-folder").mkdir()
    before = set(tmp_path.iterdir())
    assert message in refused(capsys, "generate", *argv)
    assert set(tmp_path.iterdir()) == before
