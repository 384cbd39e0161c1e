"""The `qwen-fast` command, in process: what it prints, what it writes, and what it says about bad input."""

import json
import logging
import os
import shlex
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from qwen_fast.cli import build_parser, doctor, main
from qwen_fast.common.family import FAMILY, MODULAR
from support.cli import refused

# The mission's golden values: 20 steps, 1024 image tokens.
GOLDEN = "1000.00 968.17 934.95 900.26 863.99 826.03 786.27 744.57 700.79 654.76 606.31 555.24 501.34 444.36 384.03"
GOLDEN += " 320.04 252.06 179.69 102.51 20.00"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


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
    from qwen_fast.schedule.comparison import historical_errors
    from qwen_fast.schedule.configs import load_config

    config, _ = load_config("base")
    right = Schedule.from_config(config, steps, image_seq_len=image_seq_len)
    errors = historical_errors(config, steps, image_seq_len)
    largest = [round((wrong.timesteps - right.timesteps).abs().max().item(), 1) for wrong in errors.values()]
    assert largest == [mu, linspace, stretch]
    assert historical_errors(load_config("lightning")[0], steps, image_seq_len) == {}


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
    assert "yes QwenImageEditPlusPipeline" in out
    if hasattr(diffusers, "QwenImage21Pipeline"):
        assert "no  QwenImage21Pipeline: not yet" in out
    assert "48 schedules equal diffusers' bit for bit" in out and "ok   transformer on cpu: RMS error" in out
    assert out.splitlines()[-1] == "healthy"


def test_doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["healthy"] and findings["versions"]["torch"] == torch.__version__
    accelerated = {name for name, why_not in findings["accelerated"].items() if why_not is None}
    assert accelerated == {*FAMILY, *MODULAR}
    assert [check["ok"] for check in findings["checks"]] == [True] * len(findings["checks"])


def test_doctor_shows_apart_what_other_packages_say_at_their_import(capsys, monkeypatch):
    seen, found = [], doctor.accelerated

    def noisy():
        seen.append(logging.StreamHandler())  # keeps the stderr that there is
        print("cannot load this", "cannot load this", "x" * 300, sep="\n", file=sys.stderr)
        return found()

    monkeypatch.setattr(doctor, "accelerated", noisy)
    monkeypatch.setattr(doctor, "check_schedule", lambda device: (True, "right"))
    monkeypatch.setattr(doctor, "check_transformer", lambda device: (True, "right"))
    assert main(["doctor"]) == 0
    told = capsys.readouterr()
    assert not told.err and told.out.count("cannot load this") == 1 and f"  {'x' * 157}...\n" in told.out
    seen[0].emit(logging.makeLogRecord({"msg": "later"}))
    assert capsys.readouterr().err == "later\n"


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
    with monkeypatch.context() as patch:
        from qwen_fast.transformer import blocks

        patch.setattr(blocks, "qk_norm_rope", lambda *args: None)
        assert main(["doctor"]) == 1
        assert "FAIL transformer on cpu: torch.bfloat16: error" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "accelerated", lambda: 1 / 0)
    assert main(["doctor"]) == 1
    assert "FAIL import: ZeroDivisionError" in capsys.readouterr().out


def test_doctor_names_a_gpu_that_is_too_old(capsys, monkeypatch):
    old = {"device": "cuda:0", "name": "Old GPU", "sm": "sm_70", "memory_gib": 16.0, "why_not": "sm_80 is needed"}
    monkeypatch.setattr(doctor, "devices", lambda: [old])
    assert main(["doctor"]) == 0
    assert "stays on stock diffusers: sm_80 is needed" in capsys.readouterr().out
