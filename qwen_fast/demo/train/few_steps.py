"""A LoRA with which the demo's denoiser draws in 4 steps without guidance, as Qwen-Image-Lightning does for Qwen-Image.

The teacher is the denoiser itself in `TEACHER_STEPS` steps with guidance. Lightning's schedule of 4 steps is every fifth level
of its schedule of 20, so that a trajectory of the teacher passes where the student stands, and the student learns the straight
line from there to where it stands next.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from torch.nn.attention import sdpa_kernel

from ...schedule.configs import LIGHTNING_SCHEDULER_CONFIG
from ..scenes import sample_request
from .denoiser import ATTENTION, Batches, predict
from .plan import Plan
from .progress import Progress, load_state, save_state
from .text import NEGATIVE, Features
from .vae import warmup_cosine

STEPS, TEACHER_STEPS, TEACHER_GUIDANCE = 4, 20, 4.0
# Those of Qwen-Image-Lightning: attention, feed-forward and modulations of both streams.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
TARGETS += ["net.0.proj", "net.2", "img_mod.1", "txt_mod.1"]


@dataclass(frozen=True)
class Trajectories:
    """The teacher's pictures of one size on their way: `[N, STEPS + 1, S_img, C]` fp16, noise first; grid (H, W), prompts."""

    values: torch.Tensor
    grid: tuple[int, int]
    prompts: list[str]


def draw_trajectories(
    plan: Plan, teacher: QwenImagePipeline, file: Path, device: torch.device, batch: int = 64
) -> list[Trajectories]:
    """Draw the plan's trajectories with stock diffusers in bf16 autocast, one entry per size; or go on with those in `file`."""
    state = load_state(file)
    data = [Trajectories(values, tuple(grid), prompts) for values, grid, prompts in (state or {"parts": []})["parts"]]
    teacher.scheduler = FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER_CONFIG)
    teacher.set_progress_bar_config(disable=True)
    for (width, height), share in list(zip(plan.sizes, plan.shares, strict=True))[len(data) :]:
        rng = random.Random(f"{plan.seed}/trajectories/{width}x{height}")
        values, prompts = [], []
        total = -(-round(plan.few_steps.trajectories * share) // batch)
        progress = Progress(f"trajectories {width}x{height}", total)
        for done in range(total):
            some = [sample_request(rng).prompt for _ in range(batch)]
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + 10**6 + done)
            noise = torch.randn(batch, width * height // 256, teacher.transformer.config.in_channels, generator=generator)
            seen = [noise]

            def keep(pipe: QwenImagePipeline, step: int, _: torch.Tensor, tensors: dict, seen: list = seen) -> dict:
                if (step + 1) % (TEACHER_STEPS // STEPS) == 0:
                    seen.append(tensors["latents"].float().cpu())
                return {}

            with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(ATTENTION[device.type]):
                teacher(
                    some,
                    negative_prompt=[NEGATIVE] * batch,
                    true_cfg_scale=TEACHER_GUIDANCE,
                    width=width,
                    height=height,
                    num_inference_steps=TEACHER_STEPS,
                    latents=noise.to(device),
                    output_type="latent",
                    callback_on_step_end=keep,
                )
            values.append(torch.stack(seen, dim=1).half())
            prompts += some
            progress.step(done + 1, batch)
        data.append(Trajectories(torch.cat(values), (height // 16, width // 16), prompts))
        save_state(file, {"parts": [(part.values, part.grid, part.prompts) for part in data]})
    return data


def distil(
    plan: Plan,
    data: list[Trajectories],
    features: Features,
    transformer: QwenImageTransformer2DModel,
    file: Path,
    device: torch.device,
    *,
    keep_every: int = 500,
) -> dict[str, torch.Tensor]:
    """Train the LoRA, or go on where `file` says an earlier run stopped.

    Args:
        plan (Plan): the recipe.
        data (list of Trajectories): from `draw_trajectories`.
        features (Features): of all prompts of `data`.
        transformer (QwenImageTransformer2DModel): the teacher's, fp32; it is given back without the LoRA.
        file (Path): state of the run, written every `keep_every` steps.
        device (torch.device): where to train.

    Returns:
        dict: the LoRA's weights in bf16, as `QwenImagePipeline.save_lora_weights` takes them.

    Raises:
        ImportError: peft is missing.
    """
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    recipe = plan.few_steps
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER_CONFIG)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist(), mu=LIGHTNING_SCHEDULER_CONFIG["base_shift"])
    sigmas = scheduler.sigmas
    transformer.requires_grad_(False)
    torch.manual_seed(plan.seed)
    transformer.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.rank, target_modules=TARGETS), adapter_name="few_steps")
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    step, state = 0, load_state(file)
    if state is not None:
        set_peft_model_state_dict(transformer, state["lora"], adapter_name="few_steps")
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    batches = Batches(data, features, device)
    progress = Progress("few steps", recipe.steps, step)
    while step < recipe.steps:
        generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
        part, chosen, prompts = batches.draw(recipe.batch, generator)
        place = torch.randint(STEPS, (recipe.batch,), generator=generator)
        here, there = (part.values[chosen, place + further].to(device, torch.float32) for further in (0, 1))
        sigma, following = sigmas[place].to(device), sigmas[place + 1].to(device)
        prompts = prompts.to(device)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warmup_cosine(step, recipe.steps, 200)
        velocity = predict(transformer, here, sigma, batches.values[prompts], batches.mask[prompts], part.grid)
        loss = (velocity - (there - here) / (following - sigma)[:, None, None]).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        progress.step(step, recipe.batch, loss=loss)
        if step % keep_every == 0 or step == recipe.steps:
            lora = get_peft_model_state_dict(transformer, adapter_name="few_steps")
            save_state(file, {"lora": lora, "optimizer": optimizer.state_dict(), "step": step})
    lora = get_peft_model_state_dict(transformer, adapter_name="few_steps")
    lora = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in lora.items()}
    transformer.unload_lora()
    return lora
