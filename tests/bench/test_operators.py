"""The run-book's look at every operator: a row for each, whatever comes, and only right ones are called that."""

from dataclasses import replace

import pytest
import torch

from benchmarks.operators import run as operators
from benchmarks.operators.cases import FP32, Maker, OperatorCase
from benchmarks.shared.ceilings import Ceilings
from benchmarks.shared.rows import RowFile, read

CPU = torch.device("cpu")
CEILINGS = Ceilings("CPU", "float32", 1e10, {"float32": 1e11}, 1e11, "flash", {}, 1.0, "CPU time")
CASES = [replace(case.small(), name=case.name, dtype=FP32) for case in operators.model_cases()]


def one_of(op: str) -> OperatorCase:
    return next(case for case in CASES if case.op == op)


@pytest.fixture
def row(tmp_path):
    rows = RowFile(tmp_path / "operators_of_the_model.csv", operators.FIELDS)

    def measure(case: OperatorCase) -> dict[str, str]:
        operators.row_of(case, "operator", CPU, CEILINGS, rows, {}, 60.0)
        return read(rows.path)[-1]

    return measure


def test_every_operator_has_cases_at_the_model_s_shapes():
    from benchmarks.operators.arguments import TRAFFIC

    assert {case.op for case in CASES} == set(TRAFFIC)
    assert len({(case.op, case.name) for case in CASES}) == len(CASES)
    for case in operators.model_cases():
        arguments = case.arguments(Maker("meta", fake=True))
        assert case.op == "flow_match_schedule" or {a.dtype for a in arguments[:2] if torch.is_tensor(a)} == {torch.bfloat16}


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_a_right_operator_has_its_figures(row, op):
    found = row(one_of(op))
    assert found["status"] == "ok" and found["equal_launches"] == "20" and float(found["rms_error"]) < 1e-6
    assert float(found["seconds_p50"]) > 0 and float(found["share_of_ceiling"]) >= 0


@pytest.mark.parametrize("op", ["joint_attention", "qk_norm_rope", "linear_gelu", "rms_norm_silu"])
def test_a_wrong_operator_and_one_that_moves_are_seen(row, monkeypatch, op):
    case, launches = one_of(op), []
    right = case.operator()

    def disturbed(*arguments):
        launches.append(1)
        result = right(*arguments)
        out = arguments[0] if result is None else result
        if wrong or len(launches) == 5:
            out[-1] *= 1.5
        return result

    monkeypatch.setattr(OperatorCase, "operator", lambda self: disturbed)
    wrong = True
    assert row(case)["status"] == "wrong result"
    wrong = False
    launches.clear()
    found = row(case)
    assert found["status"] == "wrong result" and found["reason"] == "launch 4 differs from the first"


def test_a_failing_operator_has_its_error_in_its_row(row, monkeypatch):
    monkeypatch.setattr(OperatorCase, "operator", lambda self: lambda *_: 1 / 0)
    assert row(one_of("linear_gelu"))["reason"] == "ZeroDivisionError: division by zero"


def test_rows_of_other_sources_are_not_of_this_run(tmp_path):
    from benchmarks.shared.machine import provenance
    from benchmarks.shared.rows import of_this_state

    rows = RowFile(tmp_path / "rows.csv", operators.FIELDS)
    assert of_this_state(rows.path, CPU) == [] and of_this_state(tmp_path / "none.csv", CPU) == []
    for changed in ({}, {"commit": "abc 123"}, {"machine": "another GPU"}):
        rows.add(provenance(CPU) | changed)
    assert len(of_this_state(rows.path, CPU)) == 1
