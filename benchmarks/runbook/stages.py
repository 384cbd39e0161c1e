"""What the run-book runs: the stages in the order of their worth, their limits and what they do at a small size on a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A command with its time.

    Attributes:
        limit: seconds; it is stopped then, or when the run's own time is over.
        command: of the interpreter; "{out}" is the folder, "{ptxas}" the assembler that was carried along, or nothing,
            "{timeout}" the limit of a test where pytest-timeout is there.
        small: what a dry run does instead; None: it needs a CUDA device.
        under: a program that runs the interpreter, with its arguments; where it is not installed the stage is not run.
        estimate: seconds that it takes on an H100: those it took, or by arithmetic where it has not run there yet.
        grace: seconds between asking it to stop and killing it.
        needed: where it fails nothing else is run.
        shown: last lines of its log that the run-book prints behind it.
        tries: how often it is begun where it ends with `GO_ON`, behind which it goes on by itself.
        rows: what `--next` looks for, (file, columns) of rows in benchmarks/results; nothing: a row of the stage itself in
            runbook.csv that says that it was done.
        after: `--next` takes it only with that stage, of which it measures the outcome.
    """

    name: str
    limit: float
    command: tuple[str, ...]
    small: tuple[str, ...] | None = None
    under: tuple[str, ...] = ()
    estimate: float | None = None
    grace: float = 5.0
    needed: bool = False
    shown: int = 0
    tries: int = 1
    rows: tuple[tuple[str, dict[str, str]], ...] = ()
    after: str = ""


