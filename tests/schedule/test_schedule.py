"""Schedule equals diffusers bit for bit, and each of the three historical errors would be noticed."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

import qwen_fast.schedule.flow_match
from qwen_fast import Schedule
from qwen_fast.schedule import layered_mu, layered_sigmas
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG as LIGHTNING
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG as QWEN_IMAGE

PIXELS = (512, 1024, 1328, 2048)
STEPS = (4, 8, 20, 50)


def tokens(pixels: int) -> int:
    return (pixels // 16) ** 2


def stock_schedule(config: dict, steps: int, image_seq_len: int, sigmas=None, mu=None):
    """Sigmas and timesteps as diffusers' pipelines get them from diffusers' scheduler."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    if mu is None:
        mu = calculate_shift(
            image_seq_len,
            scheduler.config.base_image_seq_len,
            scheduler.config.max_image_seq_len,
            scheduler.config.base_shift,
            scheduler.config.max_shift,
        )
    sigmas = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    scheduler.set_timesteps(sigmas=sigmas, mu=mu, device="cpu")
    return mu, scheduler.sigmas, scheduler.timesteps


def assert_equals_stock(config: dict, steps: int, image_seq_len: int) -> None:
    ours = Schedule.from_config(config, steps, image_seq_len=image_seq_len)
    mu, sigmas, timesteps = stock_schedule(config, steps, image_seq_len)
    assert ours.mu == (mu if config.get("use_dynamic_shifting") else None)
    assert torch.equal(ours.sigmas, sigmas) and torch.equal(ours.timesteps, timesteps)


def test_golden_values():
    schedule = Schedule.from_config(QWEN_IMAGE, 20, image_seq_len=1024)
    assert f"{schedule.mu:.6f}" == "0.538710"
    shown = [f"{t:.2f}" for t in schedule.timesteps.tolist()]
    assert shown[:4] == ["1000.00", "968.17", "934.95", "900.26"]
    assert shown[-3:] == ["179.69", "102.51", "20.00"]
    assert schedule.num_inference_steps == 20 and schedule.sigmas[-1] == 0


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("steps", [2, 3, *STEPS, 100])
@pytest.mark.parametrize(
    "config",
    [
        QWEN_IMAGE,
        LIGHTNING,
        QWEN_IMAGE | {"time_shift_type": "linear"},
        QWEN_IMAGE | {"invert_sigmas": True},
        {"shift": 3.0},
        {"shift": 3.0, "shift_terminal": 0.1},
        {"use_dynamic_shifting": True},
    ],
    ids=["base", "lightning", "linear", "inverted", "static", "static-terminal", "defaults"],
)
def test_equals_stock(config, steps, pixels):
    assert_equals_stock(config, steps, tokens(pixels))


@pytest.mark.parametrize("kind", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("terminal", [None, 0.02])
def test_converted_sigmas_equal_stock(kind, terminal):
    if kind == "beta":
        pytest.importorskip("scipy", reason="diffusers needs scipy for beta sigmas")
    assert_equals_stock(QWEN_IMAGE | {f"use_{kind}_sigmas": True, "shift_terminal": terminal}, 8, 4096)


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, 0.75, 0.5, 0.25], [0.9, 0.6, 0.3], [0.5], [1.0, 1.0, 0.5], np.array([1.0, 0.2]), (0.7, 0.1)],
)
@pytest.mark.parametrize("config", [QWEN_IMAGE, LIGHTNING])
def test_own_sigmas_are_shifted_and_stretched_as_in_stock(config, sigmas):
    ours = Schedule.from_config(config, image_seq_len=4096, sigmas=sigmas)
    _, expected, timesteps = stock_schedule(config, 0, 4096, sigmas)
    assert torch.equal(ours.sigmas, expected) and torch.equal(ours.timesteps, timesteps)


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_last_sigma_of_zero_is_accepted():
    ours = Schedule.from_config(QWEN_IMAGE, image_seq_len=4096, sigmas=[1.0, 0.5, 0.0])
    assert torch.equal(ours.sigmas, stock_schedule(QWEN_IMAGE, 0, 4096, [1.0, 0.5, 0.0])[1])


def test_layered_rule():
    sigmas, mu = layered_sigmas(8), layered_mu(4096)
    ours = Schedule.from_config(QWEN_IMAGE, mu=mu, sigmas=sigmas)
    assert mu == 4.0
    assert torch.equal(ours.sigmas, stock_schedule(QWEN_IMAGE, 0, 0, np.linspace(1.0, 0, 9)[:-1], mu=4.0)[1])


def test_sample_sigmas_of_qwen_image_2_1():
    sample_sigmas = [1.0, 0.9, 0.7, 0.4, 0.1]
    ours = Schedule.from_config(QWEN_IMAGE, 40, image_seq_len=16384, sigmas=sample_sigmas)
    mu, sigmas, _ = stock_schedule(QWEN_IMAGE, 0, 16384, sample_sigmas)
    assert f"{mu:.6f}" == "1.312903" and torch.equal(ours.sigmas, sigmas)


