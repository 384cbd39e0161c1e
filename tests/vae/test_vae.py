"""Pictures through the VAE: stock's to 1e-5 in fp32, as near to float64 in half precision, videos and others untouched."""

import copy

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import draw, stock
from qwen_fast.common.options import Options
from qwen_fast.common.state import STATE, State
from qwen_fast.testing import initialize
from qwen_fast.vae import pictures as fast_vae
from support.pipelines import DTYPES, GUIDED, assert_ran_fast

PROMPT = {"prompt": "a red circle"}


@pytest.fixture(scope="module")
def weights():
    vae = diffusers.AutoencoderKLQwenImage(base_dim=16, z_dim=16)
    with torch.no_grad():
        initialize(vae, "vae", 0)
    return vae.eval()


@pytest.fixture
def vae(weights):
    return copy.deepcopy(weights)


def latents(dtype=torch.float32, batch: int = 1, frames: int = 1, height: int = 6, width: int = 10) -> torch.Tensor:
    return torch.randn(batch, 16, frames, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@torch.no_grad()
def decode(vae, z, state=None):
    if state is None:
        return vae.decode(z).sample
    fast_vae.attach(vae, state)
    with fast_vae.images(vae, state):
        image = vae.decode(z).sample
    fast_vae.detach(vae, state)
    return image


@torch.no_grad()
def encode(vae, x, state=None):
    if state is None:
        return vae.encode(x).latent_dist.parameters
    fast_vae.attach(vae, state)
    with fast_vae.images(vae, state):
        parameters = vae.encode(x).latent_dist.parameters
    fast_vae.detach(vae, state)
    return parameters


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("run", "size"), [(decode, (16, 6, 10)), (encode, (3, 48, 80))], ids=["decode", "encode"])
def test_one_frame_in_fp32(vae, run, size, batch):
    x = torch.randn(batch, size[0], 1, *size[1:], generator=torch.Generator().manual_seed(1))
    state = State()
    expected, actual = run(vae, x), run(vae, x, state)
    assert actual.shape == expected.shape and expected.std() > 0.1
    assert (actual - expected).abs().max() <= 1e-5 and sum(state.calls.values()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("run", "size"), [(decode, (16, 6, 10)), (encode, (3, 48, 80))], ids=["decode", "encode"])
