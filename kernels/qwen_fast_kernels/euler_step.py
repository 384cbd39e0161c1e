"""One flow-matching Euler step, the step size looked up on the device.

    latents_next = latents + (sigmas[i + 1] - sigmas[i]) * velocity,   i = step_index

Grid: one program per BLOCK elements.
"""

import torch

from ._launch import launch
from ._library import FLOATS, FLOATS_OF_CPU, register
from ._triton import require_triton, tl, triton

DEFAULT_CONFIG = {"BLOCK": 1024, "num_warps": 4}


def euler_step_reference(
    latents: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor, step_index: torch.Tensor
) -> torch.Tensor:
    compute_dtype = torch.promote_types(latents.dtype, torch.float32)
    sigmas = sigmas.to(compute_dtype)
    # diffusers multiplies a 0-dim fp32 dt with the prediction: type promotion rounds dt *and* the product to the model's
    # dtype before the fp32 addition. index_select gives a 1-D dt, which would promote, hence the explicit rounding.
    dt = (sigmas.index_select(0, step_index + 1) - sigmas.index_select(0, step_index)).to(latents.dtype)
    update = dt * velocity.to(latents.dtype)
    return (latents.to(compute_dtype) + update).to(latents.dtype)


# `numel` is, since the mask has to be known to be equal for 16 bytes: at 64 channels it is always a multiple of 16.
@triton.jit(do_not_specialize=["step_index_ptr", "num_steps"])
def _euler_step_kernel(out_ptr, latents_ptr, velocity_ptr, sigmas_ptr, step_index_ptr, num_steps, numel, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offsets < numel
    # An index outside the schedule must not read past the table: it makes the latents NaN, which nobody overlooks.
    step_index = tl.load(step_index_ptr)
    in_schedule = (step_index >= 0) & (step_index < num_steps)
    sigma = tl.load(sigmas_ptr + step_index, mask=in_schedule, other=float("nan"))
    sigma_next = tl.load(sigmas_ptr + step_index + 1, mask=in_schedule, other=float("nan"))

    dtype = out_ptr.dtype.element_ty
    latents = tl.load(latents_ptr + offsets, mask=mask).to(tl.float32)
    velocity = tl.load(velocity_ptr + offsets, mask=mask).to(tl.float32)
    dt = (sigma_next - sigma).to(dtype).to(tl.float32)
    update = (dt * velocity).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (latents + update).to(dtype), mask=mask)


def launch_euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor, step_index: torch.Tensor, *, config: dict
) -> torch.Tensor:
    latents, velocity = latents.contiguous(), velocity.contiguous()
    out = torch.empty_like(latents)
    grid = (-(-out.numel() // config["BLOCK"]),)
    # Contraction to fma would skip the rounding of the product that stock diffusers performs.
    launch(
        _euler_step_kernel,
        grid,
        (out, latents, velocity, sigmas, step_index),
        (sigmas.numel() - 1,),
        (out.numel(),),
        **config,
        enable_fp_fusion=False,
    )
    return out


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, sigmas: torch.Tensor, step_index: torch.Tensor) -> torch.Tensor:
    """One flow-matching Euler step, `latents + (sigmas[i + 1] - sigmas[i]) * velocity`.

    Every intermediate is rounded to the dtype of `latents`, as diffusers rounds it when latents and prediction share the
    model's dtype. fp32 latents with a bf16 or fp16 velocity keep the whole step in fp32 (the precise sampler).

    Args:
        latents (Tensor): any shape with at least one element, bf16|fp16|fp32 (fp64 on the CPU). Copied if not contiguous.
        velocity (Tensor): shape of `latents`; the model's prediction, in the dtype of `latents` or a narrower one.
        sigmas (Tensor): `[T + 1]` fp32, contiguous, noise fraction in [0, 1], ends with the terminal sigma.
        step_index (Tensor): `[1]` int32|int64 in [0, T), read on the device.
    Returns:
        Tensor: shape and dtype of `latents`, contiguous, never an alias. On CUDA an index outside [0, T) gives NaN.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, with the offending value; on the CPU also a step index
            outside [0, T).
        RuntimeError: CUDA tensors without Triton.
    Error: bit-equal to stock diffusers in bf16, fp16 and fp32.
    Traffic: 3 * numel * itemsize bytes; 2 * numel FLOPs.
    Source: diffusers 0.42.1, schedulers/scheduling_flow_match_euler_discrete.py, FlowMatchEulerDiscreteScheduler.step.
    """
    return torch.ops.qwen_fast.euler_step(latents, velocity, sigmas, step_index)


def _check(latents, velocity, sigmas, step_index) -> None:
    allowed = FLOATS if latents.is_cuda else FLOATS_OF_CPU
    if latents.dtype not in allowed:
        raise ValueError(f"latents: dtype {latents.dtype} is not supported on {latents.device.type}; use one of {allowed}.")
    if latents.numel() == 0:
        raise ValueError(f"latents: shape {tuple(latents.shape)} holds no element; at least one is needed.")
    if velocity.shape != latents.shape:
        raise ValueError(f"velocity: shape {tuple(velocity.shape)} differs from the latents' {tuple(latents.shape)}.")
    if not velocity.is_floating_point() or torch.promote_types(velocity.dtype, latents.dtype) != latents.dtype:
        raise ValueError(
            f"velocity: dtype {velocity.dtype} is not a float type that {latents.dtype} latents hold; cast it first."
        )
    if sigmas.dim() != 1 or sigmas.numel() < 2 or sigmas.dtype != torch.float32 or not sigmas.is_contiguous():
        raise ValueError(
            f"sigmas: got {tuple(sigmas.shape)} {sigmas.dtype}; a contiguous fp32 table [T + 1] with T >= 1 is needed."
        )
    if step_index.shape != (1,) or step_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"step_index: got {tuple(step_index.shape)} {step_index.dtype}; int32 or int64 [1] is needed.")
    for name, tensor in (("velocity", velocity), ("sigmas", sigmas), ("step_index", step_index)):
        if tensor.device != latents.device:
            raise ValueError(f"{name}: on {tensor.device}, but latents are on {latents.device}; move it there first.")


def _euler_step_cuda(latents, velocity, sigmas, step_index):
    _check(latents, velocity, sigmas, step_index)
    require_triton("euler_step")
    return launch_euler_step(latents, velocity, sigmas, step_index, config=DEFAULT_CONFIG)


def _euler_step_cpu(latents, velocity, sigmas, step_index):
    _check(latents, velocity, sigmas, step_index)
    if not 0 <= int(step_index) < sigmas.numel() - 1:
        raise ValueError(f"step_index: {int(step_index)} is outside the schedule of {sigmas.numel() - 1} steps.")
    return euler_step_reference(latents.contiguous(), velocity, sigmas, step_index)


def _euler_step_fake(latents, velocity, sigmas, step_index):
    _check(latents, velocity, sigmas, step_index)
    return torch.empty_like(latents, memory_format=torch.contiguous_format)


register(
    "euler_step(Tensor latents, Tensor velocity, Tensor sigmas, Tensor step_index) -> Tensor",
    cuda=_euler_step_cuda,
    cpu=_euler_step_cpu,
    fake=_euler_step_fake,
    by_torch=euler_step_reference,
)
