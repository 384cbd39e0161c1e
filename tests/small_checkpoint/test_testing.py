"""The small checkpoint: it loads as the real one does, is the same each time, and a fault anywhere in it shows."""

import hashlib
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file

from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG, QWEN_IMAGE_SCHEDULER_CONFIG
from qwen_fast.testing import build_checkpoint, tokenizer
from qwen_fast.testing import checkpoint as testing


def digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def load(path: Path) -> QwenImagePipeline:
    pipe = QwenImagePipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: QwenImagePipeline, prompt: str = "a cat", steps: int = 4, output_type: str = "latent"):
    generator = torch.Generator().manual_seed(0)
    size = {"height": 64, "width": 64, "num_inference_steps": steps}
    return pipe(prompt, negative_prompt=" ", **size, generator=generator, output_type=output_type).images


def relative_change(pipe: QwenImagePipeline, before: torch.Tensor, prompt: str = "a cat") -> float:
    return ((draw(pipe, prompt) - before).norm() / before.norm()).item()


def test_two_builds_are_the_same_bytes(checkpoint: Path, tmp_path: Path):
    first = digests(checkpoint)
    assert digests(build_checkpoint(tmp_path / "again")) == first
    (tmp_path / "again" / "transformer" / "config.json").write_text("damaged")
    (tmp_path / "again" / "vae" / "left over").touch()
    assert digests(build_checkpoint(tmp_path / "again")) == first
    other = digests(build_checkpoint(tmp_path / "seed", seed=1))
    assert {name for name in first if first[name] != other[name]} == {name for name in first if name.endswith(".safetensors")}


def test_random_state_and_defaults_of_the_caller(checkpoint: Path, tmp_path: Path):
    np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    torch.set_default_device("meta")
    try:
        build_checkpoint(tmp_path / "again")
    finally:
        torch.set_default_device(None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert digests(tmp_path / "again") == digests(checkpoint)


def test_more_layers_keep_the_first(checkpoint: Path, tmp_path: Path):
    name = "transformer/diffusion_pytorch_model.safetensors"
    two, one = load_file(checkpoint / name), load_file(build_checkpoint(tmp_path / "one", num_layers=1) / name)
    assert set(one) < set(two)
    assert all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.mark.parametrize("before", ["file", "folder"])
def test_never_overwrites_what_it_did_not_make(tmp_path: Path, before: str):
    path, kept = tmp_path / "path", tmp_path / "path"
    if before == "folder":
        path.mkdir()
        build_checkpoint(path)  # an empty folder is welcome
        (path / "made_by_qwen_fast.json").unlink()
        kept = path / "model_index.json"
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match=f"{path} .*give a new folder"):
        build_checkpoint(path)
    assert kept.read_text() == "mine"


