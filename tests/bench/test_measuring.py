"""What `qwen-fast bench` is made of: rows that survive, provenance, clocks, the work of a step, ceilings."""

import math
import os
import statistics
import types
from collections import Counter

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qwen_fast
from benchmarks.ladder import models
from benchmarks.shared import machine
from benchmarks.shared.ceilings import Ceilings, measure_ceilings, sustained
from benchmarks.shared.measure import Difference, Spread, clocked, exact_latents, interleaved, ratio
from benchmarks.shared.rows import RowFile, append, read
from benchmarks.shared.shapes import NEGATIVE_TOKENS, QWEN_IMAGE, SHAPES, PictureCase, default_cases, full_cases

TINY = SHAPES["tiny"]
CPU = torch.device("cpu")
FIELDS = ["a", "b"]


# Rows -----------------------------------------------------------------------------------------------------------------


def test_rows_are_on_the_disk_one_by_one_and_earlier_ones_stay(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    first = RowFile(path, FIELDS)
    first.add({"a": 1, "b": 'x, "y"\nz'})
    assert read(path) == [{"a": "1", "b": 'x, "y"\nz'}] and first.note is None
    before = path.read_bytes()
    RowFile(path, FIELDS).add({"b": 2})
    assert path.read_bytes().startswith(before) and read(path)[1] == {"a": "", "b": "2"}
    with pytest.raises(KeyError, match="no column c"):
        first.add({"c": 3})
    append(path, FIELDS, [[5, 6]])
    assert len(read(path)) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\r\n1,2\r\n3,", "line 3 is half-written: '3,'"),
        (b"a,b\r\n1,2\r\n3\r\n", "row 3 has 1 of 2 columns"),
        (b"a,c\r\n1,2\r\n", "its columns are others: b missing, c unknown"),
        (b"a", "line 1 is half-written"),
    ],
)
def test_a_damaged_file_is_named_left_alone_and_gets_a_neighbour(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    rows = RowFile(path, FIELDS)
    rows.add({"a": 1, "b": 2})
    assert path.read_bytes() == content
    assert message in rows.note and "rows-1.csv" in rows.note and str(path) in rows.note
    assert read(tmp_path / "rows-1.csv") == [{"a": "1", "b": "2"}]
    assert RowFile(path, FIELDS).path == rows.path, "and that one is gone on with"
    if "half" in message:
        with pytest.raises(ValueError, match="half-written"):
            read(path)


def test_an_empty_file_is_begun(tmp_path):
    (tmp_path / "rows.csv").touch()
    append(tmp_path / "rows.csv", FIELDS, [[1, 2]])
    assert read(tmp_path / "rows.csv") == [{"a": "1", "b": "2"}]


# Machine --------------------------------------------------------------------------------------------------------------


def test_provenance_of_a_cpu():
    known = machine.provenance("cpu")
    assert list(known) == list(machine.PROVENANCE) and known["torch"] == torch.__version__
    assert known["diffusers"] == diffusers.__version__ and "CPU, 1 thread" in known["machine"] and known["driver"] == ""
    with machine.Sampler("cpu") as sampler:
        pass
    assert set(sampler.summary().values()) == {""}


@pytest.fixture
def fake_gpu(tmp_path, monkeypatch):
    """A GPU as torch and nvidia-smi would describe it; the latter loops as the real one does."""
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--id=GPU-1-2*) ;; *) exit 6;; esac\n'
        'case "$*" in\n'
        "*--loop-ms*) echo '1980, 410.5, 50, 0x0000000000000001'; echo '1500, 699.9, 71, 0x0000000000000004'\n"
        "  echo '1755, [N/A], 60, 0x0000000000000020'; exec sleep 60;;\n"
        "*) echo '570.86, 345, 1980, 2619, 700.00, 0x0000000000000001';;\n"
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return script


def test_provenance_and_samples_of_a_gpu(fake_gpu):
    known = machine.provenance("cuda:3")
    expected = {"machine": "Some GPU", "driver": "570.86", "sm_clock_mhz": "345", "sm_clock_max_mhz": "1980"}
    expected |= {"memory_clock_mhz": "2619", "power_limit_w": "700.00", "throttling": "none"}
    assert expected.items() <= known.items()
    with machine.Sampler("cuda:3") as sampler:
        for _ in range(1000):
            if len(sampler.samples) == 3:
                break
            sampler._thread.join(0.01)
    assert sampler.summary() == {
        "sm_clock_min_mhz": "1500",
        "sm_clock_p50_mhz": "1755",
        "power_max_w": "700",
        "temperature_max_c": "71",
        "throttling_seen": "software power cap + software thermal",
    }
    assert sampler._process.poll() is not None and not sampler._thread.is_alive()


