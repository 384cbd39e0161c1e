"""The stress of attention: a wrong launch among many is counted and placed, and what hangs or dies costs its own row only."""

import contextlib
import json
import sys
import time

import pytest
import torch

from benchmarks.attention import stress as attention_stress
from benchmarks.attention.counts import Found
from benchmarks.attention.stress import PICTURE_WAYS, PICTURES, SUSPECTS, USED, Batch, stressed
from benchmarks.shared.rows import read
from support.emulated_cuda import notes

CPU = torch.device("cpu")
NAN = float("nan")
GRAPH, NO_GRAPH = PICTURE_WAYS


class Gpu:
    type = "cuda"


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(fault)`: the fifth launch is right but for what `fault(out, batch)` does to it."""
    right, calls = attention_stress.launcher, []

    def set_fault(fault):
        def launcher(variant, batch):
            run = right(variant, batch)

            def spoilt():
                out = run()
                calls.append(1)
                if len(calls) == 5:
                    fault(out, batch)
                return out

            return spoilt

        monkeypatch.setattr(attention_stress, "launcher", launcher)

    return set_fault


@pytest.mark.parametrize("way", ["blocks", "eager"])
def test_the_operator_on_the_cpu_is_right(way):
    found = stressed("operator", way, CPU, 0.0)
    assert found == Found(launches=3)


def of_sequence(rows):
    def fault(out, batch):
        begin, end = batch.places[4]
        out[begin:end][rows, 2] = NAN

    return fault


def in_a_gap(out, batch):
    out[~batch.inside] = NAN


def off_by_a_row(out, batch):
    begin, end = batch.places[1]
    out[begin:end] = out[begin:end].roll(1, 0)


def a_little(out, batch):
    out[batch.places[0][0], 0, 0] += 0.01


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (of_sequence(slice(None)), {"bad": 1, "whole": 1, "sequences": [4]}),
        (of_sequence(slice(3, 9)), {"bad": 1, "partial": 1, "sequences": [4]}),
        (in_a_gap, {"bad": 1, "gaps": 1}),
        (off_by_a_row, {"bad": 1}),
        (a_little, {}),
    ],
    ids=["a tile of keys", "some rows", "between sequences", "another row", "other bits"],
)
def test_one_wrong_launch_is_counted_and_placed(spoil, monkeypatch, fault, expected):
    spoil(fault)
    rounds = iter([0.0, 0.0, 2.0])  # the end is set, one round is not enough, two are
    monkeypatch.setattr(attention_stress.time, "monotonic", lambda: next(rounds))
    found = stressed("operator", "eager", CPU, 1.0)
    assert found == Found(launches=6, different=1, **expected)


def test_sequences_change_and_addresses_stay():
    batch = Batch(CPU, 5, (25, 40), (4, 9), seed=1)
    places, addresses = list(batch.places), [one.data_ptr() for one in (*batch.data, batch.spans)]
    batch.renew()
    assert batch.places != places and [one.data_ptr() for one in (*batch.data, batch.spans)] == addresses
    assert batch.spans.tolist() == [list(place) for place in batch.places]
    gaps = [begin - end for (_, end), (begin, _) in zip(batch.places, batch.places[1:], strict=False)]
    assert all(4 <= gap <= 9 for gap in gaps) and batch.places[-1][1] <= len(batch.data[0])
    for one in batch.data:
        assert one[batch.inside].isfinite().all() and one[~batch.inside].isnan().all()
    assert batch.expected.isfinite().all() and not batch.expected[~batch.inside].any()


def test_pictures_of_nan_are_counted():
    first = torch.randn(4, 6, 2, dtype=torch.bfloat16)
    latents, found = first.clone(), Found()
    latents[1], latents[3, 2, 0] = NAN, NAN
    found.add_pictures(first, first)
    found.add_pictures(latents, first)
    assert found == Found(launches=8, bad=2, whole=1, partial=1, different=2, sequences=[1, 3])


def test_suspects_come_last_and_only_where_they_can_be_launched(monkeypatch):
    for capability, expected in ((80, (("operator", "pointers"), ())), (90, (USED, SUSPECTS)), (100, (USED, ()))):
        monkeypatch.setattr(attention_stress, "capability", lambda device, there=capability: there)
        assert attention_stress.variants_of(Gpu()) == expected
    assert attention_stress.variants_of(CPU) == (("operator",), ())
    configs = {variant: attention_stress.config_of(variant) for variant in (*USED[1:], *SUSPECTS)}
    assert not configs["pointers"]["DESCRIPTORS"] and configs["descriptors"]["DESCRIPTORS"]
    assert [configs[one]["num_stages"] for one in SUSPECTS] == [2, 3]
    assert [one for one in configs if configs[one]["WARP_SPECIALIZE"]] == list(SUSPECTS)
    assert configs["descriptors"] == attention_stress.default_config(100, 64, 2), "what no specialised warps leave"


@pytest.mark.slow
def test_a_row_of_each_way_and_process(tmp_path, capsys):
    assert attention_stress.main(["--out", str(tmp_path), "--device", "cpu", "--processes", "1", "--seconds", "0"]) == 0
    table = read(tmp_path / "attention_stress.csv")
    ways = {(row["variant"], row["way"]) for row in table}
    assert ways == {(PICTURES, GRAPH), (PICTURES, NO_GRAPH), ("operator", "blocks"), ("operator", "eager")}
    assert all(row["status"] == "ok" and row["bad"] == "0" and int(row["launches"]) > 0 and row["commit"] for row in table)
    assert list(table[0]) == attention_stress.FIELDS and "what the driver uses is right" in capsys.readouterr().out


# With an emulated GPU -------------------------------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("variant", [*USED, *SUSPECTS])
@pytest.mark.parametrize("way", attention_stress.WAYS)
def test_every_variant_is_launched_and_right_on_an_emulated_gpu(emulated_cuda, monkeypatch, variant, way):
    for sizes in (attention_stress.LONG, attention_stress.SHORT):
        monkeypatch.setitem(sizes, "cuda", (2, 2))
    assert stressed(variant, way, torch.device("cuda"), 0.0) == Found(launches=2)
    seen = emulated_cuda.notes
    assert seen.of(notes.LAUNCH) and not seen.of(notes.MIXED, notes.ILLEGAL, notes.RACE)


@pytest.mark.triton
def test_pictures_are_drawn_with_a_graph_and_without_on_an_emulated_gpu(emulated_cuda, monkeypatch):
    from benchmarks.attention import pictures as stress_pictures
    from qwen_fast.common import proofs

    monkeypatch.setattr(proofs, "DEVICES", proofs.DEVICES)  # given back behind the test
    monkeypatch.setitem(stress_pictures.CALL, "cuda", (1, 2))
    said = []
    with torch.no_grad():
        stress_pictures.draw(torch.device("cuda"), PICTURE_WAYS, 0.0, said.append)
    assert [(entry["way"], entry["launches"], entry["bad"]) for entry in said[-2:]] == [(way, 1, 0) for way in PICTURE_WAYS]
    seen = emulated_cuda.notes
    assert seen.of(notes.LAUNCH) and not seen.of(notes.MIXED, notes.ILLEGAL, notes.RACE)


# Beside the processes -------------------------------------------------------------------------------------------------


def lines(*entries: dict) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_a_process_that_hangs_and_one_that_dies_cost_no_other(tmp_path, monkeypatch):
    """Pictures hang behind a call with NaN, the operator dies behind its first way, descriptors are right, pointers differ."""

    def done(way, **more):
        return {"way": way, "done": True, "launches": 9, "bad": 0, "different": 0} | more

    right = lines(*(done(way) for way in attention_stress.WAYS))
    codes = {
        PICTURES: f"import time; print({lines({'way': GRAPH, 'launches': 64, 'bad': 2})!r}, flush=True); time.sleep(600)",
        "operator": f"import os; print({lines(done('blocks'))!r}, flush=True); os.kill(os.getpid(), 11)",
        "descriptors": f"print({right!r})",
        "pointers": f"print({(right + lines(done('graph', different=1)))!r})",
        SUSPECTS[0]: f"print({lines({'way': 'blocks', 'reason': 'no kernel'})!r})",
        SUSPECTS[1]: f"print({lines(done('blocks', bad=9))!r})",
    }
    begin, suspected = attention_stress.start, []

    def start(command, log, environment):
        after, until = (float(command[command.index(option) + 1]) for option in ("--after", "--until"))
        suspected.append((command[command.index("--variant") + 1] in SUSPECTS, after - time.time() > 1.0))
        assert until > after
        return begin([sys.executable, "-c", codes[command[command.index("--variant") + 1]]], log, environment)

    monkeypatch.setattr(attention_stress, "start", start)
    monkeypatch.setattr(attention_stress, "variants_of", lambda device: (USED, SUSPECTS))
    monkeypatch.setattr(attention_stress, "ways_of", lambda v, d: (GRAPH, NO_GRAPH) if v == PICTURES else attention_stress.WAYS)
    monkeypatch.setattr(attention_stress, "UNBOUNDED", 4.0)
    at = time.monotonic()
    found = attention_stress.measure(tmp_path, CPU, 1, 0.0)
    assert time.monotonic() - at < 30 and len(suspected) == 6 and all(late == suspect for suspect, late in suspected)
    told = {(row["variant"], row["way"]): (row["status"], row["reason"]) for row in found}
    assert told[PICTURES, GRAPH] == ("wrong result", "no answer within 4 s")
    assert told[PICTURES, NO_GRAPH] == ("failed", "no answer within 4 s")
    assert [told["operator", way] for way in ("blocks", "graph")] == [("ok", ""), ("failed", "exit code -11")]
    assert {told["descriptors", way] for way in attention_stress.WAYS} == {("ok", "")}
    assert told["pointers", "graph"][0] == "wrong result" and told["pointers", "eager"][0] == "ok"
    assert told[SUSPECTS[0], "blocks"] == ("failed", "no kernel") and told[SUSPECTS[1], "blocks"][0] == "wrong result"


def test_a_replay_that_leaves_an_output_as_it_was_is_seen(monkeypatch):
    """NaN was put there before."""

    class Graph:
        def replay(self):
            outs[0].copy_(right)

    outs = []
    batch = Batch(CPU, 6, (25, 40), (4, 9), seed=0)
    run = attention_stress.launcher("operator", batch)
    right = run()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())

    def noted():
        outs.append(run())
        return outs[-1]

    replay, found = attention_stress.replayed(noted, 2), Found()
    del outs[0]  # that one compiled
    found.add_launches(replay(), batch)
    assert (found.launches, found.bad, found.whole, found.gaps) == (2, 1, 6 * attention_stress.HEADS, 1)


@pytest.mark.parametrize(
    ("variant", "status", "code"),
    [("operator", "ok", 0), ("operator", "failed", 1), (PICTURES, "wrong result", 1), (SUSPECTS[1], "wrong result", 0)],
)
def test_only_what_the_driver_uses_decides_the_exit_code(tmp_path, monkeypatch, variant, status, code):
    monkeypatch.setattr(attention_stress, "measure", lambda *_: [{"variant": variant, "status": status}])
    assert attention_stress.main(["--out", str(tmp_path)]) == code
