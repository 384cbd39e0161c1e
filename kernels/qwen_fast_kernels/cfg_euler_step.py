"""True classifier-free guidance with norm rescale and the Euler step, in one pass over the latents.

    combined = uncond + true_cfg_scale * (cond - uncond)
    velocity = combined * |cond| / |combined|                                  norms over the channels of a token
    latents_next = latents + (sigmas[i + 1] - sigmas[i]) * velocity            i = step_index

Grid: one program per BLOCK_TOKENS rows of [B * S_img, C].
"""

import torch

from ._launch import launch
from ._library import FLOATS, FLOATS_OF_CPU, register
from ._triton import require_triton, tl, triton

DEFAULT_CONFIG = {"BLOCK_TOKENS": 16, "num_warps": 4}


def cfg_euler_step_reference(
    latents: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    sigmas: torch.Tensor,
    step_index: torch.Tensor,
    true_cfg_scale: torch.Tensor,
) -> torch.Tensor:
    compute_dtype = torch.promote_types(latents.dtype, torch.float32)
    cond, uncond = cond.to(latents.dtype), uncond.to(latents.dtype)
    # Stock multiplies by a Python float, which torch holds in the compute dtype and which promotes nothing; a 1-D tensor
    # would, hence the explicit rounding.
    guided = (true_cfg_scale.to(compute_dtype) * (cond - uncond).to(compute_dtype)).to(latents.dtype)
    combined = uncond + guided
    cond_norm = torch.norm(cond, dim=-1, keepdim=True)
    combined_norm = torch.norm(combined, dim=-1, keepdim=True)
    velocity = combined * (cond_norm / combined_norm)

    sigmas = sigmas.to(compute_dtype)
    # As in euler_step_reference: stock rounds dt and the product before the fp32 addition.
    dt = (sigmas.index_select(0, step_index + 1) - sigmas.index_select(0, step_index)).to(latents.dtype)
    return (latents.to(compute_dtype) + dt * velocity).to(latents.dtype)


