"""What the compiler makes of the sampler's launches, without a GPU: IEEE arithmetic only, 64-bit offsets, nothing spilled.

Triton compiles for a GPU only in a process that does not interpret: benchmarks/compiler/table.py starts it.
"""

import re

import pytest
from packaging.version import Version

from benchmarks.compiler.table import ARCHS, TESTED_ARCHS, compiled_for_tests, faults

OPS = ("flow_match_schedule", "euler_step", "cfg_euler_step")

# Every instruction that is not correctly rounded, that flushes subnormals or rounds once for two; integer mad is fine.
INEXACT = r"\b(?:mad\.r[nzmp]|div\.(?:full|approx)|sqrt\.approx|rsqrt|rcp\.approx|ex2|lg2)[.\w]*|\b\w[.\w]*\.ftz\b"
# Below sm_90 bf16 has no add, sub or mul: the compiler writes them as x * 1 + y, x * -1 + y and x * y + -0, to the bit.
PLUS_OR_MINUS_ONE, MINUS_ZERO = {0x3F80, 0xBF80, 0x3F803F80, 0xBF80BF80}, {0x8000, 0x80008000}


def inexact(result: dict) -> list[str]:
    (ptx,) = result["ptx"]
    # Triton 3.4 and 3.5 flush subnormals (below 1.2e-38) in correctly rounded divisions and roots; the README says so.
    if Version(result["rows"][0]["triton"]) < Version("3.6"):
        ptx = re.sub(r"\b(div|sqrt)\.rn\.ftz\b", r"\1.rn", ptx)
    return sorted(set(re.findall(INEXACT, ptx)) | contractions(ptx))


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        archs = ARCHS if metafunc.config.getoption("--all-archs") else TESTED_ARCHS
        metafunc.parametrize("arch", archs, ids=[f"sm_{arch}" for arch in archs])


@pytest.fixture
def compiled(arch: int, tmp_path_factory) -> dict[str, dict]:
    """Case -> what the compiler made of its only kernel."""
    results = [result for result in compiled_for_tests(arch, tmp_path_factory.getbasetemp()) if result["op"] in OPS]
    assert {result["op"] for result in results} == set(OPS)
    for result in results:
        assert "error" not in result and len(result["rows"]) == 1, result
    return {f"{result['op']}: {result['case']}": result for result in results}


pytestmark = [pytest.mark.triton, pytest.mark.slow]


def test_arithmetic_is_ieee(compiled):
    for name, result in compiled.items():
        assert not inexact(result), f"{name}: {inexact(result)}"


def test_divisions_and_roots_are_there_and_correctly_rounded(compiled):
    """So that the test above cannot pass because the arithmetic went somewhere else."""
    for name, result in compiled.items():
        (ptx,) = result["ptx"]
        # Before Triton 3.6 they flush subnormals.
        divisions, roots = (re.search(rf"\b{function}\.rn(\.ftz)?\.f32\b", ptx) for function in ("div", "sqrt"))
        if name.startswith("cfg_euler_step"):
            assert roots and divisions, name
        if name.startswith("flow_match_schedule"):
            assert divisions, name


def test_the_assembler_contracts_nothing(compiled):
    """A correctly rounded division is made of FFMA, so only the op without one can show it."""
    for name, result in compiled.items():
        if name.startswith("euler_step"):
            assert result["rows"][0]["FFMA"] == 0, name


def test_offsets_are_64_bits_wide(compiled):
    for name, result in compiled.items():
        (ttir,) = result["ttir"]
        assert not narrow_offsets(ttir), f"{name}: {narrow_offsets(ttir)}"


def test_no_float_is_baked_into_a_launch(compiled):
    """A CUDA graph keeps what a launch passes by value: the guidance scale lies in device memory."""
    for name, result in compiled.items():
        (ptx,) = result["ptx"]
        if name.startswith("cfg_euler_step"):
            assert ".param .u64" in ptx and not re.findall(r"\.param \.f\d+", ptx), name


def test_nothing_is_spilled(compiled):
    for name, result in compiled.items():
        assert not faults(result["rows"][0]), f"{name}: {faults(result['rows'][0])}"
