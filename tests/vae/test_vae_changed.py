"""What people change in a VAE: stock's picture all the same, the change is named, and it raises under strict=True."""

import copy
import functools
import re

import diffusers
import peft
import pytest
import torch
import torch.nn.functional as F
from optimum import quanto
from torch import nn

import qwen_fast
from qwen_fast.common.options import Options
from qwen_fast.common.state import STATE
from qwen_fast.testing import initialize
from qwen_fast.vae.pictures import images
from support.field import distance

FAMILY = {
    "AutoencoderKLQwenImage": {"base_dim": 8, "z_dim": 16, "num_res_blocks": 1},
    "AutoencoderKLQwenImage21": {
        **{"base_dim": 4, "decoder_base_dim": 6, "z_dim": 8, "num_res_blocks": 1},
        **{"latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
    },
}


@functools.cache
def built(family: str) -> nn.Module:
    vae = getattr(diffusers, family)(**FAMILY[family])
    initialize(vae, "vae", 0)
    return vae.eval()


@pytest.fixture(params=[name for name in FAMILY if hasattr(diffusers, name)])  # the second is newer than the oldest diffusers
def vae(request):
    return copy.deepcopy(built(request.param))


@torch.no_grad()
def code(vae, what: str) -> torch.Tensor:
    """A picture decoded or encoded; random numbers, where there are any, from one seed."""
    torch.manual_seed(11)
    if what == "decode":
        return vae.decode(torch.randn(1, vae.config.z_dim, 1, 4, 3)).sample
    ratio, channels = vae.spatial_compression_ratio, next(vae.encoder.parameters()).shape[1]
    return vae.encode(torch.randn(1, channels, 1, 4 * ratio, 3 * ratio)).latent_dist.parameters


def instances(vae, name: str) -> list[nn.Module]:
    """Modules of diffusers' class `name` of either family."""
    return [module for module in vae.modules() if type(module).__name__ in (f"QwenImage{name}", f"QwenImage21{name}")]


def convolutions(vae) -> list[nn.Module]:
    return [module for module in vae.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]


def first_block(part: nn.Module) -> nn.Module:
    return part.mid_block.resnets[0]


def circular(vae, patch):
    for convolution in convolutions(vae):
        if convolution.kernel_size[-1] == 3 and type(convolution) is nn.Conv2d:
            convolution.padding_mode = "circular"
        elif convolution.kernel_size[-1] == 3:
            width, _, height, *_ = convolution._padding
            convolution.padding_mode = "circular"
            convolution._reversed_padding_repeated_twice = [width, width, height, height, 0, 0][
                : 2 * (convolution.weight.ndim - 2)
            ]
            convolution._padding = (0, 0, 0, 0, *convolution._padding[4:])


def seamless(vae, patch):
    """Tiling textures: `_conv_forward` of single layers replaced, as scripts for seamless pictures do."""

    def padded(convolution, x, weight, bias):
        x = F.pad(x, (1, 1, 1, 1) + (0, 0) * (x.ndim - 4), mode="circular")[..., 1:-1, 1:-1] * 1.1
        return type(convolution)._conv_forward(convolution, x, weight, bias)

    for part in (vae.encoder, vae.decoder):
        convolution = first_block(part).conv1
        convolution._conv_forward = functools.partial(padded, convolution)


def class_s_convolution(vae, patch):
    for cls in (nn.Conv2d, nn.Conv3d):
        old = cls._conv_forward
        patch.setattr(cls, "_conv_forward", lambda self, x, weight, bias, old=old: old(self, x, weight, bias) * 1.05)


def class_s_call(vae, patch):
    cls = type(vae.decoder.norm_out)
    patch.setattr(cls, "__call__", lambda self, x: nn.Module.__call__(self, x) * 1.05, raising=False)


def class_s_forward(vae, patch):
    cls = type(vae.decoder.norm_out)
    old = cls.forward
    patch.setattr(cls, "forward", lambda self, x: old(self, x) * 1.05)


def shifted(vae, patch):
    """One row of padding above, none below."""
    for part in (vae.encoder, vae.decoder):
        padding = part.conv_in._padding
        part.conv_in._padding = (*padding[:2], 2, 0, *padding[4:])


def wider_padding(vae, patch):
    vae.quant_conv._padding = vae.post_quant_conv._padding = (1, 1, 1, 1, *vae.quant_conv._padding[4:])


def padding_of_a_plain_convolution(vae, patch):
    for block in instances(vae, "Resample"):
        block.resample[1].padding_mode = "reflect" if block.mode.startswith("up") else block.resample[1].padding_mode
        if block.mode.startswith("down"):
            block.resample[0] = nn.ReflectionPad2d((0, 1, 0, 1))


def scaled_norms(vae, patch):
    for part in (vae.encoder, vae.decoder):
        part.norm_out.scale *= 0.7


def norm_with_bias(vae, patch):
    for part in (vae.encoder, vae.decoder):
        part.norm_out.bias = nn.Parameter(torch.full(part.norm_out.gamma.shape, 0.3))


def norm_with_a_plain_bias(vae, patch):
    for part in (vae.encoder, vae.decoder):
        part.norm_out.bias = 0.3


def other_norm(make, vae, patch):
    for part in (vae.encoder, vae.decoder):
        part.norm_out = make(part.norm_out.gamma.shape[0])
        first_block(part).norm2 = make(first_block(part).norm2.gamma.shape[0])


def dropout(vae, patch):
    for part in (vae.encoder, vae.decoder):
        first_block(part).dropout.p = 0.5
        first_block(part).dropout.train()


def other_dropout(vae, patch):
    for part in (vae.encoder, vae.decoder):
        first_block(part).dropout = nn.Hardtanh(-0.5, 0.5)


def other_activation(where, vae, patch):
    for part in (vae.encoder, vae.decoder):
        where(part).nonlinearity = nn.GELU()


def inplace_activation(vae, patch):
    """SiLU that writes into its input: the same picture, and not ours to know."""
    for part in (vae.encoder, vae.decoder):
        part.nonlinearity = nn.SiLU(inplace=True)


class Louder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *args, **kwargs):
        return self.inner(x, *args, **kwargs) * 1.1 + 0.1


