"""The tables of attention implementations and of matrix products: a row for each way, and only right ones are called that."""

import itertools

import pytest
import torch

from benchmarks.attention import speed as attention_speed
from benchmarks.attention.speed import LENGTHS, error_of, fields_of, joined
from benchmarks.parts import products
from benchmarks.shared.rows import read

CPU = torch.device("cpu")
LENGTHS_HERE = (9, 5)


@pytest.fixture
def rows():
    return torch.randn((3, sum(LENGTHS_HERE), 2, 32), generator=torch.Generator().manual_seed(0)).unbind()


def test_every_way_on_the_cpu_is_attention_within_each_sequence(rows):
    found = attention_speed.ways(LENGTHS_HERE, CPU)
    assert list(found) == ["flash", "operator"]
    for way in found.values():
        assert error_of(joined(way(rows)), rows, LENGTHS_HERE) < 1e-6


def test_a_wrong_result_has_a_large_error(rows):
    right = joined(attention_speed.ways(LENGTHS_HERE, CPU)["operator"](rows))
    whole = joined(attention_speed.ways((sum(LENGTHS_HERE),), CPU)["operator"](rows))
    swapped = right.clone()
    swapped[[0, 1], -1] = right[[1, 0], -1]  # two rows of the last head
    for wrong in (right * 1.01, whole, swapped):
        assert error_of(wrong, rows, LENGTHS_HERE) > 5e-3


def test_on_a_gpu_every_implementation_and_configuration_is_a_way(monkeypatch):
    class There:
        type = "cuda"

    monkeypatch.setattr(torch, "tensor", lambda *_, **__: None)
    names = list(attention_speed.ways((3,), There()))
    assert names[:4] == ["cudnn", "flash", "efficient", "varlen_attn"] and names[4:] == list(attention_speed.CONFIGS)
    assert all("specialised" in name for name in names[-2:]), "what may hang is last"


def test_a_row_of_each_way_and_case(tmp_path, capsys):
    assert attention_speed.main(["--out", str(tmp_path), "--device", "cpu", "--cases", "all"]) == 0
    table = read(tmp_path / "attention.csv")
    assert [(row["way"], row["case"]) for row in table] == list(itertools.product(("flash", "operator"), LENGTHS))
    assert all(row["status"] == "ok" and row["equal_launches"] == "20" and row["tflop_per_s"] == "" for row in table)
    assert list(table[0]) == attention_speed.FIELDS and "512x512" in capsys.readouterr().out


def test_wrong_moving_and_failing_ways_are_told_apart(tmp_path, monkeypatch):
    right, calls = attention_speed.ways, []

    def moves(rows):
        calls.append(1)
        return right(LENGTHS_HERE, CPU)["operator"](rows) + (1e-6 if len(calls) == 7 else 0.0)

    def fails(rows):
        raise RuntimeError("no kernel\nfor this")

    wrong = {"wrong": lambda rows: right(LENGTHS_HERE, CPU)["operator"](rows) * 1.01, "moves": moves, "fails": fails}
    monkeypatch.setattr(attention_speed, "ways", lambda lengths, device: wrong)
    rows = [attention_speed.measured("case", LENGTHS_HERE, way, CPU, 0.1) for way in wrong]
    assert [row["status"] for row in rows] == ["wrong result", "wrong result", "failed"]
    assert float(rows[0]["rms_error"]) > 5e-3 and rows[1]["equal_launches"] == "19"
    assert rows[2]["reason"] == "RuntimeError: no kernel for this" and "ms_p50" not in rows[2]


def test_an_unknown_case_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        attention_speed.main(["--out", str(tmp_path), "--cases", "nothing;512x512"])
    assert "nothing is none of" in capsys.readouterr().err


def test_the_columns_of_a_time():
    found = fields_of([1.0, 2.0, 4.0], 4e9)
    assert found["ms_p50"] == "2" and found["rounds"] == "3" and found["tflop_per_s"] == "2"
    assert 1.0 < float(found["ms_p20"]) < 2.0 < float(found["ms_p80"]) < 4.0


# Products -------------------------------------------------------------------------------------------------------------


def test_products_of_every_shape_have_a_row(tmp_path, capsys):
    assert products.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    table = read(tmp_path / "products.csv")
    assert list(table[0]) == products.FIELDS and all(row["tflop_per_s"] == row["gb_per_s"] == "" for row in table)
    ways = {(row["m"], row["k"], row["n"]): [] for row in table}
    assert list(ways) == [(str(m), str(k), str(n)) for m in (64, 4) for k, n in products.weights(32)]
    assert all(row["status"] == "ok" for row in table if row["way"].startswith("bf16"))
    assert {row["way"] for row in table if row["m"] == "4"} == {"bf16", "bf16 + GELU"}, "text has few rows"
    assert {row["k"] for row in table if row["way"] == "bf16 + GELU"} == {"32"} and "int8, no scales" in str(table)


def test_what_torch_refuses_is_a_row_with_its_reason():
    def refuse():
        raise RuntimeError("not on this\ndevice")

    row = products.measured(8, 4, 2, "bf16", [refuse], CPU, 0.1)
    assert row["status"] == "failed" and row["reason"] == "RuntimeError: not on this device" and "ms_p50" not in row


def test_rates_count_the_bytes_of_each_dtype(monkeypatch):
    monkeypatch.setattr(products, "milliseconds", lambda *_: [1.0, 1.0, 1.0])
    wide = products.measured(100, 10, 10, "bf16", [], CPU, 0.1)
    narrow = products.measured(100, 10, 10, "fp8, one scale", [], CPU, 0.1)
    assert float(wide["tflop_per_s"]) == 2e4 / 1e9 and float(wide["gb_per_s"]) == (2 * 1100 + 2000) / 1e6
    assert float(narrow["gb_per_s"]) == (1100 + 2000) / 1e6
