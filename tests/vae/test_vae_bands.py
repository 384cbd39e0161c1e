"""Pictures in bands of rows: the whole picture's result within a given memory, for both VAEs of the family; what rows reach."""

import copy
import importlib
import itertools
import math

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.parts.vae_memory import LiveBytes
from qwen_fast.common.state import STATE
from qwen_fast.testing import initialize
from qwen_fast.vae import bands as vae_bands
from qwen_fast.vae import layers as vae_layers
from qwen_fast.vae.bands import Plan, Sizes, choose, memory_limit, run, whole_peak
from qwen_fast.vae.layers import Stream, decoder_layers, encoder_layers

NEWER = hasattr(diffusers, "AutoencoderKLQwenImage21")
FAMILY = ["qwenimage", pytest.param("qwenimage21", marks=pytest.mark.skipif(not NEWER, reason="an older diffusers"))]
READ = {"decode": decoder_layers, "encode": encoder_layers}


@pytest.fixture(scope="module")
def weights():
    """One small VAE of each kind; the decoder of the newer one is wider than its encoder, as in the real one."""
    made = {"qwenimage": diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=16, num_res_blocks=1)}
    if NEWER:
        made["qwenimage21"] = diffusers.AutoencoderKLQwenImage21(
            base_dim=4, decoder_base_dim=6, z_dim=8, num_res_blocks=1, latents_mean=[0.0] * 8, latents_std=[1.0] * 8
        )
    for vae in made.values():
        initialize(vae, "vae", 0)
        vae.eval()
    return made


@pytest.fixture(params=FAMILY)
def vae(weights, request):
    return copy.deepcopy(weights[request.param])


@pytest.fixture(params=["decode", "encode"])
def what(request):
    return request.param


def picture(vae, what: str, height: int = 12, width: int = 4, batch: int = 1) -> torch.Tensor:
    """Latents of this size, or a picture whose latents have it; without frames."""
    ratio = vae.spatial_compression_ratio if what == "encode" else 1
    channels = vae.encoder.conv_in.in_channels if what == "encode" else vae.config.z_dim
    shape = (batch, channels, height * ratio, width * ratio)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)


@torch.no_grad()
def code(vae, what: str, x: torch.Tensor) -> torch.Tensor:
    x = x[:, :, None]
    return vae.decode(x).sample if what == "decode" else vae.encode(x).latent_dist.parameters


def state(vae):
    return vae.__dict__[STATE]


@pytest.mark.parametrize("batch", [1, 2])
def test_alone_as_stock(vae, what, batch):
    x = picture(vae, what, batch=batch)
    expected = code(vae, what, x)
    actual = code(qwen_fast.enable_vae(vae), what, x)
    assert expected.std() > 0.1 and actual.shape == expected.shape and actual.is_contiguous()
    assert (actual - expected).abs().max() <= 1e-5
    assert state(vae).calls == {f"vae {what}": 1} and "whole" in state(vae).vae_note
    assert torch.equal(code(qwen_fast.disable_vae(vae), what, x), expected) and STATE not in vars(vae)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_no_farther_from_float64(vae, what, dtype):
    x = picture(vae, what, batch=4).to(dtype)
    vae = torch.nn.Module.to(vae, dtype)
    expected = code(vae, what, x)
    actual = code(qwen_fast.enable_vae(vae), what, x)
    exact = code(vae.double(), what, x.double())
    ours, theirs = ((value.double() - exact).square().mean().sqrt() for value in (actual, expected))
    assert actual.dtype == dtype and 0 < ours <= theirs, (ours, theirs)


def test_biases_added_later(vae, what, monkeypatch):
    """The way of a GPU: convolutions without bias, which the next norm or sum adds."""
    x = picture(vae, what)
    expected = code(vae, what, x)
    monkeypatch.setattr(vae_layers, "BIAS_LATER", {"cpu"})
    actual = code(qwen_fast.enable_vae(vae), what, x)
    assert not torch.equal(actual, expected) and (actual - expected).abs().max() <= 1e-5


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs natively here")
def test_through_the_interpreted_kernel(vae, what, monkeypatch):
    """Every norm, and every bias and residual before one, by the operator's Triton launcher."""
    module, seen = importlib.import_module("qwen_fast_kernels.rms_norm_silu"), []

    def launched(x, gamma, x_bias=None, residual=None, silu=True):
        seen.append((x_bias is not None, residual is not None, silu))
        config = module.default_config(90, x.shape[1], x.element_size())
        return module.launch_rms_norm_silu(x, gamma, x_bias, residual, silu, config=config)

    x = picture(vae, what, 2, 2)
    expected = code(vae, what, x)
    monkeypatch.setattr(vae_layers, "BIAS_LATER", {"cpu"})
    monkeypatch.setattr(vae_layers, "rms_norm_silu", launched)
    actual = code(qwen_fast.enable_vae(vae), what, x)
    assert (actual - expected).abs().max() <= 1e-5
    assert {(False, False, True), (True, False, True), (True, True, True), (True, True, False)} <= set(seen)


