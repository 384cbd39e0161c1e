"""The driver's parts against stock diffusers: schedule, sampler, one step's forwards of the transformer, whole pipeline.

    pytest benchmarks/parts/bench_driver.py --benchmark-only [-k "sampler and not compiled"]

On a GPU the clock is the wall's and waits for the device at both ends, since the host's work is part of these. The models
are small on a CPU (4 layers 512 wide) and of the real width, with few layers, on a GPU; `qwen-fast bench` takes the whole one.
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import retrieve_timesteps

import qwen_fast
from qwen_fast.common.state import State
from qwen_fast.denoise.step import sampler_step
from qwen_fast.schedule import Schedule, calculate_mu
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG
from qwen_fast.testing import build_checkpoint
from qwen_fast.transformer.attach import detach
from qwen_fast_kernels.cfg_euler_step import cfg_euler_step_reference
from qwen_fast_kernels.flow_match_schedule import flow_match_schedule_reference

from ..operators.arguments import TRAFFIC
from ..operators.bench_operators import checked, compiled, guided_step, scheduler_at
from ..operators.suite import Run, clock, sets
from ..operators.work import Piece, count
from ..shared.budget import assert_bit_equal
from ..shared.stock import assert_same_latents, draw, in_float64, in_fp32, stock
from .transformer import StepForwards

pytestmark = clock(host=True)
STEPS, SCALE = 20, 4.0
FOUR = ("fast", "reference", "compiled", "stock")


def image_tokens(device: torch.device) -> int:
    return 4096 if device.type == "cuda" else 256


# Schedule -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", FOUR)
def test_schedule(benchmark, measure, device, variant):
    """From a config and a picture's size to sigmas and timesteps on the device."""
    tokens = image_tokens(device)
    mu = calculate_mu(tokens, QWEN_IMAGE_SCHEDULER_CONFIG)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE_SCHEDULER_CONFIG)
    none = torch.empty(0, device=device)
    arguments = (STEPS, none, math.exp(mu), "dynamic", QWEN_IMAGE_SCHEDULER_CONFIG["shift_terminal"], 1000.0, False)

    def from_stock() -> tuple[torch.Tensor, torch.Tensor]:
        retrieve_timesteps(scheduler, STEPS, device, sigmas=np.linspace(1.0, 1 / STEPS, STEPS), mu=mu)
        return scheduler.sigmas, scheduler.timesteps

    def from_config() -> tuple[torch.Tensor, torch.Tensor]:
        schedule = Schedule.from_config(QWEN_IMAGE_SCHEDULER_CONFIG, STEPS, image_seq_len=tokens, device=device)
        return schedule.sigmas, schedule.timesteps

    run = {
        "fast": from_config,
        "stock": from_stock,
        "reference": functools.partial(flow_match_schedule_reference, *arguments),
        "compiled": functools.partial(compiled(flow_match_schedule_reference), *arguments),
    }[variant]

    def check(result: tuple) -> dict[str, float]:
        if variant == "fast":
            for ours, theirs in zip(result, from_stock(), strict=True):
                assert_bit_equal(ours.cpu(), theirs.cpu())
        same = flow_match_schedule_reference(*arguments)
        # The operator computes in fp32 whatever it gets, since stock does.
        return checked([values.to(device) for values in result], same, [values.double() for values in same])

    benchmark.group = f"schedule: {STEPS} steps {device.type}"
    pieces = [Piece("flow_match_schedule", *TRAFFIC["flow_match_schedule"](*arguments))]
    measure([run], check, pieces, dtype=torch.float32, variant=variant, size=f"{STEPS} steps, {tokens} image tokens")


