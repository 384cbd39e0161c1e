"""The driver and the proofs: what is asked for and when, what happens where a kernel is wrong, and that nothing is launched
that was not asked for. The stand-in for a GPU is the CPU.
"""

import functools
import importlib
import inspect
import json

import diffusers
import pytest
import torch

import qwen_fast
import qwen_fast_kernels
from benchmarks.shared.stock import assert_same_latents, draw, in_fp32, stock
from qwen_fast.cli import doctor, main
from qwen_fast.common import proofs
from qwen_fast.denoise import graph
from qwen_fast.vae import layers as vae_layers
from qwen_fast_kernels._library import restore_kernels
from qwen_fast_kernels.proof import Problem, Verdict
from support import stand_in
from support.pipelines import GUIDED, SMALL

BF16, FP32 = torch.bfloat16, torch.float32
OPS = sorted(name for name in qwen_fast_kernels.__all__ if name != "HAS_TRITON")
PROMPT = {"prompt": "a red circle"}
CACHED = (proofs.sampler_problems, proofs.transformer_problems, proofs.vae_problems, proofs.attention_problem)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is the CPU")


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """The CPU needs proofs; they are small, and kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(proofs, "DEVICES", ("cpu",))
    monkeypatch.setattr(proofs, "_VERDICTS", {})
    monkeypatch.setattr(proofs, "ROWS", ((5, 2), (9, 7)))
    monkeypatch.setattr(proofs, "ATTENTION_ROWS", ((20, 7), (70, 50)))
    monkeypatch.setattr(proofs, "ATTENTION_HEADS", 1)
    monkeypatch.setattr(proofs, "LATENT_ROWS", 37)
    monkeypatch.setattr(proofs, "PIXELS", 90)
    caches = (*CACHED, proofs.kept, proofs.attention_is_right)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path / "cache" / "qwen_fast" / "cards"
    restore_kernels()
    for cached in caches:
        cached.cache_clear()


class Proofs:
    """Takes the place of `proof.prove`.

    Attributes:
        asked: the problems of each call.
        wrong: operators, or whole problems by their names, that come out wrong, and why.
    """

    def __init__(self):
        self.asked: list[list[Problem]] = []
        self.wrong: dict[str, str] = {}

    def prove(self, problems, device, kept, **others) -> dict[Problem, Verdict]:
        self.asked.append(list(problems))
        reasons = {problem: self.wrong.get(problem.op, self.wrong.get(str(problem), "")) for problem in problems}
        return {problem: Verdict(not reason, reason) for problem, reason in reasons.items()}


@pytest.fixture
def proved(on_cpu, monkeypatch) -> Proofs:
    made = Proofs()
    monkeypatch.setattr(proofs.proof, "prove", made.prove)
    return made


@pytest.fixture
def launched():
    """Signatures of all calls of operators, which the CPU's own kernels compute."""
    found, library = {}, torch.library.Library("qwen_fast", "IMPL")

    def noting(op, function):
        @functools.wraps(function)
        def call(*arguments):
            found.setdefault(signature(op, arguments), arguments)
            return function(*arguments)

        return call

    for op in OPS:
        module = importlib.import_module(f"qwen_fast_kernels.{op}")
        function = noting(op, getattr(module, f"_{op}_cpu"))
        if op == "rms_norm_silu":
            library.impl("rms_norm_silu.residual", function, "CPU", allow_override=True)
            function = module._without_residual(function)
        library.impl(op, function, "CPU", allow_override=True)
    yield found
    library._destroy()


def signature(op: str, arguments: tuple) -> tuple:
    """What a kernel is compiled for: dtypes, the width of the first tensor, which arguments are there, flags."""
    bound = inspect.signature(getattr(importlib.import_module(f"qwen_fast_kernels.{op}"), f"_{op}_cpu")).bind(*arguments)
    bound.apply_defaults()  # the dispatcher leaves out what equals its default
    parts, width = [], None
    for argument in bound.arguments.values():
        if isinstance(argument, torch.Tensor):
            width = argument.shape[-1] if width is None and op != "flow_match_schedule" else width
            parts.append((argument.dtype, argument.numel() > 0))
        elif isinstance(argument, (str, bool, float, type(None))):
            parts.append(bool(argument) if isinstance(argument, float) else argument)
    return op, width, tuple(parts)


