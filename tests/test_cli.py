"""The `qwen-fast` command, in process: what it prints, what it writes, and what it says about bad input."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops

from qwen_fast.cli import build_parser, doctor, generate, loading, main, schedule

# The mission's golden values: 20 steps, 1024 image tokens.
GOLDEN = "1000.00 968.17 934.95 900.26 863.99 826.03 786.27 744.57 700.79 654.76 606.31 555.24 501.34 444.36 384.03"
GOLDEN += " 320.04 252.06 179.69 102.51 20.00"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """Run a command that must end with exit code 2; returns its message, one line without a traceback."""
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def helped(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------- command


def test_help_answers_without_importing_torch():
    code = "import sys; from qwen_fast.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-m", "qwen_fast.cli", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("generate", "schedule", "doctor", "examples:"))


@pytest.mark.parametrize("command", ["generate", "schedule", "doctor"])
def test_help_ends_with_examples_and_every_example_parses(command, capsys):
    text = helped(capsys, command)
    examples = text.partition("examples:")[2].replace("\\\n", " ").splitlines()
    examples = [line.split("    ")[0] if "    " in line.strip() else line for line in map(str.strip, examples)]
    examples = [line.split(" > ")[0] for line in examples if line.startswith("qwen-fast")]
    assert examples
    for line in examples:
        build_parser().parse_args(shlex.split(line)[1:])


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("qwen-fast 0.")


def test_no_command_and_unknown_command(capsys):
    assert "COMMAND" in refused(capsys)
    assert "paint" in refused(capsys, "paint")


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        main(["--debug", "schedule", "--config", "missing.json"])


def test_a_closed_pipe_ends_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["schedule"]) == 0
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------------------------- schedule


def test_schedule_prints_the_golden_table(capsys):
    assert main(["schedule", "--steps", "20", "--width", "512", "--height", "512"]) == 0
    out = capsys.readouterr().out
    assert "mu 0.538710, image_seq_len 1024" in out
    rows = [line.split() for line in out.splitlines() if line[:4].strip().isdigit()]
    assert [row[2] for row in rows[:-1]] == GOLDEN.split()
    assert rows[1] == ["1", "0.968167", "968.17", "-0.033217", "968.75"]
    assert rows[-1] == ["20", "0.000000"]
    assert "equal bit for bit" in out


def test_schedule_lightning_and_own_sigmas(capsys):
    assert main(["schedule", "--config", "lightning", "--steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "mu 1.098612" in out and all(t in out for t in ("1000.00", "900.00", "750.00", "500.00"))
    assert main(["schedule", "--sigmas", "1.0,0.6,0.3", "--image-seq-len", "256"]) == 0
    out = capsys.readouterr().out
    assert "3 steps, 256 image tokens" in out and "equal bit for bit" in out


def test_schedule_of_one_step_says_what_diffusers_does(capsys, recwarn):
    assert main(["schedule", "--steps", "1"]) == 0
    out = capsys.readouterr().out
    assert "   0  1.000000   1000.00" in out and "gives NaN here" in out
    assert not recwarn.list


def test_schedule_of_a_checkpoint_and_of_a_file(checkpoint, tmp_path, capsys):
    assert main(["schedule", "--model", str(checkpoint), "--steps", "3"]) == 0
    assert "equal bit for bit" in capsys.readouterr().out
    static = tmp_path / "static.json"
    static.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}')
    assert main(["schedule", "--config", str(static), "--steps", "3"]) == 0
    out = capsys.readouterr().out
    assert "no mu (static shift)" in out and "equal bit for bit" in out


def test_schedule_reports_a_difference(capsys, monkeypatch):
    from qwen_fast.schedule import Schedule

    right = Schedule.from_config
    monkeypatch.setattr(Schedule, "from_config", lambda config, *a, **k: right({**config, "shift_terminal": None}, *a, **k))
    assert main(["schedule", "--steps", "4"]) == 1
    assert "DIFFERENT, by up to 0.38 in sigma and 380 in timestep" in capsys.readouterr().out


def test_json_golden_vectors_are_exact(capsys, tmp_path):
    from qwen_fast import Schedule

    assert main(["schedule", "--steps", "20", "--width", "512", "--height", "512", "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    (vector,) = written["vectors"]
    assert (vector["num_inference_steps"], vector["width"], vector["height"]) == (20, 512, 512)
    expected = Schedule.from_config(written["config"], 20, image_seq_len=1024)
    assert vector["mu"] == expected.mu == 0.5387096774193548
    for name in ("sigmas", "timesteps"):
        values = getattr(expected, name).numpy()
        assert np.array_equal(np.array(vector[name], dtype=np.float32), values)
        assert {len(word) for word in vector[f"{name}_hex"]} == {8}
        bits = np.array([int(word, 16) for word in vector[f"{name}_hex"]], dtype=np.uint32)
        assert np.array_equal(bits.view(np.float32), values)
    assert vector["timesteps"][1] == 968.16656  # fp32's own shortest decimal

    path = tmp_path / "vectors.json"
    assert main(["schedule", "--json", str(path), "--grid"]) == 0
    assert "30 golden vectors written" in capsys.readouterr().out
    vectors = json.loads(path.read_text())["vectors"]
    assert len({(v["width"], v["height"], v["num_inference_steps"]) for v in vectors}) == 30
    assert vectors[0]["sigmas"] == [1.0, 0.0] and vectors[0]["timesteps_hex"] == ["447a0000"]
    assert "exists" in refused(capsys, "schedule", "--json", str(path), "--grid")
    assert main(["schedule", "--json", str(path), "--overwrite"]) == 0
    assert len(json.loads(path.read_text())["vectors"]) == 1


@pytest.mark.parametrize(
    ("image_seq_len", "steps", "mu", "linspace", "stretch"),
    [
        (1024, 20, 2.1, 5.1, 62.7),
        (4096, 50, 6.8, 0.0, 19.2),
        (4096, 4, 4.2, 49.6, 380.1),
    ],
)
def test_historical_errors_are_as_large_as_measured(image_seq_len, steps, mu, linspace, stretch):
    from qwen_fast import Schedule

    config, _ = schedule.load_config("base")
    right = Schedule.from_config(config, steps, image_seq_len=image_seq_len)
    errors = schedule.historical_errors(config, steps, image_seq_len)
    largest = [round((wrong.timesteps - right.timesteps).abs().max().item(), 1) for wrong in errors.values()]
    assert largest == [mu, linspace, stretch]
    assert schedule.historical_errors(schedule.load_config("lightning")[0], steps, image_seq_len) == {}


def test_terminal_plot(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["schedule", "--width", "512", "--height", "512", "--plot", "-"]) == 0
    out = capsys.readouterr().out
    plot = out[out.index("timestep over step") :]
    assert "no stretch (at most 62.7)" in plot and "linspace to shift_terminal (at most 5.1)" in plot
    assert plot.isascii() and max(map(len, plot.splitlines())) <= 80
    assert plot.splitlines()[1].startswith("  1000.0 |o")
    assert main(["schedule", "--config", "lightning", "--steps", "1", "--plot", "-"]) == 0
    assert "difference" not in capsys.readouterr().out.partition("timestep over step")[2]


def test_png_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path = tmp_path / "plot.png"
    assert main(["schedule", "--steps", "8", "--plot", str(path)]) == 0
    assert f"plot written to {path}" in capsys.readouterr().out
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert Image.open(path).size == (1320, 540)
    assert "exists" in refused(capsys, "schedule", "--plot", str(path))
    assert main(["schedule", "--config", "lightning", "--plot", str(path), "--overwrite"]) == 0
    assert Image.open(path).size == (660, 540)  # no errors to show: one panel


def test_png_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["schedule", "--plot", str(tmp_path / "plot.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--width", "500"], "500 is not a multiple of 16 pixels; 496 or 512 would do"),
        (["--height", "4"], "4 is not a multiple of 16 pixels; 16 would do"),
        (["--width", "512", "--image-seq-len", "1024"], "--image-seq-len replaces --width and --height"),
        (["--sigmas", "a,b"], "'a,b' is not a list of numbers"),
        (["--sigmas", "0.5,0.9"], "`sigmas` ascends from 0.5 to 0.9"),
        (["--sigmas", "1.5,0.5"], "`sigmas` holds 1.5"),
        (["--sigmas", "1,0.5", "--steps", "3"], "--steps is 3, but --sigmas has 2 values"),
        (["--config", "missing.json"], "use base, lightning or a scheduler_config.json"),
        (["--model", "nowhere"], "--model nowhere: "),
        (["--config", "base", "--model", "x"], "not allowed with argument"),
        (["--plot", "plot.pdf"], "a name ending in .png"),
        (["--grid"], "--grid needs --json"),
        (["--grid", "--json", "--steps", "3"], "--grid has its own sizes"),
        (["--json", "-", "--plot", "-"], "both want to print"),
        (["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_schedule_refuses(argv, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert message in refused(capsys, "schedule", *argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list"),
        ('{"shift": "3"}', "shift is '3'; a number is needed"),
        ('{"base_image_seq_len": 9, "max_image_seq_len": 9}', "a line needs two points"),
        ('{"_class_name": "DDIMScheduler"}', "DDIMScheduler"),
    ],
)
def test_schedule_refuses_a_config(content, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(content)
    assert message in refused(capsys, "schedule", "--config", str(path))


# --------------------------------------------------------------------------------------------------------- generate


@pytest.fixture
def draw(checkpoint, tmp_path, monkeypatch):
    """`draw(*argv)`: generate 64x64 pictures in 2 steps with the tiny checkpoint, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

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
    assert last == "qwen_fast: QwenImagePipeline is accelerated; 3 fast calls, 0 on stock diffusers"
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
        generate.save_png(Image.new("RGB", (1, 1)), mine, {}, overwrite=False, find_free_name=False)
    assert mine.read_text() == "mine"
    assert draw("--prompt", "x", "--out", str(mine), "--overwrite") == 0
    assert mine.read_bytes().startswith(PNG_SIGNATURE)


