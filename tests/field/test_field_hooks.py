"""Hooks on parts of a pipeline: steering, interpretability, LoRA by timestep, hooks of every module of a process."""

import pytest
import torch
from torch.nn.modules import module as every_module

import qwen_fast
from qwen_fast.transformer.block_module import mask_arguments
from support.field import IMAGE_TO_IMAGE, ORDERS, SMALL, assert_not_stocks_own, compare, draw, guided

TO_Q, TO_V = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"
BLOCK = "transformer_blocks.0"
SHIFT = 0.3 * torch.linspace(-1, 1, 24 * 64).view(1, 24, 64)
CHANNELS = torch.linspace(0, 1, 32)


def hooked(path, change):
    """A situation: a forward hook that notes what its module gave and changes it."""

    def situation(run):
        def hook(module, args, output):
            run.note(path, *args, output)
            return change(output)

        run.transformer.get_submodule(path).register_forward_hook(hook)

    return situation


def with_names(path, change=lambda output: output):
    """The same with the names of the arguments."""

    def situation(run):
        def hook(module, args, kwargs, output):
            run.note(path, *args, **kwargs)
            return change(output)

        run.transformer.get_submodule(path).register_forward_hook(hook, with_kwargs=True)

    return situation


def before(path, name, change):
    """A situation: a pre-hook that changes one argument by name."""

    def situation(run):
        def hook(module, args, kwargs):
            run.note(path, *args, **kwargs)
            return args, kwargs | {name: change(kwargs[name])}

        run.transformer.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)

    return situation


def positional(path, change):
    """A pre-hook without names, as on a linear layer."""

    def situation(run):
        def hook(module, args):
            run.note(path, *args)
            return (change(args[0]), *args[1:])

        run.transformer.get_submodule(path).register_forward_pre_hook(hook)

    return situation


def every_other_call(run):
    """Halves the calls that have the prompt and leaves those of the negative one."""
    calls = []

    def hook(module, args, output):
        calls.append(tuple(output.shape))
        run.note("to_v", *args, output)
        return output * 0.5 if len(calls) % 2 else output

    run.transformer.get_submodule(TO_V).register_forward_hook(hook)


def masked_tokens(run):
    """A pre-hook that gives a block a mask of its own."""

    def hook(module, args, kwargs):
        run.note(BLOCK, *args, **kwargs)
        text = kwargs["encoder_hidden_states"]
        mask = torch.ones(text.shape[:2], dtype=torch.bool)
        mask[:, :2] = False
        return args, kwargs | mask_arguments(mask, kwargs["hidden_states"].shape[1], None)

    run.transformer.get_submodule(BLOCK).register_forward_pre_hook(hook, with_kwargs=True)


def appended(tokens):
    return torch.cat([tokens, 0.5 * tokens[..., :2, :]], dim=-2)