def _each(option: str, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(word for value in values for word in (option, value))


# They take gigabytes, or all memory that is free, or many seconds of the card: nothing may run beside them.
HOGS = (
    "tests/bench/test_profile.py::test_a_picture_is_profiled_on_a_gpu",
    "tests/demo/test_demo_checkpoint.py::test_on_a_gpu_ours_is_as_near_to_fp32_as_stock_in_bf16",
    "tests/ops/test_qk_norm_rope.py::test_more_than_2_to_the_31_elements",
    "tests/vae/test_vae_bands.py::test_a_large_picture_within_its_memory",
    "tests/transformer/test_host_weights.py::test_on_cuda_too_little_memory_is_noticed_before_anything_moves",
    "tests/loading/test_loading.py::test_on_a_gpu_every_tensor_is_the_one_that_stock_loads",
    "tests/pipelines/test_batch_invariant.py::test_at_the_models_own_width_on_a_gpu",
    "tests/pipelines/test_batches_on_a_gpu.py::test_blocks_that_inductor_compiled",
)
# Pytest writes the tracebacks of what failed when it is asked to stop, which takes as long as a test does.
_GRACE = 18.0
# By a thread, which ends the worker: a signal does not reach a test that waits for the device.
TIMEOUT = ("--timeout=60", "--timeout-method=thread")
_PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--continue-on-collection-errors", "{timeout}")
_CLI = ("-m", "qwen_fast.cli")
_CEILINGS = ("--ceilings", "{out}/ceilings.json")
_LADDER = (*_CLI, "bench", "--size", "1024x1024", "--steps", "50", "--repeats", "1", "--seconds", "0.5")
_LADDER += ("--limit", "60", "--resume", *_CEILINGS)  # the first one of ours on a card proves its kernels too
_SMALL_LADDER = (*_CLI, "bench", "--shape", "tiny", "--size", "64x64", "--steps", "2", "--repeats", "1", "--seconds", "0.02")
_SMALL_LADDER += ("--device", "cpu", "--resume", *_CEILINGS)
# Launch-bound and few-step pictures, and pictures each of another size and prompt, on one model: building it takes 15 s.
_CHOSEN = ("as enabled", "CUDA graph", "VAE of pictures")  # with and without a graph beside "auto"
_CASES = (*_CLI, "bench", "--repeats", "1", "--seconds", "0.5", "--limit", "60", "--resume", *_CEILINGS)
_SIZES = (*_CASES, *_each("--only", _CHOSEN))
_FIRST_SIZES = ("--case", "512x512,20", *_each("--changing", ("512x512,50", "1024x1024,8,no-cfg")))
_MORE_SIZES = (
    *_each("--case", ("1024x1024,8,no-cfg", "256x256,20", "512x512,8,no-cfg")),
    *_each("--changing", ("1024x1024,50", "512x512,8,no-cfg")),
)
_SMALL_CASES = (*_CLI, "bench", "--shape", "tiny", "--device", "cpu", "--repeats", "1", "--seconds", "0.02", "--resume")
_SMALL_CASES += _CEILINGS
_SMALL_SIZES = (*_SMALL_CASES, *_each("--case", ("48x48,2", "64x64,2,no-cfg")), "--changing", "128x128,2")
_SMALL_SIZES += _each("--only", _CHOSEN)
# What it costs that no picture depends on its batch.
_INVARIANT = _each("--only", ("as enabled", "batch_invariant"))
_PICTURE = {"width": "1024", "height": "1024", "steps": "50", "cfg": "True"}  # of which the ladder has every rung
_PROFILE = (*_CLI, "profile", "--shape", "qwen-image", "--size", "1024x1024", "--steps", "3", *_CEILINGS)
_SMALL_PROFILE = (*_CLI, "profile", "--shape", "tiny", "--size", "64x64", "--steps", "1", "--device", "cpu", *_CEILINGS)
# What compiles within a rung, and what is another library's, comes when all the rest is there.
_LATE = ("compile", "torchao", "cache-dit", "SageAttention")
_GPU_TESTS = (  # where tests are marked gpu
    *("bench/test_profile", "bench/test_runbook", "bench/test_tune", "demo/test_demo_checkpoint", "denoise/test_graph"),
    *("loading/test_loading", "ops", "pipelines/test_generate", "schedule/test_schedule", "text/test_text_cache"),
    *(
        "pipelines/test_family_on_a_gpu",
        "pipelines/test_batches_on_a_gpu",
        "pipelines/test_batch_invariant",
        "transformer/test_host_weights",
        "transformer/test_modulation",
        "vae/test_vae_bands",
    ),
)


def _tests(name: str, *arguments: str) -> tuple[str, ...]:
    return (*_PYTEST, *arguments, "--junitxml", f"{{out}}/{name}.xml")


def _operator_tests(name: str) -> tuple[str, ...]:
    """Most of their time goes into Triton's compiler, one for each core. What Inductor compiles, and test_ptx, stay out."""
    kept = ("-m", "not gpu", "-k", "not inductor and not compile", "-n", "14", "--ignore", "tests/ops/test_ptx.py")
    return _tests(name, "tests/ops", *kept)


STAGES = (
    Stage(
        "smoke",
        60,
        ("-m", "benchmarks.runbook.smoke"),
        ("-m", "benchmarks.runbook.smoke", "--device", "cpu"),
        estimate=14.5,
        needed=True,
    ),
    Stage(
        "environment",
        50,
        ("-m", "benchmarks.runbook.environment", "--out", "{out}/environment.json", "--device", "cuda", "--ptxas", "{ptxas}"),
        ("-m", "benchmarks.runbook.environment", "--out", "{out}/environment.json", "--device", "cpu"),
        shown=8,
        estimate=16,
    ),
    Stage(
        "stress",
        60,
        ("-m", "benchmarks.attention.stress", "--out", "{out}"),
        ("-m", "benchmarks.attention.stress", "--out", "{out}", "--device", "cpu", "--processes", "1", "--seconds", "0.1"),
        shown=30,
        estimate=43,
        rows=(
            ("attention_stress.csv", {"variant": "operator", "way": "graph"}),
            ("attention_stress.csv", {"variant": "pictures", "way": "cuda_graph=True"}),
        ),
    ),
    Stage(
        "attention",
        60,
        ("-m", "benchmarks.attention.speed", "--out", "{out}", "--cases", "all", "--seconds", "0.05"),
        ("-m", "benchmarks.attention.speed", "--out", "{out}", "--device", "cpu"),
        estimate=24,
        rows=(("attention.csv", {}),),
    ),
    Stage(
        "operators",
        70,
        ("-m", "benchmarks.operators.run", "--out", "{out}", "--seconds", "0.5", *_CEILINGS),
        ("-m", "benchmarks.operators.run", "--out", "{out}", "--seconds", "0.02", "--device", "cpu", *_CEILINGS),
        shown=3,
        estimate=21,
        grace=2,
        tries=3,
        rows=(("operators_of_the_model.csv", {}),),
    ),
    Stage(
        "ladder",
        190,
        (*_LADDER, *_each("--skip", _LATE), "--out", "{out}/ladder"),
        (*_SMALL_LADDER, *_each("--skip", _LATE), "--out", "{out}/ladder"),
        shown=18,
        estimate=140,  # 116 s before kernels had to prove themselves
        tries=3,
        rows=(("ladder.csv", _PICTURE | {"rung": "qwen_fast as enabled"}),),
    ),
    Stage(
        "sizes",
        110,
        (*_SIZES, *_FIRST_SIZES, "--out", "{out}/ladder"),
        (*_SMALL_SIZES, "--out", "{out}/ladder"),
        shown=24,
        estimate=70,  # and 25 s where it is the first of ours on a card
        tries=3,
        rows=(
            ("ladder.csv", {"width": "512", "height": "512", "steps": "20", "rung": "+ CUDA graph"}),
            ("changing.csv", {"width": "512", "steps": "50", "rung": "qwen_fast as enabled"}),
            ("changing.csv", {"width": "1024", "steps": "8", "rung": "qwen_fast as enabled"}),
        ),
    ),
    Stage(
        "profile",
        80,
        (*_PROFILE, "--out", "{out}/profile"),
        (*_SMALL_PROFILE, "--out", "{out}/profile"),
        estimate=50,
    ),
    Stage(
        "tests-gpu",
        140,
        _tests(
            "tests-gpu",
            *(f"tests/{name}{'' if name == 'ops' else '.py'}" for name in _GPU_TESTS),
            *("-m", "gpu", "-n", "8", *_each("--deselect", HOGS)),
        ),
        shown=10,
        estimate=100,  # 113 s, of which pytest's own are 90
        grace=_GRACE,
    ),
)
# What a first run has no time for: `--next` takes them up, and each can be asked for by name.
LATER = (
    Stage(
        "ladder-compile",
        150,
        (*_LADDER, *_each("--only", ("compile",)), "--limit", "110", "--out", "{out}/ladder"),
        shown=8,
        estimate=110,  # 52 s with stock's alone
        rows=(
            ("ladder.csv", _PICTURE | {"rung": "stock + regional compile"}),
            ("ladder.csv", _PICTURE | {"rung": "qwen_fast + regional compile"}),
        ),
    ),
    Stage(
        "batches",
        130,
        (*_CASES, *_each("--case", ("1024x1024,8,no-cfg,batch=4", "512x512,8,no-cfg,batch=4")), *_INVARIANT)
        + ("--out", "{out}/ladder"),
        (*_SMALL_CASES, "--case", "64x64,2,no-cfg,batch=4", *_INVARIANT, "--out", "{out}/ladder"),
        shown=16,
        estimate=110,  # the last rung of its six was cut off at 93 s
        tries=3,
        rows=(("ladder.csv", {"batch": "4", "rung": "+ batch_invariant"}),),
    ),
    Stage(
        "mixed-sizes",
        90,
        ("-m", "benchmarks.ladder.sizes", "--device", "cuda", "--repeats", "2", "--append", "{out}/sizes.csv"),
        ("-m", "benchmarks.ladder.sizes", "--append", "{out}/sizes.csv"),
        shown=6,
        estimate=60,
        rows=(("sizes.csv", {}),),
    ),
    Stage(
        "tests-ops",
        80,
        _operator_tests("tests-ops"),
        _tests("tests-ops", "tests/ops/test_flow_match_schedule.py", "-k", "timesteps_of_20_steps"),
        shown=6,
        estimate=54,
        grace=_GRACE,
    ),
    Stage(
        "sizes-more",
        130,
        (*_SIZES, *_MORE_SIZES, "--out", "{out}/ladder"),
        shown=24,
        estimate=90,
        tries=3,
        rows=(
            ("ladder.csv", {"width": "1024", "height": "1024", "steps": "8", "rung": "+ CUDA graph"}),
            ("changing.csv", {"width": "1024", "steps": "50", "rung": "qwen_fast as enabled"}),
            ("changing.csv", {"width": "512", "steps": "8", "rung": "qwen_fast as enabled"}),
        ),
    ),
    Stage(
        "products",
        40,
        ("-m", "benchmarks.parts.products", "--out", "{out}"),
        ("-m", "benchmarks.parts.products", "--out", "{out}", "--device", "cpu"),
        estimate=20,
        rows=(("products.csv", {}),),
    ),
    Stage(
        "edits",
        130,
        ("-m", "benchmarks.parts.edits", "--device", "cuda", "--repeats", "1", "--append", "{out}/edits.csv"),
        ("-m", "benchmarks.parts.edits", "--only", "ControlNet", "--repeats", "1", "--append", "{out}/edits.csv"),
        shown=8,
        estimate=85,
        rows=(("edits.csv", {}),),
    ),
    Stage(
        "lora",
        90,
        ("-m", "benchmarks.parts.lora", "--device", "cuda", "--repeats", "1", "--append", "{out}/lora.csv"),
        ("-m", "benchmarks.parts.lora", "--repeats", "1", "--append", "{out}/lora.csv"),
        shown=16,
        estimate=55,
        rows=(("lora.csv", {}),),
    ),
    Stage(
        "whole",
        180,
        ("-m", "benchmarks.parts.whole", "--device", "cuda", "--append", "{out}/whole.csv"),
        ("-m", "benchmarks.parts.whole", "--append", "{out}/whole.csv"),
        shown=4,
        estimate=140,
        rows=(("whole.csv", {}),),
    ),
    Stage(
        "ladder-peers",
        210,
        (*_LADDER, *_each("--only", _LATE[1:]), "--limit", "150", "--out", "{out}/ladder"),
        estimate=190,  # cut off after 125 s: torchao's layers were still being compiled
        rows=(("ladder.csv", _PICTURE | {"rung": "torchao"}),),
    ),
    Stage("profile-stock", 80, (*_PROFILE, "--stock", "--out", "{out}/profile-stock"), estimate=50),
    Stage(
        "profile-snapshot",
        80,
        (*_PROFILE, "--snapshot", "--out", "{out}/profile-snapshot"),
        estimate=60,
    ),
    Stage(
        "memory",
        120,
        ("-m", "benchmarks.parts.memory", "--device", "cuda", "--append", "{out}/memory.csv"),
        ("-m", "benchmarks.parts.memory", "--only", "on the", "--append", "{out}/memory.csv"),
        shown=14,
        estimate=110,  # without the last three recipes: pinning 41 GB for group offload takes more than 90 s
        rows=(("memory.csv", {}),),
    ),
    Stage("tests-alone", 100, _tests("tests-alone", *HOGS), shown=10, grace=_GRACE, estimate=60),
    Stage(
        "sanitizer",
        60,
        ("-m", "benchmarks.runbook.environment", "--launch-all"),
        under=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
        estimate=50,
    ),
)
TUNING = (
    Stage(
        "tune",
        130,
        (*_CLI, "tune", "--ops", "joint_attention,linear_gelu", "--minutes", "1.8", "--record", "{out}/tuning.jsonl"),
        grace=10,
        estimate=120,
    ),
    Stage(
        "ladder-tuned",
        100,
        (*_LADDER, *_each("--only", ("as enabled", "packed, our attention")), "--out", "{out}/ladder-tuned"),
        estimate=50,
        after="tune",
    ),
    Stage("tests-ops-tuned", 80, _operator_tests("tests-ops-tuned"), grace=_GRACE, estimate=54, after="tune"),
    Stage("profile-tuned", 80, (*_PROFILE, "--out", "{out}/profile-tuned"), estimate=50, after="tune"),
)