# What is asked for ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [diffusers.QwenImagePipeline, diffusers.QwenImageImg2ImgPipeline], ids=lambda c: c.__name__)
def test_all_kernels_of_a_call_are_asked_for_at_once_before_the_first(checkpoint, proved, launched, monkeypatch, cls):
    pipe = qwen_fast.enable(stock(checkpoint, BF16, cls))
    prove = proved.prove
    monkeypatch.setattr(proofs.proof, "prove", lambda *a, **k: assert_none(launched) or prove(*a, **k))
    arguments = GUIDED | PROMPT | {"output_type": "pt"}
    if cls is diffusers.QwenImageImg2ImgPipeline:
        arguments |= {"image": torch.rand(1, 3, 64, 96), "strength": 1.0}
    draw(pipe, **arguments)
    assert len(proved.asked) == 1
    ops = {problem.op for problem in proved.asked[0]}
    assert ops == set(OPS) - {"linear_gated_residual"}
    draw(pipe, **arguments)
    draw(qwen_fast.enable(stock(checkpoint, BF16, cls)), **arguments)
    assert len(proved.asked) == 1, "once a process"
    report = qwen_fast.report(pipe)
    count = len(proved.asked[0])
    assert any(f"kernels ({count} of {count} proved right on this GPU)" in line for line in report.replaced)
    assert not report.kernels


def assert_none(launched) -> None:
    assert not launched


RUNS = {
    "guided": (BF16, {}, GUIDED | {"output_type": "pt"}),
    "plain": (FP32, {}, SMALL | {"output_type": "pt"}),
    "fp16": (torch.float16, {}, GUIDED),
    "precise": (BF16, {"precise_sampler": True}, GUIDED),
    "layers, two pictures": (BF16, {"modulation": "layers"}, GUIDED | {"num_images_per_prompt": 2}),
    "own sigmas": (BF16, {}, SMALL | {"sigmas": [1.0, 0.6, 0.2, 0.1]}),
    "image-to-image, two lengths": (
        BF16,
        {"modulation": "layers"},
        GUIDED
        | {"image": torch.rand(2, 3, 64, 96), "strength": 1.0, "prompt": ["a red circle", "a red circle on a"]}
        | {"negative_prompt": ["blurry", "blurry"]},
    ),
    "graph": (BF16, {"cuda_graph": True, "attention": "triton"}, GUIDED),
}


@pytest.mark.parametrize("run", RUNS)
def test_nothing_is_launched_that_was_not_asked_for(checkpoint, proved, launched, monkeypatch, run):
    """In the dtype, the width and with the flags of the proof."""
    dtype, options, arguments = RUNS[run]
    monkeypatch.setattr(vae_layers, "BIAS_LATER", {"cpu"})  # as on a GPU
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "capture", lambda step, rewind, device: rewind() and None or step)
    cls = diffusers.QwenImageImg2ImgPipeline if "image" in arguments else diffusers.QwenImagePipeline
    pipe = qwen_fast.enable(stock(checkpoint, dtype, cls), **options)
    draw(pipe, **PROMPT | arguments)
    assert not qwen_fast.report(pipe).fallbacks
    asked = {signature(problem.op, problem.arguments(torch.device("cpu"))) for call in proved.asked for problem in call}
    unasked = launched.keys() - asked
    assert launched and not unasked, "\n".join(sorted(map(str, unasked)))


# Where a kernel is wrong ----------------------------------------------------------------------------------------------


def test_a_wrong_kernel_is_said_once_in_the_log_and_in_the_report(checkpoint, proved, caplog):
    proved.wrong = {"ada_layer_norm": "relative RMS error 0.1 where 0.0033 are allowed"}
    for _ in range(2):
        pipe = qwen_fast.enable(stock(checkpoint, BF16))
        for _ in range(2):
            draw(pipe, **PROMPT, **GUIDED)
        report = qwen_fast.report(pipe)
        assert not report.fallbacks, "the pipeline stays fast"
        assert len(report.kernels) == 2 and set(report.kernels.values()) == set(proved.wrong.values())
        assert all(name.startswith("ada_layer_norm bfloat16") for name in report.kernels)
        assert "is wrong here: relative RMS error 0.1 where" in str(report)
    said = [record.message for record in caplog.records if "torch's operators take its place" in record.message]
    assert len(said) == 1, "for both ways of calling it"
    assert "relative RMS error 0.1" in said[0] and "doctor --prove" in said[0]