HOOKS = {
    "to_v adds a batch": (hooked(TO_V, lambda out: out + SHIFT), "to_v"),
    "img_in adds a batch": (hooked("img_in", lambda out: out + SHIFT), "img_in"),
    "to_q steers the first sample": (hooked(TO_Q, lambda out: torch.cat([out[:1] + 0.5, out[1:]])), "to_q"),
    "txt_in appends tokens": (hooked("txt_in", appended), "txt_in"),
    "to_v by turns": (every_other_call, "to_v"),
    "norm_q": (hooked("transformer_blocks.1.attn.norm_q", lambda out: out * 1.1), "norm_q"),
    "img_norm1": (hooked(f"{BLOCK}.img_norm1", lambda out: out * 1.1), "img_norm1"),
    "txt_mlp.net.0": (hooked(f"{BLOCK}.txt_mlp.net.0", lambda out: out * 0.5), "txt_mlp"),
    "norm_out": (hooked("norm_out", lambda out: out * 0.9), "norm_out"),
    "norm_out.linear": (hooked("norm_out.linear", lambda out: out * 0.9), "norm_out"),
    "proj_out": (hooked("proj_out", lambda out: out * 0.9), "proj_out"),
    "attention": (with_names(f"{BLOCK}.attn", lambda out: (out[0] + SHIFT, out[1])), "attn"),
    "block": (with_names(BLOCK, lambda out: (out[0], out[1] + SHIFT)), BLOCK),
    "transformer": (with_names("", lambda out: (out[0] * 0.9,)), "transformer"),
    "img_mod": (hooked(f"{BLOCK}.img_mod.1", lambda out: out * 1.1), "img_mod"),
    "time_text_embed": (hooked("time_text_embed", lambda out: out * 1.1), "time_text_embed"),
    "pos_embed": (hooked("pos_embed", lambda out: (out[0], out[1].conj())), "pos_embed"),
    "pre: to_k": (positional("transformer_blocks.1.attn.to_k", lambda x: x.roll(1, -1)), "to_k"),
    "pre: txt_norm": (positional("txt_norm", lambda x: x * CHANNELS), "txt_norm"),
    "pre: transformer's text": (before("", "encoder_hidden_states", lambda e: e * CHANNELS), "transformer"),
    "pre: transformer's latents": (before("", "hidden_states", lambda x: x * 0.9), "transformer"),
    "pre: transformer's timestep": (before("", "timestep", lambda t: t * 0.9), "transformer"),
    "pre: block's temb": (before(BLOCK, "temb", lambda t: t * 1.2), BLOCK),
    "pre: block's rope": (before(BLOCK, "image_rotary_emb", lambda f: (f[0].conj(), f[1])), BLOCK),
    "pre: block's mask": (masked_tokens, BLOCK),
    "pre: block's latents": (before(BLOCK, "hidden_states", lambda h: h + SHIFT), BLOCK),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_sees_and_changes_what_it_would_in_stock(field, name, order):
    compare(field, HOOKS[name][0], order)


@pytest.mark.parametrize("path", [TO_Q, TO_V, "img_in", "norm_out", f"{BLOCK}.attn", BLOCK, "", f"{BLOCK}.img_mod"])
def test_a_hook_that_only_looks_sees_what_it_would_in_stock(field, path):
    compare(field, with_names(path), "after", moves=False)


@pytest.mark.parametrize("name", ["to_v adds a batch", "norm_out", "transformer", "pre: block's temb", "time_text_embed"])
def test_hooks_in_image_to_image(field, name):
    compare(field, HOOKS[name][0], "after", cls=IMAGE_TO_IMAGE)


@pytest.mark.parametrize("name", ["to_v adds a batch", "pre: transformer's timestep", "txt_in appends tokens"])
def test_hooks_without_guidance(field, name):
    compare(field, HOOKS[name][0], "after", negative_prompt=None)


def test_hooks_with_several_pictures(field):
    prompts = {"prompt": ["a red circle", "two green squares on a hill"], "negative_prompt": ["blurry", " "]}
    compare(field, HOOKS["to_q steers the first sample"][0], "after", **prompts)


def counting_steps(run):
    """A hook whose result follows the number of its calls, which is stock's number of forwards."""
    calls = []

    def hook(module, args, output):
        calls.append(1)
        return output * (1 + 0.1 * len(calls))

    run.transformer.time_text_embed.register_forward_hook(hook)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("negative_prompt", [None, "blurry"])
def test_a_hook_that_counts_the_steps(field, order, negative_prompt):
    compare(field, counting_steps, order, negative_prompt=negative_prompt)


def test_an_outer_scale_that_changes_between_two_calls(field):
    """What a call computed once is not used again where a hook has to say what it is."""
    scale = [1.0]

    def situation(run):
        scale[0] = 1.0
        run.block().img_mod[1].register_forward_hook(lambda module, args, output: output * scale[0])

    def twice(run):
        first = draw(run.pipe, **guided())
        scale[0] = 0.5
        return [first, draw(run.pipe, **guided())]

    compare(field, situation, "after", act=twice)


def test_a_hook_that_is_removed_leaves_nothing_behind(field):
    with field.run() as run:
        expected = draw(run.pipe, **SMALL)
        qwen_fast.enable(run.pipe)
        handle = run.transformer.get_submodule(TO_V).register_forward_hook(lambda module, args, output: output * 0.5)
        moved = draw(run.pipe, **SMALL)
        handle.remove()
        again = draw(run.pipe, **SMALL)
        assert (moved - expected).abs().max() > 1e-3
        assert (again - expected).abs().max() <= 2e-6 * expected.abs().max()


def globally(register, wanted):
    """A situation: a hook of every module of the process, which notes some of the transformer's."""

    def situation(run):
        names = {module: name for name, module in run.transformer.named_modules()}

        def hook(module, args, output=None):
            if wanted(names.get(module, None)):
                run.note(names[module], *args)
                return output * 0.9 if isinstance(output, torch.Tensor) else None

        run.later.callback(register(hook).remove)

    return situation


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "register", [every_module.register_module_forward_hook, every_module.register_module_forward_pre_hook], ids=["hook", "pre"]
)
def test_hooks_of_every_module(field, register, order):
    """torch's own profilers and anomaly checks: every module of stock would have been called."""
    moves = register is every_module.register_module_forward_hook

    def wanted(name):
        return name is not None and name.endswith(("to_v", "to_out.0", "img_mlp.net.2", "img_mod.1", "norm_q", "img_in"))

    compare(field, globally(register, wanted), order, moves=moves)


def on_the_text_encoder(run):
    layer = run.pipe.text_encoder.model.language_model.layers[1]

    def hook(module, args, output):
        run.note("layer", *args)
        return (output[0] + SHIFT[0, 0, :32], *output[1:]) if isinstance(output, tuple) else output + SHIFT[0, 0, :32]

    layer.register_forward_hook(hook)


def on_the_logits(run):
    """Stock computes them, so a hook on their layer is called."""
    run.pipe.text_encoder.lm_head.register_forward_hook(lambda module, args, output: run.note("lm_head", *args))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [on_the_text_encoder, on_the_logits])
def test_hooks_on_the_text_encoder(field, situation, order):
    compare(field, situation, order, moves=situation is on_the_text_encoder)


def on_the_decoder(run):
    def hook(module, args, output):
        run.note("conv_in", *args)
        return output * 1.1

    run.pipe.vae.decoder.conv_in.register_forward_hook(hook)


def on_a_norm_of_the_decoder(run):
    def hook(module, args):
        run.note("norm_out", *args)
        return (args[0] * 0.9 + 0.1,)

    run.pipe.vae.decoder.norm_out.register_forward_pre_hook(hook)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [on_the_decoder, on_a_norm_of_the_decoder])
def test_hooks_on_the_vae(field, situation, order):
    compare(field, situation, order, output_type="pt", tolerance=1e-5)


# The second contract: what is not stock's own is named, and raises under strict=True.


@pytest.mark.parametrize("name", HOOKS)
def test_strict_a_hook_is_named_and_raises(field, name):
    assert_not_stocks_own(field, *HOOKS[name])