@pytest.mark.parametrize("broken", ["exit 9", None])
def test_without_a_working_nvidia_smi_the_columns_stay_empty(fake_gpu, broken, monkeypatch, tmp_path):
    if broken:
        fake_gpu.write_text(f"#!/bin/sh\n{broken}\n")
    else:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with machine.Sampler("cuda:3") as sampler:
        pass
    known = machine.provenance("cuda:3")
    assert known["driver"] == known["throttling"] == "" and set(sampler.summary().values()) == {""}


# The work of a step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_as_they_are(name):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = diffusers.QwenImageTransformer2DModel(
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            joint_attention_dim=shape.text_width,
            axes_dims_rope=shape.rope_axes,
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters


def test_the_work_of_a_step_is_what_stock_does_less_what_it_need_not():
    case = PictureCase(64, 96, 4, True, 1, 10, TINY)
    model = models.random_pipeline(TINY, CPU, torch.float32).transformer
    counted = Counter()
    for tokens in (10, NEGATIVE_TOKENS):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(
                hidden_states=torch.randn(1, case.image_tokens, 64),
                encoder_hidden_states=torch.randn(1, tokens, TINY.text_width),
                timestep=torch.tensor([0.5]),
                img_shapes=[[(1, 6, 4)]],
            )
        counted.update({name: sum(flops.values()) for name, flops in counter.get_flop_counts().items()})
    root = type(model).__name__
    left_out = ("img_mod", "txt_mod", "txt_in", "time_text_embed", "norm_out")
    needed = counted[root] - sum(
        flops for name, flops in counted.items() if name.split(".")[-1] in left_out and name.startswith(root)
    )
    last = f"{root}.transformer_blocks.{TINY.layers - 1}"
    needed -= sum(counted[f"{last}.{name}"] for name in ("txt_mlp", "attn.to_add_out", "attn.add_q_proj"))
    assert case.work().product_flops == needed
    # torch counts no attention on a CPU. The last block's text asks for none.
    image, texts = case.image_tokens, (10, NEGATIVE_TOKENS)
    attended = sum((TINY.layers - 1) * (image + text) ** 2 + image * (image + text) for text in texts)
    assert case.work().attention_flops == 4 * TINY.width * attended


def test_floors_follow_flops_and_bytes():
    ceilings = Ceilings("x", "bfloat16", 4e12, {"bfloat16": 8e14, "float8_e4m3fn": 16e14}, 6e14, "flash", {}, 2.0, "events")
    base = PictureCase()
    floor = ceilings.floor_seconds(base)
    work = base.work()
    assert floor > work.product_flops / 8e14 + work.attention_flops / 6e14, "few text rows are limited by their weights"
    assert floor < 1.1 * (work.product_flops / 8e14 + work.attention_flops / 6e14)
    assert 0.5 * floor < ceilings.floor_seconds(base, "float8_e4m3fn") < 0.65 * floor
    half = ceilings.floor_seconds(PictureCase(cfg=False))
    assert 0.48 * floor < half < 0.55 * floor
    text_only = Ceilings("x", "bfloat16", 4e12, {"bfloat16": 1e30}, 1e30, "flash", {}, 2.0, "events").floor_seconds(base)
    weights = QWEN_IMAGE.layers * 2 * 12 * QWEN_IMAGE.width**2 * 2
    assert text_only > weights / 4e12, "every weight is read once a step"


def test_ceilings_of_this_machine():
    ceilings = measure_ceilings(CPU, torch.float32, seconds=1e-3, shape=TINY, tokens=48, copy_bytes=2**16)
    assert ceilings.copy_bytes_per_s > 1e6 and ceilings.matmul_flops_per_s["float32"] > 1e6
    assert ceilings.attention_flops_per_s > 1e6 and ceilings.attention_backend in ceilings.attention_tried
    assert ceilings.clock == "CPU time of one thread" and isinstance(ceilings.attention_tried["cudnn"], str)
    assert [row["what"] for row in ceilings.rows()] == ["copy", "matrix product", "attention"]
    calls = []
    rate, _ = sustained([lambda: calls.append(0), lambda: calls.append(1)], 1e-3, CPU)
    assert rate > 0 and abs(calls.count(0) - calls.count(1)) <= 1, "by turns"