def wrapped(path, vae, patch):
    for part in (vae.encoder, vae.decoder):
        parent = part.get_submodule(path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        parent._modules[name] = Louder(parent._modules[name])


def wrapped_resampling(vae, patch):
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("Resample"):
                module._modules[name] = Louder(child)


def subclassed(vae, patch):
    class Own(type(vae.decoder.conv_in)):
        def forward(self, x, *args):
            return super().forward(x, *args) * 1.1

    vae.encoder.conv_in.__class__ = vae.decoder.conv_in.__class__ = Own


def other_upsampling(vae, patch):
    for block in instances(vae, "Resample"):
        if block.mode.startswith("up"):
            block.resample[0].mode = "bilinear"
        else:
            block.resample[0].value = 0.5


def no_attention(vae, patch):
    vae.encoder.mid_block.attentions[0] = vae.decoder.mid_block.attentions[0] = None


def identity_for_attention(vae, patch):
    vae.encoder.mid_block.attentions[0] = vae.decoder.mid_block.attentions[0] = nn.Identity()


def no_middle(vae, patch):
    vae.encoder.mid_block.resnets = vae.encoder.mid_block.resnets[:1]
    vae.decoder.mid_block.resnets = vae.decoder.mid_block.resnets[:1]


def lora(vae, patch):
    config = peft.LoraConfig(r=2, target_modules=["to_qkv", "proj"], init_lora_weights=False)
    torch.manual_seed(5)
    peft.inject_adapter_in_model(config, vae)


def quantised(vae, patch):
    quanto.quantize(vae, weights=quanto.qint8, include=["*to_qkv", "*proj"])
    quanto.freeze(vae)


def frozen_norm(vae, patch):
    for part in (vae.encoder, vae.decoder):
        gamma = part.norm_out.gamma
        del part.norm_out.gamma
        part.norm_out.gamma = gamma.detach() * 1.2


def weight_norm(vae, patch):
    for part in (vae.encoder, vae.decoder):
        torch.nn.utils.parametrizations.weight_norm(first_block(part).conv1)
        first_block(part).conv1.parametrizations.weight.original0.data *= 1.2


def hooked(path, vae, patch):
    for part in (vae.encoder, vae.decoder):
        part.get_submodule(path).register_forward_hook(lambda module, args, output: output * 1.1)


def hooked_before(path, vae, patch):
    for part in (vae.encoder, vae.decoder):
        part.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0] * 1.1, *args[1:]))


