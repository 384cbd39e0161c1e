"""The search for launch configurations: what is tried, in which order, what is kept, and what an interruption leaves."""

import importlib
import json
import math

import pytest
import torch

from benchmarks.operators.cases import BF16, OperatorCase, Size
from benchmarks.shared.budget import results
from benchmarks.tuning import precompile
from benchmarks.tuning import run as tune
from benchmarks.tuning.cases import CASES
from benchmarks.tuning.run import Checker, Task, read_record, write_entry
from benchmarks.tuning.search import FINAL_ROUNDS, SCREENING_ROUNDS, SPACES, Outcome, candidates, search
from qwen_fast_kernels.tuning import chosen, dims_of, read_entries
from support.cli import refused

DEFAULT = {"BLOCK": 0, "num_warps": 4}
MEASURED = {"machine": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-24", "commit": "abc"}


def config(block: int) -> dict:
    return DEFAULT | {"BLOCK": block}


class Machine:
    """An injected compiler, checker and timer: what each block takes, which do not compile, which compute wrongly."""

    def __init__(self, seconds: dict[int, float], spilling=(), wrong=(), jitter: float = 0.0):
        self.seconds, self.spilling, self.wrong, self.jitter = seconds, spilling, wrong, jitter
        self.compiled, self.checked, self.measured = [], [], []

    def compile(self, configs):
        self.compiled += [c["BLOCK"] for c in configs]
        return ["spills" if c["BLOCK"] in self.spilling else None for c in configs]

    def check(self, config):
        self.checked.append(config["BLOCK"])
        return "RMS error" if config["BLOCK"] in self.wrong else None

    def measure(self, configs, rounds):
        blocks = [c["BLOCK"] for c in configs]
        assert set(blocks) <= set(self.checked), "measured before it was checked"
        self.measured.append((rounds, blocks))
        noise = [1.0 + self.jitter * math.sin(7 * n + position) for position in range(len(blocks)) for n in range(rounds)]
        return [[self.seconds[b] * noise[p * rounds + n] for n in range(rounds)] for p, b in enumerate(blocks)]

    def search(self, *blocks: int) -> Outcome:
        tried = [config(block) for block in blocks]
        return search(DEFAULT, tried, compile=self.compile, check=self.check, measure=self.measure)


def test_the_fastest_right_configuration_is_found():
    machine = Machine({0: 10e-6, 1: 9e-6, 2: 5e-6, 3: 4e-6, 4: 12e-6}, spilling={2}, wrong={3})
    outcome = machine.search(1, 2, 3, 4)
    assert (outcome.best, outcome.worth_writing) == (config(1), True)
    assert outcome.gain == pytest.approx(0.1) and outcome.noise == pytest.approx(0.0)
    assert (outcome.default_us, outcome.best_us) == (pytest.approx(10), pytest.approx(9))
    assert outcome.pruned == [(config(2), "spills")] and outcome.wrong == [(config(3), "RMS error")]
    assert machine.compiled == [0, 1, 2, 3, 4] and machine.checked == [0, 1, 3, 4]
    assert machine.measured == [(SCREENING_ROUNDS, [0, 1, 4]), (FINAL_ROUNDS, [0, 0, 1, 4])]
    assert [c["BLOCK"] for c, _ in outcome.timings] == [1, 0, 4]


@pytest.mark.parametrize(("best", "worth"), [(9.9e-6, False), (9.81e-6, False), (9.79e-6, True), (10.5e-6, False)])
def test_two_per_cent_are_needed(best, worth):
    outcome = Machine({0: 10e-6, 1: best}).search(1)
    assert outcome.worth_writing is worth
    assert outcome.best == config(int(best < 10e-6))


def test_noise_is_added_to_what_is_needed():
    quiet, loud = (Machine({0: 10e-6, 1: 9.7e-6}, jitter=jitter).search(1) for jitter in (0.0, 0.05))
    assert quiet.worth_writing and not loud.worth_writing
    assert loud.noise > 0.02 and loud.gain == pytest.approx(0.03, abs=0.06)


def test_only_the_fastest_are_measured_at_length():
    machine = Machine({block: 1e-6 * (20 - block) for block in range(12)})
    machine.search(*range(1, 12))
    assert machine.measured[1] == (FINAL_ROUNDS, [0, 0, 11, 10, 9, 8])


def test_a_wrong_default_is_said_and_nothing_is_measured():
    machine = Machine({0: 1.0, 1: 1.0}, wrong={0})
    outcome = machine.search(1)
    assert outcome.default_is_wrong == "RMS error" and not outcome.worth_writing and not machine.measured
    assert "wrong on this GPU" in tune.describe(outcome)


def test_a_spilling_default_is_still_measured():
    outcome = Machine({0: 2e-6, 1: 1e-6}, spilling={0}).search(1)
    assert outcome.default_us == pytest.approx(2) and outcome.worth_writing


def test_with_nothing_else_the_default_stays():
    outcome = Machine({0: 1e-6}).search()
    assert outcome.best == DEFAULT and not outcome.worth_writing
    assert "the default stays" in tune.describe(outcome)


# Candidates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_candidates_are_variations_of_the_default(case, capability):
    task = Task.of(case, capability)
    assert len(task.candidates) >= 10 and task.default not in task.candidates
    assert len({json.dumps(c) for c in task.candidates}) == len(task.candidates)
    for candidate in task.candidates:
        assert candidate.keys() == task.default.keys()
        assert all(value & (value - 1) == 0 for name, value in candidate.items() if name.startswith(("BLOCK", "num_w")))
        assert candidate.get("DESCRIPTORS") == task.default.get("DESCRIPTORS"), "what cannot be loaded so must not be"
        assert not candidate.get("WARP_SPECIALIZE") or task.default["WARP_SPECIALIZE"]


def test_every_tunable_operator_is_tuned():
    found = {
        path.stem
        for path in tune.CONFIGS.parent.glob("[!_]*.py")
        if hasattr(importlib.import_module(f"qwen_fast_kernels.{path.stem}"), "default_config")
    }
    assert found == set(SPACES) == {case.op for case in CASES}


def test_fp32_attention_has_its_own_tiles():
    module = importlib.import_module("qwen_fast_kernels.joint_attention")
    dims = (128, 4, False, True)
    found = candidates("joint_attention", 90, module.default_config(90, *dims), dims_of(module.default_config, dims))
    assert found and max(c["BLOCK_M"] for c in found) == 64


# Record and files -----------------------------------------------------------------------------------------------------


def task_of(rows: int = 4096) -> Task:
    return Task.of(OperatorCase("linear_gelu", f"{rows} rows", BF16, Size((), (rows,))), 90)


def outcome_of(task: Task, gain: float) -> Outcome:
    return Outcome(task.default, task.candidates[0], 100.0, 100.0 * (1 - gain), gain, 0.001, [(task.default, 100.0)])


@pytest.fixture
def run(tmp_path):
    """`run(search_task, *tasks)` with files in a temporary folder."""

    def of(search_task, *tasks: Task, **options):
        places = {"folder": tmp_path / "configs", "record": tmp_path / "tuning.jsonl"}
        return tune.tune(list(tasks), search_task, measured=MEASURED, **places, **options)

    of.folder, of.record = tmp_path / "configs", tmp_path / "tuning.jsonl"
    return of


def test_what_gains_is_written_where_the_operators_look(run, capsys):
    task = task_of()
    run(lambda task: outcome_of(task, 0.1), task)
    (path,) = run.folder.glob("*.json")
    assert path.name == "linear_gelu,D=3072,device_name=NVIDIA_H200.json"
    assert chosen(read_entries(path), task.dims, "3.6.1", task.default) == task.candidates[0]
    (entry,) = read_entries(path)
    assert entry["measured"] == MEASURED and entry["default"] == task.default
    assert (entry["default_us"], entry["config_us"], entry["gain"]) == (100.0, 90.0, 0.1)
    assert f"-> {path.name}" in capsys.readouterr().out


def test_what_does_not_gain_is_recorded_and_not_written(run, capsys):
    results = run(lambda task: outcome_of(task, 0.01), task_of())
    assert not run.folder.exists() and len(read_record(run.record)) == 1
    assert "no configuration beats the defaults" in "\n".join(tune.summary(results))


def test_a_later_measurement_replaces_an_entry_and_leaves_the_others(run):
    tasks = task_of(4096), task_of(60)
    run(lambda task: outcome_of(task, 0.1), *tasks)
    (path,) = run.folder.glob("*.json")
    assert len(read_entries(path)) == 2
    other_triton = MEASURED | {"triton": "3.9.0"}
    write_entry(run.folder, tasks[0], outcome_of(tasks[0], 0.2), other_triton)
    assert len(read_entries(path)) == 3
    write_entry(run.folder, tasks[0], outcome_of(tasks[0], 0.3), MEASURED)
    assert sorted(entry["gain"] for entry in read_entries(path)) == [0.1, 0.2, 0.3]
    for task, measured in ((tasks[0], MEASURED), (tasks[0], other_triton), (tasks[1], MEASURED)):
        write_entry(run.folder, task, outcome_of(task, 0.0), measured)
    assert not path.exists(), "the defaults won again everywhere"


def test_a_run_goes_on_behind_the_last_one(run, capsys):
    tasks = [task_of(rows) for rows in (60, 1024, 4096)]
    searched = []

    def interrupted(task):
        searched.append(task.dims["rows"])
        if len(searched) == 2:
            raise KeyboardInterrupt
        return outcome_of(task, 0.1)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, *tasks)
    assert len(read_record(run.record)) == 1 and len(list(run.folder.glob("*.json"))) == 1
    with run.record.open("a") as file:
        file.write('{"identity": {"op": "linear_ge')  # killed while it wrote
    run(interrupted, *tasks)
    assert searched == [60, 1024, 1024, 4096] and len(read_record(run.record)) == 3
    run(interrupted, *tasks)
    assert len(searched) == 4
    out = capsys.readouterr().out
    assert "linear_gelu: 60 rows: measured before, default 100.0 us, best 90.0 us" in out