def test_products_in_8_bits_are_measured_or_refused_by_name(monkeypatch):
    from benchmarks.shared import ceilings

    monkeypatch.setattr(ceilings, "eight_bit_dtypes", lambda device: [torch.float8_e4m3fn])
    size = {"seconds": 1e-3, "shape": TINY, "tokens": 48, "copy_bytes": 2**16}

    def product(a, b, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert a.dtype == b.dtype == torch.float8_e4m3fn and b.stride(0) == 1, "column-major, as the GPU's takes it"
        assert scale_a.shape == (48, 1) and scale_b.shape == (1, b.shape[1]) and use_fast_accum
        exact.append((a.float() * scale_a) @ (b.float() * scale_b))
        return exact[-1].to(out_dtype)

    exact = []
    monkeypatch.setattr(torch, "_scaled_mm", product)
    measured = measure_ceilings(CPU, torch.float32, **size)
    assert set(measured.matmul_flops_per_s) == {"float32", "float8_e4m3fn"} and not measured.refused
    assert exact[0].std().item() == pytest.approx(1.0, rel=0.1), "scales undo the quantisation"

    def refuses(*_, **__):
        raise RuntimeError("no such product\non this machine")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    measured = measure_ceilings(CPU, torch.float32, **size)
    assert measured.refused == {"float8_e4m3fn": "no such product"} and set(measured.matmul_flops_per_s) == {"float32"}


def test_an_attention_that_computes_something_else_is_no_candidate(monkeypatch):
    from benchmarks.shared import ceilings

    right = torch.nn.functional.scaled_dot_product_attention
    wrong = types.SimpleNamespace(**vars(torch.nn.functional))
    seen = []

    def attention(*rows):
        seen.append(1)
        return right(*rows) * (1.0 if len(seen) == 1 else 1.01)

    wrong.scaled_dot_product_attention = attention
    monkeypatch.setattr(ceilings, "F", wrong)
    tried = measure_ceilings(CPU, torch.float32, seconds=1e-3, shape=TINY, tokens=48, copy_bytes=2**16).attention_tried
    assert "differs from flash" in tried["math"] and tried["flash"] > 0


def test_an_attention_that_is_not_finite_is_no_candidate(monkeypatch):
    from benchmarks.shared import ceilings

    nowhere = types.SimpleNamespace(**vars(torch.nn.functional))
    nowhere.scaled_dot_product_attention = lambda *rows: rows[0] * float("nan")
    monkeypatch.setattr(ceilings, "F", nowhere)
    with pytest.raises(RuntimeError, match="no attention runs on cpu.*not finite"):
        measure_ceilings(CPU, torch.float32, seconds=1e-3, shape=TINY, tokens=48, copy_bytes=2**16)


def test_ceilings_are_measured_once_and_again_where_the_file_is_of_something_else(tmp_path, monkeypatch):
    from benchmarks.shared import ceilings

    how = {"seconds": 1e-3, "shape": TINY, "tokens": 48, "copy_bytes": 2**16}
    path = tmp_path / "new" / "ceilings.json"
    first = ceilings.kept_ceilings(path, CPU, torch.float32, **how)
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda *_, **__: pytest.fail("measured again"))
    assert ceilings.kept_ceilings(path, CPU, torch.float32, **how) == first
    monkeypatch.undo()
    assert ceilings.kept_ceilings(path, CPU, torch.bfloat16, **how).dtype == "bfloat16"
    path.write_text("{")
    assert ceilings.kept_ceilings(path, CPU, torch.float32, **how).dtype == "float32"


def test_the_grid_holds_what_was_asked_for():
    cases = full_cases(QWEN_IMAGE)
    assert len(cases) == len(set(cases)) == 5 * 4 * 2 * 2 * 3 and cases[0] == PictureCase()
    assert set(default_cases(QWEN_IMAGE)) & set(cases) == set(default_cases(QWEN_IMAGE))
    lengths = PictureCase(batch=4, text=128).text_lengths
    assert len(set(lengths)) == 4 and max(lengths) == 128 and PictureCase(batch=4, text=1).text_lengths == (1, 1, 1, 1)


# Clocks and comparisons -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    built = models.random_pipeline(TINY, CPU, torch.bfloat16)
    built.set_progress_bar_config(disable=True)
    return built


