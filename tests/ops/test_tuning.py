"""Which launch configuration an operator gets: the measured one where there is one that fits, its default where not."""

import importlib
import json
import logging
import sys

import pytest
import torch

import qwen_fast_kernels
from qwen_fast_kernels import tuning
from qwen_fast_kernels._matmul import dimensions

DEVICE = torch.device("cuda", 0)
NAME = "NVIDIA H200"
VERSION = tuning.triton.__version__ if tuning.HAS_TRITON else ""
TUNABLE = sorted(
    name
    for name in set(qwen_fast_kernels.__all__) - {"HAS_TRITON"}
    if hasattr(importlib.import_module(f"qwen_fast_kernels.{name}"), "default_config")
)
# What the operators ask for at the model's sizes: one of each.
ASKED = {
    "ada_layer_norm": (3072, 2),
    "gated_residual": (3072, 2),
    "gated_residual_ada_layer_norm": (3072, 2),
    "joint_attention": (128, 2, False, True),
    "linear_gated_residual": (4096, 3072, 12288, 2, True),
    "linear_gelu": (4096, 12288, 3072, 2, True, False),
    "qk_norm_rope": (24, 128, 2),
    "rms_norm_silu": (96, 2),
}


def default(capability: int, rows: int, k: int, itemsize: int, aligned: bool = True) -> dict:
    return {"BLOCK": capability, "num_warps": 4}


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """Writes a file of configurations for `default` on an H200; the package's own folder is out of sight."""
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(tuning, "capability", lambda device: 90)
    monkeypatch.setattr(tuning, "device_name", lambda device: NAME)
    caches = tuning.get_config.cache_clear, tuning._measured.cache_clear, tuning._entries.cache_clear
    for clear in caches:
        clear()

    def write(*entries: dict, text: str | None = None) -> None:
        for clear in caches:
            clear()
        tuning.CONFIGS.mkdir(exist_ok=True)
        path = tuning.CONFIGS / "op,D=3072,device_name=NVIDIA_H200.json"
        path.write_text(text or json.dumps({"op": "op", "device": NAME, "entries": list(entries)}))

    yield write
    for clear in caches:
        clear()


def entry(block: int, rows: int = 4096, version: str = VERSION, **dims) -> dict:
    dims = {"rows": rows, "k": 3072, "itemsize": 2, "aligned": True} | dims
    return {"dims": dims, "triton": version, "config": {"BLOCK": block, "num_warps": 8}}


def get(rows: int = 4096, itemsize: int = 2, aligned: bool = True) -> int:
    return tuning.get_config("op", (rows, 3072, itemsize, aligned), DEVICE, default)["BLOCK"]


def test_without_files_the_default_serves_and_the_log_says_so_once(configs, caplog):
    with caplog.at_level(logging.WARNING, "qwen_fast_kernels"):
        assert [get(), get(), get(rows=77)] == [90, 90, 90]
    assert [record.getMessage() for record in caplog.records] == [
        "no launch configurations were measured on NVIDIA H200: the defaults are used (`qwen-fast tune`)."
    ]


def test_another_gpus_files_serve_nobody_else(configs, monkeypatch):
    configs(entry(1))
    monkeypatch.setattr(tuning, "device_name", lambda device: "NVIDIA H20")
    assert get() == 90


@pytest.mark.parametrize(
    ("rows", "block"),
    [(4096, 2), (4500, 2), (5500, 2), (6000, 3), (8192, 3), (16384, 3), (16385, 90), (60, 1), (31, 1), (128, 90)],
)
def test_the_nearest_number_of_rows_serves(configs, rows, block):
    configs(entry(1, 62), entry(2, 4096), entry(3, 8192))
    assert get(rows) == block


def test_all_other_dimensions_have_to_agree(configs, caplog):
    configs(entry(1), entry(2, itemsize=4), entry(3, aligned=False))
    assert (get(), get(itemsize=4), get(aligned=False), get(itemsize=8)) == (1, 2, 3, 90)
    assert not caplog.records, "a GPU that was measured, and a size that was not: nothing to warn of"


@pytest.mark.skipif(not VERSION, reason="needs Triton")
def test_a_measurement_holds_for_its_version_of_triton(configs):
    major, minor, *_ = VERSION.split(".")
    configs(entry(1, version=f"{major}.{int(minor) + 1}.0"))
    assert get() == 90
    configs(entry(1, version=f"{major}.{minor}.99"))
    assert get() == 1


def test_a_configuration_of_another_state_of_the_kernel_is_left_out(configs):
    old = entry(1)
    old["config"]["STAGES"] = 3
    configs(old)
    assert get() == 90


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"entries": [{"dims": {}}]}', '{"entries": [{"dims": {}, "config": {}, "triton": 3}]}']
)
def test_a_damaged_file_is_named_and_not_used(configs, caplog, text):
    configs(text=text)
    with caplog.at_level(logging.WARNING, "qwen_fast_kernels"):
        assert get() == get() == 90
    (record,) = caplog.records
    assert "NVIDIA_H200.json" in record.getMessage() and "default configurations" in record.getMessage()


