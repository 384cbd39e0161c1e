"""The committed compile table, and this interpreter's Triton, hold what is promised of every kernel, without a GPU."""

import importlib
import itertools
import json

import pytest

import qwen_fast_kernels
from benchmarks.compiler.table import (
    ARCHS,
    FAMILIES,
    FIELDS,
    TENSOR_CORES,
    TESTED_ARCHS,
    VERSIONS,
    code,
    compiled_for_tests,
    faults,
    merged,
    missing,
    operators,
    read_table,
    stale,
    write_table,
)
from benchmarks.operators.cases import CASES, MODEL, WIDTHS

ROWS = read_table()
OPS = sorted(set(qwen_fast_kernels.__all__) - {"HAS_TRITON"})
# What has matrix products runs them on the tensor cores in bf16 and fp16.
SPECIALISING = [version for version in VERSIONS if version >= "3.8"]
PRODUCTS = {"joint_attention", "linear_gelu", "linear_gated_residual"}
# What default_config may be asked behind the capability: a choice that depends on it must not escape the table.
_WIDTHS, _ITEMSIZES = ((64, 2, 32), (512, 8, 64), (3072, 24, 128)), (2, 4)
_ROWS = (1, 8, 16, 17, 24, 32, 33, 60, 64, 65, 77, 128, 200, 256, 333, 512, 700, 1054, 2048, 4126, 8252, 16384)
_CHANNELS = [(channels, itemsize) for channels, _, _ in _WIDTHS for itemsize in _ITEMSIZES]
ASKED = {
    "ada_layer_norm": _CHANNELS,
    "gated_residual": _CHANNELS,
    "gated_residual_ada_layer_norm": _CHANNELS,
    "qk_norm_rope": [(heads, dim, itemsize) for _, heads, dim in _WIDTHS for itemsize in _ITEMSIZES],
    "rms_norm_silu": list(itertools.product((7, 8, 32, *WIDTHS), _ITEMSIZES)),
    "joint_attention": list(itertools.product((16, 32, 64, 128), _ITEMSIZES, (False, True), (True, False))),
    "linear_gelu": list(itertools.product(_ROWS, (12288,), (3072,), _ITEMSIZES, (True, False), (False, True))),
    "linear_gated_residual": list(itertools.product(_ROWS, (3072,), (3072, 12288), _ITEMSIZES, (True, False))),
}
COMMAND = "python -m benchmarks.compiler.table --python <an interpreter with the other Triton>"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "arch" in metafunc.fixturenames:
        archs = ARCHS if metafunc.config.getoption("--all-archs") else TESTED_ARCHS
        metafunc.parametrize("arch", archs, ids=[f"sm_{arch}" for arch in archs])


def row_key(row: dict) -> tuple:
    return row["op"], row["case"], row["kernel"]


def label(row: dict) -> str:
    return f"{row['op']}: {row['case']}, sm_{row['arch']}, Triton {row['triton']}, {row['config']}"


def without_tensor_cores(rows: list[dict]) -> list[str]:
    """Launches in bf16 or fp16 that multiply matrices without the tensor cores, or at full width not on the best ones."""
    found = {}
    for row in rows:
        if row["op"] in PRODUCTS and row["dtype"] in ("bfloat16", "float16"):
            launch = found.setdefault(
                (row["triton"], row["op"], row["case"], row["arch"]), {"label": label(row), "used": set()}
            )
            launch["used"] |= {family for family in FAMILIES if row[family]}
    best = {(case.op, case.name) for case in CASES if case.op in PRODUCTS and case.size == MODEL and case.name != "offset"}
    return [
        f"{launch['label']}: {sorted(launch['used'])}"
        for (_, op, case, arch), launch in found.items()
        if not launch["used"] or (arch == 90 and (op, case) in best and TENSOR_CORES[arch] not in launch["used"])
    ]


def test_every_op_has_rows_of_every_architecture_and_version():
    there = {(row["op"], row["arch"], row["triton"]) for row in ROWS}
    wanted = {(op, arch, version) for op in OPS for arch in ARCHS for version in VERSIONS}
    assert not wanted - there, f"{sorted(wanted - there)}: run {COMMAND}"


def test_the_rows_are_those_of_the_cases():
    differing = missing(ROWS)
    assert not differing, f"run {COMMAND} --changed: {len(differing)} are missing or too many, first {differing[:5]}"


def test_the_operators_are_those_of_the_package():
    assert set(operators()) == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_the_rows_were_compiled_from_these_sources(op):
    assert op not in stale(ROWS), f"{op} or a module that it imports has changed: run {COMMAND} --ops {op}"


@pytest.mark.parametrize("op", sorted(set(OPS) & set(ASKED)))
def test_every_configuration_that_can_be_chosen_has_a_row(op, monkeypatch):
    module = importlib.import_module(f"qwen_fast_kernels.{op}")
    for capability, version in itertools.product(ARCHS, VERSIONS):
        if hasattr(module, "SPECIALISES"):  # what a version of Triton is trusted with
            monkeypatch.setattr(module, "SPECIALISES", version in SPECIALISING)
        chosen = {json.dumps(module.default_config(capability, *asked)): asked for asked in ASKED[op]}
        there = {row["config"] for row in ROWS if (row["op"], row["arch"], row["triton"]) == (op, capability, version)}
        lost = {config: asked for config, asked in chosen.items() if config not in there}
        assert not lost, f"sm_{capability}, Triton {version}: a case is missing in benchmarks/operators/cases.py for {lost}"


