"""flow_match_schedule against set_timesteps of stock diffusers, bit for bit."""

import functools
import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift

from benchmarks.shared.budget import assert_bit_equal
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG as LIGHTNING
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG as QWEN_IMAGE
from qwen_fast_kernels.flow_match_schedule import DEFAULT_CONFIG, flow_match_schedule, launch_flow_match_schedule
from support.canaries import Canaries, between_canaries

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

STEPS = (2, 3, 4, 8, 20, 50, 100)
IMAGE_SEQ_LENS = (256, 1024, 4096, 6032, 6889, 16384)
STATIC = {"use_dynamic_shifting": False}
CONFIGS = {
    "Qwen-Image": QWEN_IMAGE,
    "Lightning": LIGHTNING,
    "no stretch": QWEN_IMAGE | {"shift_terminal": None},
    "stretch to 0.1": QWEN_IMAGE | {"shift_terminal": 0.1},
    "linear": QWEN_IMAGE | {"time_shift_type": "linear"},
    "inverted": QWEN_IMAGE | {"invert_sigmas": True},
    "500 train timesteps": QWEN_IMAGE | {"num_train_timesteps": 500},
    "static shift 1": STATIC | {"shift": 1.0},
    "static shift 3": STATIC | {"shift": 3.0},
    "static shift 3, stretched": STATIC | {"shift": 3.0, "shift_terminal": 0.02},
    "static shift 3, inverted": STATIC | {"shift": 3.0, "invert_sigmas": True},
}
CUSTOM_SIGMAS = {
    "ordinary": [1.0, 0.93, 0.71, 0.333, 0.1],
    "ends in 0": [1.0, 0.5, 0.25, 0.0],
    "equal neighbours": [1.0, 0.8, 0.8, 0.3],
    "starts below 1": [0.6, 0.4, 0.2],
    "one": [0.5],
}


def stock_schedule(config: dict, sigmas, image_seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    with np.errstate(divide="ignore"):  # a sigma of 0 becomes 1 / inf
        scheduler.set_timesteps(sigmas=sigmas, mu=stock_mu(scheduler.config, image_seq_len), device="cpu")
    return scheduler.sigmas, scheduler.timesteps


def stock_mu(config, image_seq_len: int) -> float:
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return calculate_shift(image_seq_len, *(config[name] for name in names))


def op_arguments(config: dict, image_seq_len: int) -> dict:
    config = FlowMatchEulerDiscreteScheduler.from_config(config).config
    mu = stock_mu(config, image_seq_len)
    dynamic = math.exp(mu) if config.time_shift_type == "exponential" else mu
    return {
        "shift": dynamic if config.use_dynamic_shifting else config.shift,
        "time_shift": "dynamic" if config.use_dynamic_shifting else "static",
        "shift_terminal": config.shift_terminal,
        "num_train_timesteps": config.num_train_timesteps,
        "invert_sigmas": config.invert_sigmas,
    }


guarded = between_canaries(launch_flow_match_schedule, config=DEFAULT_CONFIG)


def launch(num_inference_steps: int, sigmas=None, *, shift_terminal=None, device=None, **rest):
    """The launcher, with the arguments of the operator."""
    sigmas = torch.empty(0, device=device) if sigmas is None else sigmas
    defaults = {"time_shift": "dynamic", "num_train_timesteps": 1000.0, "invert_sigmas": False}
    return guarded(num_inference_steps, sigmas, shift_terminal=shift_terminal or 0.0, **defaults | rest)


IMPLEMENTATIONS = [
    pytest.param(launch, id="launcher", marks=pytest.mark.triton),
    pytest.param(flow_match_schedule, id="op"),
]


def assert_same(actual: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert_bit_equal(one.cpu(), other)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_schedule_is_stocks_to_the_bit(run, name, device):
    for image_seq_len in IMAGE_SEQ_LENS if "static" not in name else IMAGE_SEQ_LENS[:1]:
        arguments = op_arguments(CONFIGS[name], image_seq_len)
        for steps in STEPS:
            expected = stock_schedule(CONFIGS[name], np.linspace(1.0, 1 / steps, steps), image_seq_len)
            assert_same(run(steps, **arguments, device=device), expected)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("sigmas", CUSTOM_SIGMAS.values(), ids=CUSTOM_SIGMAS)
@pytest.mark.parametrize("name", CONFIGS)
def test_custom_sigmas_are_shifted_and_stretched_as_stock_does(run, name, sigmas, device):
    expected = stock_schedule(CONFIGS[name], sigmas, 1024)
    given = torch.tensor(sigmas, dtype=torch.float32, device=device)
    before = given.clone()
    actual = run(len(sigmas), given, **op_arguments(CONFIGS[name], 1024))
    assert_same(actual, expected)
    assert torch.equal(given, before)
    assert all(out.untyped_storage().data_ptr() != given.untyped_storage().data_ptr() for out in actual)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if "inverted" not in name])
