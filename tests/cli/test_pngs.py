"""PNGs beside the drawing: in order, few waiting, errors with the picture's name, and a table of where the time went."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen_fast.cli import main, pngs
from qwen_fast.common.stages import record

FREE = {"overwrite": False, "find_free_name": True}


def picture(value: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (value, 0, 0))


def submit(writer: pngs.PngWriter, folder: Path, value: int) -> None:
    writer.submit(picture(value), folder / f"{value}.png", {"prompt": f"{value}"}, f"note {value}", **FREE)


def test_all_are_written_in_order_with_their_metadata(tmp_path, capsys):
    with record() as recorder, pngs.PngWriter() as writer:
        for value in range(5):
            submit(writer, tmp_path, value)
    assert writer.saved == [tmp_path / f"{value}.png" for value in range(5)]
    assert capsys.readouterr().out.splitlines() == [f"saved {tmp_path / str(v)}.png  note {v}" for v in range(5)]
    for value, path in enumerate(writer.saved):
        with Image.open(path) as image:
            assert image.getpixel((3, 3)) == (value, 0, 0) and image.text == {"prompt": f"{value}"}
    here, beside = recorder.own_seconds()
    assert set(beside) == {"png"} and set(here) == {"png"}


def test_the_drawing_goes_on_meanwhile_until_two_wait(tmp_path, monkeypatch):
    let_go, inside = threading.Event(), []
    save = pngs.save_png

    def slow(*args, **kwargs):
        inside.append(threading.current_thread().name)
        assert let_go.wait(30)
        return save(*args, **kwargs)

    monkeypatch.setattr(pngs, "save_png", slow)
    third = threading.Event()
    with pngs.PngWriter() as writer:
        submit(writer, tmp_path, 0)
        submit(writer, tmp_path, 1)
        assert not writer.saved, "neither call waited for the writer"
        timer = threading.Thread(target=lambda: (third.wait(0.2), let_go.set()))
        timer.start()
        begin = time.perf_counter()
        submit(writer, tmp_path, 2)
        assert let_go.is_set() and time.perf_counter() - begin > 0.1, "the third waits for the first"
        assert writer.saved[:1] == [tmp_path / "0.png"]
        timer.join()
    assert len(writer.saved) == 3 and all(name.startswith("qwen_fast_png") for name in inside)


def test_an_error_names_its_picture_and_the_others_are_kept(tmp_path, monkeypatch):
    save = pngs.save_png

    def full(image, path, *args, **kwargs):
        if path.name == "1.png":
            raise OSError(28, "No space left on device")
        return save(image, path, *args, **kwargs)

    monkeypatch.setattr(pngs, "save_png", full)
    with pytest.raises(OSError, match=r"1\.png cannot be written: .*No space left on device; 1 before it is saved"):
        with pngs.PngWriter() as writer:
            submit(writer, tmp_path, 0)
            submit(writer, tmp_path, 1)
            submit(writer, tmp_path, 2)
            submit(writer, tmp_path, 3)
    assert (tmp_path / "0.png").is_file() and not (tmp_path / "1.png").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qwen_fast_png")]


def test_what_is_drawn_is_written_after_an_interrupt(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with pngs.PngWriter() as writer:
            submit(writer, tmp_path, 0)
            submit(writer, tmp_path, 1)
            raise KeyboardInterrupt
    assert writer.saved == [tmp_path / "0.png", tmp_path / "1.png"]


def test_a_second_interrupt_drops_what_is_not_begun(tmp_path, monkeypatch):
    began, let_go = threading.Event(), threading.Event()
    save = pngs.save_png

    def slow(*args, **kwargs):
        began.set()
        assert let_go.wait(30)
        return save(*args, **kwargs)

    def interrupted(self, left):
        assert began.wait(30)
        let_go.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(pngs, "save_png", slow)
    writer = pngs.PngWriter()
    with pytest.raises(KeyboardInterrupt), writer:
        submit(writer, tmp_path, 0)
        assert began.wait(30)
        monkeypatch.setattr(pngs.PngWriter, "_collect", interrupted)
    with Image.open(tmp_path / "0.png") as image:
        assert np.asarray(image).shape == (8, 8, 3), "the one being written is whole"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qwen_fast_png")]


@pytest.fixture
def draw(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *argv: main(
        ["generate", "--model", str(checkpoint), "--device", "cpu", "--size", "64x64", "--steps", "2", "--cfg", "1", *argv]
    )


@pytest.mark.parametrize("argv", [(), ("--stock",), ("--num-images", "2")], ids=["one", "stock", "several"])
def test_generate_prints_a_stage_table_that_adds_up(draw, argv, capsys):
    assert draw("--prompt", "x", *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    end = next(i for i, line in enumerate(lines) if line.startswith("total "))
    table = {line.split()[0]: float(line.split()[1]) for line in lines[begin + 1 : end]}
    names = ["import", "load", "text", "schedule", "modulation", "denoise", "vae", "png", "other"]
    assert list(table) == [name for name in names if name != "modulation" or "--stock" not in argv]
    total = float(lines[end].split()[1])
    assert sum(table.values()) == pytest.approx(total, abs=0.0005 * (len(table) + 1))
    assert ("per picture" in lines[begin]) == ("--num-images" in argv)
    assert lines[end + 1 : end + 3][0] == "meanwhile, in other threads:" and lines[end + 2].startswith("png ")
    with Image.open("x-seed0.png") as image:
        stages = dict(part.split() for part in image.text["stages"].split(", "))
        assert list(stages) == [name for name in list(table)[2:-2]]
        assert float(image.text["seconds"]) == pytest.approx(sum(map(float, stages.values())), abs=0.01)


def test_generate_says_which_picture_could_not_be_written(draw, monkeypatch, capsys, tmp_path):
    save = pngs.save_png

    def full(image, path, *args, **kwargs):
        if "two" in path.name:
            raise OSError(28, "No space left on device")
        return save(image, path, *args, **kwargs)

    monkeypatch.setattr(pngs, "save_png", full)
    assert draw("--prompt", "one", "--prompt", "two", "--prompt", "three") == 2
    err = capsys.readouterr().err
    assert "two-seed1.png cannot be written" in err and "No space left on device; 1 before it is saved" in err
    assert {path.name for path in tmp_path.glob("*.png")} <= {"one-seed0.png", "three-seed2.png"}
    assert (tmp_path / "one-seed0.png").is_file()