@pytest.mark.parametrize("op", OPS)
def test_no_committed_row_spills_or_exceeds_its_architecture(op):
    found = {label(row): faults(row) for row in ROWS if row["op"] == op and faults(row)}
    assert not found, "\n".join(f"{name}: {', '.join(texts)}" for name, texts in found.items())


def test_committed_rows_say_of_every_warp_specialised_kernel_whether_it_keeps_its_tiles():
    asked = {label(row) for row in ROWS if json.loads(row["config"]).get("WARP_SPECIALIZE")}
    assert asked == {label(row) for row in ROWS if row["tiles_kept"]}
    assert {row["triton"] for row in ROWS if row["tiles_kept"]} == set(SPECIALISING), "3.6 leaves barriers in a tile"
    assert {(row["triton"], row["dtype"]) for row in ROWS if row["tiles_kept"] == "yes"} >= set(
        itertools.product(SPECIALISING, ("bfloat16", "float16"))
    )


def test_committed_rows_use_tensor_cores():
    assert not without_tensor_cores(ROWS), "\n".join(without_tensor_cores(ROWS))


@pytest.mark.slow
@pytest.mark.triton
def test_default_configurations_compile_as_the_table_says(arch, tmp_path_factory):
    """With a Triton version that the table does not have, only what holds for every version."""
    results = compiled_for_tests(arch, tmp_path_factory.getbasetemp())
    assert {result["op"] for result in results} == set(OPS)
    errors = [f"{result['op']}: {result['case']}: {result['error']}" for result in results if "error" in result]
    assert not errors, "\n".join(errors)
    rows = [row for result in results for row in result["rows"]]
    found = {label(row): faults(row) for row in rows if faults(row)}
    assert not found, "\n".join(f"{name}: {', '.join(texts)}" for name, texts in found.items())
    assert not without_tensor_cores(rows), "\n".join(without_tensor_cores(rows))
    specialised = {label(row) for row in rows if row["tiles_kept"]}
    assert specialised == {label(row) for row in rows if json.loads(row["config"]).get("WARP_SPECIALIZE")}

    compared = ("config", "registers", "warps", "stack", "dynamic_shared", "tiles_kept", *FAMILIES)
    version = rows[0]["triton"]
    committed = {row_key(row): row for row in ROWS if row["arch"] == arch and row["triton"] == version}
    for row in rows if committed else []:
        expected = committed.get(row_key(row))
        assert expected, f"{label(row)} is not in the table: run {COMMAND}"
        differs = {name: (row[name], expected[name]) for name in compared if row[name] != expected[name]}
        assert not differs, f"{label(row)}: {differs} (now, in the table): run {COMMAND}"


# The functions above, on rows that are known to be bad ------------------------------------------------------------------

GOOD = {
    "triton": "3.9.0", "op": "joint_attention", "case": "bf16", "kernel": "0", "arch": 90, "dtype": "bfloat16", "config": "{}",
    "stack": 0, "local": 0, "spill_stores": 0, "spill_loads": 0, "static_shared": 1024, "dynamic_shared": 100000,
    "shared_limit": 232448, "tensor_memory": 0, "instructions": 900, "tiles_kept": "yes", "source": "",
    **dict.fromkeys(FAMILIES, 0), "HGMMA": 12,
}  # fmt: skip


@pytest.mark.parametrize(
    "bad",
    [
        {"stack": 8},
        {"spill_stores": 1},
        {"spill_loads": 1},
        {"local": 4},
        {"dynamic_shared": 232449},
        {"static_shared": 140000},
        {"tensor_memory": 576},
        {"instructions": 4},
        {"tiles_kept": "no"},
    ],
    ids=str,
)
def test_a_bad_row_is_noticed(bad):
    assert not faults(GOOD) and faults(GOOD | bad)


def test_a_product_without_tensor_cores_is_noticed():
    assert not without_tensor_cores([GOOD])
    assert without_tensor_cores([GOOD | {"HGMMA": 0}])
    assert without_tensor_cores([GOOD | {"HGMMA": 0, "arch": 80}])
    assert not without_tensor_cores([GOOD | {"HGMMA": 0, "HMMA": 8, "arch": 80}])
    assert not without_tensor_cores([GOOD | {"HGMMA": 0, "dtype": "float32"}])


def test_another_source_is_noticed():
    assert stale([GOOD | {"op": "euler_step"}]) == ["euler_step"]


def test_a_run_replaces_its_own_rows_only(tmp_path):
    old = [GOOD | {"op": op, "arch": arch, "triton": version} for op in OPS[:2] for arch in ARCHS for version in VERSIONS]
    new = [GOOD | {"op": OPS[0], "arch": 90, "triton": VERSIONS[1], "case": "other"}]
    rows = merged(old, new, [80, 90], OPS[:1])
    assert len(rows) == len(old) - 2 + 1 and new[0] in rows
    gone = [row for row in old if row not in rows]
    assert {(row["op"], row["triton"]) for row in gone} == {(OPS[0], VERSIONS[1])} and {row["arch"] for row in gone} == {80, 90}

    row = dict.fromkeys(FIELDS, 7) | GOOD | {"source": "0123456789012345", "size": "20"}
    write_table([row], tmp_path / "table.csv")
    assert read_table(tmp_path / "table.csv") == [row]


def test_comments_and_docstrings_change_no_hash(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text('"""One."""\n\n# why\ndef f(x):\n    """Doc\n    string."""\n    return x\n')
    other.write_text('"""Two\nlines."""\ndef f(x):\n    """Another."""\n\n    # why not\n    return x\n')
    assert code(one) == code(other)
    other.write_text('"""One."""\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert code(one) != code(other)