def test_one_step_goes_from_noise_to_picture(run, name, device):
    """Where stock stretches it divides 0 by 0; everywhere else it agrees."""
    sigmas, timesteps = run(1, **op_arguments(CONFIGS[name], 1024), device=device)
    assert sigmas.tolist() == [1.0, 0.0]
    assert timesteps.tolist() == [CONFIGS[name].get("num_train_timesteps", 1000.0)]
    with np.errstate(invalid="ignore"):
        stock = stock_schedule(CONFIGS[name], [1.0], 1024)
    if CONFIGS[name].get("shift_terminal"):
        assert stock[0][0].isnan()
    else:
        assert_same((sigmas, timesteps), stock)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_the_last_sigma_is_set_and_not_computed(run, device):
    """As numpy's linspace does; 38,335 is the lowest step count at which fp32 shows the difference."""
    config, steps = CONFIGS["static shift 1"], 38_335
    expected = stock_schedule(config, np.linspace(1.0, 1 / steps, steps), 1024)
    assert_same(run(steps, **op_arguments(config, 1024), device=device), expected)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_the_timesteps_of_20_steps_at_512_pixels(run, device):
    sigmas, timesteps = run(20, **op_arguments(QWEN_IMAGE, 1024), device=device)
    golden = [1000, 968.166565, 934.949707, 900.257141, 863.988281, 826.033325, 786.27179, 744.571655, 700.787415]
    golden += [654.759033, 606.309204, 555.241882, 501.339081, 444.357697, 384.026459, 320.040894, 252.058624]
    golden += [179.693161, 102.506401, 19.9999809]
    assert torch.equal(timesteps.cpu(), torch.tensor(golden))
    assert sigmas[-1] == 0


@pytest.mark.triton
@pytest.mark.parametrize("steps", [1, 3, 4, 20, 63, 64])
def test_nothing_outside_the_buffers_is_touched(steps, device):
    given = torch.linspace(1.0, 0.1, steps, device=device)
    arguments = op_arguments(QWEN_IMAGE, 1024)
    canaries = Canaries()
    outputs = launch(steps, canaries.copy(given), **arguments)
    canaries.check()
    assert all(out.isfinite().all() for out in outputs)
    assert_same(outputs, flow_match_schedule(steps, given.cpu(), **arguments))


BAD = {
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps: 0"),
    "negative steps": ({"num_inference_steps": -3}, "num_inference_steps: -3"),
    "too few sigmas": ({"sigmas": torch.ones(3)}, "sigmas: 3 values for num_inference_steps = 4"),
    "fp64 sigmas": ({"sigmas": torch.ones(4, dtype=torch.float64)}, "sigmas: .*torch.float64"),
    "sigma matrix": ({"sigmas": torch.ones(2, 2)}, r"sigmas: got \(2, 2\)"),
    "strided sigmas": ({"sigmas": torch.ones(8)[::2]}, "sigmas: .*contiguous"),
    "sigmas elsewhere": ({"sigmas": torch.ones(4), "device": "meta"}, "device: meta"),
    "unknown time shift": ({"time_shift": "cubic"}, "time_shift: 'cubic'"),
    "shift of 0": ({"shift": 0.0}, "shift: 0.0"),
    "shift not a number": ({"shift": float("nan")}, "shift: nan"),
    "terminal of 1": ({"shift_terminal": 1.0}, "shift_terminal: 1.0"),
    "negative terminal": ({"shift_terminal": -0.1}, "shift_terminal: -0.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        flow_match_schedule(**{"num_inference_steps": 4, "shift": 1.7} | changes)


def test_opcheck(device):
    op = torch.ops.qwen_fast.flow_match_schedule.default
    for sigmas in (torch.empty(0, device=device), torch.linspace(1.0, 0.1, 20, device=device)):
        torch.library.opcheck(op, (20, sigmas, 1.7, "dynamic", 0.02, 1000.0, False))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    torch.compiler.reset()
    run = functools.partial(flow_match_schedule, shift=1.7, shift_terminal=0.02, device=device)
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for steps in (4, 20):
        assert_same(tuple(out.cpu() for out in compiled(steps)), tuple(out.cpu() for out in run(steps)))


@pytest.mark.gpu
def test_no_host_synchronisation(device):
    arguments = op_arguments(QWEN_IMAGE, 1024)
    flow_match_schedule(20, **arguments, device=device)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        flow_match_schedule(20, **arguments, device=device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
