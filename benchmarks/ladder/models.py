"""The pipeline that is measured: seeded random weights straight on the device, or a checkpoint; and what memory it takes."""

import math
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch

from qwen_fast.loading import check_folder
from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG
from qwen_fast.testing import initialize

from ..shared.shapes import NEGATIVE_TOKENS, PictureCase, Shape

_VAE_MAPS = 15  # feature maps of full resolution and base_dim channels that stock's decoder holds at once, with its copies
_TOKEN_ROWS = 40  # rows of the transformer's width that an eager forward holds at once, the fourfold ones of the MLP included


def random_pipeline(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> diffusers.QwenImagePipeline:
    """A stock pipeline without text encoder: transformer and VAE with unit-gain random weights, Qwen-Image's scheduler.

    Nothing is made on the host: the 20 B parameters of Qwen-Image appear in `dtype` on the GPU within seconds.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        transformer = diffusers.QwenImageTransformer2DModel(
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            joint_attention_dim=shape.text_width,
            axes_dims_rope=shape.rope_axes,
        )
        vae = diffusers.AutoencoderKLQwenImage(base_dim=shape.vae_base_dim, num_res_blocks=2)
    for name, model in (("transformer", transformer), ("vae", vae)):
        fill(model, name, device, dtype, seed)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE_SCHEDULER_CONFIG)
    pipe = diffusers.QwenImagePipeline(scheduler, vae, None, None, transformer)
    return pipe.to(device)


def fill(model: torch.nn.Module, name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
    """Give a model on the meta device unit-gain random weights, made where they stay."""
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                values = torch.empty(parameter.shape, dtype=dtype, device=device)
                module._parameters[key] = torch.nn.Parameter(values, requires_grad=False)
    initialize(model, name, seed, on_device=True)
    model.eval()


def load_pipeline(folder: str | Path, device: torch.device, dtype: torch.dtype) -> diffusers.QwenImagePipeline:
    """The stock pipeline of a checkpoint's folder, on the device.

    Raises:
        ValueError, OSError: not a checkpoint, or one that is incomplete.
    """
    check_folder(folder)
    pipe = diffusers.QwenImagePipeline.from_pretrained(folder, dtype=dtype)
    if pipe.transformer.dtype != dtype:
        pipe = pipe.to(dtype=dtype)  # older diffusers know the argument as torch_dtype and ignore this one
    return pipe.to(device)


def shape_of(folder: str | Path) -> Shape:
    """Sizes of a checkpoint, from its configuration files alone."""
    transformer = diffusers.QwenImageTransformer2DModel.load_config(folder, subfolder="transformer")
    vae = diffusers.AutoencoderKLQwenImage.load_config(folder, subfolder="vae")
    return Shape(
        layers=transformer["num_layers"],
        heads=transformer["num_attention_heads"],
        head_dim=transformer["attention_head_dim"],
        text_width=transformer["joint_attention_dim"],
        vae_base_dim=vae["base_dim"],
    )


def memory_needed(case: PictureCase, dtype: torch.dtype) -> int:
    """Bytes of device memory, about, that stock needs for `case`: weights of transformer and VAE, and activations."""
    shape = case.shape
    vae_parameters = 126_892_531 * (shape.vae_base_dim / 96) ** 2
    rows = (case.image_tokens + max(case.text_lengths)) * case.batch
    decoding = _VAE_MAPS * shape.vae_base_dim * case.width * case.height * case.batch
    # The exact predictions that results are compared with hold one block in fp32.
    exact = 4 * shape.parameters // max(shape.layers, 1) if dtype.itemsize < 4 else 0
    activations = max(_TOKEN_ROWS * rows * shape.width, decoding)
    return math.ceil((shape.parameters + vae_parameters + activations) * dtype.itemsize + exact)


def text_encoder_bytes(folder: str | Path) -> int:
    """Of its weights, in the dtype in which they are stored."""
    return sum(file.stat().st_size for file in Path(folder, "text_encoder").glob("*.safetensors"))


def check_memory(cases: list[PictureCase], device: torch.device, dtype: torch.dtype, beside: int = 0) -> None:
    """Refuse, before anything is allocated, what will not fit with `beside` bytes of something else.

    Raises:
        ValueError: saying what is needed, what there is, and what would fit.
    """
    free, layers = free_memory(device), layers_that_fit(cases, device, dtype, beside)
    case = max(cases, key=lambda one: memory_needed(one, dtype))
    if free is None or layers >= case.shape.layers:
        return
    needed = memory_needed(case, dtype) + beside
    hint = f"--layers {layers} would fit" if layers > 0 else "a smaller --size or --batch may fit"
    raise ValueError(
        f"{case} with {case.shape.layers} layers needs about {needed / 2**30:.1f} GiB on {device}, where "
        f"{free / 2**30:.1f} GiB are free; nothing was allocated. {hint}."
    )


def layers_that_fit(cases: list[PictureCase], device: torch.device, dtype: torch.dtype, beside: int = 0) -> int:
    """How many of the model's layers there is room for, for the largest case; 0 or less where none fits."""
    free, case = free_memory(device), max(cases, key=lambda one: memory_needed(one, dtype))
    needed = memory_needed(case, dtype) + beside
    if free is None or needed <= free:
        return case.shape.layers
    layer = dtype.itemsize * case.shape.parameters / case.shape.layers
    return case.shape.layers - math.ceil((needed - free) / layer)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on a CUDA device; None on a CPU, where swap and caches blur the figure."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


@torch.no_grad()
def call_arguments(pipe: Any, case: PictureCase) -> dict:
    """Arguments of a pipeline call for `case`, whose seeded noise and random embeddings are the same on every machine.

    A pipeline with a text encoder gets the embeddings of prompts of about those lengths. Where prompts of a batch differ in
    length, the padding is masked.
    """
    generator, device, dtype = torch.Generator().manual_seed(0), pipe.device, pipe.transformer.dtype

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    arguments = {
        "width": case.width,
        "height": case.height,
        "num_inference_steps": case.steps,
        "latents": normal(case.batch, case.image_tokens, 64),
        "true_cfg_scale": 4.0 if case.cfg else 1.0,
    }
    for prefix, prompts in zip(("", "negative_"), prompts_of(pipe, case), strict=False):
        if pipe.text_encoder is None:
            embeds = normal(case.batch, max(prompts), case.shape.text_width)
            mask = torch.arange(max(prompts), device=device) < torch.tensor(prompts, device=device)[:, None]
        else:
            embeds, mask = pipe.encode_prompt(prompt=prompts, device=device)
        arguments[f"{prefix}prompt_embeds"] = embeds
        if mask is not None and not mask.all():
            arguments[f"{prefix}prompt_embeds_mask"] = mask.to(torch.int64)
    return arguments


def prompts_of(pipe: Any, case: PictureCase) -> list[list]:
    """Prompts of the batch, and with guidance negative ones: texts, or token counts where there is no text encoder."""
    lengths = [case.text_lengths, (NEGATIVE_TOKENS,) * case.batch]
    if pipe.text_encoder is None:
        return [list(one) for one in lengths[: 1 + case.cfg]]
    tokens = pipe.tokenizer(" cat" * max(case.text_lengths)).input_ids
    texts = [pipe.tokenizer.decode(tokens[:length]) for length in case.text_lengths]
    return [texts, [" "] * case.batch][: 1 + case.cfg]