def test_half_precision_is_no_farther_from_float64(vae, run, size, dtype):
    x = torch.randn(4, size[0], 1, *size[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
    vae.to(dtype)
    expected, actual = run(vae, x), run(vae, x, State())
    exact = run(vae.double(), x.double())
    ours, theirs = ((value.double() - exact).square().mean().sqrt() for value in (actual, expected))
    assert actual.dtype == dtype and theirs > 0 and ours <= 1.05 * theirs, (ours, theirs)


def test_slicing_and_tiling(vae):
    z = latents(batch=2, height=11, width=13)
    vae.tile_sample_min_height = vae.tile_sample_min_width = 64
    vae.tile_sample_stride_height = vae.tile_sample_stride_width = 48
    for change in (vae.enable_slicing, vae.enable_tiling):
        change()
        expected = decode(vae, z)
        assert (decode(vae, z, State()) - expected).abs().max() <= 1e-5


def test_a_video_goes_stocks_way(vae):
    z, state = latents(frames=3), State()
    expected = decode(vae, z)
    actual = decode(vae, z, state)
    # Its first frame has no past either, and takes the 2-D convolutions; the others have one.
    assert (actual - expected).abs().max() <= 1e-5 and expected.shape[2] == 9 and not state.calls


def note(vae, z, **changes):
    """The decoded picture, and what was noted about it."""
    state = State(Options(**changes))
    return decode(vae, z, state), state.vae_note


@pytest.mark.parametrize("name", ["decoder", "decoder.mid_block.attentions.0", "decoder.up_blocks.1.resnets.0.conv1"])
def test_a_hooked_module_is_called(vae, name):
    """As stock calls it, with its arguments, and so are all the others."""
    z, called, hooked, state = latents(), [], vae.get_submodule(name), State()
    handle = hooked.register_forward_hook(
        lambda module, args, kwargs, output: called.append((len(args), sorted(kwargs))), with_kwargs=True
    )
    expected = decode(vae, z)
    assert torch.equal(decode(vae, z, state), expected) and called[0] == called[1] and len(called) == 2
    assert any(f"a forward hook on {name}" in reason for reason in state.fallbacks)
    with pytest.raises(RuntimeError, match=f"strict=True.*a forward hook on {name}"):
        decode(vae, z, State(Options(strict=True)))
    handle.remove()
    assert "whole" in note(vae, z)[1]


def test_gradients_flow_as_in_stock(vae):
    z, state = latents().requires_grad_(), State()
    (expected,) = torch.autograd.grad(vae.decode(z).sample.square().sum(), z)
    fast_vae.attach(vae, state)
    with fast_vae.images(vae, state):
        (actual,) = torch.autograd.grad(vae.decode(z).sample.square().sum(), z)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max() and "gradients are wanted" in state.vae_note


def test_under_autocast(vae):
    z = latents()
    with torch.autocast("cpu", torch.bfloat16):
        expected = decode(vae, z)
        actual, said = note(vae, z)
    assert actual.dtype == expected.dtype and (actual - expected).abs().max() <= 0.1 and "autocast is on" in said


@pytest.mark.parametrize(
    ("run", "shape", "message"),
    [
        (decode, (1, 12, 1, 6, 10), r"`z` has shape \(1, 12, 1, 6, 10\); \[batch, 16 channels, frames, height, width\]"),
        (decode, (1, 16, 6, 10), r"`z` has shape \(1, 16, 6, 10\)"),
        (encode, (1, 4, 1, 48, 80), r"`x` has shape \(1, 4, 1, 48, 80\); \[batch, 3 channels"),
    ],
)
def test_wrong_shapes_are_named(vae, run, shape, message):
    with pytest.raises(ValueError, match=message):
        run(vae, torch.zeros(shape), State())


def test_weights_are_read_at_each_call(vae):
    z, state = latents(), State()
    decode(vae, z, state)
    with torch.no_grad():
        vae.decoder.conv_out.weight.data = vae.decoder.conv_out.weight.data * 2
        vae.decoder.up_blocks[0].resnets[0].norm1.gamma.data[3] += 1
    assert (decode(vae, z, state) - decode(vae, z)).abs().max() <= 1e-5


def test_enable_vae_beside_pipelines_and_bad_arguments(vae, checkpoint):
    assert qwen_fast.enable_vae(vae) is vae and "one frame" in str(qwen_fast.report(vae))
    assert "enable_vae(vae)" in str(qwen_fast.report(qwen_fast.disable_vae(vae)))
    pipe = qwen_fast.enable(stock(checkpoint))
    qwen_fast.enable_vae(pipe.vae)
    qwen_fast.disable_vae(pipe.vae)
    draw(pipe, **PROMPT, **(GUIDED | {"output_type": "pt"}))
    assert qwen_fast.report(pipe).calls["vae decode"] == 1
    assert type(qwen_fast.disable(pipe).vae) is diffusers.AutoencoderKLQwenImage
    with pytest.raises(ValueError, match="`vae` cannot be accelerated: vae is a Linear"):
        qwen_fast.enable_vae(torch.nn.Linear(1, 1))
    for value in ("much", 0, -5, 1.5, True):
        with pytest.raises(ValueError, match=f"`memory` is {value!r}; use 'auto', None, or a whole number of bytes"):
            qwen_fast.enable_vae(vae, memory=value)
        with pytest.raises(ValueError, match=f"`vae_memory` is {value!r}"):
            qwen_fast.enable(pipe, vae_memory=value)
    assert type(vae) is diffusers.AutoencoderKLQwenImage and type(pipe) is diffusers.QwenImagePipeline


def test_a_copy_of_an_enabled_vae_is_its_own(vae):
    z = latents()
    twin = copy.deepcopy(qwen_fast.enable_vae(vae))
    qwen_fast.disable_vae(vae)
    assert (decode(twin, z) - decode(vae, z)).abs().max() <= 1e-5
    assert qwen_fast.report(twin).calls == {"vae decode": 1} and type(twin) is fast_vae.AutoencoderKLQwenImage
    assert type(qwen_fast.disable_vae(twin)) is diffusers.AutoencoderKLQwenImage


def test_bands_in_a_pipeline(checkpoint):
    pipe = stock(checkpoint)
    expected = draw(pipe, **PROMPT, **(GUIDED | {"output_type": "pt"}))
    qwen_fast.enable(pipe, vae_memory=100_000)
    actual = draw(pipe, **PROMPT, **(GUIDED | {"output_type": "pt"}))
    assert (actual - expected).abs().max() <= 1e-5
    report = qwen_fast.report(pipe)
    assert report.calls["vae bands"] > 1 and "decoded in bands of rows above" in str(report)


def test_attach_and_detach_leave_no_trace(vae):
    before = {name: (type(module), set(vars(module))) for name, module in vae.named_modules()}
    pointers, z = [p.data_ptr() for p in vae.parameters()], latents()
    expected = decode(vae, z)
    before = {name: (type(module), set(vars(module))) for name, module in vae.named_modules()}
    one, two = State(), State()
    fast_vae.attach(vae, one), fast_vae.attach(vae, two)
    assert torch.equal(decode(vae, z), expected), "outside a call of its pipeline it is stock"
    with fast_vae.images(vae, State()):
        assert torch.equal(decode(vae, z), expected), "a pipeline that is not attached"
    fast_vae.detach(vae, one)
    assert type(vae) is fast_vae.AutoencoderKLQwenImage
    fast_vae.detach(vae, two)
    assert {name: (type(module), set(vars(module))) for name, module in vae.named_modules()} == before
    assert [p.data_ptr() for p in vae.parameters()] == pointers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["image", "diffusers"])
def test_in_a_pipeline(checkpoint, dtype, option):
    pipe = stock(checkpoint, dtype)
    expected = draw(pipe, **PROMPT, **(GUIDED | {"output_type": "pt"}))
    qwen_fast.enable(pipe, vae_mode=option)
    actual = draw(pipe, **PROMPT, **(GUIDED | {"output_type": "pt"}))
    assert_ran_fast(pipe)
    assert qwen_fast.report(pipe).calls.get("vae decode", 0) == (option == "image")
    assert ("VAE" in str(qwen_fast.report(pipe))) == (option == "image")
    assert (actual - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.1)
    assert type(qwen_fast.disable(pipe).vae) is diffusers.AutoencoderKLQwenImage


def test_image_to_image_encodes_and_decodes(checkpoint):
    from support.snapshots import EDITING

    cls = diffusers.QwenImageImg2ImgPipeline
    pipe = stock(checkpoint, cls=cls)
    arguments = PROMPT | GUIDED | EDITING[cls] | {"output_type": "pt"}
    expected = draw(pipe, **arguments)
    actual = draw(qwen_fast.enable(pipe), **arguments)
    assert (actual - expected).abs().max() <= 2e-5
    calls = qwen_fast.report(pipe).calls
    assert calls["vae encode"] == calls["vae decode"] == 1


def test_another_vae_is_used_as_it_is_and_named(checkpoint):
    class Custom(diffusers.AutoencoderKLQwenImage):
        pass

    pipe = stock(checkpoint)
    pipe.vae.__class__ = Custom
    expected = draw(pipe, **PROMPT, **(GUIDED | {"output_type": "pt"}))
    actual = draw(qwen_fast.enable(pipe), **PROMPT, **(GUIDED | {"output_type": "pt"}))
    assert (actual - expected).abs().max() <= 1e-5
    assert any("vae is a Custom" in reason for reason in qwen_fast.report(pipe).fallbacks)


@pytest.mark.parametrize("name", ["decode", "_decode"])
def test_a_method_of_ones_own_is_called_and_named(vae, name):
    """What it calls stays fused."""
    for changed in (vae, enabled := qwen_fast.enable_vae(copy.deepcopy(vae))):
        old = getattr(changed, name)
        setattr(changed, name, lambda z, old=old, **arguments: old(z * 0.5, **arguments))
    z = latents()
    assert (decode(enabled, z) - decode(vae, z)).abs().max() <= 1e-5
    report = qwen_fast.report(enabled)
    assert report.calls == {"vae decode": 1} and f"{name} is not diffusers' own" in str(report.fallbacks)
    enabled.__dict__[STATE].options = Options(strict=True)
    with pytest.raises(RuntimeError, match=f"strict=True.*{name} is not"):
        decode(enabled, z)


def test_a_vae_without_parts_is_reported(vae):
    qwen_fast.enable_vae(vae, memory=1000)
    vae.encoder = vae.decoder = vae.quant_conv = vae.post_quant_conv = None
    assert "VAE" in str(qwen_fast.report(vae))
    with pytest.raises(AttributeError):
        decode(vae, latents())