def test_interrupt_leaves_the_finished_pictures(draw, monkeypatch, capsys):
    finish = generate._draw

    def interrupted(pipe, prompt, *args):
        if prompt == "two":
            raise KeyboardInterrupt
        return finish(pipe, prompt, *args)

    monkeypatch.setattr(generate, "_draw", interrupted)
    assert draw("--prompt", "one", "--prompt", "two", "--prompt", "three") == 130
    assert "1 of 3 pictures are finished" in capsys.readouterr().err
    assert [path.name for path in Path().glob("*.png")] == ["one-seed0.png"]


def test_interrupt_while_loading(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "device_and_dtype", interrupted)
    assert main(["generate", "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_generate_builds_the_demo_checkpoint_once_and_says_it_is_random(draw, tmp_path, monkeypatch, capsys):
    assert draw("--prompt", "x", model=None) == 0
    captured = capsys.readouterr()
    assert "weights are random" in captured.out and captured.err == ""
    (demo,) = (tmp_path / "cache" / "qwen_fast").iterdir()
    assert str(demo) in captured.out
    assert Image.open("x-seed0.png").text["model"] == "demo checkpoint (random weights)"

    from qwen_fast import testing

    built = []
    monkeypatch.setattr(testing, "build_checkpoint", lambda path: built.append(path) or path.mkdir())
    assert loading.demo_checkpoint() == demo and not built
    (demo / "model_index.json").unlink()
    assert loading.demo_checkpoint() == demo and built
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {}, ".cache/qwen_fast"),
        ("darwin", {}, "Library/Caches/qwen_fast"),
        ("win32", {}, "AppData/Local/qwen_fast"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/qwen_fast"),
        ("linux", {"XDG_CACHE_HOME": "/cache"}, "/cache/qwen_fast"),
        ("linux", {"XDG_CACHE_HOME": ""}, ".cache/qwen_fast"),
    ],
)
def test_cache_folder(platform, environment, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loading.cache_folder() == tmp_path / expected


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
        ([], "one of the arguments --prompt --prompt-file is required"),
        (["--prompt", "x", "--prompt-file", "y"], "not allowed with argument"),
        (["--prompt-file", "missing.txt"], "--prompt-file missing.txt: No such file or directory"),
        (["--prompt-file", "empty.txt"], "--prompt-file empty.txt holds no prompt"),
        (["--prompt-file", "latin.txt"], "--prompt-file latin.txt is not UTF-8"),
        (["--prompt", "x", "--size", "64"], "'64' is not WIDTHxHEIGHT"),
        (["--prompt", "x", "--size", "64x70"], "70 is not a multiple of 16 pixels; 64 or 80 would do"),
        (["--prompt", "x", "--size", "0x64"], "'0' is not a whole number of at least 1"),
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


# ----------------------------------------------------------------------------------------------------------- doctor


def test_doctor_is_healthy_here(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("python", "torch", "triton", "diffusers", "transformers", "qwen_fast"):
        assert f"\n  {name}" in out
    assert torch.__version__ in out
    if not torch.cuda.is_available():
        assert "none that PyTorch can use" in out
    assert "yes QwenImagePipeline" in out and "yes QwenImageImg2ImgPipeline" in out
    assert "no  QwenImageEditPipeline: not yet" in out
    assert "48 schedules equal diffusers' bit for bit" in out
    assert out.splitlines()[-1] == "healthy"


def test_doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["healthy"] and findings["versions"]["torch"] == torch.__version__
    accelerated = {name for name, why_not in findings["accelerated"].items() if why_not is None}
    assert accelerated == {"QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"}
    assert [check["ok"] for check in findings["checks"]] == [True] * len(findings["checks"])


def test_doctor_finds_a_wrong_schedule_a_wrong_step_and_a_broken_import(capsys, monkeypatch):
    import qwen_fast_kernels
    from qwen_fast.schedule import Schedule

    with monkeypatch.context() as patch:
        right = Schedule.from_config
        patch.setattr(Schedule, "from_config", lambda config, *a, **k: right({**config, "max_shift": 1.2}, *a, **k))
        assert main(["doctor"]) == 1
        out = capsys.readouterr().out
        assert "FAIL schedule on cpu: base, 1 steps" not in out  # one step looks the same with any shift
        assert "FAIL schedule on cpu: base, 2 steps" in out and out.splitlines()[-1].startswith("NOT healthy")
    with monkeypatch.context() as patch:
        step = qwen_fast_kernels.euler_step
        patch.setattr(qwen_fast_kernels, "euler_step", lambda x, v, sigmas, i: step(x, -v, sigmas, i))
        assert main(["doctor"]) == 1
        assert "FAIL euler_step on cpu: torch.bfloat16, step 0: differs" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "accelerated", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    assert "FAIL import: ZeroDivisionError" in capsys.readouterr().out


def test_doctor_names_a_gpu_that_is_too_old(capsys, monkeypatch):
    old = {"device": "cuda:0", "name": "Old GPU", "sm": "sm_70", "memory_gib": 16.0, "why_not": "sm_80 is needed"}
    monkeypatch.setattr(doctor, "devices", lambda: [old])
    assert main(["doctor"]) == 0
    assert "stays on stock diffusers: sm_80 is needed" in capsys.readouterr().out