def test_another_version_or_source_is_another_measurement(run, monkeypatch):
    searched = []

    def found(task):
        searched.append(task)
        return outcome_of(task, 0.1)

    run(found, task_of())
    monkeypatch.setitem(MEASURED, "triton", "3.9.0")
    run(found, task_of())
    monkeypatch.setattr(tune, "source_hash", lambda op: "changed")
    run(found, task_of())
    assert len(searched) == 3


def test_a_case_that_ends_the_device_is_left_out_next_time(run):
    tasks = [task_of(rows) for rows in (60, 4096)]

    def failing(task):
        if task.dims["rows"] == 60:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return outcome_of(task, 0.1)

    with pytest.raises(RuntimeError, match="60 rows: CUDA error.*left out"):
        run(failing, *tasks)
    results = run(failing, *tasks)
    assert [task.dims["rows"] for task, _ in results] == [4096]


def test_no_case_begins_after_the_time(run):
    clock = iter([0.0, 10.0, 70.0, 80.0]).__next__
    results = run(lambda task: outcome_of(task, 0.1), *(task_of(r) for r in (60, 1024, 4096)), seconds=60, clock=clock)
    assert [outcome is None for _, outcome in results] == [False, True, True]
    assert "run the command again" in list(tune.summary(results))[-1]


