"""Where a kernel is wrong, torch's operators take its place in the registry, for its device and dtype only."""

import sys

import pytest
import torch

from qwen_fast_kernels._library import is_replaced, replace_kernel, restore_kernels
from qwen_fast_kernels.proof import examine
from support.stand_in import RIGHT, problem

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in is the CPU"),
]


@pytest.fixture
def restored():
    yield
    restore_kernels()


@pytest.mark.parametrize("one", [one for one in RIGHT if one.op != "joint_attention"], ids=str)
def test_torchs_operators_take_the_place_of_a_wrong_kernel(restored, monkeypatch, one):
    """The registry's operator passes the proof that its kernel failed."""
    dtype = getattr(torch, one.dtype)
    module = sys.modules[f"qwen_fast_kernels.{one.op}"]
    assert replace_kernel(one.op, CPU, dtype) and is_replaced(one.op, CPU, dtype)
    monkeypatch.setattr(module, f"launch_{one.op}", lambda *_, **__: pytest.fail("the kernel was launched"))
    registered = getattr(torch.ops.qwen_fast, one.op)
    if one.op == "rms_norm_silu":

        def entry(x, gamma, bias, residual, silu):
            with_residual = registered.residual, (x, gamma, bias, residual, silu)
            function, arguments = with_residual if residual is not None else (registered, (x, gamma, bias, silu))
            return function(*arguments)
    else:
        entry = registered
    monkeypatch.setattr(module, f"_{one.op}_cuda", entry)
    verdict = examine(one, CPU, launches=2)
    assert verdict.right, verdict


def test_only_that_dtype_is_replaced(restored, interpreted, monkeypatch):
    module = sys.modules["qwen_fast_kernels.euler_step"]
    launched = []
    launch = module.launch_euler_step
    monkeypatch.setattr(module, "launch_euler_step", lambda *a, **k: launched.append(a[0].dtype) or launch(*a, **k))
    replace_kernel("euler_step", CPU, BF16)
    for dtype in (BF16, FP32):
        torch.ops.qwen_fast.euler_step(*problem("euler_step", dtype).arguments(CPU))
    assert launched == [FP32]
    assert is_replaced("euler_step", CPU, BF16) and not is_replaced("euler_step", CPU, FP32)


def test_the_joint_attention_is_the_drivers_to_replace():
    assert not replace_kernel("joint_attention", CPU, BF16)