@triton.jit(do_not_specialize=["step_index_ptr", "true_cfg_scale_ptr", "num_tokens", "num_steps"])
def _cfg_euler_step_kernel(
    out_ptr,
    latents_ptr,
    cond_ptr,
    uncond_ptr,
    sigmas_ptr,
    step_index_ptr,
    true_cfg_scale_ptr,
    num_tokens,
    num_steps,
    num_channels,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)  # [BLOCK_TOKENS]
    channels = tl.arange(0, BLOCK_CHANNELS)  # [BLOCK_CHANNELS]
    offsets = tokens[:, None] * num_channels + channels[None, :]  # [BLOCK_TOKENS, BLOCK_CHANNELS]
    mask = (tokens[:, None] < num_tokens) & (channels[None, :] < num_channels)
    # An index outside the schedule must not read past the table: it makes the latents NaN, which nobody overlooks.
    step_index = tl.load(step_index_ptr)
    in_schedule = (step_index >= 0) & (step_index < num_steps)
    sigma = tl.load(sigmas_ptr + step_index, mask=in_schedule, other=float("nan"))
    sigma_next = tl.load(sigmas_ptr + step_index + 1, mask=in_schedule, other=float("nan"))

    dtype = out_ptr.dtype.element_ty
    cond = tl.load(cond_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    uncond = tl.load(uncond_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    true_cfg_scale = tl.load(true_cfg_scale_ptr)
    difference = (cond - uncond).to(dtype).to(tl.float32)
    guided = (true_cfg_scale * difference).to(dtype).to(tl.float32)
    combined = (uncond + guided).to(dtype).to(tl.float32)

    cond_norm = tl.sqrt_rn(tl.sum(cond * cond, axis=1)).to(dtype).to(tl.float32)  # [BLOCK_TOKENS]
    combined_norm = tl.sqrt_rn(tl.sum(combined * combined, axis=1)).to(dtype).to(tl.float32)
    ratio = tl.div_rn(cond_norm, combined_norm).to(dtype).to(tl.float32)
    velocity = (combined * ratio[:, None]).to(dtype).to(tl.float32)

    latents = tl.load(latents_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    dt = (sigma_next - sigma).to(dtype).to(tl.float32)
    update = (dt * velocity).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (latents + update).to(dtype), mask=mask)


def launch_cfg_euler_step(
    latents: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    sigmas: torch.Tensor,
    step_index: torch.Tensor,
    true_cfg_scale: torch.Tensor,
    *,
    config: dict,
) -> torch.Tensor:
    latents, cond, uncond = latents.contiguous(), cond.contiguous(), uncond.contiguous()
    out = torch.empty_like(latents)
    num_channels = out.shape[-1]
    num_tokens = out.numel() // num_channels
    grid = (-(-num_tokens // config["BLOCK_TOKENS"]),)
    # Contraction to fma would skip the roundings that stock diffusers performs.
    launch(
        _cfg_euler_step_kernel,
        grid,
        (out, latents, cond, uncond, sigmas, step_index, true_cfg_scale),
        (num_tokens, sigmas.numel() - 1),
        (num_channels,),
        BLOCK_CHANNELS=1 << (num_channels - 1).bit_length(),
        **config,
        enable_fp_fusion=False,
    )
    return out


def cfg_euler_step(
    latents: torch.Tensor,
    cond: torch.Tensor,
    uncond: torch.Tensor,
    sigmas: torch.Tensor,
    step_index: torch.Tensor,
    true_cfg_scale: float | torch.Tensor,
) -> torch.Tensor:
    """True CFG with norm rescale, then `latents + (sigmas[i + 1] - sigmas[i]) * velocity`.

    Every intermediate is rounded to the dtype of `latents`, as diffusers rounds it when latents and predictions share the
    model's dtype; `true_cfg_scale` itself keeps its fp32. fp32 latents with bf16 or fp16 predictions keep everything in fp32
    (the precise sampler). A token whose combined prediction is all zero gives 0 / 0 = NaN, as in diffusers.

    Args:
        latents (Tensor): `[B, S_img, C]`, bf16|fp16|fp32 (fp64 on the CPU). Copied if not contiguous, as are the next two.
        cond (Tensor): shape of `latents`; prediction for the prompt, in the dtype of `latents` or a narrower one.
        uncond (Tensor): shape of `latents`; prediction for the negative prompt, dtype of `cond`.
        sigmas (Tensor): `[T + 1]` fp32, contiguous, noise fraction in [0, 1], ends with the terminal sigma.
        step_index (Tensor): `[1]` int32|int64 in [0, T), read on the device.
        true_cfg_scale (float | Tensor): guidance scale. A tensor is `[1]` fp32, or fp64 beside fp64 latents, and is read on
            the device: each replay of a CUDA graph takes the value that it then holds. Whether that is finite is not
            checked, since the host would have to wait for the device. A float has to be finite; it is put into such a
            tensor, without a wait, and a CUDA graph keeps its value.
    Returns:
        Tensor: shape and dtype of `latents`, contiguous, never an alias. On CUDA an index outside [0, T) gives NaN.
    Raises:
        ValueError: shapes, dtypes, devices or a float scale that do not fit, with the offending value; on the CPU also a
            step index outside [0, T).
        RuntimeError: CUDA tensors without Triton.
    Error: the CPU reference is bit-equal to stock diffusers. The kernel differs from it only through the order in which a
        token's squares are added: up to that order in fp32; in bf16 and fp16 it shows only where that order moves a norm
        across a rounding boundary.
    Traffic: 4 * numel * itemsize bytes, without the two sigmas, the step index and the scale; 12 * numel FLOPs.
    Source: diffusers 0.42.1, pipelines/qwenimage/pipeline_qwenimage.py, QwenImagePipeline.__call__ (denoising loop).
    """
    if not isinstance(true_cfg_scale, torch.Tensor):
        dtype = torch.float64 if latents.dtype == torch.float64 else torch.float32
        if not abs(true_cfg_scale) <= torch.finfo(dtype).max:  # NaN is not either
            raise ValueError(f"true_cfg_scale: {true_cfg_scale} is not finite in {dtype}.")
        true_cfg_scale = torch.full((1,), true_cfg_scale, dtype=dtype, device=latents.device)
    return torch.ops.qwen_fast.cfg_euler_step(latents, cond, uncond, sigmas, step_index, true_cfg_scale)


def _check(latents, cond, uncond, sigmas, step_index, true_cfg_scale) -> None:
    allowed = FLOATS if latents.is_cuda else FLOATS_OF_CPU
    if latents.dtype not in allowed:
        raise ValueError(f"latents: dtype {latents.dtype} is not supported on {latents.device.type}; use one of {allowed}.")
    if latents.dim() != 3 or latents.numel() == 0:
        raise ValueError(f"latents: shape {tuple(latents.shape)}; [B, S_img, C] with at least one element is needed.")
    for name, prediction in (("cond", cond), ("uncond", uncond)):
        if prediction.shape != latents.shape:
            raise ValueError(f"{name}: shape {tuple(prediction.shape)} differs from the latents' {tuple(latents.shape)}.")
        if not prediction.is_floating_point() or torch.promote_types(prediction.dtype, latents.dtype) != latents.dtype:
            raise ValueError(
                f"{name}: dtype {prediction.dtype} is not a float type that {latents.dtype} latents hold; cast it first."
            )
    if cond.dtype != uncond.dtype:
        raise ValueError(f"uncond: dtype {uncond.dtype} differs from cond's {cond.dtype}; cast one of them.")
    if sigmas.dim() != 1 or sigmas.numel() < 2 or sigmas.dtype != torch.float32 or not sigmas.is_contiguous():
        raise ValueError(
            f"sigmas: got {tuple(sigmas.shape)} {sigmas.dtype}; a contiguous fp32 table [T + 1] with T >= 1 is needed."
        )
    if step_index.shape != (1,) or step_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"step_index: got {tuple(step_index.shape)} {step_index.dtype}; int32 or int64 [1] is needed.")
    scales = (torch.float32, torch.float64) if latents.dtype == torch.float64 else (torch.float32,)
    if true_cfg_scale.shape != (1,) or true_cfg_scale.dtype not in scales:
        raise ValueError(
            f"true_cfg_scale: got {tuple(true_cfg_scale.shape)} {true_cfg_scale.dtype}; one of {scales} [1] is needed."
        )
    tensors = {"cond": cond, "uncond": uncond, "sigmas": sigmas, "step_index": step_index, "true_cfg_scale": true_cfg_scale}
    for name, tensor in tensors.items():
        if tensor.device != latents.device:
            raise ValueError(f"{name}: on {tensor.device}, but latents are on {latents.device}; move it there first.")


def _cfg_euler_step_cuda(latents, cond, uncond, sigmas, step_index, true_cfg_scale):
    _check(latents, cond, uncond, sigmas, step_index, true_cfg_scale)
    require_triton("cfg_euler_step")
    return launch_cfg_euler_step(latents, cond, uncond, sigmas, step_index, true_cfg_scale, config=DEFAULT_CONFIG)


def _cfg_euler_step_cpu(latents, cond, uncond, sigmas, step_index, true_cfg_scale):
    _check(latents, cond, uncond, sigmas, step_index, true_cfg_scale)
    if not 0 <= int(step_index) < sigmas.numel() - 1:
        raise ValueError(f"step_index: {int(step_index)} is outside the schedule of {sigmas.numel() - 1} steps.")
    return cfg_euler_step_reference(latents.contiguous(), cond, uncond, sigmas, step_index, true_cfg_scale)


def _cfg_euler_step_fake(latents, cond, uncond, sigmas, step_index, true_cfg_scale):
    _check(latents, cond, uncond, sigmas, step_index, true_cfg_scale)
    return torch.empty_like(latents, memory_format=torch.contiguous_format)


register(
    "cfg_euler_step(Tensor latents, Tensor cond, Tensor uncond, Tensor sigmas, "
    "Tensor step_index, Tensor true_cfg_scale) -> Tensor",
    cuda=_cfg_euler_step_cuda,
    cpu=_cfg_euler_step_cpu,
    fake=_cfg_euler_step_fake,
    by_torch=cfg_euler_step_reference,
)
