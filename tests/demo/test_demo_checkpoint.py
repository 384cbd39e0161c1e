"""The committed demo checkpoint: whole, small, loaded by stock diffusers, and drawing what its prompts say."""

import copy
import json

import diffusers
import numpy as np
import pytest
import torch
from safetensors import safe_open

import qwen_fast
from benchmarks.shared.stock import draw, stock
from qwen_fast import demo
from qwen_fast.demo import __main__ as main
from qwen_fast.demo.accuracy import draw as draw_and_judge
from qwen_fast.demo.accuracy import held_out_requests
from qwen_fast.demo.judge import judge
from qwen_fast.demo.scenes import Request
from qwen_fast.demo.train.plan import SCHEDULER_CONFIG
from qwen_fast.demo.train.saving import name_rope_twice
from qwen_fast.loading import check_folder
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG
from support.pipelines import assert_ran_fast

CALL = {"negative_prompt": " ", "true_cfg_scale": 4.0, "num_inference_steps": 20}
FOUR_STEPS = {"num_inference_steps": 4, "true_cfg_scale": 1.0}
SIZES = ((64, 64), (96, 64))  # width, height


def test_it_is_whole_small_and_bf16():
    folder = demo.checkpoint()
    check_folder(folder)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 24e6
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}
    listed = {line.split("  ")[1] for line in (folder / demo.CHECKSUMS).read_text().splitlines()}
    assert listed == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {demo.CHECKSUMS}


