"""Pictures through the VAE: stock's to 1e-5 in fp32, as near to float64 in half precision, videos and others untouched."""

import copy

import diffusers
import pytest
import torch

import qwen_fast
from pipelines import DTYPES, GUIDED, assert_ran_fast, draw, stock
from qwen_fast import vae as fast_vae
from qwen_fast.reporting import State
from qwen_fast.testing import initialize

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
    z = latents(batch=2, height=40, width=36)
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


def test_nothing_is_kept_for_frames_that_do_not_come(vae):
    """Stock keeps a copy of each convolution's input until the picture is done."""
    z, seen = latents(), []
    original = fast_vae.QwenImageCausalConv3d.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fast_vae.QwenImageCausalConv3d, "forward", lambda self, *args: (seen.append(args[1:]), original(self, *args))[1]
        )
        decode(vae, z, State())
    assert seen and not any(seen) and not getattr(vae, "_feat_map", None)


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
    qwen_fast.enable(pipe, vae=option)
    actual = draw(pipe, **PROMPT, **(GUIDED | {"output_type": "pt"}))
    assert_ran_fast(pipe)
    assert qwen_fast.report(pipe).calls.get("vae decode", 0) == (option == "image")
    assert ("VAE" in str(qwen_fast.report(pipe))) == (option == "image")
    assert (actual - expected).abs().max() <= (1e-5 if dtype == torch.float32 else 0.1)
    assert type(qwen_fast.disable(pipe).vae) is diffusers.AutoencoderKLQwenImage


def test_image_to_image_encodes_and_decodes(checkpoint):
    from test_switch import EDITING

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
