"""`qwen-fast bench` on the CPU, at tiny size: every rung reached, right before fast, and nothing lost when something breaks."""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.ladder import models
from benchmarks.ladder import run as bench
from benchmarks.ladder import rungs as ladder
from benchmarks.ladder.peers import PEERS
from benchmarks.ladder.rung import NotMeasured, Rung
from benchmarks.ladder.rungs import ENABLED, ENABLED_AND_COMPILED, GRAPH, INVARIANT, OURS, PACKED, STEPS
from benchmarks.ladder.stock import COMPARED, COMPILED, STOCK
from benchmarks.shared.rows import read
from benchmarks.shared.shapes import SHAPES, PictureCase
from benchmarks.shared.watchdog import GO_ON
from qwen_fast.cli import main

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
CASE = PictureCase(32, 48, 3, True, 1, 8, TINY)


@pytest.fixture(scope="module")
def pipelines():
    """One for each dtype: a run leaves it as it was."""
    return functools.cache(models.random_pipeline)


@pytest.fixture
def session(tmp_path, monkeypatch, pipelines):
    """Runs some rungs on one case; gives the rows, what was said, and the folder."""
    monkeypatch.setattr(models, "random_pipeline", pipelines)

    def run(rungs, case=CASE, dtype=torch.float32, **options):
        said = []
        monkeypatch.setattr(bench, "plan", lambda _: [(case, rungs)])
        chosen = bench.Options(CPU, dtype, shape=TINY, repeats=1, ceiling_seconds=1e-3, out=tmp_path, **options)
        try:
            rows = bench.run(chosen, said.append)
        except KeyboardInterrupt:
            rows = None
        return rows, "\n".join(said), tmp_path

    return run


def without_compiler(monkeypatch) -> None:
    """Regional compilation that compiles nothing: the compiler takes a minute on a CPU."""

    def compile_repeated_blocks(model, fullgraph):
        for block in model.transformer_blocks:
            block._compiled_call_impl = block._call_impl

    monkeypatch.setattr(diffusers.QwenImageTransformer2DModel, "compile_repeated_blocks", compile_repeated_blocks)


def test_every_rung_is_reached_and_leaves_the_pipeline_as_it_was(session, monkeypatch, pipelines):
    without_compiler(monkeypatch)
    reports, disable, pipe = [], qwen_fast.disable, pipelines(TINY, CPU, torch.float32)

    def noted(pipe):
        reports.append(qwen_fast.report(pipe))
        return disable(pipe)

    monkeypatch.setattr(qwen_fast, "disable", noted)
    rows, said, folder = session(ladder.all_rungs())
    by_name = {row["rung"]: row for row in rows}
    assert list(by_name) == [rung.name for rung in ladder.all_rungs()] and len(by_name) == 20
    on_gpus = (GRAPH, PACKED[1], COMPARED[0])
    stay_out = dict.fromkeys([rung.name for rung in on_gpus], "needs a CUDA device") | {INVARIANT.name: "one picture a call"}
    for row in rows:
        if row["rung"] in {rung.name for rung in PEERS} and row["status"] == "ok":
            continue  # of others, with an error of their own
        if row["rung"] in stay_out or row["reason"].startswith(("not installed", "random weights", "sageattention")):
            assert row["status"] == "not measured" and not row.get("step_ms_p50")
            assert stay_out.get(row["rung"], row["reason"]) in said
            continue
        assert row["status"] == "ok", row
        assert 0 < float(row["image_s_p20"]) <= float(row["image_s_p50"]) <= float(row["image_s_p80"])
        assert float(row["images_per_minute"]) == pytest.approx(60 / float(row["image_s_p50"]), rel=1e-3)
        assert float(row["first_image_s"]) > 0 and 0 < float(row["share_of_floor"]) < 1
        assert float(row["max_difference"]) <= 2e-6 and row["clock"] == "CPU time of one thread"
        assert ("speedup_image" in row) == (row["rung"] != STOCK.name)
    assert read(folder / "ladder.csv") == [{name: row.get(name, "") for name in bench.FIELDS} for row in rows]
    assert {row["what"] for row in read(folder / "ceilings.csv")} == {"copy", "matrix product", "attention"}
    assert all(row["torch"] == torch.__version__ and row["commit"] for row in rows)

    # A rung is entered twice, for the first image and for the pairs; the first one once more, for the stage table.
    measured = [ENABLED, PACKED[0], *PACKED[2:], *STEPS, ENABLED_AND_COMPILED]
    assert len(reports) == 2 * len(measured) + 1
    told = reports.pop()
    assert told.calls["packed transformer"] and not told.fallbacks
    enabled, diffusers_attention, flash, our_attention, sampler, fused, table, packed, pictures, _ = reports[::2]
    assert "cfg_euler_step" in sampler.calls and "transformer" not in sampler.calls and "vae decode" not in sampler.calls
    for report in (fused, table):
        assert report.calls["transformer"] and "packed transformer" not in report.calls and not report.fallbacks
    for report, modulation in (
        (fused, "layers"),
        (table, "device"),
        (packed, "device"),
        (pictures, "device"),
        (enabled, "auto"),
    ):
        assert f"modulation {modulation}" in str(report) and not report.memory["modulation weights that stay on the host"]
    for report in (packed, diffusers_attention, flash, our_attention):
        assert report.calls["packed transformer"] and "vae decode" not in report.calls
    assert pictures.calls["vae decode"] and enabled.calls["vae decode"]

    fresh = pipelines.__wrapped__(TINY, CPU, torch.float32)
    assert type(pipe) is type(fresh) and type(pipe.transformer) is type(fresh.transformer)
    assert {name for name in pipe.__dict__ if not name.startswith("_")} == {n for n in fresh.__dict__ if not n.startswith("_")}
    for name, tensor in fresh.transformer.state_dict().items():
        assert torch.equal(pipe.transformer.state_dict()[name], tensor)


