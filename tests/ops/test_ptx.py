"""What the compiler makes of every launch, without a GPU: IEEE arithmetic only, 64-bit offsets, nothing spilled.

Triton compiles for a GPU only in a process that does not interpret, so this file is also that process: run as a script
with a compute capability, it prints what it found as JSON.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import qwen_fast_kernels
from qwen_fast_kernels.cfg_euler_step import DEFAULT_CONFIG as CFG_CONFIG
from qwen_fast_kernels.cfg_euler_step import launch_cfg_euler_step
from qwen_fast_kernels.euler_step import DEFAULT_CONFIG as EULER_CONFIG
from qwen_fast_kernels.euler_step import launch_euler_step
from qwen_fast_kernels.flow_match_schedule import DEFAULT_CONFIG as SCHEDULE_CONFIG
from qwen_fast_kernels.flow_match_schedule import launch_flow_match_schedule

TESTS = Path(__file__).resolve().parents[1]
DEFAULT_ARCHS, ALL_ARCHS = (80, 90), (80, 86, 89, 90, 100, 120)

# Every instruction that is not correctly rounded, that flushes subnormals or rounds once for two; integer mad is fine.
INEXACT = r"\b(?:mad\.r[nzmp]|div\.(?:full|approx)|sqrt\.approx|rsqrt|rcp\.approx|ex2|lg2)[.\w]*|\b\w[.\w]*\.ftz\b"
# Below sm_90 bf16 has no add, sub or mul: the compiler writes them as x * 1 + y, x * -1 + y and x * y + -0, to the bit.
PLUS_OR_MINUS_ONE, MINUS_ZERO = {0x3F80, 0xBF80, 0x3F803F80, 0xBF80BF80}, {0x8000, 0x80008000}


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """(case, launch) for every dtype, and for every way in which Triton specialises a launch."""

    def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    def offset(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Not aligned to 16 bytes, which forbids vector loads."""
        return cuda(torch.Size(shape).numel() + 3, dtype=dtype).narrow(0, 3, torch.Size(shape).numel()).view(shape)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    cases = [(f"{dtype}".removeprefix("torch."), cuda, (2, 4096, 64), dtype, dtype, 20) for dtype in (bf16, fp16, fp32)]
    cases += [
        ("precise", cuda, (2, 4096, 64), fp32, bf16, 20),
        ("offset", offset, (1, 77, 64), bf16, bf16, 20),
        ("odd channels", cuda, (1, 77, 7), bf16, bf16, 20),
        ("all ones", cuda, (1, 1, 1), bf16, bf16, 1),  # an argument that is 1 becomes a constant
    ]
    for name, make, shape, dtype, prediction_dtype, steps in cases:
        latents, cond, uncond = (make(*shape, dtype=d) for d in (dtype, prediction_dtype, prediction_dtype))
        step = (cuda(steps + 1), cuda(1, dtype=torch.int32))
        yield f"euler_step: {name}", functools.partial(launch_euler_step, latents, cond, *step, config=EULER_CONFIG)
        yield (
            f"cfg_euler_step: {name}",
            functools.partial(launch_cfg_euler_step, latents, cond, uncond, *step, 3.7, config=CFG_CONFIG),
        )
    for name, steps, sigmas, arguments in [
        ("Qwen-Image", 20, cuda(0), (1.7, "dynamic", 0.02, 1000.0, False)),
        ("Lightning", 8, cuda(0), (3.0, "dynamic", 0.0, 1000.0, False)),
        ("one step", 1, cuda(0), (1.7, "dynamic", 0.02, 1000.0, False)),
        ("custom sigmas", 50, cuda(50), (1.7, "dynamic", 0.02, 1000.0, False)),
        ("static", 20, cuda(0), (3.0, "static", 0.02, 1000.0, False)),
        ("shift 1, inverted", 20, cuda(20), (1.0, "static", 0.0, 1.0, True)),
    ]:
        yield (
            f"flow_match_schedule: {name}",
            functools.partial(launch_flow_match_schedule, steps, sigmas, *arguments, config=SCHEDULE_CONFIG),
        )