def test_strict_raises(checkpoint, proved):
    proved.wrong = {"qk_norm_rope": "it does not run"}
    pipe = qwen_fast.enable(stock(checkpoint, BF16), strict=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="strict=True.*qk_norm_rope.*it does not run"):
            draw(pipe, **PROMPT, **GUIDED)


@pytest.mark.parametrize("attention", ["auto", "triton"])
def test_where_the_attention_is_wrong_torchs_takes_its_place(checkpoint, proved, launched, attention):
    expected = draw(stock(checkpoint), **PROMPT, **GUIDED)
    proved.wrong = {"joint_attention": "its result moves"}
    pipe = qwen_fast.enable(stock(checkpoint), attention=attention)
    actual = draw(pipe, **PROMPT, **GUIDED)
    assert_same_latents(actual, expected)
    assert not any(one[0] == "joint_attention" for one in launched)
    assert len(qwen_fast.report(pipe).kernels) == 2


def test_no_graph_where_the_attention_is_wrong(checkpoint, proved, launched, monkeypatch):
    monkeypatch.setattr(graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph, "capture", lambda *_: pytest.fail("captured"))
    head_dim = 32
    proved.wrong = {str(proofs.attention_problem(FP32, head_dim)): "it took more than 20 s"}
    pipe = qwen_fast.enable(stock(checkpoint), cuda_graph=True)
    assert_same_latents(draw(pipe, **PROMPT, **GUIDED), draw(stock(checkpoint), **PROMPT, **GUIDED))
    assert any("no CUDA graph: the attention kernel is wrong" in line for line in qwen_fast.report(pipe).replaced)
    assert not any(one[0] == "joint_attention" for one in launched)


@pytest.mark.parametrize("kind", ["transformer", "vae"])
def test_a_model_alone_asks_too(checkpoint, proved, kind):
    pipe = stock(checkpoint, BF16)
    if kind == "vae":
        vae = qwen_fast.enable_vae(pipe.vae)
        with torch.no_grad():
            vae.decode(torch.randn(1, vae.config.z_dim, 1, 8, 12, dtype=BF16))
        assert {problem.op for call in proved.asked for problem in call} == {"rms_norm_silu"}
        assert "proved right" in str(qwen_fast.report(vae))
        return
    model = qwen_fast.QwenImageTransformer2DModel.from_config(pipe.transformer.config).to(BF16)
    rows = torch.randn(1, 24, model.config.in_channels, dtype=BF16)
    text = torch.randn(1, 5, model.config.joint_attention_dim, dtype=BF16)
    with torch.no_grad():
        for _ in range(2):
            model(rows, text, timestep=torch.tensor([0.5], dtype=BF16), img_shapes=[[(1, 4, 6)]])
    assert len(proved.asked) == 1 and "joint_attention" in {problem.op for problem in proved.asked[0]}


# Whole, with a child, and with faults in both processes ---------------------------------------------------------------

FAULTS = {"ada_layer_norm": "wrong scale", "joint_attention": "25 % noise", "cfg_euler_step": "compile error"}


@pytest.fixture
def faulty(monkeypatch, child):
    """Interpreted kernels in this process and in the child, three of them with faults."""
    stand_in.interpret(monkeypatch.setattr, FAULTS)
    started, library = child(FAULTS), torch.library.Library("qwen_fast", "IMPL")
    stand_in.launchers_for_cpu(library, [op for op in OPS if op != "rms_norm_silu"])
    yield started
    restore_kernels()
    library._destroy()