def disturbed(size: float, **kind) -> Rung:
    """Stock with something added to its predictions."""

    @contextlib.contextmanager
    def enter(pipe, case):
        hook = pipe.transformer.register_forward_hook(lambda _module, _args, output: (output[0] + size,))
        yield ""
        hook.remove()

    return Rung("disturbed", enter, **kind)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-3), (torch.bfloat16, 0.5), (torch.float32, float("nan"))])
def test_a_wrong_result_gets_no_speed_up(session, dtype, size):
    (stock, wrong), said, _ = session([STOCK, disturbed(size)], dtype=dtype)
    assert stock["status"] == "ok" and wrong["status"] == "wrong result" and wrong["reason"] in said
    assert "speedup_image" not in wrong and "speedup_step" not in wrong and bench.is_fault(wrong)
    assert float(wrong["step_ms_p50"]) > 0


def test_below_fp32_the_error_is_a_part_of_stock_s(session):
    rows, _, _ = session([STOCK, ENABLED, disturbed(0.0)], dtype=torch.bfloat16)
    assert [row["status"] for row in rows] == ["ok"] * 3
    assert rows[0]["error_to_stock"] == rows[2]["error_to_stock"] == "1.000"
    assert 0.3 < float(rows[1]["error_to_stock"]) < 1.25 and float(rows[1]["max_difference"]) > 0


def test_a_lossy_mode_may_differ_but_not_be_another_picture(session):
    rows, said, _ = session([STOCK, disturbed(1e-3, lossy=True), disturbed(50.0, lossy=True)])
    assert [row["status"] for row in rows] == ["ok", "ok", "wrong result"]
    assert rows[1]["speedup_image"] and 20 < float(rows[1]["psnr_db"]) < 100 and "speedup_image" not in rows[2]
    assert "lossy" in said


def failing(error: BaseException, *, inside: bool = True) -> Rung:
    @contextlib.contextmanager
    def enter(pipe, case):
        if not inside:
            raise error
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipe.vae, "decode", lambda *_, **__: (_ for _ in ()).throw(error))
            yield ""

    return Rung("failing", enter)