def forward_of_an_instance(vae, patch):
    for part in (vae.encoder, vae.decoder):
        old = part.norm_out.forward
        part.norm_out.forward = lambda x, old=old: old(x) * 1.1


def hooks_on_all_modules(vae, patch):
    patch.setitem(
        torch.nn.modules.module._global_forward_hooks,
        -1,
        lambda module, args, output: output * 1.1 if isinstance(module, nn.SiLU) else None,
    )


CHANGES = {
    "circular": (circular, "padding_mode is 'circular'"),
    "_conv_forward": (seamless, "conv1._conv_forward is its own"),
    "_conv_forward of a class": (class_s_convolution, r"Conv2d\._conv_forward"),
    "__call__ of a class": (class_s_call, r"RMS_norm\.__call__"),
    "forward of a class": (class_s_forward, r"RMS_norm\.forward"),
    "padding shifted": (shifted, "conv_in._padding is"),
    "padding widened": (wider_padding, "quant_conv._padding is"),
    "padding of plain convolutions": (padding_of_a_plain_convolution, "resample"),
    "scale of a norm": (scaled_norms, "norm_out.scale is"),
    "bias of a norm": (norm_with_bias, "norm_out has other tensors: gamma, bias"),
    "plain bias of a norm": (norm_with_a_plain_bias, "norm_out.bias is 0.3"),
    "group norm": (functools.partial(other_norm, lambda dim: nn.GroupNorm(2, dim)), "GroupNorm"),
    "no norm": (functools.partial(other_norm, lambda dim: nn.Identity()), "Identity"),
    "dropout": (dropout, "dropout is training"),
    "no dropout": (other_dropout, "Hardtanh"),
    "activation of the head": (functools.partial(other_activation, lambda part: part), "nonlinearity is a .*GELU"),
    "activation of a block": (functools.partial(other_activation, first_block), "nonlinearity is a .*GELU"),
    "activation in place": (inplace_activation, "nonlinearity.inplace is True"),
    "wrapped convolution": (functools.partial(wrapped, "conv_in"), "conv_in is a .*Louder"),
    "wrapped last convolution": (functools.partial(wrapped, "conv_out"), "conv_out is a .*Louder"),
    "wrapped block": (functools.partial(wrapped, "mid_block.resnets.0"), "resnets.0 is a .*Louder"),
    "wrapped attention": (functools.partial(wrapped, "mid_block.attentions.0"), "attentions.0 is a .*Louder"),
    "wrapped middle": (functools.partial(wrapped, "mid_block"), "mid_block is a .*Louder"),
    "wrapped resampling": (wrapped_resampling, "is a .*Louder"),
    "subclass": (subclassed, "conv_in is a .*Own"),
    "upsampling": (other_upsampling, "resample.0"),
    "no attention": (no_attention, "attentions.0 is a .*NoneType"),
    "identity": (identity_for_attention, "attentions.0 is a .*Identity"),
    "no middle": (no_middle, "resnets has other modules"),
    "LoRA": (lora, "to_qkv is a peft"),
    "quantised": (quantised, "to_qkv is a optimum"),
    "gamma a plain tensor": (frozen_norm, "norm_out has other tensors"),
    "weight norm": (weight_norm, "conv1 is a .*Parametrized"),
    "hook on the head": (functools.partial(hooked, "norm_out"), "hook on .*norm_out"),
    "hook on an activation": (functools.partial(hooked, "mid_block.resnets.0.nonlinearity"), "hook on .*nonlinearity"),
    "hook before a block": (functools.partial(hooked_before, "mid_block.resnets.1"), "hook on .*resnets.1"),
    "forward of an instance": (forward_of_an_instance, "a forward of its own on .*norm_out"),
    "hooks on all modules": (hooks_on_all_modules, "hooks on all modules"),
}
SAME = {"activation in place"}  # stock's picture does not change


OF_CLASSES = {name for name in CHANGES if name.endswith(("of a class", "all modules"))}  # both VAEs have these at once