def test_an_unwritable_folder_is_named_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file: results cannot be written there"):
        tune.check_writable(tmp_path / "file", tmp_path / "tuning.jsonl")
    with pytest.raises(OSError, match="results cannot be written there"):
        tune.check_writable(tmp_path, tmp_path / "file" / "tuning.jsonl")


# Check and compiler ---------------------------------------------------------------------------------------------------


@pytest.mark.triton
@pytest.mark.parametrize("op", ["qk_norm_rope", "gated_residual_ada_layer_norm", "joint_attention"])
def test_a_wrong_kernel_is_seen(op, device, monkeypatch):
    case = OperatorCase(op, "small", BF16, Size((5,), (30,), 2, 64))
    checker, task = Checker(case, device), Task.of(case, 80)
    assert checker.check(task.default) is None
    assert checker.check(task.default) is None, "what an operator in place writes must not be its next input"
    module = case.module()
    right = getattr(module, f"launch_{op}")

    def off_by_a_row(*arguments, config):
        result = right(*arguments, config=config)
        for one in results(op, result, arguments):
            one[-1] *= 1.1
        return result

    monkeypatch.setattr(module, f"launch_{op}", off_by_a_row)
    assert "exceeds its budget" in checker.check(task.default)


@pytest.mark.triton
def test_an_unwritten_row_is_seen(device, monkeypatch):
    case = OperatorCase("gated_residual", "small", torch.float32, Size((5,), (30,), 2, 64))
    checker, task = Checker(case, device), Task.of(case, 80)
    module = case.module()
    right = module.launch_gated_residual

    def without_the_last_row(*arguments, config):
        out = torch.empty_like(arguments[0])
        out[:-1] = right(*arguments, config=config)[:-1]
        return out

    monkeypatch.setattr(module, "launch_gated_residual", without_the_last_row)
    assert "non-finite" in checker.check(task.default)


@pytest.mark.triton
def test_the_compiler_prunes_in_a_process_of_its_own(capfd):
    """One right configuration, one of other keys, one with a tile that does not fit."""
    case = next(case for case in CASES if case.op == "gated_residual")
    right = Task.of(case, 90).default
    found = precompile.precompile([(case, right), (case, right | {"BLOCK_ROWS": 3}), (case, right)], 90, jobs=1)
    assert found[0] is None is found[2] and "power of 2" in found[1]
    assert "3 configurations compiled" in capfd.readouterr().out


def test_the_item_that_kills_the_compiler_is_answered_for(tmp_path):
    import sys

    script = (
        "import json, os, sys\n"
        "for name, config in json.load(sys.stdin)['items']:\n"
        "    if config == 'deadly': os._exit(3)\n"
        "    print(json.dumps([None if config == 'good' else config]), flush=True)\n"
    )
    items = [("a", "good"), ("b", "deadly"), ("c", "spills"), ("d", "deadly")]
    found = list(precompile.answers([sys.executable, "-c", script], {"items": items}, {}))
    assert found == [None, "the compiler ended with 3", "spills", "the compiler ended with 3"]


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_refuses_without_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "tune measures on a GPU, and torch" in refused(capsys, "tune")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [("--minutes", "0"), ("--jobs", "x"), ("--minutes", "nan")])
def test_the_command_refuses_bad_numbers(capsys, argv):
    assert argv[0] in refused(capsys, "tune", *argv)


@pytest.mark.gpu
def test_one_operator_is_tuned(tmp_path, device, capsys):
    record = tmp_path / "tuning.jsonl"
    assert tune.tune_device(device, ops=["qk_norm_rope"], folder=tmp_path / "configs", record=record) == 0
    (line,) = read_record(record)
    assert line["outcome"]["default_us"] > 0 and len(line["outcome"]["timings"]) > 5
    assert tune.tune_device(device, ops=["qk_norm_rope"], folder=tmp_path / "configs", record=record) == 0
    assert "measured before" in capsys.readouterr().out