@pytest.mark.parametrize("inside", [True, False])
def test_a_failing_rung_has_its_error_in_its_row_and_the_next_goes_on(session, inside):
    error = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")
    rows, said, folder = session([STOCK, failing(error, inside=inside), ENABLED])
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"] and bench.is_fault(rows[1])
    assert rows[1]["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB" and rows[1]["reason"] in said
    assert [row["status"] for row in read(folder / "ladder.csv")] == ["ok", "failed", "ok"]


def test_a_silent_fallback_to_stock_is_no_measurement(session, monkeypatch):
    monkeypatch.setattr("qwen_fast.pipelines.call.reason_for_stock", lambda *_: "a reason")
    rows, _, _ = session([STOCK, ENABLED])
    assert rows[1]["status"] == "failed" and "stock diffusers ran instead: a reason" in rows[1]["reason"]


def test_an_interruption_keeps_the_rows_and_says_where_they_are(session):
    rows, said, folder = session([STOCK, failing(KeyboardInterrupt()), ENABLED])
    assert rows is None and f"interrupted: 1 rows are finished and in {folder / 'ladder.csv'}" in said
    assert [row["rung"] for row in read(folder / "ladder.csv")] == [STOCK.name]


def test_a_checkpoint_is_measured_with_its_prompts(session, checkpoint):
    rows, _, _ = session([STOCK, ENABLED], dataclasses.replace(CASE, batch=2), model=str(checkpoint))
    assert [row["status"] for row in rows] == ["ok", "ok"] and {row["model"] for row in rows} == {checkpoint.name}
    assert all(float(row["text_s"]) > 0 for row in rows)
    arguments = models.call_arguments(models.load_pipeline(checkpoint, CPU, torch.float32), dataclasses.replace(CASE, batch=2))
    lengths = arguments["prompt_embeds_mask"].sum(1).tolist()
    assert lengths[0] > lengths[1] > 0, "prompts of different lengths"


def test_stages_of_stock_and_ours_are_told_once_each(session, checkpoint):
    _, said, _ = session([STOCK, ENABLED], dataclasses.replace(CASE, steps=6), model=str(checkpoint))
    for rung, own in ((STOCK, {"text", "schedule", "denoise", "vae"}), (ENABLED, {"text", "schedule", "modulation", "vae"})):
        table = said.split(f"{rung.name}, stages of a call of 4 steps:\n")[1].split("total")[0]
        seconds = {line.split()[0]: float(line.split()[1]) for line in table.splitlines()[1:]}
        assert own | {"denoise", "other"} <= set(seconds) and seconds["denoise"] > 0


def test_what_was_measured_before_is_not_measured_again(session):
    first, _, folder = session([STOCK, failing(ValueError("no"))])
    rows, said, _ = session([STOCK, failing(ValueError("yes")), ENABLED], resume=True)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"] and rows[1]["reason"] == "ValueError: no"
    assert said.count("measured before") == 2 and len(read(folder / "ladder.csv")) == 3


def test_without_exact_latents_rows_are_judged_by_their_distance_from_stock(session, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("benchmarks.ladder.session.exact_latents", refuse)
    rows, said, _ = session([STOCK, ENABLED, disturbed(0.5)], dtype=torch.bfloat16)
    assert [row["status"] for row in rows] == ["ok", "ok", "wrong result"]
    assert "not compared with fp32: OutOfMemoryError" in rows[1]["detail"] and "no exact latents" in said


def test_a_failing_stage_table_costs_nothing(session, monkeypatch):
    monkeypatch.setattr("benchmarks.ladder.session.stage_table", lambda *_: 1 / 0)
    rows, said, _ = session([STOCK, ENABLED])
    assert [row["status"] for row in rows] == ["ok", "ok"] and "no stages: ZeroDivisionError" in said


@pytest.mark.slow
def test_a_rung_that_hangs_has_its_row_and_the_next_run_goes_on_behind_it(tmp_path):
    """In a process of its own, since it ends."""
    code = """
import contextlib, sys, time, torch
from benchmarks.ladder import run as bench
from benchmarks.ladder.rungs import STEPS, STOCK, Rung
from benchmarks.shared.shapes import SHAPES, PictureCase

@contextlib.contextmanager
def hang(pipe, case):
    time.sleep(60)
    yield ""

case = PictureCase(32, 48, 2, False, 1, 8, SHAPES["tiny"])
bench.plan = lambda _: [(case, [STOCK, Rung("hanging", hang), STEPS[0]])]
options = bench.Options(torch.device("cpu"), torch.float32, shape=SHAPES["tiny"], repeats=1, ceiling_seconds=1e-3)
options.out, options.limit, options.resume = sys.argv[1], 12.0, True
bench.run(options)
"""
    codes = [
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT).returncode for _ in range(2)
    ]
    rows = read(tmp_path / "ladder.csv")
    assert codes == [GO_ON, 0] and [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["rung"] == "hanging" and rows[1]["reason"] == "no end within 12 s"


def test_the_process_ends_with_its_output_and_without_taking_the_interpreter_apart():
    code = "import atexit; from benchmarks.ladder.run import leave; atexit.register(print, 'taken apart')"
    code += "; print('all of it'); leave(3)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "all of it\n"), done.stderr


def test_stages_are_not_told_of_a_wrong_result(session):
    _, said, _ = session([STOCK, dataclasses.replace(ENABLED, enter=failing(ValueError("no")).enter)])
    assert said.count("stages of a call") == 1


def test_memory_is_checked_before_anything_is_allocated(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "free_memory", lambda device: 30 * 2**30)
    monkeypatch.setattr(models, "random_pipeline", lambda *_: pytest.fail("allocated"))
    monkeypatch.setattr(bench, "kept_ceilings", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(models, "free_memory", lambda device: 2**28)
    options = bench.Options(CPU, torch.bfloat16, cases=[PictureCase()], out=tmp_path)
    with pytest.raises(ValueError, match=r"60 layers needs about 4\d\.\d GiB.*0\.2 GiB are free; nothing was allocated"):
        bench.run(options)
    monkeypatch.setattr(models, "free_memory", lambda device: 30 * 2**30)
    said = []
    assert 40 <= bench.smaller(options, said.append).cases[0].shape.layers < 50
    assert "SMALLER MODEL" in said[0] and "of the 60 layers" in said[0]
    with pytest.raises(ValueError, match=r"--layers 4\d would fit"):
        models.check_memory([PictureCase()], CPU, torch.bfloat16)
    assert (
        models.memory_needed(PictureCase(shape=dataclasses.replace(PictureCase().shape, layers=40)), torch.bfloat16)
        < 30 * 2**30
    )
    assert (
        models.memory_needed(PictureCase(), torch.float32) > 1.9 * models.memory_needed(PictureCase(), torch.bfloat16) - 2**32
    )


def test_a_batch_whose_pictures_are_kept_apart(session):
    rows, _, _ = session([STOCK, ENABLED, INVARIANT], case=dataclasses.replace(CASE, batch=2))
    assert [row["status"] for row in rows] == ["ok"] * 3 and float(rows[2]["speedup_step"]) > 0
    assert {row["batch"] for row in rows} == {"2"}


def test_skipped_rungs_and_unknown_ones():
    options = bench.Options(CPU, torch.float32, shape=TINY, cases=[CASE], skip=("compile", "cache"))
    ((_, rungs),) = bench.plan(options)
    assert COMPILED not in rungs and STOCK in rungs and len(rungs) == len(ladder.all_rungs()) - 3
    with pytest.raises(ValueError, match="--skip nothing: no rung has that"):
        bench.plan(dataclasses.replace(options, skip=("nothing",)))
    ((_, rungs),) = bench.plan(dataclasses.replace(options, skip=(), only=("compile", "as enabled")))
    assert rungs == [STOCK, ENABLED, COMPILED, ENABLED_AND_COMPILED], "in the ladder's order"


def test_the_default_takes_less_than_eight_minutes_by_arithmetic(capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.ladder.estimate.importlib.util.find_spec", lambda name: None)  # peers come on top
    assert main(["bench", "--estimate"]) == 0
    out = capsys.readouterr().out
    minutes = float(out.split("about ")[1].split(" minutes")[0])
    assert 2 < minutes < 8 and "1024x1024, 50 steps, CFG, batch 1" in out and "1328x1328" in out
    assert main(["bench", "--estimate", "--full"]) == 0
    assert float(capsys.readouterr().out.split("about ")[1].split(" minutes")[0]) > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:9"], "cuda:9"),
        (["--out", "/proc/nowhere"], "`--out` is /proc/nowhere, where nothing can be written"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--skip", "nothing", "--shape", "tiny"], "--skip nothing"),
    ],
)
def test_bad_input_is_named_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    if "cuda:9" in arguments and torch.cuda.device_count() > 9:
        pytest.skip("there is such a GPU")
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "rows")]
    assert main(["bench", *arguments, *out]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob("rows/*.csv"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--full", "--steps", "4"],
        ["--model", "x", "--layers", "3"],
        ["--size", "100x100"],
        ["--seconds", "0"],
        ["--batch", "0"],
    ],
)
def test_arguments_that_contradict_or_make_no_sense(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *arguments])
    assert caught.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_the_command_prints_one_table_and_tells_a_fault_by_its_exit_code(tmp_path, capsys):
    skip = [part for name in ("compile", "attention", "+", "as enabled") for part in ("--skip", name)]
    command = ["bench", "--shape", "tiny", "--size", "32x32", "--steps", "2", "--no-cfg", "--text", "4", "--repeats", "1"]
    assert main([*command, "--seconds", "0.001", *skip, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "32x32, 2 steps, no CFG, batch 1, text 4 tokens" in out and "no lossy mode exists yet" in out
    assert str(tmp_path / "ladder.csv") in out and len(read(tmp_path / "ladder.csv")) == 5


def test_a_rung_that_does_not_apply_says_why(pipelines):
    pipe = pipelines(TINY, CPU, torch.float32)
    for rung in OURS:
        with contextlib.suppress(NotMeasured), rung.enter(pipe, dataclasses.replace(CASE, cfg=False)):
            assert rung.name not in ("+ packed CFG", "+ CUDA graph")