def test_a_lookup_is_cached_by_device(configs, monkeypatch):
    configs(entry(1))
    assert get() == 1
    monkeypatch.setattr(tuning, "CONFIGS", None)
    assert get() == 1
    monkeypatch.setattr(tuning, "capability", lambda device: 80)
    with pytest.raises(TypeError):
        tuning.get_config("op", (4096, 3072, 2, True), torch.device("cuda", 1), default)


def test_a_file_is_read_once_for_all_numbers_of_rows(configs, monkeypatch):
    """A prompt of a new length asks with a new number of rows."""
    configs(entry(1, 62), entry(2, 4096), entry(3, 8192))
    read, paths = tuning.read_entries, []
    monkeypatch.setattr(tuning, "read_entries", lambda path: (paths.append(path), read(path))[1])
    assert {rows: get(rows) for rows in (60, 61, 77, 4096, 4126, 8252)} == {60: 1, 61: 1, 77: 1, 4096: 2, 4126: 2, 8252: 3}
    assert len(paths) == 1


def test_a_damaged_file_is_named_once_for_all_numbers_of_rows(configs, caplog):
    configs(text="{")
    with caplog.at_level(logging.WARNING, "qwen_fast_kernels"):
        assert [get(rows) for rows in (60, 61, 4096)] == [90] * 3
    assert len(caplog.records) == 1


def test_a_known_key_runs_no_python(configs):
    configs(entry(1))
    get()
    device, calls = DEVICE, []
    sys.setprofile(lambda frame, event, _: calls.append((event, frame.f_code.co_name)))
    try:
        tuning.get_config("op", (4096, 3072, 2, True), device, default)
    finally:
        sys.setprofile(None)
    assert [name for event, name in calls if event == "call"] == [], calls


def test_a_linear_layer_asks_in_one_call():
    """Every call of linear_gelu asks, also where the library then multiplies: no generator, no helper."""
    x, weight = torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    calls = []
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        dims = dimensions(x, weight)
    finally:
        sys.setprofile(None)
    assert dims == (4, 8, 64, 2, True) and calls == ["dimensions"]


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.zeros(4 * 64 + 1)[1:].view(4, 64), torch.zeros(8, 64)),
        (torch.zeros(4, 64), torch.zeros(8 * 64 + 1)[1:].view(8, 64)),
        (torch.zeros(4, 66)[:, :64], torch.zeros(8, 64)),
        (torch.zeros(4, 64), torch.zeros(8, 66)[:, :64]),
        (torch.zeros(1, 64).expand(4, 64), torch.zeros(8, 64)),
    ],
    ids=["x begins anywhere", "weight begins anywhere", "rows of x", "rows of the weight", "one row many times"],
)
def test_what_the_tensor_memory_accelerator_cannot_read_is_not_aligned(x, weight):
    assert dimensions(torch.zeros(4, 64), torch.zeros(8, 64))[-1] is True
    assert dimensions(x, weight)[-1] is False


def test_these_operators_are_tunable():
    """The sampler's and the schedule's launches are a few microseconds of a step: one configuration serves every GPU."""
    assert set(TUNABLE) == set(ASKED)


@pytest.mark.parametrize("op", TUNABLE)
def test_an_operator_asks_with_the_dimensions_of_its_default(op, configs, monkeypatch):
    """A configuration written for what `default_config` takes is the one that the operator's CUDA entry launches with."""
    from benchmarks.operators.cases import CASES, Maker

    module = importlib.import_module(f"qwen_fast_kernels.{op}")
    dims = tuning.dims_of(module.default_config, ASKED[op])
    base = module.default_config(90, *ASKED[op])
    path = tuning.CONFIGS / tuning.file_name(op, dims, NAME)
    path.parent.mkdir()
    tuned = base | {"num_warps": 2} | ({"BACKEND": "triton"} if "BACKEND" in base else {})
    path.write_text(json.dumps({"entries": [{"dims": dims, "triton": VERSION, "config": tuned}]}))
    launched = []
    monkeypatch.setattr(module, f"launch_{op}", lambda *args, config: launched.append(config))
    monkeypatch.setattr(module, "require_triton", lambda op: None)
    monkeypatch.setattr(module, "_check", lambda *args: None, raising=False)
    case = next(case for case in CASES if case.op == op and case.measured and case.dtype == torch.bfloat16)
    arguments = case.arguments(Maker("cpu", fake=True))
    if "rows" in dims:  # of the image alone, as the driver calls it
        rows = case.size.rows
        arguments = [a[:4096] if isinstance(a, torch.Tensor) and a.shape[0] == rows else a for a in arguments]
    getattr(module, f"_{op}_cuda")(*arguments)
    assert launched == [tuned]