def test_a_broken_off_build_is_not_a_checkpoint(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = build_checkpoint(tmp_path / "path")
    with monkeypatch.context() as patch:
        patch.setattr(AutoencoderKLQwenImage, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_checkpoint(path)
    assert not (path / "model_index.json").exists()
    assert digests(build_checkpoint(path)) == digests(checkpoint)


def test_stock_pipeline_draws_with_it(checkpoint: Path):
    picture = draw(load(checkpoint), steps=2, output_type="np")[0]  # [64, 64, 3] in [0, 1]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()
    # 0.20 to 0.29 by channel; with the gain spread over taps in time that meet no data, 0.12 to 0.20.
    assert (picture.std(axis=(0, 1)) > 0.16).all()
    assert ((picture <= 0) | (picture >= 1)).mean() < 0.25
    neighbours = np.abs(np.diff(picture, axis=0)).mean()
    apart = np.abs(picture[:32] - picture[32:]).mean()
    assert neighbours < 0.7 * apart, "a picture, not noise from pixel to pixel"


def test_vae_encodes_on_the_scale_of_its_latents(checkpoint: Path):
    vae = AutoencoderKLQwenImage.from_pretrained(checkpoint, subfolder="vae")
    picture = torch.rand(1, 3, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean = vae.encode(picture).latent_dist.mean
    assert mean.shape == (1, 16, 1, 8, 8)
    assert 0.2 < mean.std() < 5


def test_shards(checkpoint: Path, tmp_path: Path):
    sharded = build_checkpoint(tmp_path / "sharded", max_shard_size="200KB")
    for component, name in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        index = json.loads((sharded / component / f"{name}.safetensors.index.json").read_text())
        shards = set(index["weight_map"].values())
        assert len(shards) > 1
        assert {file.name for file in (sharded / component).glob("*.safetensors")} == shards
    ours, expected = load(sharded), load(checkpoint)
    for component in ("transformer", "text_encoder"):
        weights = getattr(expected, component).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in getattr(ours, component).state_dict().items())
    # Not to the bit: a matrix product may depend on the alignment at which a file was mapped into memory.
    assert (draw(ours) - draw(expected)).abs().max() < 1e-5


def test_template_prefix_is_what_the_pipeline_drops(checkpoint: Path):
    pipe = load(checkpoint)
    prefix = pipe.prompt_template_encode.split("{}")[0]
    ids = pipe.tokenizer(prefix).input_ids
    assert len(ids) == pipe.prompt_template_encode_start_idx == 34
    assert pipe.tokenizer.decode(ids) == prefix
    for prompt in ("", "a red circle", "system user", "名前 naïve\n\n 42"):
        ids = pipe.tokenizer(pipe.prompt_template_encode.format(prompt)).input_ids
        assert pipe.tokenizer.decode(ids[:34]) == prefix
        assert pipe.tokenizer.decode(ids[34:]) == prompt + "<|im_end|>\n<|im_start|>assistant\n"
    assert pipe.encode_prompt("")[0].shape == (1, 5, 32)
    assert pipe.tokenizer.pad_token == "<|endoftext|>"


def test_another_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "_SPECIAL_TOKENS", tuple(token for token in tokenizer._SPECIAL_TOKENS if "im_" not in token))
    with pytest.raises(RuntimeError, match="prefix into [0-9]+ tokens where the pipeline drops 34"):
        tokenizer.write_tokenizer(tmp_path / "tokenizer")


def test_faults_move_the_latents(checkpoint: Path):
    """Each part is knocked out in turn; with default initialisation most of these moves stay below 3 %."""
    pipe = load(checkpoint)
    before = draw(pipe)
    assert relative_change(pipe, before) == 0
    assert relative_change(pipe, before, "a dog") > 0.05
    blocks = pipe.transformer.transformer_blocks
    parts = [blocks[0].txt_mlp, blocks[0].img_mlp, blocks[0].attn, blocks[0].img_mod, blocks[0].txt_mod]
    parts += [blocks[1].img_mlp, blocks[1].attn, blocks[1].img_mod, blocks[1].txt_mod]
    parts += [pipe.transformer.time_text_embed, pipe.transformer.norm_out, pipe.text_encoder.lm_head]
    for part in parts:
        saved = {name: value.clone() for name, value in part.state_dict().items()}
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.zero_()
        moved = relative_change(pipe, before)
        part.load_state_dict(saved)
        if part is pipe.text_encoder.lm_head:
            assert moved == 0, "the pipeline reads hidden states, not logits"
        else:
            assert moved > 0.05, f"{type(part).__name__} moves the latents by {moved:.1%} only"


def test_no_parameter_is_a_constant(checkpoint: Path):
    """Norm weights of 1 and biases of 0 would hide what is done with them."""
    for file in checkpoint.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                value = tensors.get_tensor(name)
                assert value.isfinite().all() and (value.numel() == 1 or value.std() > 0), f"{file}: {name}"


def test_scheduler_configs(checkpoint: Path, tmp_path: Path):
    def saved(path: Path) -> dict:
        config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
        return {key: value for key, value in config.items() if not key.startswith("_")}

    assert saved(checkpoint) == QWEN_IMAGE_SCHEDULER_CONFIG
    assert saved(build_checkpoint(tmp_path, scheduler_config=LIGHTNING_SCHEDULER_CONFIG)) == LIGHTNING_SCHEDULER_CONFIG
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER_CONFIG)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=LIGHTNING_SCHEDULER_CONFIG["max_shift"])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_dtype(tmp_path: Path):
    path = build_checkpoint(tmp_path, dtype=torch.bfloat16)
    for file in path.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_other_sizes(tmp_path: Path):
    path = build_checkpoint(
        tmp_path,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=128,
        joint_attention_dim=256,
        vae_base_dim=4,
        text_layers=1,
    )
    pipe = load(path)
    assert tuple(pipe.transformer.config.axes_dims_rope) == (16, 56, 56)
    assert pipe.text_encoder.config.text_config.num_attention_heads == 2
    assert draw(pipe, steps=2).isfinite().all()


def test_full_width_fits_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The whole path for one block of the real width, on the meta device: no weight is allocated or written."""
    built = []
    # In this module only: torch itself asks isinstance(..., torch.device).
    monkeypatch.setattr(testing, "torch", SimpleNamespace(random=torch.random, device=lambda _: torch.device("meta")))
    monkeypatch.setattr(testing, "_save", lambda module, *_, **__: built.append(module))
    build_checkpoint(tmp_path, num_layers=1, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=3584)
    transformer, _, text_encoder = built
    assert all(parameter.is_meta for module in built for parameter in module.parameters())
    assert isinstance(transformer, QwenImageTransformer2DModel)
    block = transformer.transformer_blocks[0]
    assert sum(parameter.numel() for parameter in block.parameters()) == 339_831_296
    assert transformer.config.axes_dims_rope == (16, 56, 56)
    text_config = text_encoder.config.text_config
    assert (text_config.hidden_size, text_config.num_attention_heads) == (3584, 28)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"attention_head_dim": 40}, "attention_head_dim=40 is no multiple of 32: give axes_dims_rope"),
        ({"axes_dims_rope": (4, 14, 16)}, r"axes_dims_rope=\(4, 14, 16\) must be .* sum to attention_head_dim=32"),
        ({"axes_dims_rope": (4, 13, 15)}, "even"),
        ({"joint_attention_dim": 36}, "joint_attention_dim=36 must be a positive multiple of 8"),
        ({"vae_base_dim": 3}, "vae_base_dim=3 must be positive and even"),
        ({"num_layers": 0}, "num_layers=0"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path: Path, sizes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_checkpoint(tmp_path / "path", **sizes)
    assert not (tmp_path / "path").exists()
