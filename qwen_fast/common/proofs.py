"""Which kernels a pipeline needs, and that each has proved itself on its GPU before the first step.

The pipelines ask once per call, before any work on the GPU, for all that they and their models need: the kernels that have no
verdict on this card prove themselves in one child process. A kernel that is wrong is replaced for this process: an operator of
the registry by torch's operators, the joint attention by torch's own (see attention.py).
"""

import functools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from qwen_fast_kernels import proof
from qwen_fast_kernels._arguments import Size
from qwen_fast_kernels._kept import Kept, environment
from qwen_fast_kernels._library import replace_kernel
from qwen_fast_kernels.proof import Problem, Verdict

from .hardware import indexed, unsupported_reason
from .state import State, logger

DEVICES = ("cuda",)  # on the CPU torch's operators run anyway
# Two sequences: several tiles of each kind of row, full ones and tails.
ROWS = (37, 24), (300, 211)
ATTENTION_ROWS = (130, 37), (500, 700)
ATTENTION_HEADS = 24  # the kernel is the same for any number; these fill a GPU
LATENT_ROWS, PIXELS = 517, 1517
QWEN_IMAGE_LATENTS, QWEN_IMAGE_HEADS = 64, (24, 128)
QWEN_IMAGE_NORMS = (96, True), (192, True), (384, False), (384, True)

_VERDICTS: dict[tuple[torch.device, Problem], Verdict] = {}
_LOCK = threading.RLock()


# Problems -------------------------------------------------------------------------------------------------------------


class ScheduleFlags(NamedTuple):
    """What a scheduler's config decides of the schedule's kernel."""

    dynamic: bool = True
    stretch: bool = True
    invert: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ScheduleFlags":
        keys = "use_dynamic_shifting", "shift_terminal", "invert_sigmas"
        return cls(*(bool(config.get(key)) for key in keys))


QWEN_IMAGE_SCHEDULE = ScheduleFlags()


@functools.cache
def sampler_problems(
    dtype: torch.dtype, channels: int, flags: ScheduleFlags = QWEN_IMAGE_SCHEDULE, precise: bool = False
) -> tuple[Problem, ...]:
    """The schedule, and both kinds of Euler step over latents of so many channels, whose model computes in `dtype`."""
    latents, nothing = (torch.float32 if precise else dtype), Size((), (1,), 1, 1)
    shape = (2, LATENT_ROWS, channels)
    schedule = (1.7, "dynamic" if flags.dynamic else "static", 0.02 if flags.stretch else 0.0, 1000.0, flags.invert)
    return (
        *(
            Problem.of("flow_match_schedule", torch.float32, nothing, steps=50, own=own, arguments=schedule)
            for own in (False, True)
        ),
        *(
            Problem.of(op, latents, nothing, shape=shape, **({"prediction_dtype": dtype} if precise else {}))
            for op in ("euler_step", "cfg_euler_step")
        ),
    )


@functools.cache
def attention_problem(dtype: torch.dtype, head_dim: int, masked: bool = False) -> Problem:
    """The joint attention of packed sequences, or with a mask of keys."""
    size = Size(*ATTENTION_ROWS, ATTENTION_HEADS, head_dim)
    return Problem.of("joint_attention", dtype, size, layout="rows", masked=masked)


@functools.cache
def transformer_problems(dtype: torch.dtype, heads: int, head_dim: int) -> tuple[Problem, ...]:
    """All that the fused transformer launches in this dtype and width."""
    size, found = Size(*ROWS, heads, head_dim), []
    clips = (False, True) if dtype == torch.float16 else (False,)  # as diffusers
    for packed in (False, True):  # each token at its own condition, or all at the step's
        found.append(Problem.of("ada_layer_norm", dtype, size, packed=packed))
        for op in ("gated_residual", "gated_residual_ada_layer_norm"):
            found += [Problem.of(op, dtype, size, packed=packed, clip=clip) for clip in clips]
    # With what a ControlNet adds.
    found.append(Problem.of("gated_residual_ada_layer_norm", dtype, size, packed=False, clip=clips[-1], added=True))
    found.append(Problem.of("qk_norm_rope", dtype, size, layout="rows"))
    # Alone, and with LoRA: ranks that wide loads take and others are two kernels, both of which have a tail here.
    found += [Problem.of("linear_gelu", dtype, size, expansion=1, **lora) for lora in ({}, {"ranks": 48}, {"ranks": 20})]
    found += [attention_problem(dtype, head_dim, masked) for masked in (False, True)]
    return tuple(found)


@functools.cache
def vae_problems(dtype: torch.dtype, norms: tuple[tuple[int, bool], ...]) -> tuple[Problem, ...]:
    """The norms of a VAE, widths as of `vae_norms`: of a stream, of one whose last branch is still to be added, and within a
    block, where no attention stands, of a convolution without its bias."""
    return tuple(
        Problem.of("rms_norm_silu", dtype, Size((), (PIXELS,), 1, width), silu=silu, bias=bias, residual=residual)
        for width, silu in norms
        for bias, residual in ((False, False), (True, True), *([(True, False)] if silu else []))
    )


