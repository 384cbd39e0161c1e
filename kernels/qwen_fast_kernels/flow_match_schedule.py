"""The flow-matching schedule of Qwen-Image, from step count to sigmas and timesteps, in one launch.

    sigma = linspace(1, 1/T, T), or the caller's
    sigma = shift / (shift + 1/sigma - 1)                            dynamic shift; static: shift s / (1 + (shift - 1) s)
    sigma = 1 - (1 - sigma) (1 - shift_terminal) / (1 - sigma[-1])   stretch, so that the last one is shift_terminal
    timestep = num_train_timesteps * sigma;   sigmas = [sigma, 0]

Grid: one program.
"""

import torch

from ._launch import launch
from ._library import register
from ._triton import require_triton, tl, triton

DEFAULT_CONFIG = {"num_warps": 4}
TIME_SHIFTS = ("dynamic", "static")


def flow_match_schedule_reference(
    num_inference_steps: int,
    sigmas: torch.Tensor,
    shift: float,
    time_shift: str,
    shift_terminal: float,
    num_train_timesteps: float,
    invert_sigmas: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if sigmas.numel():
        sigma = sigmas.clone()
    else:
        # numpy's linspace, to the bit: fp64 i * step + 1, the endpoint set and not computed, then one rounding to fp32.
        index = torch.arange(num_inference_steps, dtype=torch.float64, device=sigmas.device)
        stop = 1.0 / num_inference_steps
        step = (stop - 1.0) / max(num_inference_steps - 1, 1)
        sigma = torch.where(index == num_inference_steps - 1, stop, index * step + 1.0).to(torch.float32)
    one = torch.ones_like(sigma)
    if time_shift == "dynamic":
        sigma = (one * shift) / (shift + (one / sigma - 1.0))
    else:
        sigma = (shift * sigma) / (1.0 + (shift - 1.0) * sigma)
    if shift_terminal:
        complement = 1.0 - sigma
        last = complement.narrow(0, num_inference_steps - 1, 1)
        stretched = 1.0 - complement / (last / (1.0 - shift_terminal))
        # A schedule whose last sigma is 1 (a single step) cannot be stretched: diffusers divides 0 by 0 there.
        sigma = torch.where(last == 0.0, sigma, stretched)
    if invert_sigmas:
        sigma = 1.0 - sigma
    terminal = one[:1] if invert_sigmas else torch.zeros_like(one[:1])
    return torch.cat([sigma, terminal]), sigma * num_train_timesteps


@triton.jit(do_not_specialize=["num_inference_steps"])
def _flow_match_schedule_kernel(
    sigmas_out_ptr,
    timesteps_out_ptr,
    sigmas_ptr,
    num_inference_steps,
    shift,
    shift_minus_one,
    one_minus_terminal,
    num_train_timesteps,
    HAS_SIGMAS: tl.constexpr,
    DYNAMIC: tl.constexpr,
    STRETCH: tl.constexpr,
    INVERT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)  # [BLOCK], BLOCK > num_inference_steps
    mask = index < num_inference_steps
    is_last = index == num_inference_steps - 1
    if HAS_SIGMAS:
        sigma = tl.load(sigmas_ptr + index, mask=mask, other=1.0)
    else:
        steps = num_inference_steps.to(tl.float64)  # numpy's linspace in fp64
        stop = 1.0 / steps
        step = (stop - 1.0) / tl.where(steps > 1.0, steps - 1.0, 1.0)
        sigma = tl.where(is_last, stop, index.to(tl.float64) * step + 1.0).to(tl.float32)
    ones = tl.full((BLOCK,), 1.0, tl.float32)
    if DYNAMIC:
        sigma = tl.div_rn(ones * shift, shift + (tl.div_rn(ones, sigma) - 1.0))
    else:
        sigma = tl.div_rn(shift * sigma, 1.0 + shift_minus_one * sigma)
    if STRETCH:
        complement = 1.0 - sigma
        last = tl.sum(tl.where(is_last, complement, 0.0), axis=0) * ones  # [BLOCK], all equal
        stretched = 1.0 - tl.div_rn(complement, tl.div_rn(last, ones * one_minus_terminal))
        sigma = tl.where(last == 0.0, sigma, stretched)
    terminal = 0.0
    if INVERT:
        sigma = 1.0 - sigma
        terminal = 1.0
    tl.store(sigmas_out_ptr + index, tl.where(mask, sigma, terminal), mask=index <= num_inference_steps)
    tl.store(timesteps_out_ptr + index, sigma * num_train_timesteps, mask=mask)


def launch_flow_match_schedule(
    num_inference_steps: int,
    sigmas: torch.Tensor,
    shift: float,
    time_shift: str,
    shift_terminal: float,
    num_train_timesteps: float,
    invert_sigmas: bool,
    *,
    config: dict,
) -> tuple[torch.Tensor, torch.Tensor]:
    sigmas_out = torch.empty(num_inference_steps + 1, dtype=torch.float32, device=sigmas.device)
    timesteps_out = torch.empty(num_inference_steps, dtype=torch.float32, device=sigmas.device)
    # The contract is bit equality with numpy's fp32: no contraction to fma.
    launch(
        _flow_match_schedule_kernel,
        (1,),
        (sigmas_out, timesteps_out, sigmas),
        (num_inference_steps, float(shift), float(shift) - 1.0, 1.0 - float(shift_terminal), float(num_train_timesteps)),
        HAS_SIGMAS=sigmas.numel() > 0,
        DYNAMIC=time_shift == "dynamic",
        STRETCH=shift_terminal != 0,
        INVERT=invert_sigmas,
        BLOCK=1 << num_inference_steps.bit_length(),
        **config,
        enable_fp_fusion=False,
    )
    return sigmas_out, timesteps_out


def flow_match_schedule(
    num_inference_steps: int,
    sigmas: torch.Tensor | None = None,
    *,
    shift: float,
    time_shift: str = "dynamic",
    shift_terminal: float | None = None,
    num_train_timesteps: float = 1000.0,
    invert_sigmas: bool = False,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sigmas and timesteps of FlowMatchEulerDiscreteScheduler, computed on the device without a host synchronisation.

    Args:
        num_inference_steps (int): T >= 1.
        sigmas (Tensor | None): `[T]` fp32, contiguous, the caller's sigmas before shift and stretch; None for
            linspace(1, 1/T, T).
        shift (float): exp(mu) for an exponential time shift, mu for a linear one, the scheduler's `shift` for "static".
        time_shift (str): "dynamic" (shift / (shift + 1/sigma - 1)) or "static" (shift sigma / (1 + (shift - 1) sigma)).
        shift_terminal (float | None): the last sigma after the stretch, in [0, 1); None or 0 for no stretch.
        num_train_timesteps (float): timestep of sigma 1.
        invert_sigmas (bool): 1 - sigma, and 1 as the terminal sigma.
        device (device | None): where to compute when `sigmas` is None; the CPU by default.
    Returns:
        tuple[Tensor, Tensor]: sigmas `[T + 1]` and timesteps `[T]`, fp32, not aliasing the input.
    Raises:
        ValueError: an argument out of range or of the wrong shape, dtype or device, with its value.
        RuntimeError: CUDA without Triton.
    Error: bit-equal to diffusers in fp32. Where diffusers divides 0 by 0 (a last sigma of 1 that should be stretched, as
        in one step) the stretch is left out: one step gives sigmas [1, 0] and timestep [1000].
    Traffic: 4 * (2 T + 1) bytes written, 4 T read with `sigmas`.
    Source: diffusers 0.42.1, schedulers/scheduling_flow_match_euler_discrete.py, set_timesteps, time_shift,
        stretch_shift_to_terminal; the linspace is pipelines/qwenimage/pipeline_qwenimage.py's.
    """
    if sigmas is None:
        sigmas = torch.empty(0, dtype=torch.float32, device=device)
    elif device is not None and torch.device(device).type != sigmas.device.type:
        raise ValueError(f"device: {device}, but sigmas are on {sigmas.device}; move them there first.")
    terminal = 0.0 if shift_terminal is None else float(shift_terminal)
    return torch.ops.qwen_fast.flow_match_schedule(
        num_inference_steps, sigmas, float(shift), time_shift, terminal, float(num_train_timesteps), invert_sigmas
    )


def _check(num_inference_steps, sigmas, shift, time_shift, shift_terminal) -> None:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: {num_inference_steps}; at least 1 is needed.")
    if sigmas.dtype != torch.float32 or sigmas.dim() != 1 or not sigmas.is_contiguous():
        raise ValueError(f"sigmas: got {tuple(sigmas.shape)} {sigmas.dtype}; a contiguous fp32 [T] is needed.")
    if sigmas.numel() not in (0, num_inference_steps):
        raise ValueError(f"sigmas: {sigmas.numel()} values for num_inference_steps = {num_inference_steps}.")
    if time_shift not in TIME_SHIFTS:
        raise ValueError(f"time_shift: {time_shift!r}; use one of {TIME_SHIFTS}.")
    if not 0.0 < shift < float("inf"):
        raise ValueError(f"shift: {shift}; a finite number above 0 is needed.")
    if not 0.0 <= shift_terminal < 1.0:
        raise ValueError(f"shift_terminal: {shift_terminal}; a number in [0, 1) is needed (0: no stretch).")


def _flow_match_schedule_cuda(
    num_inference_steps, sigmas, shift, time_shift, shift_terminal, num_train_timesteps, invert_sigmas
):
    _check(num_inference_steps, sigmas, shift, time_shift, shift_terminal)
    require_triton("flow_match_schedule")
    return launch_flow_match_schedule(
        num_inference_steps,
        sigmas,
        shift,
        time_shift,
        shift_terminal,
        num_train_timesteps,
        invert_sigmas,
        config=DEFAULT_CONFIG,
    )


def _flow_match_schedule_cpu(
    num_inference_steps, sigmas, shift, time_shift, shift_terminal, num_train_timesteps, invert_sigmas
):
    _check(num_inference_steps, sigmas, shift, time_shift, shift_terminal)
    return flow_match_schedule_reference(
        num_inference_steps, sigmas, shift, time_shift, shift_terminal, num_train_timesteps, invert_sigmas
    )


def _flow_match_schedule_fake(
    num_inference_steps, sigmas, shift, time_shift, shift_terminal, num_train_timesteps, invert_sigmas
):
    _check(num_inference_steps, sigmas, shift, time_shift, shift_terminal)
    return sigmas.new_empty(num_inference_steps + 1), sigmas.new_empty(num_inference_steps)


register(
    "flow_match_schedule(int num_inference_steps, Tensor sigmas, float shift, "
    "str time_shift, float shift_terminal, float num_train_timesteps, bool invert_sigmas) -> (Tensor, Tensor)",
    cuda=_flow_match_schedule_cuda,
    cpu=_flow_match_schedule_cpu,
    fake=_flow_match_schedule_fake,
    by_torch=flow_match_schedule_reference,
)