def test_its_rotary_embedding_has_the_names_of_every_supported_transformers(tmp_path):
    """transformers 4 reads `rope_scaling` and `rope_theta`, transformers 5 `rope_parameters`, and writes those only."""
    path = demo.CHECKPOINT / "text_encoder" / "config.json"
    text = json.loads(path.read_text())["text_config"]
    new = text["rope_parameters"]
    assert text["rope_scaling"] == {"type": "mrope", "mrope_section": new["mrope_section"]}
    assert text["rope_theta"] == new["rope_theta"]
    stripped = json.loads(path.read_text())
    del stripped["text_config"]["rope_scaling"], stripped["text_config"]["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(stripped))
    name_rope_twice(tmp_path / "config.json")
    assert (tmp_path / "config.json").read_bytes() == path.read_bytes()


def test_it_is_of_qwen_image_s_classes():
    pipe = stock(demo.CHECKPOINT)
    assert dict(pipe.scheduler.config).items() >= SCHEDULER_CONFIG.items()
    assert type(pipe) is diffusers.QwenImagePipeline
    assert type(pipe.transformer) is diffusers.QwenImageTransformer2DModel and pipe.transformer.config.in_channels == 64
    assert type(pipe.vae) is diffusers.AutoencoderKLQwenImage and pipe.vae.config.z_dim == 16
    assert len(pipe.tokenizer(pipe.prompt_template_encode.split("{}")[0]).input_ids) == 34


@pytest.fixture(scope="module")
def pipe():
    return stock(demo.CHECKPOINT)


@pytest.mark.parametrize("prompt", demo.PROMPTS)
@pytest.mark.parametrize("size", SIZES)
def test_the_default_prompts_are_drawn_as_asked(pipe, prompt, size):
    assert Request.parse(prompt)
    picture = draw(pipe, 0, prompt=prompt, width=size[0], height=size[1], **CALL)[0]
    assert judge(np.asarray(picture), prompt).everything


def test_the_default_prompts_were_never_shown():
    assert all(Request.parse(prompt).held_out for prompt in demo.PROMPTS)


def in_float64(pipe, prompt: str, seed: int, size: tuple[int, int], **call) -> torch.Tensor:
    """The latents of stock's picture, its transformer in float64 on the same embeddings and the same noise."""
    disabled = qwen_fast.disable(copy.deepcopy(pipe))
    embeds, mask = disabled.encode_prompt(prompt=[prompt], device="cpu")
    noise = torch.randn(1, 1, 16, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))
    disabled.transformer.double()
    disabled.encode_prompt = lambda **_: (embeds.double(), mask)
    noise = disabled._pack_latents(noise, 1, 16, size[1] // 8, size[0] // 8).double()
    return draw(disabled, prompt=[prompt], width=size[0], height=size[1], latents=noise, output_type="latent", **call)[0]


def assert_ours_draws_the_same(pipe, size=(64, 64), **call) -> None:
    """Stock and ours: in fp32 latents within the contract, and every picture as asked from both."""
    prompts = list(demo.PROMPTS)

    def run(**arguments):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        return draw(pipe, prompt=prompts, width=size[0], height=size[1], generator=generators, **call | arguments)

    expected, pictures = run(output_type="latent"), run(output_type="np")
    qwen_fast.enable(pipe)
    actual, ours = run(output_type="latent"), run(output_type="np")
    assert_ran_fast(pipe)
    if actual.dtype == torch.float32:
        limit = 2e-6 * expected.abs().max()
        far = [n for n in range(len(prompts)) if (actual[n] - expected[n]).abs().max() > limit]
        # In few steps a picture may magnify the last bits of both: then neither is farther from float64 than the contract.
        for n in far:
            assert call["true_cfg_scale"] == 1.0, (prompts[n], (actual[n] - expected[n]).abs().max())
            exact = in_float64(pipe, prompts[n], n, size, **call)
            for latents in (actual, expected):
                assert (latents[n] - exact).abs().max() <= limit, (latents[n] - exact).abs().max()
    for prompt, theirs, mine in zip(prompts, pictures, ours, strict=True):
        verdicts = [judge((picture * 255).round().astype(np.uint8), prompt) for picture in (theirs, mine)]
        assert verdicts[0] == verdicts[1] and verdicts[0].everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_draws_the_same(dtype):
    assert_ours_draws_the_same(stock(demo.CHECKPOINT, dtype), **CALL | {"negative_prompt": [" "] * len(demo.PROMPTS)})


# Four steps


def lightning(dtype: torch.dtype = torch.float32):
    """Stock with the LoRA and on the schedule that it was made for."""
    pytest.importorskip("peft", reason="a LoRA needs peft")
    pipe = stock(demo.CHECKPOINT, dtype)
    pipe.load_lora_weights(demo.CHECKPOINT / demo.LIGHTNING, weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = type(pipe.scheduler).from_config(LIGHTNING_SCHEDULER_CONFIG)
    return pipe


def test_the_lora_brings_four_steps_nearer_to_twenty_with_guidance():
    pipe, prompts = lightning(), list(demo.PROMPTS)

    def run(**arguments):
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
        return draw(pipe, prompt=prompts, width=64, height=64, generator=generators, output_type="latent", **arguments)

    distilled = run(**FOUR_STEPS)
    pipe.disable_lora()
    plain, teacher = run(**FOUR_STEPS), run(**CALL | {"negative_prompt": [" "] * len(prompts)})
    with_lora, without = ((latents - teacher).square().mean().sqrt() for latents in (distilled, plain))
    assert with_lora < 0.85 * without, (with_lora, without)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_ours_draws_the_same_in_four_steps(size, dtype, fused):
    pipe = lightning(dtype)
    if fused:
        pipe.fuse_lora()
    assert_ours_draws_the_same(pipe, size, **FOUR_STEPS)


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_on_a_gpu_ours_is_as_near_to_fp32_as_stock_in_bf16(size):
    """On held-out prompts, of which rounding alone decides one or two: what `benchmarks.quality --check` asks on a CPU."""
    requests = held_out_requests(200)

    def drawn(pipe):
        pictures, verdicts = draw_and_judge(pipe.to("cuda"), requests, width=size[0], height=size[1])
        return np.asarray(pictures, float), verdicts

    exact, right = drawn(stock(demo.CHECKPOINT))
    pipe = stock(demo.CHECKPOINT, torch.bfloat16)
    far, same = [], []
    for enabled in (False, True):
        pictures, verdicts = drawn(qwen_fast.enable(pipe) if enabled else pipe)
        far.append(np.sqrt(np.mean((pictures - exact) ** 2)))
        same.append(np.mean([a == b for a, b in zip(verdicts, right, strict=True)]))
    assert_ran_fast(pipe)
    assert far[1] <= 1.25 * far[0] and same[1] >= same[0] - 0.015, (far, same)


def test_the_demo_draws_and_compares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "REPEATS", 1)
    monkeypatch.setattr(main, "PROMPTS", demo.PROMPTS[:1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert out.count("as asked") == 2 and "not as asked" not in out
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert "qwen_fast: QwenImagePipeline is accelerated" in out