def vae_norms(vae: nn.Module) -> tuple[tuple[int, bool], ...]:
    """Width of each norm of `vae` and whether an activation follows it, each pair once."""
    before_attention = {id(module.norm) for module in vae.modules() if hasattr(module, "to_qkv")}
    norms = [module for module in vae.modules() if isinstance(getattr(module, "gamma", None), nn.Parameter)]
    return tuple(sorted({(norm.gamma.numel(), id(norm) not in before_attention) for norm in norms}))


def all_problems() -> list[Problem]:
    """Every operator at Qwen-Image's widths in every dtype, those included that no pipeline uses by default."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for stretch in (True, False):  # the base model's schedule, and Lightning's
            for precise in (False, True):
                found += sampler_problems(dtype, QWEN_IMAGE_LATENTS, ScheduleFlags(stretch=stretch), precise)
        found += transformer_problems(dtype, *QWEN_IMAGE_HEADS)
        found.append(Problem.of("linear_gated_residual", dtype, Size(*ROWS, *QWEN_IMAGE_HEADS), expansion=1))
        found += vae_problems(dtype, QWEN_IMAGE_NORMS)
    return list(dict.fromkeys(found))


# Verdicts -------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Where this user's verdicts are kept; None where there is no home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "qwen_fast" / "cards"
    except RuntimeError:
        return None


@functools.cache
def kept(device: torch.device) -> Kept:
    """What is known about a device, by key: its kernels' verdicts, and whatever else was measured on it."""
    return Kept(device, cache_folder())


def require(state: State | None, problems: Iterable[Problem], device: torch.device) -> None:
    """Make sure that every problem has its verdict and every wrong kernel is replaced; note both in `state`.

    Raises:
        RuntimeError: a kernel is wrong and the pipeline is strict.
    """
    if device.type not in DEVICES or unsupported_reason(device) is not None:
        return
    device = indexed(device)
    problems = tuple(problems)
    with _LOCK:
        new = [problem for problem in problems if (device, problem) not in _VERDICTS]
        if new:
            found = proof.prove(new, device, kept(device), tell=logger.warning)
            _VERDICTS.update({(device, problem): verdict for problem, verdict in found.items()})
            _replace({problem: verdict.reason for problem, verdict in found.items() if not verdict.right}, device)
    if state is None:
        return
    for problem in problems:
        state.verdicts[problem] = verdict = _VERDICTS[device, problem]
        if not verdict.right and state.options.strict:
            raise RuntimeError(f"strict=True, and a kernel is wrong on this GPU: {problem}: {verdict.reason}.")


def require_transformer(state: State, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """`require` for a model that is about to compute in `dtype`: cheap enough for every forward."""
    if device.type in DEVICES:
        key = device, dtype
        if key not in state.proved:
            config = model.config
            require(state, transformer_problems(dtype, config.num_attention_heads, config.attention_head_dim), device)
            state.proved.add(key)


def require_vae(state: State, vae: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """`require` for a VAE that is about to code a picture."""
    if device.type in DEVICES:
        require(state, vae_problems(dtype, vae_norms(vae)), device)


@functools.cache
def attention_is_right(device: torch.device, dtype: torch.dtype, head_dim: int, masked: bool = False) -> bool:
    """Whether the attention kernel may be used on this GPU with these flags; proves it if nobody has asked yet."""
    if device.type not in DEVICES:
        return True
    problem = attention_problem(dtype, head_dim, masked)
    require(None, [problem], device)
    verdict = _VERDICTS.get((indexed(device), problem))
    return verdict is None or verdict.right  # None: no kernel runs there, which its operator says


def prove_again(device: torch.device | str, each: Callable[[Problem, Verdict], None]) -> None:
    """Let every kernel prove itself anew, whatever is known of it, and keep the verdicts for other processes."""
    device = indexed(torch.device(device))
    proof.prove(all_problems(), device, kept(device), again=True, tell=logger.warning, each=each)


def _replace(wrong: dict[Problem, str], device: torch.device) -> None:
    """Put torch's operators in the place of wrong kernels, and say so once for each operator and dtype."""
    said = set()
    for problem, reason in wrong.items():
        replace_kernel(problem.op, device, getattr(torch, problem.dtype))
        if (problem.op, problem.dtype) not in said:
            said.add((problem.op, problem.dtype))
            logger.warning(
                "%s is wrong on %s in %s and torch's operators take its place in this process: %s (proved with %s; "
                "`qwen-fast doctor --prove` tries again).",
                problem.op,
                environment(device)["card"],
                problem.dtype,
                reason,
                problem,
            )
