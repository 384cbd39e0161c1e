"""`--next`: what the committed rows lack for the machine at hand comes first, and what comes is said with its reason."""

import csv

import pytest

from benchmarks.runbook import next_stages
from benchmarks.runbook import run as runbook
from benchmarks.runbook.stages import LATER, STAGES, TUNING, Stage

HERE, OTHER = "a card", "another card"
KEY = "abc 123"
SMOKE = Stage("smoke", 60, (), estimate=10, needed=True)
LADDER = Stage("ladder", 60, (), estimate=40, rows=(("ladder.csv", {"width": "512"}), ("ladder.csv", {"width": "1024"})))
PRODUCTS = Stage("products", 60, (), estimate=20, rows=(("products.csv", {}),))
TESTS = Stage("tests", 60, (), estimate=30)
TUNED = Stage("tuned", 60, (), estimate=5, after="tests")
ALL = (SMOKE, LADDER, PRODUCTS, TESTS, TUNED)


@pytest.fixture
def results(tmp_path):
    """`results(file, rows)` writes rows, of this machine and these sources where they do not say another."""

    def write(file, *rows):
        rows = [{"date": "2026-01-02", "commit": KEY, "machine": HERE} | row for row in rows]
        with (tmp_path / file).open("w", newline="") as target:
            writer = csv.DictWriter(target, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)

    write.folder = tmp_path
    return write


def names(results, seconds=1000.0, stages=ALL, machine=HERE):
    picked, lines = next_stages.chosen(stages, machine, KEY, seconds, results.folder)
    return [stage.name for stage in picked], "\n".join(lines)


def test_on_a_new_machine_everything_comes_in_the_order_of_its_worth(results):
    results("products.csv", {"machine": OTHER})
    picked, told = names(results)
    assert picked == ["smoke", "ladder", "products", "tests", "tuned"]
    assert "next: products, about 20 s: no row in products.csv" in told and "with width 512" in told
    assert "next: smoke, about 10 s: every stage needs it" in told


def test_what_is_there_is_left_out_and_what_is_old_comes_last(results):
    old = {"commit": "old 999", "date": "2026-01-01"}
    results("products.csv", old)
    results("ladder.csv", {"width": "512"}, {"width": "1024"} | old)
    results("runbook.csv", {"stage": "tests", "status": "failed"}, {"stage": "tuned", "status": "done"})
    picked, told = names(results)
    assert picked == ["smoke", "tests", "ladder", "products"]
    assert "ladder, about 40 s: rows of 2026-01-01, of other sources (old 999)" in told
    assert "there: tuned: rows of these sources" in told
    results("ladder.csv", {"width": "512"}, {"width": "1024"} | old, {"width": "1024", "date": "2025-01-01"})
    assert "ladder" not in names(results)[0], "a row of these sources counts, whatever came after it"


def test_the_oldest_of_what_is_of_other_sources_comes_first(results):
    for file, day in (("ladder.csv", "05"), ("products.csv", "03")):
        rows = [{"width": width, "commit": "old 999", "date": f"2026-01-{day}"} for width in ("512", "1024")]
        results(file, *rows)
    assert names(results, stages=(SMOKE, LADDER, PRODUCTS))[0] == ["smoke", "products", "ladder"]


def test_only_what_fits_comes_and_the_outcome_of_another_only_with_it(results):
    picked, told = names(results, seconds=45.0)
    assert picked == ["smoke", "products"]
    assert "later: ladder, about 40 s, 35 s are left" in told and "later: tuned, about 5 s: comes behind tests" in told


def test_a_stage_that_ran_is_noted_and_read_again(results):
    entry = {"status": "done", "code": 0, "seconds": 3.2}
    for name in ("tests", "tuned"):
        next_stages.note(results.folder, (KEY, "False"), HERE, name, entry)
    rows = next_stages.rows_of(results.folder / "runbook.csv")
    assert [row["stage"] for row in rows] == ["tests", "tuned"] and list(rows[0]) == list(next_stages.FIELDS)
    assert rows[0]["seconds"] == "3.2" and names(results)[0] == ["smoke", "ladder", "products"]


def test_the_rows_that_stages_are_known_by_have_such_columns():
    """A misspelt column or file would call a stage missing for ever."""
    from benchmarks.attention import speed as attention_speed
    from benchmarks.attention import stress as attention_stress
    from benchmarks.ladder import changing, session, sizes
    from benchmarks.operators import run as operators
    from benchmarks.parts import edits, lora, memory, products, whole

    fields = {"ladder.csv": session.FIELDS, "changing.csv": changing.FIELDS, "attention.csv": attention_speed.FIELDS}
    fields |= {"attention_stress.csv": attention_stress.FIELDS, "products.csv": products.FIELDS}
    fields |= {"operators_of_the_model.csv": operators.FIELDS, "edits.csv": edits.FIELDS, "lora.csv": lora.FIELDS}
    fields |= {"memory.csv": memory.FIELDS, "sizes.csv": sizes.FIELDS, "whole.csv": whole.FIELDS}
    for stage in (*STAGES, *LATER, *TUNING):
        for file, columns in stage.rows:
            assert columns.keys() | {"machine", "commit", "date"} <= set(fields[file])
        assert not stage.after or stage.after in {one.name for one in TUNING}
    committed = next_stages.rows_of(next_stages.RESULTS / "runbook.csv")
    assert committed and list(committed[0]) == list(next_stages.FIELDS)


def test_whether_attention_is_ever_wrong_is_the_first_thing_that_is_missing(results):
    results("runbook.csv", {"stage": "environment", "status": "done", "commit": "old 999"})
    picked, told = names(results, stages=(*STAGES, *LATER))
    assert picked[:2] == ["smoke", "stress"] and "no row in attention_stress.csv with variant operator, way graph" in told


def test_the_command_plans_and_runs_nothing(capsys, tmp_path):
    assert runbook.main(["--next", "--plan", "--machine", "a card nobody has", "--minutes", "2"]) == 0
    told = capsys.readouterr().out
    assert "what a card nobody has lacks, for 120 s" in told and "next: smoke" in told and "of 120 s" in told
    assert runbook.main(["--plan", "--only", "sizes"]) == 0
    assert capsys.readouterr().out.startswith("smoke: about")


def test_without_a_machine_s_name_nothing_is_guessed(monkeypatch, capsys):
    monkeypatch.setattr(next_stages, "machine_at_hand", lambda small: "")
    assert runbook.main(["--next", "--plan"]) == 2
    assert "--machine NAME" in capsys.readouterr().err
