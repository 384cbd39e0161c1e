"""That a tile which is released too early is seen in Triton's IR, by faults in the IR of a kernel that keeps its tiles."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.compiler.table import compiled_for_tests
from benchmarks.compiler.warp_specialised import early_releases, stale_barriers

ROOT = Path(__file__).resolve().parents[2]
ARRIVE = re.compile(r"\n[^\n]*= ttg\.memdesc_index [^\n]*\n[^\n]*ttng\.arrive_barrier[^\n]*")
pytestmark = [pytest.mark.triton, pytest.mark.slow]


@pytest.fixture(scope="module")
def right(tmp_path_factory) -> str:
    """The TTGIR of the attention with warp specialisation, as the installed Triton makes it."""
    results = compiled_for_tests(90, tmp_path_factory.getbasetemp())
    (found,) = [one["ttgir"][0] for one in results if one["op"] == "joint_attention" and one["case"] == "bf16"]
    assert found.count("ttng.warp_group_dot ") == 4 and len(ARRIVE.findall(found)) == 6  # two groups; query, key, value
    return found


def test_a_kernel_that_keeps_its_tiles(right):
    assert early_releases(right) == []
    assert early_releases("tt.func public @kernel() {\n  tt.return\n}") is None


def test_a_barrier_that_is_left_in_the_memory_of_a_tile_is_seen(tmp_path_factory):
    results = compiled_for_tests(90, tmp_path_factory.getbasetemp())
    (ptx,) = [one["ptx"][0] for one in results if one["op"] == "joint_attention" and one["case"] == "bf16"]
    assert ptx.count("mbarrier.init.") > 10 and stale_barriers(ptx) == 0
    lines = ptx.splitlines()
    (left,) = [n for n, line in enumerate(lines) if "mbarrier.inval." in line][:1]
    assert stale_barriers("\n".join(lines[:left] + lines[left + 1 :])) == 1


def test_a_triton_that_leaves_barriers_gets_no_specialised_warps(monkeypatch):
    module = importlib.import_module("qwen_fast_kernels.joint_attention")
    monkeypatch.setattr(module, "SPECIALISES", False)
    for dim in module.HEAD_DIMS:
        config = module.default_config(90, dim, 2)
        assert config["DESCRIPTORS"] and not config["WARP_SPECIALIZE"] and config["num_warps"] == 8
    # Neither by a configuration that was measured.
    launched = []
    measured = config | {"WARP_SPECIALIZE": True, "num_warps": 4}
    monkeypatch.setattr(module, "get_config", lambda *_: measured)
    monkeypatch.setattr(module, "capability", lambda _device: 90)
    monkeypatch.setattr(module, "launch_joint_attention", lambda *_, config: launched.append(config))
    rows, spans = torch.zeros(8, 2, 128, dtype=torch.bfloat16), torch.tensor([[0, 8]], dtype=torch.int32)
    module._joint_attention_cuda(rows, rows, rows, spans, 8)
    monkeypatch.setattr(module, "SPECIALISES", True)
    module._joint_attention_cuda(rows, rows, rows, spans, 8)
    assert [config["WARP_SPECIALIZE"] for config in launched] == [False, True]


@pytest.mark.parametrize("which", range(6))
def test_a_release_before_the_product_is_seen(right, which):
    release = list(ARRIVE.finditer(right))[which]
    region = max(right.rfind(name, 0, release.start()) for name in ("partition0(", "partition1("))
    loop = right.rfind("\n", 0, right.index("warp_group_dot ", region))
    # In front of its group's first product; the slot, which is named later than there, by a name that exists there.
    slots = re.findall(r"memdesc_index %\w+\[(%\w+)\]", right[region:loop])
    moved = release[0] if "%c0_i32" in release[0] else re.sub(r"\[%\w+\]", f"[{slots[-1]}]", release[0])
    broken = right[:loop] + moved + right[loop : release.start()] + right[release.end() :]
    (fault,) = early_releases(broken)
    assert re.fullmatch(r"partition[01] releases %\w+ before it is read", fault)


def test_a_release_of_another_slot_is_seen(right):
    release = ARRIVE.search(right)[0]
    broken = right.replace(release, re.sub(r"\[%\w+\]", "[%another]", release))
    assert broken != right and early_releases(broken)


def test_an_asynchronous_product_is_over_at_its_wait(right):
    """With `pendings = 1` a wait lets the last product run on."""
    product = re.compile(r"(%\w+)( = ttng\.warp_group_dot [^\n]*?) \{")
    asynchronous = product.sub(r"\1\2 {isAsync = true, ", right)
    assert early_releases(asynchronous), "nobody waits"

    def waited(pendings: int) -> str:
        lines = asynchronous.splitlines()
        return "\n".join(
            line + (f"\n%w = ttng.warp_group_dot_wait %x {{pendings = {pendings} : i32}} : t" if "isAsync" in line else "")
            for line in lines
        )

    assert early_releases(waited(0)) == []
    assert early_releases(waited(1))


def test_a_tile_that_nobody_releases_is_seen(right):
    assert any("never released" in fault for fault in early_releases(ARRIVE.sub("", right)))


# What the compiler took for a tile's last use: the reshape of a rank-3 tile, as the kernel had it until November 2026.
RESHAPED = """
import torch, triton, triton.language as tl
from benchmarks.compiler.offline import compile_only
from benchmarks.compiler.warp_specialised import early_releases

@triton.jit
def kernel(out_ptr, query_ptr, key_ptr, rows, RESHAPE: tl.constexpr):
    query = tl.make_tensor_descriptor(query_ptr, [rows, 128], [128, 1], [128, 128]).load([tl.program_id(0) * 128, 0])
    if RESHAPE:
        key = tl.make_tensor_descriptor(key_ptr, [rows, 1, 128], [128, 128, 1], [128, 1, 128])
    else:
        key = tl.make_tensor_descriptor(key_ptr, [rows, 128], [128, 1], [128, 128])
    acc = tl.zeros((128, 128), tl.float32)
    for row in tl.range(0, rows, 128, warp_specialize=True):
        if RESHAPE:
            tile = key.load([row, 0, 0]).reshape(128, 128)
        else:
            tile = key.load([row, 0])
        acc = tl.dot(tl.exp2(tl.dot(query, tile.T)).to(tile.dtype), tile, acc)
    out = tl.make_tensor_descriptor(out_ptr, [rows, 128], [128, 1], [128, 128])
    out.store([tl.program_id(0) * 128, 0], acc.to(out_ptr.dtype.element_ty))

with compile_only(90) as log:
    tensors = [torch.empty(1024, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    for reshape in (False, True):
        kernel[(8,)](*tensors, 1024, RESHAPE=reshape, num_warps=4, num_stages=2, enable_fp_fusion=True)
for one in log:
    print(early_releases(one.ttgir))
"""


def test_the_compilers_own_early_release_is_seen(tmp_path):
    """Of a reshaped tile. Where it fails because a later Triton keeps such tiles too, this test may go."""
    script = tmp_path / "reshaped.py"  # Triton reads the source of a kernel from its file
    script.write_text(RESHAPED)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, reshaped = done.stdout.splitlines()
    assert kept == "[]" and "before it is read" in reshaped