# Sampler --------------------------------------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """What a sampler sees in one run: `[1, S_img, 64]` latents, cond and uncond of each step, `[T + 1]` sigmas."""

    latents: torch.Tensor
    cond: list[torch.Tensor]
    uncond: list[torch.Tensor]
    sigmas: torch.Tensor

    @classmethod
    def random(cls, device: torch.device, dtype: torch.dtype, seed: int) -> "Predictions":
        tokens, generator = image_tokens(device), torch.Generator().manual_seed(seed)
        noise = torch.randn(2 * STEPS + 1, 1, tokens, 64, generator=generator).to(device, dtype)
        schedule = Schedule.from_config(QWEN_IMAGE_SCHEDULER_CONFIG, STEPS, image_seq_len=tokens, device=device)
        return cls(noise[0], list(noise[1 : STEPS + 1]), list(noise[STEPS + 1 :]), schedule.sigmas)

    def double(self) -> "Predictions":
        return Predictions(self.latents.double(), *([p.double() for p in ps] for ps in self[1:3]), self.sigmas.double())


def sampled(step: Callable[..., torch.Tensor], given: Predictions) -> torch.Tensor:
    """The latents after all steps of a sampler whose step reads its index from the device."""
    latents, step_index = given.latents, torch.zeros(1, dtype=torch.int32, device=given.latents.device)
    dtype = torch.promote_types(latents.dtype, torch.float32)
    scale = torch.full((1,), SCALE, dtype=dtype, device=latents.device)
    for cond, uncond in zip(given.cond, given.uncond, strict=True):
        latents = step(latents, cond, uncond, given.sigmas, step_index, scale)
        step_index.add_(1)
    return latents


def sampler(variant: str, given: Predictions) -> Run:
    if variant == "stock":
        scheduler = scheduler_at(given.sigmas)
        step = guided_step(scheduler)

        def run() -> torch.Tensor:
            scheduler._step_index, latents = 0, given.latents
            for cond, uncond, timestep in zip(given.cond, given.uncond, scheduler.timesteps, strict=True):
                latents = step(latents, cond, uncond, timestep, SCALE)
            return latents

        return run
    if variant == "fast":
        state = State()
        return lambda: sampled(lambda latents, cond, uncond, *rest: sampler_step(state, latents, (cond, uncond), *rest), given)
    step = compiled(cfg_euler_step_reference) if variant == "compiled" else cfg_euler_step_reference
    return lambda: sampled(step, given)