@torch.no_grad()
@pytest.mark.parametrize("height", [12, 13])
def test_every_way_to_cut_gives_the_whole_picture(vae, what, height):
    x = picture(vae, what, height)
    layers = READ[what](vae)
    expected = run(layers, x, Plan(0, 0, 0, 1, 0, 0.0))
    sizes, count, ways = Sizes(layers, x.shape, 4), len(layers), 0
    spans = [(first, count) for first in range(count)] if what == "decode" else [(0, last) for last in range(1, count + 1)]
    for first, last in spans[:: 1 if height == 12 else 3]:
        if any(layer.reach is None for layer in layers[first:last]):
            continue
        for rows in {1, sizes.rows[last] // 2 + 1, max(sizes.rows[last] // 3, 1)} if height == 13 else {sizes.rows[last] // 3}:
            if rows > 2 or height == 13:
                actual = run(layers, x, Plan(first, last, max(rows, 1), 2, 0, 0.0))
                assert (actual - expected).abs().max() <= 2e-6 * max(1, expected.abs().max()), (first, last, rows)
                ways += 1
    assert ways >= 3


@torch.no_grad()
def test_a_layer_reaches_as_far_as_it_says(vae, what):
    """One changed row changes those within reach, and none beyond."""
    x = picture(vae, what, 16)
    layers = READ[what](vae)
    stream = Stream(vae_layers.channels_last(x), own=False)
    sizes = Sizes(layers, x.shape, 4)
    for index, layer in enumerate(layers):
        stream = layer.run(Stream(stream.total().clone(memory_format=torch.channels_last)))
        assert stream.total().shape[1:] == (layer.channels, sizes.rows[index + 1], sizes.columns[index + 1])
    for index, layer in enumerate(layers):
        if layer.reach is None:
            continue
        height = 8 + 4 * layer.reach + 2
        value = vae_layers.channels_last(torch.randn(1, sizes.channels[index], height, 4))
        row = height // 2 // layer.down * layer.down
        changed = value.clone(memory_format=torch.channels_last)
        changed[:, :, row] += 1
        before, after = (layer.run(Stream(each)).total() for each in (value, changed))
        rows = (before != after).any(dim=3).any(dim=1)[0].nonzero()[:, 0].tolist()
        low, high = math.floor((row - layer.reach) * layer.up / layer.down), (row + layer.reach + 1) * layer.up / layer.down
        assert rows and low <= rows[0] and rows[-1] < high, (layer.name, rows, row, layer.reach)
        assert layer.up > 1 or layer.down > 1 or rows == list(range(row - layer.reach, row + layer.reach + 1)), layer.name


@torch.no_grad()
def test_a_layer_needs_the_memory_that_it_says(vae, what, monkeypatch):
    """Its input, with a branch not yet added, among what is counted."""
    monkeypatch.setattr(importlib.import_module("qwen_fast_kernels.rms_norm_silu"), "CPU_BLOCK", 1 << 8)
    layers = READ[what](vae)
    channels = picture(vae, what).shape[1]
    for layer in layers:
        shape = (1, channels, 32, 32)

        def half(shape=shape) -> torch.Tensor:
            return torch.ones(shape).contiguous(memory_format=torch.channels_last)

        with LiveBytes() as counter:
            stream = Stream(half(), half() if layer is not layers[0] else None)
            counter.peak = 0  # what made the input is not the layer's
            layer.run(stream)
        pixels, channels = 4 * 32 * 32, layer.channels
        assert 0.5 * layer.peak * pixels <= counter.peak <= 1.05 * layer.peak * pixels + 4096, layer.name


@torch.no_grad()
@pytest.mark.parametrize("part", [2, 3])
def test_bands_keep_to_the_memory(vae, what, part, monkeypatch):
    """Tensor bytes counted at every operation: near the estimate, and within the limit that it was planned for."""
    monkeypatch.setattr(importlib.import_module("qwen_fast_kernels.rms_norm_silu"), "CPU_BLOCK", 1 << 10)
    x = picture(vae, what, 32, 8)
    stock = count(vae, what, x)[1]
    expected, counted = count(qwen_fast.enable_vae(vae, memory=None), what, x)
    estimate = whole_peak(READ[what](vae), x.shape, 4)
    assert 0.5 * estimate <= counted <= estimate < 0.8 * stock, (counted, estimate, stock)
    limit = estimate // part
    actual, counted = count(qwen_fast.enable_vae(vae, memory=limit), what, x)
    assert (actual - expected).abs().max() <= 1e-5 and counted <= 1.05 * limit, (counted, limit)
    assert state(vae).calls["vae bands"] > 1 and "computed twice" in state(vae).vae_note
    assert "bands" in str(qwen_fast.report(vae))


def count(vae, what, x) -> tuple[torch.Tensor, int]:
    with LiveBytes() as counter:
        result = code(vae, what, x)
    return result, counter.peak


def test_a_batch_goes_picture_by_picture_first(vae, what):
    x = picture(vae, what, batch=3)
    expected = code(qwen_fast.enable_vae(vae, memory=None), what, x)
    limit = whole_peak(READ[what](vae), x[:1].shape, 4)
    actual = code(qwen_fast.enable_vae(vae, memory=limit), what, x)
    assert (actual - expected).abs().max() <= 1e-5 and not state(vae).calls["vae bands"]


def test_too_little_memory_takes_the_smallest_bands_and_says_so(vae, what, caplog):
    x = picture(vae, what)
    expected = code(vae, what, x)
    actual = code(qwen_fast.enable_vae(vae, memory=1000), what, x)
    assert (actual - expected).abs().max() <= 1e-5
    assert f"the VAE cannot {what} a picture of this size in 0.0 MiB" in caplog.text


def test_the_plan_that_fits_with_the_least_work():
    with torch.device("meta"):
        layers = decoder_layers(diffusers.AutoencoderKLQwenImage())
    shape, gib = torch.Size((1, 16, 512, 512)), 2**30
    plans = [choose(layers, shape, 2, limit) for limit in (None, 16 * gib, 6 * gib, 3 * gib, 2 * gib)]
    assert plans[0] == plans[1] and plans[0].bands == 1 and plans[0].overhead == 0
    for plan, limit in zip(plans[2:], (6, 3, 2), strict=True):
        assert plan.bands > 1 and plan.peak <= limit * gib and 0 < plan.overhead < 0.1
    assert all(less.overhead <= more.overhead for less, more in itertools.pairwise(plans))
    # No tensor too large for 32 bits, however much memory there is.
    cut = choose(layers, shape, 2, None, vae_bands.MOST_ON_CUDA)
    assert cut.bands == 2 and cut.overhead < 0.01
    assert choose(layers, torch.Size((1, 16, 256, 256)), 2, None, vae_bands.MOST_ON_CUDA).bands == 1
    # Of stock 20.8 GiB are reported at 2048x2048.
    assert whole_peak(layers, torch.Size((1, 16, 256, 256)), 2) < 6 * gib


def test_rows_of_a_band():
    """By hand: a residual block of two 3x3 convolutions, an upsampling, a residual block."""
    with torch.device("meta"):
        layers = decoder_layers(diffusers.AutoencoderKLQwenImage())
    names = [layer.name for layer in layers]
    first = names.index("decoder.up_blocks.2.2")
    assert [layer.reach for layer in layers[first : first + 3]] == [2, 1, 2]
    sizes = Sizes(layers, torch.Size((1, 16, 64, 64)), 2)
    last = first + 3
    assert sizes.ranges(first, last, 100, 200) == [(46, 104), (48, 102), (98, 202), (100, 200)]
    assert sizes.ranges(first, last, 0, 512)[0] == (0, 256), "no rows beyond the picture's"


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_attention_in_parts(rows, monkeypatch):
    query, key, value = (torch.randn(2, 1, 64, 24, dtype=torch.float64) for _ in range(3))
    expected = vae_layers.attend(query, key, value)
    monkeypatch.setattr(vae_layers, "_rows_at_once", lambda *_: rows)
    torch.testing.assert_close(vae_layers.attend(query, key, value), expected, rtol=1e-12, atol=1e-12)
    scores = torch.softmax(query @ key.mT / 24**0.5, dim=-1)
    torch.testing.assert_close(expected, scores @ value, rtol=1e-10, atol=1e-10)


def test_auto_asks_the_gpu_and_nothing_else(monkeypatch):
    monkeypatch.setattr(vae_bands, "free_bytes", lambda device, **_: 1200 if device.type == "cuda" else None)
    assert memory_limit("auto", torch.device("cuda", 0)) == int(vae_bands.USABLE * 1200)
    assert memory_limit("auto", torch.device("cpu")) is None
    assert memory_limit(None, torch.device("cuda", 0)) is None and memory_limit(77, torch.device("cuda", 0)) == 77


def test_the_size_at_which_bands_begin_is_reported(weights):
    vae = copy.deepcopy(weights["qwenimage"])
    limit = whole_peak(decoder_layers(vae), torch.Size((1, 16, 20, 20)), 4)
    assert "in bands of rows above 160x160" in str(qwen_fast.report(qwen_fast.enable_vae(vae, memory=limit)))
    assert "bands" not in str(qwen_fast.report(qwen_fast.enable_vae(vae, memory=None)))


@pytest.mark.gpu
@torch.no_grad()
def test_a_large_picture_within_its_memory(device):
    """The whole VAE in bf16 at 2048x2048: at most 6 GiB beyond the weights."""
    vae = diffusers.AutoencoderKLQwenImage()
    initialize(vae, "vae", 0)
    vae = torch.nn.Module.to(vae, device, torch.bfloat16).eval()
    z = torch.randn(1, 16, 1, 256, 256, device=device, dtype=torch.bfloat16)
    qwen_fast.enable_vae(vae, memory=None)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    whole = vae.decode(z).sample
    assert torch.cuda.max_memory_allocated(device) - before <= 6 * 2**30
    qwen_fast.enable_vae(vae, memory=2**31)
    torch.cuda.reset_peak_memory_stats(device)
    banded = vae.decode(z).sample
    assert torch.cuda.max_memory_allocated(device) - before <= 3 * 2**30
    assert (banded.float() - whole.float()).abs().max() <= 0.1