@pytest.mark.triton
def test_a_picture_is_right_although_three_kernels_are_not(checkpoint, on_cpu, faulty, monkeypatch):
    arguments = PROMPT | GUIDED | {"num_inference_steps": 2}
    pipe = stock(checkpoint, BF16)
    expected, exact = draw(pipe, **arguments), in_fp32(pipe, 7, BF16, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr(proofs, "DEVICES", ())  # without proofs the kernels are used, and do what they do
        with pytest.raises(RuntimeError, match="PassManager"):
            draw(qwen_fast.enable(stock(checkpoint, BF16)), **arguments)
    proofs.attention_is_right.cache_clear()
    qwen_fast.enable(pipe)
    assert_same_latents(draw(pipe, **arguments), expected, exact)
    report = qwen_fast.report(pipe)
    assert {name.split()[0] for name in report.kernels} == set(FAULTS) and not report.fallbacks
    for name, reason in report.kernels.items():
        assert stand_in.REASONS[FAULTS[name.split()[0]]] in reason
    assert len(faulty) == 1, "one child for all"
    assert len(list(on_cpu.rglob("*.json"))) == len(pipe.fast_state.verdicts) + 1


@pytest.mark.triton
def test_doctor_proves_and_prints_a_table(on_cpu, child, monkeypatch, capsys):
    stand_in.interpret(monkeypatch.setattr, {})
    problems = [stand_in.problem("euler_step"), stand_in.problem("cfg_euler_step"), stand_in.problem("ada_layer_norm")]
    found = [{"device": "cpu", "name": "stand-in", "sm": "sm_90", "memory_gib": 1.0, "why_not": None}]
    monkeypatch.setattr(doctor, "devices", lambda: found)
    monkeypatch.setattr(proofs, "all_problems", lambda: problems)
    for check in ("check_schedule", "check_euler_step", "check_transformer"):
        monkeypatch.setattr(doctor, check, functools.wraps(getattr(doctor, check))(lambda device: (True, "")))
    child({})
    assert main(["doctor", "--prove"]) == 0
    output = capsys.readouterr()
    for problem in problems:
        assert f"ok   {problem}" in output.out and f"ok   {problem}" in output.err
    assert "kernels on cpu: 3 of 3 proved right" in output.out

    child({"cfg_euler_step": "crash"})  # proved anew, whatever is kept
    assert main(["doctor", "--prove", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [row["right"] for row in findings["kernels"]["cpu"]] == [True, False, True]
    assert "signal 6" in findings["kernels"]["cpu"][1]["reason"]


def test_doctor_without_a_gpu_says_so(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "devices", lambda: [])
    assert main(["doctor", "--prove"]) == 0
    assert "kernels: no CUDA device that serves" in capsys.readouterr().out


def test_all_problems_are_small_and_name_every_operator():
    """At most 200 MB of arguments in float64; each name once, and through JSON unchanged."""
    problems = proofs.all_problems()
    assert {problem.op for problem in problems} == set(OPS)
    assert len({str(problem) for problem in problems}) == len(problems)
    for problem in problems:
        assert Problem.from_json(problem.to_json()) == problem
        if problem.dtype == "float16":
            tensors = [one for one in problem.arguments(torch.device("cpu")) if isinstance(one, torch.Tensor)]
            assert 8 * sum(one.numel() for one in tensors) <= 2e8, problem
            assert tensors[0].shape[-1] in (64, 96, 128, 192, 384, 3072) or problem.op == "flow_match_schedule"


def test_the_folder_is_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert proofs.cache_folder() == tmp_path / "qwen_fast" / "cards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(proofs.Path, "home", lambda: tmp_path)
    assert proofs.cache_folder() == tmp_path / ".cache" / "qwen_fast" / "cards"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(proofs.Path, "home", homeless)
    assert proofs.cache_folder() is None


def test_a_gpu_that_serves_none_is_not_asked(monkeypatch, proved):
    """The operator itself says why, as it does without the driver."""
    monkeypatch.setattr(proofs, "unsupported_reason", lambda device: "Triton is not installed")
    assert proofs.attention_is_right(torch.device("cpu"), BF16, 128)
    assert not proved.asked


def test_what_was_measured_is_kept_beside_the_verdicts(on_cpu):
    device = torch.device("cpu")
    proofs.kept(device).put("attention, 4096 rows", {"fastest": "cudnn", "ms": 1.5})
    proofs.kept.cache_clear()
    assert proofs.kept(device).get("attention, 4096 rows") == {"fastest": "cudnn", "ms": 1.5}