def compile_all(capability: int) -> dict[str, dict]:
    """Compile every launch for one architecture and report what the tests below look at."""
    import triton

    from offline import compile_only

    # Triton 3.4 and 3.5 flush subnormals (below 1.2e-38) in correctly rounded divisions and roots; the README says so.
    flushes = Version(triton.__version__) < Version("3.6")
    found = {}
    with compile_only(capability) as log:
        compiled = {}
        for name, launch in launches():
            launch()
            (compiled[name],) = log
            log.clear()
    for name, one in compiled.items():
        machine, ptx = one.inspect(), one.ptx
        if flushes:
            ptx = re.sub(r"\b(div|sqrt)\.rn\.ftz\b", r"\1.rn", ptx)
        found[name] = {
            "inexact": sorted(set(re.findall(INEXACT, ptx)) | contractions(ptx)),
            "rounded divisions": len(re.findall(r"\bdiv\.rn\.f32\b", ptx)),
            "rounded roots": len(re.findall(r"\bsqrt\.rn\.f32\b", ptx)),
            "narrow offsets": narrow_offsets(one.ttir),
            "registers": machine["registers"],
            "stack": machine["stack"],
            "fused in SASS": machine["opcodes"]["FFMA"],
            "spills": machine["opcodes"]["LDL"] + machine["opcodes"]["STL"],
            "instructions": machine["opcodes"].total(),
        }
    return found


def contractions(ptx: str) -> set[str]:
    """The fma instructions that do the work of two, by what they compute."""
    constants = {}
    for size, register, value in re.findall(r"mov\.[bu](16|32)\s+(%\w+), (0x[0-9A-Fa-f]+|-?\d+);", ptx):
        constants.setdefault(register, set()).add(int(value, 0) & (2 ** int(size) - 1))

    def always(register: str, values: set[int]) -> bool:
        assigned = len(re.findall(rf"^\s*(?:@\S+\s+)?\S+\s+{re.escape(register)},", ptx, flags=re.MULTILINE))
        return assigned == 1 and constants.get(register, {None}) <= values

    return {
        f"{kind} {a} {b} {c}"
        for kind, a, b, c in re.findall(r"\b(fma\.[.\w]+)\s+%\w+, ([^,;]+), ([^,;]+), ([^,;]+);", ptx)
        if "bf16" not in kind or not (always(a, PLUS_OR_MINUS_ONE) or always(b, PLUS_OR_MINUS_ONE) or always(c, MINUS_ZERO))
    }


def narrow_offsets(ttir: str) -> list[str]:
    """Lines of Triton's IR that compute with a program id of fewer than 64 bits, or add narrow offsets to a block."""
    ids = re.findall(r"(%\w+) = tt\.get_program_id", ttir)
    lines = [
        line.strip()
        for line in ttir.splitlines()
        if any(re.search(rf"{re.escape(name)}\b", line.partition("=")[2]) for name in ids)
    ]
    early = [line for line in lines if "arith.extsi" not in line]
    blocks = [line.strip() for line in ttir.splitlines() if "tt.addptr" in line and ": tensor<" in line]
    return early + [line for line in blocks if "xi32>" in line] if ids else []


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    print(json.dumps(compile_all(int(sys.argv[1]))))


@functools.cache
def compiler_process(capability: int) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    packages = str(Path(qwen_fast_kernels.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join([packages, environment.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, __file__, str(capability)], env=environment, capture_output=True, text=True, timeout=300
    )


def compiled(capability: int) -> dict[str, dict]:
    done = compiler_process(capability)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        archs = ALL_ARCHS if metafunc.config.getoption("--all-archs") else DEFAULT_ARCHS
        metafunc.parametrize("arch", archs, ids=[f"sm_{arch}" for arch in archs])


pytestmark = pytest.mark.triton


def test_arithmetic_is_ieee(arch):
    for name, found in compiled(arch).items():
        assert not found["inexact"], f"{name}: {found['inexact']}"


def test_divisions_and_roots_are_there_and_correctly_rounded(arch):
    """So that the test above cannot pass because the arithmetic went somewhere else."""
    for name, found in compiled(arch).items():
        if name.startswith("cfg_euler_step"):
            assert found["rounded roots"] and found["rounded divisions"], name
        if name.startswith("flow_match_schedule"):
            assert found["rounded divisions"], name


def test_the_assembler_contracts_nothing(arch):
    """A correctly rounded division is made of FFMA, so only the op without one can show it."""
    for name, found in compiled(arch).items():
        if name.startswith("euler_step"):
            assert found["fused in SASS"] == 0, name


def test_offsets_are_64_bits_wide(arch):
    for name, found in compiled(arch).items():
        assert not found["narrow offsets"], f"{name}: {found['narrow offsets']}"


def test_nothing_is_spilled(arch):
    for name, found in compiled(arch).items():
        assert found["stack"] == found["spills"] == 0, f"{name}: {found}"
        assert found["instructions"] > 20, f"{name}: an empty kernel? {found}"