@pytest.mark.parametrize("what", ["decode", "encode"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen_as_in_stock(vae, name, what, monkeypatch):
    """After `enable_vae` and a first picture; `report` names it and never fails, and stock has it after `disable_vae`."""
    change, word = CHANGES[name]
    before = code(vae, what)
    enabled = qwen_fast.enable_vae(copy.deepcopy(vae))
    code(enabled, what)
    for changed in [vae] if name in OF_CLASSES else [vae, enabled]:
        change(changed, monkeypatch)
    expected = code(vae, what)
    assert name in SAME or distance(expected, before) > 1e-3, "the change shows nothing"
    assert torch.equal(code(enabled, what), expected)
    (reason,) = qwen_fast.report(enabled).fallbacks
    assert re.search(word, reason), reason
    enabled.__dict__[STATE].options = Options(strict=True)
    with pytest.raises(RuntimeError, match=f"strict=True.*{word}"):
        code(enabled, what)
    assert torch.equal(code(qwen_fast.disable_vae(enabled), what), expected)


@pytest.mark.parametrize("what", ["decode", "encode"])
def test_methods_taken_before_disable_are_stocks_afterwards(vae, what):
    """`encode` and `decode`, those they call, and a convolution's forward."""
    expected = code(vae, what)
    qwen_fast.enable_vae(vae)
    taken = {name: getattr(vae, name) for name in ("encode", "decode", "_encode", "_decode")}
    convolution = first_block(vae.decoder).conv1.forward
    x = torch.randn(1, first_block(vae.decoder).conv1.in_channels, 1, 4, 3)
    qwen_fast.disable_vae(vae)
    assert torch.equal(convolution(x), first_block(vae.decoder).conv1(x))
    for name in taken:
        setattr(vae, name, taken[name])
    assert torch.equal(code(vae, what), expected)


def test_a_part_that_was_changed_leaves_the_other_fused(vae):
    """A decoder of one's own, and an encoder that is diffusers'."""
    vae.decoder.conv_in = Louder(vae.decoder.conv_in)
    expected = code(vae, "encode")
    qwen_fast.enable_vae(vae)
    assert distance(code(vae, "encode"), expected) <= 1e-5
    report = qwen_fast.report(vae)
    assert report.calls == {"vae encode": 1} and not report.fallbacks


def test_a_fresh_one_tells_nothing_where_layers_are_made_otherwise(monkeypatch):
    """The script for seamless pictures that makes every convolution circular: undone or not, it is seen."""
    old = nn.Conv2d.__init__

    def seamless_init(self, *args, **kwargs):
        old(self, *args, **kwargs | ({"padding_mode": "circular"} if type(self) is nn.Conv2d else {}))

    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "__init__", seamless_init)
        # A width that no other test has.
        vae = diffusers.AutoencoderKLQwenImage(base_dim=12, z_dim=16, num_res_blocks=1).eval()
        initialize(vae, "vae", 0)
        expected = code(vae, "decode")
        qwen_fast.enable_vae(vae)
        assert torch.equal(code(vae, "decode"), expected)
        assert "Conv2d.__init__" in str(qwen_fast.report(vae))
    assert torch.equal(code(vae, "decode"), expected)
    assert "padding_mode is 'circular'" in str(qwen_fast.report(vae))


def test_a_convolution_called_within_a_call_is_stocks():
    """A callback may call a VAE's own modules; only while the VAE codes, its convolutions are ours."""
    vae = copy.deepcopy(built("AutoencoderKLQwenImage"))
    circular(vae, None)
    x = torch.randn(1, vae.config.z_dim, 1, 4, 3)
    with torch.no_grad():
        expected = vae.decoder(vae.post_quant_conv(x))
        with images(vae, qwen_fast.enable_vae(vae).__dict__[STATE]):
            assert torch.equal(vae.decoder(vae.post_quant_conv(x)), expected)


def test_weights_of_several_dtypes_go_along_the_modules(vae):
    """A head in float64: its norm decides the dtype of what follows."""
    vae.decoder.norm_out.double(), vae.decoder.conv_out.double()
    expected = code(vae, "decode")
    actual = code(qwen_fast.enable_vae(vae), "decode")
    assert actual.dtype == expected.dtype == torch.float64 and distance(actual, expected) <= 1e-5
    assert "its weights are torch.float32 and torch.float64" in str(qwen_fast.report(vae))
