"""Every example runs, draws what it says, and is listed."""

import importlib.util
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
from packaging.version import Version

import qwen_fast
from qwen_fast.cli import main as command
from qwen_fast.demo.judge import judge
from qwen_fast.testing.family import build_pipeline
from support.family import small_references

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def circle(tmp_path_factory) -> Path:
    """A green circle on white, drawn by the first example."""
    path = tmp_path_factory.mktemp("drawn") / "circle.png"
    image = example("text_to_image").main(["--out", str(path)])
    assert judge(np.asarray(image), "a green circle on a white background").everything
    return path


def drawn(image, prompt: str) -> bool:
    assert Path("picture.png").exists()
    return judge(np.asarray(image.convert("RGB")), prompt).everything


def test_text_to_image(circle):
    assert PIL.Image.open(circle).size == (64, 64)


def test_image_to_image(circle):
    image = example("image_to_image").main([str(circle)])
    assert drawn(image, "a blue circle on a white background")
    kept = example("image_to_image").main([str(circle), "--strength", "0.1"])
    assert drawn(kept, "a green circle on a white background"), "little noise leaves the picture"


def test_inpaint(circle):
    picture = PIL.Image.open(circle).convert("RGB")
    half = PIL.Image.new("L", picture.size)
    half.paste(255, (0, 0, 32, 64))
    half.save("mask.png")
    image = example("inpaint").main([str(circle), "mask.png", "--prompt", "a green circle on a white background"])
    left, right = (np.abs(np.asarray(image, int) - np.asarray(picture, int))[:, part] for part in (np.s_[:28], np.s_[40:]))
    assert left.max() > 8 and right.mean() < 8, "the white half is drawn again, the black one is kept"
    PIL.Image.new("L", (32, 32)).save("small.png")
    with pytest.raises(SystemExit):
        example("inpaint").main([str(circle), "small.png"])


def test_edit(checkpoint, circle, here, capsys):
    pipe = qwen_fast.enable(build_pipeline(diffusers.QwenImageEditPlusPipeline, checkpoint))
    pictures = [PIL.Image.open(circle).convert("RGB")]
    small = {"height": 64, "width": 64, "num_inference_steps": 2}
    with small_references():
        first, second, again = example("edit").edit(pipe, pictures, ["x", "a red circle", "x"], here / "out", **small)
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert len(list((here / "out").glob("*.png"))) == 3
    if Version(diffusers.__version__) >= Version("0.42"):  # of older ones prompts with pictures are not kept
        assert qwen_fast.report(pipe).prompt_cache["hits"] >= 2


@pytest.mark.parametrize("fuse", [[], ["--fuse"]], ids=["beside", "fused"])
def test_lora(fuse, capsys):
    pytest.importorskip("peft")
    assert drawn(example("lora").main(fuse), "two green squares on a white background")
    assert "0 on stock diffusers" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["whole", "text-on-host", "eight-bits", "by-blocks"])
def test_low_memory(recipe, circle, capsys):
    if recipe == "by-blocks" and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip("group offload of an older diffusers needs an accelerator")
    low_memory = example("low_memory")
    image = low_memory.main(["--recipe", recipe])
    assert drawn(image, "a green circle on a white background")
    if recipe != "eight-bits":
        assert np.abs(np.asarray(image, int) - np.asarray(PIL.Image.open(circle), int)).max() <= 1
    assert f"recipe: {recipe}" in capsys.readouterr().out


def test_the_recipe_follows_the_free_memory():
    choose = example("low_memory").choose
    assert [choose(gib) for gib in (79, 47, 44, 23.5, 15)] == ["whole", "whole", "text-on-host", "eight-bits", "by-blocks"]


def test_many_prompts(here, capsys):
    (here / "prompts.txt").write_text("a red circle on a white background\n\na blue cross on a yellow background\n")
    example("many_prompts").main(["prompts.txt"])
    for name, prompt in (("0000", "a red circle on a white background"), ("0001", "a blue cross on a yellow background")):
        assert judge(np.asarray(PIL.Image.open(here / "pictures" / f"{name}.png")), prompt).everything
    assert "denoise" in capsys.readouterr().out


def test_own_loop(capsys):
    assert drawn(example("own_loop").main([]), "a green circle on a white background")
    assert "fast calls, 0 on stock" in capsys.readouterr().out


def test_port_schedule(here, capsys):
    assert command(["schedule", "--json", "vectors.json", "--grid"]) == 0
    port = example("port_schedule")
    assert 0 < port.main(["vectors.json"]) < 5e-7
    right = port.math.exp
    port.math = type("math", (), {"exp": staticmethod(lambda x: right(1.01 * x))})
    with pytest.raises(SystemExit, match="this port is wrong"):
        port.main(["vectors.json"])


def test_all_are_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert not [path.name for path in EXAMPLES.glob("*.py") if f"]({path.name})" not in listed]