@pytest.mark.parametrize("enabled", [False, True])
def test_a_clock_sees_every_step_and_ends_the_loop(pipe, enabled):
    arguments = models.call_arguments(pipe, PictureCase(32, 32, 5, True, 1, 6, TINY))
    if enabled:
        qwen_fast.enable(pipe)
    try:
        latents = {}
        for steps in (1, 3, 5):
            with clocked(pipe, steps) as clock:
                latents[steps] = pipe(**arguments, output_type="latent").images
            assert len(clock.steps) == steps and all(seconds > 0 for seconds in clock.steps)
        assert torch.equal(latents[5], pipe(**arguments, output_type="latent").images), "all steps are the whole picture"
        assert not torch.equal(latents[1], latents[3]) and "progress_bar" not in pipe.__dict__
    finally:
        qwen_fast.disable(pipe)


def test_exact_latents_are_stock_s_in_fp32_and_leave_the_weights(pipe, monkeypatch):
    arguments = models.call_arguments(pipe, PictureCase(32, 48, 3, True, 2, 9, TINY))
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in pipe.transformer.named_parameters()}
    exact = exact_latents(pipe, arguments, 1)
    assert exact.dtype == torch.float32 and not pipe.transformer._forward_pre_hooks
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    wide = models.random_pipeline(TINY, CPU, torch.bfloat16)
    wide.transformer.float()
    floating = {n: v.float() for n, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    with clocked(wide, 1):  # at the first step the timestep, 1000, is the same in bf16
        expected = wide(**arguments | floating, output_type="latent").images
    assert torch.equal(exact, expected)
    with clocked(pipe, 1):
        narrow = pipe(**arguments, output_type="latent").images
    assert 1e-4 < (narrow.float() - exact).abs().max() < 0.3
    # A failure inside leaves the weights too.
    monkeypatch.setattr(pipe.transformer.transformer_blocks[1].img_mlp, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        exact_latents(pipe, arguments, 1)
    assert all(parameter.data_ptr() == before[name][0] for name, parameter in pipe.transformer.named_parameters())


def test_every_stage_of_ours_gives_what_stock_s_gives(checkpoint):
    from benchmarks.parts import stages as bench_stages

    stock = diffusers.QwenImagePipeline.from_pretrained(checkpoint)
    ours = qwen_fast.QwenImagePipeline.from_pipe(stock)
    ways = bench_stages.stages(stock, ours, "tiny", 32, 3, (5, 4))
    assert list(ways)[:3] == ["text", "schedule", "forwards of a step"] and len(ways) == 7
    with torch.no_grad():
        for name, (theirs, fast, _) in ways.items():
            assert Difference.between(fast(), theirs()).largest <= bench_stages.WIDER.get(name, bench_stages.LIMIT), name
    a_step, a_picture = {"forwards of a step", "CFG and Euler step"}, {"text", "schedule", "VAE"}
    counts = dict.fromkeys(a_step, 3) | dict.fromkeys(a_picture, 1)
    assert {name: count for name, (_, _, count) in ways.items() if count} == counts
    calls = qwen_fast.report(ours).calls
    assert calls["packed transformer"] == 3 and calls["vae decode"] == 1


def test_differences():
    expected = torch.tensor([0.0, 4.0, -2.0])
    same = Difference.between(expected, expected)
    assert (same.largest, same.mean, same.psnr) == (0, 0, math.inf)
    off = Difference.between(expected + torch.tensor([0.0, 0.0, 0.6]), expected)
    assert off.largest == pytest.approx(0.15) and off.mean == pytest.approx(0.05)
    assert off.psnr == pytest.approx(10 * math.log10(36 / 0.12))
    assert math.isnan(Difference.between(expected * float("nan"), expected).psnr)
    with pytest.raises(ValueError, match="shape"):
        Difference.between(expected[:2], expected)


def test_medians_and_pairs():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    spread = Spread.of(values)
    assert (spread.p20, spread.p50, spread.p80) == (pytest.approx(1.8), 3.0, pytest.approx(4.2))
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == statistics.median([2.0, 3.0, 1.0])
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, CPU)
    assert order == ["b", "a", "a", "b", "b", "a"] and [len(times) for times in seconds.values()] == [2, 2]


def test_a_backend_that_takes_no_mask_is_not_measured_where_stock_needs_one(pipe):
    from benchmarks.ladder.rung import NotMeasured
    from benchmarks.ladder.stock import COMPARED

    (flash,) = (rung for rung in COMPARED if "flash" in rung.name)
    with flash.enter(pipe, PictureCase(32, 32, 2, True, 1, 6, TINY)) as detail:
        assert detail == "_native_flash"
    with pytest.raises(NotMeasured, match="takes no mask"), flash.enter(pipe, PictureCase(32, 32, 2, True, 2, 6, TINY)):
        pass