@pytest.mark.parametrize("config", [QWEN_IMAGE, LIGHTNING, {"shift": 3.0}, QWEN_IMAGE | {"use_karras_sigmas": True}])
def test_one_step_is_not_nan(config):
    schedule = Schedule.from_config(config, 1, image_seq_len=4096)
    assert schedule.sigmas.tolist() == [1.0, 0.0] and schedule.timesteps.tolist() == [1000.0]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_stock_gives_nan_for_one_step():
    assert stock_schedule(QWEN_IMAGE, 1, 4096)[1][0].isnan(), "diffusers was repaired: the docs may say so"


def test_lightning_sigmas():
    schedule = Schedule.from_config(LIGHTNING, 4, image_seq_len=4096)
    assert schedule.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


def test_set_shift_of_a_scheduler_is_seen():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_shift(5.0)
    ours = Schedule.from_scheduler(scheduler, 8)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8))
    assert torch.equal(ours.sigmas, scheduler.sigmas)


def test_model_timesteps_are_rounded_before_the_division():
    schedule = Schedule.from_config(QWEN_IMAGE, 20, image_seq_len=1024)
    assert schedule.model_timesteps(torch.bfloat16)[1].item() * 1000 == 968.75


def _mu_through_exp(monkeypatch):
    def calculate_mu(image_seq_len, config):
        low, high = math.log(config["base_shift"]), math.log(config["max_shift"])
        share = (image_seq_len - config["base_image_seq_len"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
        return math.exp(low + share * (high - low))

    monkeypatch.setattr(qwen_fast.schedule.flow_match, "calculate_mu", calculate_mu)


def _with_schedule_op(monkeypatch, change):
    op = qwen_fast.schedule.flow_match.flow_match_schedule
    monkeypatch.setattr(qwen_fast.schedule.flow_match, "flow_match_schedule", lambda *a, **k: op(*change(*a, k), **k))


def _linspace_to_terminal(monkeypatch):
    def change(steps, sigmas, options):
        return steps, torch.from_numpy(np.linspace(1.0, options["shift_terminal"], steps).astype(np.float32))

    _with_schedule_op(monkeypatch, change)


def _no_stretch(monkeypatch):
    def change(steps, sigmas, options):
        options["shift_terminal"] = None
        return steps, sigmas

    _with_schedule_op(monkeypatch, change)


@pytest.mark.parametrize("pixels", PIXELS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("fault", [_mu_through_exp, _linspace_to_terminal, _no_stretch])
def test_each_historical_error_is_caught(monkeypatch, fault, steps, pixels):
    fault(monkeypatch)
    if fault is _linspace_to_terminal and steps == 50:
        assert_equals_stock(QWEN_IMAGE, steps, tokens(pixels))  # 1/50 is shift_terminal: this error cannot be seen here
        return
    with pytest.raises(AssertionError):
        assert_equals_stock(QWEN_IMAGE, steps, tokens(pixels))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"num_inference_steps": -3}, "`num_inference_steps` is -3"),
        ({"num_inference_steps": 2.5}, "`num_inference_steps` is 2.5"),
        ({"num_inference_steps": None}, "`num_inference_steps` is None"),
        ({"sigmas": []}, r"`sigmas` has shape \(0,\)"),
        ({"sigmas": [0.2, 0.5]}, "`sigmas` ascends from 0.2 to 0.5 at position 1"),
        ({"sigmas": [1.5, 0.5]}, "`sigmas` holds 1.5"),
        ({"sigmas": [1.0, -0.5]}, "`sigmas` holds -0.5"),
        ({"sigmas": [1.0, float("nan")]}, "`sigmas` holds nan"),
        ({"num_inference_steps": 4, "image_seq_len": None}, "`image_seq_len` is None"),
        ({"num_inference_steps": 4, "image_seq_len": 0}, "`image_seq_len` is 0"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(QWEN_IMAGE, **{"image_seq_len": 4096, **arguments})


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler"):
        saved = json.loads(diffusers.DPMSolverMultistepScheduler().to_json_string())
        Schedule.from_config(saved, 4, image_seq_len=4096)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_where_there_is_none():
    with pytest.raises(ValueError, match="`device` is cuda"):
        Schedule.from_config(QWEN_IMAGE, 4, image_seq_len=4096, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [1, 2, 8, 50, 1000])
def test_on_the_gpu_equals_the_cpu_without_synchronisation(steps):
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = Schedule.from_config(QWEN_IMAGE, steps, image_seq_len=4096, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu = Schedule.from_config(QWEN_IMAGE, steps, image_seq_len=4096)
    assert torch.equal(ours.sigmas.cpu(), on_cpu.sigmas) and torch.equal(ours.timesteps.cpu(), on_cpu.timesteps)
