"""The benchmark of pictures of different sizes: every way draws stock's pictures, and a wrong one gets no speed-up."""

import pytest
import torch

from benchmarks.ladder import sizes
from benchmarks.shared.rows import read

SMALL = ["--device", "cpu", "--shape", "tiny", "--sizes", "64x48", "32x64", "--steps", "2", "--repeats", "1", "--text", "9"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("guided", [[], ["--cfg"]])
def test_three_rows(tmp_path, capsys, guided):
    assert sizes.main([*SMALL, *guided, "--append", str(tmp_path / "sizes.csv")]) == 0
    rows = read(tmp_path / "sizes.csv")
    assert [row["way"] for row in rows] == [sizes.STOCK, sizes.IN_TURN, sizes.TOGETHER]
    for row in rows:
        assert row["status"] == "ok" and row["sizes"] == "64x48 32x64" and row["cfg"] == str(bool(guided))
        assert row["machine"] and row["commit"] and float(row["s_p50"]) > 0 and row["text_tokens"] == "9 2"
    assert all(0 <= float(row["max_difference"]) <= 2e-6 and float(row["speedup_to_stock"]) > 0 for row in rows[1:])
    assert float(rows[2]["speedup_to_one_by_one"]) > 0 and not rows[1]["speedup_to_one_by_one"]
    assert capsys.readouterr().out.count("dB, from stock") == 2


def test_a_wrong_result_has_no_speed_up(capsys):
    seconds = {name: [1.0] for name in (sizes.STOCK, sizes.IN_TURN, sizes.TOGETHER)}
    latents = torch.linspace(-1, 1, 50)[None, :, None]
    drawn = {name: [latents[0], latents[0]] for name in seconds} | {sizes.TOGETHER: [latents[0], latents[0] + 1e-3]}
    rows = sizes.rows_of(seconds, drawn)
    assert [row["status"] for row in rows] == ["ok", "ok", "wrong result"] and "from stock" in rows[2]["reason"]
    assert "speedup_to_stock" not in rows[2] and "wrong result" in sizes.told(rows[2])


@pytest.mark.triton
def test_on_a_gpu_in_bf16(emulated_cuda, tmp_path):
    """Everything that a run on a GPU goes through, at small size; its rows are those of three ways in turn."""
    arguments = ["cuda" if one == "cpu" else one for one in SMALL]
    assert sizes.main([*arguments, "--append", str(tmp_path / "sizes.csv")]) == 0
    rows = read(tmp_path / "sizes.csv")
    assert [row["clock"] for row in rows] == ["CUDA events"] * 3 and {row["dtype"] for row in rows} == {"bfloat16"}
    assert all(float(row["psnr_db"]) > 30 for row in rows[1:])