@pytest.mark.parametrize("variant", FOUR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@torch.no_grad()
def test_sampler(benchmark, measure, device, dtype, variant):
    """All steps of a run with guidance, on recorded predictions."""
    given = Predictions.random(device, dtype, 0)
    moved, flops = TRAFFIC["cfg_euler_step"](given.latents)
    others = [Predictions.random(device, dtype, seed) for seed in range(1, sets(device, moved * STEPS))]

    def check(result: torch.Tensor) -> dict[str, float]:
        oracle = sampled(cfg_euler_step_reference, given.double())
        return checked([result], [sampled(cfg_euler_step_reference, given)], [oracle])

    benchmark.group = f"sampler: {STEPS} steps, {given.latents.shape[1]} tokens, CFG, {dtype} {device.type}"
    pieces = [Piece("cfg_euler_step", moved, flops)] * STEPS
    info = {"variant": variant, "shapes": [list(given.latents.shape)]}
    measure([sampler(variant, one) for one in (given, *others)], check, pieces, dtype=dtype, **info)


# Transformer ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forwards(device) -> tuple[StepForwards, list[torch.Tensor], list[torch.Tensor], list[Piece]]:
    """One step's forwards on one model; stock's predictions, their float64 oracle, and the work."""
    sizes = ("four layers", 1024, (30, 6), torch.bfloat16) if device.type == "cuda" else ("middle", 256, (14, 6), torch.float32)
    with torch.no_grad():
        case = StepForwards(*sizes, device)
        exact = stock_of(case)
        exact.model.double()
        exact.latents, exact.timestep = case.latents.double(), case.timestep.double()
        exact.texts = [text.double() for text in case.texts]
        with in_float64():
            oracle = exact.stock()
        case.from_table_packed()  # fills the table, which is no part of a step
        return case, case.stock(), oracle, count(case.from_table_packed)


def stock_of(case: StepForwards) -> StepForwards:
    """The same forwards on a copy of the model that is diffusers' own."""
    other = copy.copy(case)
    other.model = copy.deepcopy(case.model)
    detach(other.model, case.state)
    return other


@pytest.mark.parametrize("variant", ["fast", "layers", "compiled", "stock"])
@torch.no_grad()
def test_forward(benchmark, measure, device, forwards, variant):
    """Both predictions of a step; "fast" as the pipeline's default computes them, "layers" with all of stock's work."""
    case, expected, oracle, pieces = forwards
    if variant in ("compiled", "stock"):
        theirs = stock_of(case)
        if variant == "compiled":
            theirs.model.compile_repeated_blocks()
        run = theirs.stock
    else:
        run = case.from_table_packed if variant == "fast" else case.layers
    benchmark.group = f"transformer: one step with CFG {device.type}"
    info = {"variant": variant, "shapes": [list(case.latents.shape), *(list(text.shape) for text in case.texts)]}
    measure([run], lambda result: checked(result, expected, oracle), pieces, dtype=case.latents.dtype, **info)


# Pipeline -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(device, tmp_path_factory):
    folder, common = tmp_path_factory.mktemp("checkpoint") / "model", {"attention_head_dim": 64, "num_attention_heads": 8}
    if device.type == "cpu":
        return build_checkpoint(folder, num_layers=4, **common)
    real = {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584, "vae_base_dim": 96}
    return build_checkpoint(folder, num_layers=2, dtype=torch.bfloat16, **real)


@pytest.fixture(scope="module")
def picture(device) -> dict:
    """Arguments of the call."""
    side, steps = (1024, 8) if device.type == "cuda" else (128, 4)
    sizes = {"height": side, "width": side, "num_inference_steps": steps}
    return sizes | {"prompt": "a red circle", "negative_prompt": "blurry", "true_cfg_scale": SCALE}


def pipeline(checkpoint, device: torch.device, variant: str) -> diffusers.DiffusionPipeline:
    pipe = stock(checkpoint, torch.bfloat16 if device.type == "cuda" else torch.float32).to(device)
    if variant == "compiled":
        pipe.transformer.compile_repeated_blocks()
    return qwen_fast.enable(pipe) if variant == "fast" else pipe


@pytest.fixture(scope="module")
def expected(checkpoint, device, picture) -> tuple[torch.Tensor, torch.Tensor, list[Piece]]:
    """Stock's latents, what they are in fp32, and the work of a picture."""
    pipe = pipeline(checkpoint, device, "stock")
    latents = draw(pipe, output_type="latent", **picture)
    exact = latents if latents.dtype == torch.float32 else in_fp32(pipe, 7, latents.dtype, output_type="latent", **picture)
    fast = qwen_fast.enable(pipe)
    draw(fast, **picture)
    return latents, exact, count(lambda: draw(fast, **picture))


@pytest.mark.parametrize("variant", ["fast", "compiled", "stock"])
def test_pipeline(benchmark, measure, device, checkpoint, picture, expected, variant):
    """From the prompt to the picture."""
    latents, exact, pieces = expected
    pipe = pipeline(checkpoint, device, variant)

    def check(_image: object) -> dict[str, float]:
        actual = draw(pipe, output_type="latent", **picture)
        assert_same_latents(actual, latents, exact)
        apart = (actual.double() - latents.double()).abs()
        size = latents.double().square().mean().sqrt()
        return {
            "max_error": (apart.max() / latents.abs().max()).item(),
            "rms_error": (apart.square().mean().sqrt() / size).item(),
        }

    size = f"{picture['width']}x{picture['height']}, {picture['num_inference_steps']} steps, CFG"
    benchmark.group = f"pipeline: {size} {device.type}"
    run = functools.partial(draw, pipe, **picture)
    measure([run], check, pieces, dtype=latents.dtype, variant=variant, size=size, shapes=[list(latents.shape)])
