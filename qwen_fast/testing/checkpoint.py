"""A complete small Qwen-Image checkpoint, made offline: what the tests, the demo and the command line draw with.

It has the classes, the folder layout and the file formats of Qwen/Qwen-Image, so that stock diffusers and this package
load it through the code that loads the real one; only the sizes are small and the weights random. The pictures mean
nothing, but they depend on every part of the model: see `initialize`.
"""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ..schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG
from .tokenizer import _SPECIAL_TOKENS, _write_json, write_tokenizer
from .weights import initialize

_MARKER = "made_by_qwen_fast.json"
_COMPONENTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "Qwen2_5_VLForConditionalGeneration"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "transformer": ("diffusers", "QwenImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKLQwenImage"),
}


def build_checkpoint(
    path: str | Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    num_attention_heads: int = 2,
    attention_head_dim: int = 32,
    axes_dims_rope: tuple[int, int, int] | None = None,
    joint_attention_dim: int = 32,
    vae_base_dim: int = 8,
    text_layers: int = 2,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
    scheduler_config: dict[str, Any] | None = None,
    guidance_embeds: bool = False,
) -> Path:
    """Write a Qwen-Image checkpoint with seeded weights; the same arguments and versions give the same bytes.

    The defaults take 4.6 MB. One block of the real width is `num_layers=1, num_attention_heads=24,
    attention_head_dim=128, joint_attention_dim=3584` (1.4 GB in fp32).

    Args:
        path (str or Path): folder to write; new, empty, or a checkpoint made here before, which is replaced.
        seed (int): of all weights. A parameter's values depend on the seed, its name and its shape only, so that more
            layers leave the first ones as they are.
        num_layers (int): dual-stream blocks; 60 in Qwen-Image.
        num_attention_heads, attention_head_dim (int): the width is their product; 24 and 128 in Qwen-Image.
        axes_dims_rope (tuple): rotary channels of frame, height and width, even, summing to `attention_head_dim`.
            Default: an eighth and twice seven sixteenths, as in Qwen-Image.
        joint_attention_dim (int): width of the text encoder, a multiple of 8; 3584 in Qwen-Image.
        vae_base_dim (int): channels of the VAE at full resolution, even; 96 in Qwen-Image.
        text_layers (int): decoder layers of the text encoder; 28 in Qwen-Image.
        dtype (torch.dtype): of the weights on disk, drawn in fp32 and rounded.
        max_shard_size (int or str): the transformer and the text encoder are cut into files of this size, with an
            index, such as "200KB"; None: one file each.
        scheduler_config (dict): of FlowMatchEulerDiscreteScheduler; None: QWEN_IMAGE_SCHEDULER_CONFIG.
        guidance_embeds (bool): the transformer's configuration entry; stock diffusers does not run with it set.

    Returns:
        Path: `path`. The random state of the caller is as before.

    Raises:
        ValueError: sizes that do not fit together.
        FileExistsError: `path` is a file, or a folder with contents that were not made here.
        RuntimeError: the tokenizer does not yield the 34 leading tokens that the pipeline drops.
    """
    path = Path(path)
    if axes_dims_rope is None:
        if attention_head_dim % 32:
            raise ValueError(f"attention_head_dim={attention_head_dim} is no multiple of 32: give axes_dims_rope too")
        axes_dims_rope = (attention_head_dim // 8, attention_head_dim * 7 // 16, attention_head_dim * 7 // 16)
    if sum(axes_dims_rope) != attention_head_dim or any(dim < 2 or dim % 2 for dim in axes_dims_rope):
        raise ValueError(
            f"axes_dims_rope={axes_dims_rope} must be positive, even and sum to attention_head_dim={attention_head_dim}"
        )
    if joint_attention_dim < 8 or joint_attention_dim % 8:
        raise ValueError(f"joint_attention_dim={joint_attention_dim} must be a positive multiple of 8")
    if vae_base_dim < 2 or vae_base_dim % 2:
        raise ValueError(f"vae_base_dim={vae_base_dim} must be positive and even")
    if min(num_layers, num_attention_heads, text_layers) < 1:
        raise ValueError(f"{num_layers=}, {num_attention_heads=}, {text_layers=} must be at least 1")

    _claim(path)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    scheduler = FlowMatchEulerDiscreteScheduler(**(scheduler_config or QWEN_IMAGE_SCHEDULER_CONFIG))
    scheduler.save_pretrained(path / "scheduler")
    vocabulary_size = write_tokenizer(path / "tokenizer")
    # The constructors draw weights from the global random state, which is the caller's; and on the caller's device.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        transformer = QwenImageTransformer2DModel(
            num_layers=num_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=tuple(axes_dims_rope),
        )
        _save(transformer, path / "transformer", seed, dtype, **sharding)
        del transformer  # at the full width the largest part by far
        _save(AutoencoderKLQwenImage(base_dim=vae_base_dim, num_res_blocks=1), path / "vae", seed, dtype)
        text_encoder = small_text_encoder(joint_attention_dim, text_layers, vocabulary_size)
        _save(text_encoder, path / "text_encoder", seed, dtype, **sharding)
    # Last, so that a folder with a model_index.json is complete.
    _write_json(
        path / "model_index.json",
        {"_class_name": "QwenImagePipeline", "_diffusers_version": diffusers.__version__, **_COMPONENTS},
    )
    return path


def _save(module: nn.Module, folder: Path, seed: int, dtype: torch.dtype, **sharding: int | str) -> None:
    initialize(module, folder.name, seed)
    # Not module.to(): diffusers' own warns about parts to be kept in fp32 even where there are none.
    nn.Module.to(module, dtype).save_pretrained(folder, **sharding)


def small_text_encoder(width: int, layers: int, vocabulary_size: int) -> Qwen2_5_VLForConditionalGeneration:
    """The Qwen2.5-VL of the text encoder, with a vision tower (unused for text) as small as it gets.

    Args:
        width (int): hidden size, a multiple of 8.
        layers (int): decoder layers.
        vocabulary_size (int): entries of the tokenizer without the special tokens, as `write_tokenizer` returns them.
    """
    head_dim = 128 if width % 128 == 0 else 8
    heads = width // head_dim
    ids = {token: vocabulary_size + index for index, token in enumerate(_SPECIAL_TOKENS)}
    text = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2 if heads % 2 == 0 else heads,
        "vocab_size": vocabulary_size + len(_SPECIAL_TOKENS),
        "rope_theta": 1000000.0,
        "rope_scaling": {
            # Channel pairs for time, height and width: 16, 24, 24 in Qwen2.5-VL.
            "mrope_section": [head_dim // 8, head_dim * 3 // 16, head_dim // 2 - head_dim // 8 - head_dim * 3 // 16],
            "rope_type": "default",
            "type": "default",
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision | {"fullatt_block_indexes": [0]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        vision_token_id=ids["<|vision_pad|>"],
        tie_word_embeddings=False,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _claim(path: Path) -> None:
    """Make `path` ours and empty of our own former files, or refuse."""
    marker = path / _MARKER
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: give a new folder")
    if path.is_dir() and any(path.iterdir()) and not marker.is_file():
        raise FileExistsError(f"{path} is not empty and not a checkpoint made by build_checkpoint: give a new folder")
    path.mkdir(parents=True, exist_ok=True)
    _write_json(marker, {"made_by": "qwen_fast.testing.build_checkpoint", "weights": "random"})
    (path / "model_index.json").unlink(missing_ok=True)
    for name in _COMPONENTS:
        if (path / name).exists():
            shutil.rmtree(path / name)
