"""LoRA adapters of each prompt's own in one batch: each picture is the one that stock draws alone with them."""

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, stock
from support.family import MEMBERS, small_references
from support.pipelines import GUIDED, SMALL

pytest.importorskip("peft", reason="LoRA needs peft")
from peft import LoHaConfig, LoraConfig

from support.adapters import BASE, WEIGHTS, only, with_adapters

PROMPTS = ["a cat", "two green squares on a hill", "a hen"]
ENTRIES = ["style", ["style", "speed"], BASE]


def named(entries, **others) -> dict:
    return {"attention_kwargs": {"adapter_names": entries, **others}}


def noise(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def assert_as_alone(pipe, fast, prompts, entries, copies: int = 1, scale: float = 1.0, **arguments) -> torch.Tensor:
    """All pictures of one call of `fast` against those of `pipe`, one a call; returns them."""
    pictures, generators = len(prompts) * copies, noise(len(prompts) * copies)
    kwargs = named(entries, scale=scale)
    drawn = fast(prompt=prompts, generator=generators, num_images_per_prompt=copies, **kwargs, **arguments).images
    assert len(drawn) == pictures and kwargs == named(entries, scale=scale), "the arguments are the caller's"
    for n, generator in enumerate(noise(pictures)):
        only(pipe.transformer, entries[n // copies])
        alone = {"prompt": prompts[n // copies], "generator": generator, "attention_kwargs": {"scale": scale}}
        assert_same_latents(drawn[n : n + 1], pipe(**alone, **arguments).images)
    assert not qwen_fast.report(fast).fallbacks
    return drawn


def pair(checkpoint, **options):
    """Stock, and the same enabled, each under the adapters."""
    pipes = stock(checkpoint), stock(checkpoint)
    modulations = options.pop("modulations", False)
    for pipe in pipes:
        with_adapters(pipe.transformer, modulations=modulations)
    return pipes[0], qwen_fast.enable(pipes[1], strict=True, **options)


@pytest.mark.parametrize("arguments", [SMALL, GUIDED], ids=["alone", "guided"])
@pytest.mark.parametrize("modulations", [False, True])
def test_each_picture_is_the_one_drawn_alone(checkpoint, modulations, arguments):
    pipe, fast = pair(checkpoint, modulations=modulations)
    drawn = assert_as_alone(pipe, fast, PROMPTS, ENTRIES, **arguments)
    others = assert_as_alone(pipe, fast, PROMPTS, ["speed", "thing", "style"], scale=0.5, **arguments)
    limit = 1e-2 * drawn.abs().max()
    assert all((one - other).abs().max() > limit for one, other in zip(drawn, others, strict=True)), "they do nothing"
    assert qwen_fast.report(fast).calls["packed transformer" if arguments is GUIDED else "transformer"] == 8


def test_several_pictures_a_prompt_and_modulations_in_each_forward(checkpoint):
    pipe, fast = pair(checkpoint, modulations=True, modulation="layers")
    assert_as_alone(pipe, fast, PROMPTS[:2], [["thing", "speed"], "style"], copies=2, **GUIDED)


def test_nobody_has_any(checkpoint):
    pipe, fast = pair(checkpoint, modulations=True)
    plain = stock(checkpoint)
    drawn = assert_as_alone(pipe, fast, PROMPTS[:2], [BASE, []], **GUIDED)
    assert_same_latents(drawn, plain(prompt=PROMPTS[:2], generator=noise(2), **GUIDED).images)


def test_all_have_the_same(checkpoint):
    pipe, fast = pair(checkpoint, modulations=True)
    assert_as_alone(pipe, fast, PROMPTS[:2], ["speed", ["speed"]], **GUIDED)


def test_embeddings_and_a_forward_for_each_prediction(checkpoint, monkeypatch):
    """Where memory is short, the prompts' and the negative prompts' forwards come one after the other."""
    from qwen_fast.denoise import packing

    monkeypatch.setattr(packing, "fits_in_memory", lambda *_: False)
    pipe, fast = pair(checkpoint, modulations=True)
    drawn = assert_as_alone(pipe, fast, PROMPTS[:2], ["speed", "style"], **GUIDED)
    assert qwen_fast.report(fast).calls["transformer"] == 8
    embeds, mask = pipe.encode_prompt(PROMPTS[:2])
    given = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "generator": noise(2)}
    assert torch.equal(fast(**given, **named(["speed", "style"]), **GUIDED).images, drawn)


@pytest.mark.parametrize("name", ["image", "inpaint", "edit", "edit plus 2511", "layered", "controlnet"])
def test_other_pipelines(checkpoint, name):
    """Whose noise for a batch differs from that of singles: each picture is the one of stock's batch with its adapters on."""
    member = MEMBERS[name]
    pipes = member.pipe(checkpoint), member.pipe(checkpoint)
    for pipe in pipes:
        with_adapters(pipe.transformer, modulations=True)
    fast, entries = qwen_fast.enable(pipes[1]), ["style", ["speed", "thing"]]
    prompts = {"prompt": PROMPTS[:2]}
    if name in ("edit", "edit plus 2511", "layered"):  # which take one prompt
        prompts, entries = {}, entries[1:]
    with small_references():
        drawn = member.draw(fast, **prompts, **named(entries))
        for n, entry in enumerate(entries):
            only(pipes[0].transformer, entry)
            member.assert_same(drawn[n : n + 1], member.draw(pipes[0], **prompts)[n : n + 1])
    assert not qwen_fast.report(fast).fallbacks


def test_the_call_behind_it_is_as_before(checkpoint):
    pipe, fast = pair(checkpoint, modulations=True)
    arguments = {"prompt": PROMPTS[:2], **GUIDED}
    layers = [module for module in fast.transformer.modules() if hasattr(module, "scaling")]
    before = fast(**arguments, generator=noise(2)).images
    states = [(dict(layer.scaling), layer.active_adapters) for layer in layers]
    fast(**arguments, generator=noise(2), **named(["style", "speed"], scale=0.3))
    assert states == [(dict(layer.scaling), layer.active_adapters) for layer in layers]
    assert torch.equal(fast(**arguments, generator=noise(2)).images, before)
    assert_same_latents(before, pipe(**arguments, generator=noise(2)).images)


def test_weights_that_a_callback_changes(checkpoint):
    pipe, fast = pair(checkpoint, modulations=True)

    def fade(pipe, step, timestep, tensors):
        on = pipe.transformer.transformer_blocks[0].attn.to_q.active_adapters
        pipe.transformer.set_adapters(list(WEIGHTS), [weight * 0.5**step for weight in WEIGHTS.values()])
        pipe.transformer.set_adapters(on, [WEIGHTS[name] * 0.5**step for name in on])
        return {}

    assert_as_alone(pipe, fast, PROMPTS[:2], ["style", "speed"], callback_on_step_end=fade, **GUIDED)


def test_names_that_a_callback_changes(checkpoint):
    pipe, fast = pair(checkpoint, modulations=True)
    after = ["speed", "thing"]

    def change(one, step, timestep, tensors):
        if one is fast:
            one.attention_kwargs["adapter_names"] = after
        else:
            only(one.transformer, after[turn])
        return {}

    arguments = {"callback_on_step_end": change, **GUIDED}
    drawn = fast(prompt=PROMPTS[:2], generator=noise(2), **named(["style", BASE]), **arguments).images
    for turn, entry in enumerate(["style", BASE]):
        only(pipe.transformer, entry)
        expected = pipe(prompt=PROMPTS[turn], generator=noise(2)[turn], **arguments).images
        assert_same_latents(drawn[turn : turn + 1], expected)


def leave_one_out(pipe, step, timestep, tensors):
    return {name: value[:1] for name, value in tensors.items()}


def disable(pipe, step, timestep, tensors):
    qwen_fast.disable(pipe)
    return {}


def delete(pipe, step, timestep, tensors):
    pipe.transformer.delete_adapters("speed")
    return {}


@pytest.mark.parametrize(("callback", "words"), [(leave_one_out, "2 entries for 1"), (disable, "stock"), (delete, "'speed'")])
def test_a_callback_that_forbids_them_within_a_call(checkpoint, callback, words):
    _, fast = pair(checkpoint)
    tensors = ["latents", "prompt_embeds"]
    with pytest.raises(ValueError, match=words):
        fast(
            prompt=PROMPTS[:2],
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=tensors,
            **named(["style", "speed"]),
            **SMALL,
        )


# What cannot be done is refused by name, before any work


def add(config, name="other"):
    return lambda pipe: (torch.manual_seed(9), pipe.transformer.add_adapter(config(), adapter_name=name))


def lora(**options):
    return lambda: LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False, **options)


def double(pipe):
    for module in pipe.transformer.modules():
        if hasattr(module, "lora_A") and "style" in module.lora_A:
            module.lora_A["style"].double()


def quantised(pipe):
    pipe.transformer.transformer_blocks[0].attn.to_q.base_layer.__class__ = type("Linear4bit", (torch.nn.Linear,), {})


def compiled(pipe):
    pipe.transformer.transformer_blocks[0]._compiled_call_impl = lambda *_: None


def hooked(pipe):
    pipe.transformer.transformer_blocks[1].attn.register_forward_hook(lambda *_: None)


def cached(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))


def nothing(pipe):
    pass


REFUSED = {
    "an unknown name": (nothing, ["style", "stile"], "'stile'.*'speed', 'style', 'thing'"),
    "too few": (nothing, ["style"], "1 entries for 2 prompts"),
    "too many": (nothing, ["style"] * 4, "4 entries for 2 prompts"),
    "no list": (nothing, "style", "a list"),
    "no name": (nothing, ["style", 3], "holds 3"),
    "None": (nothing, ["style", None], "holds None"),
    "twice the same": (nothing, ["style", ["speed", "speed"]], "different names"),
    "none and one": (nothing, ["style", [BASE, "speed"]], BASE),
    "DoRA": (add(lora(use_dora=True)), ["style", "other"], "to_k.*DoRA"),
    "a bias": (add(lora(lora_bias=True)), ["style", "other"], "to_k.*bias"),
    "dropout": (add(lora(lora_dropout=0.5)), ["style", "other"], "to_k.*dropout"),
    "merged": (lambda pipe: pipe.transformer.fuse_lora(adapter_names=["style"]), ["style", "speed"], "unfuse_lora"),
    "switched off": (lambda pipe: pipe.transformer.disable_adapters(), ["style", "speed"], "enable_lora"),
    "another dtype": (double, ["style", "speed"], "float64.*cast"),
    "a quantised layer": (quantised, ["style", "speed"], "blocks.0.attn.to_q is over a Linear4bit"),
    "torch.compile": (compiled, ["style", "speed"], "torch.compile"),
    "a hook": (hooked, ["style", "speed"], "forward hook"),
    "a cache": (cached, ["style", "speed"], "cache"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_any_work(checkpoint, monkeypatch, name):
    change, entries, words = REFUSED[name]
    fast = qwen_fast.enable(stock(checkpoint))
    with_adapters(fast.transformer)
    change(fast)
    monkeypatch.setattr(fast.text_encoder, "forward", None)
    with pytest.raises(ValueError, match=words):
        fast(prompt=PROMPTS[:2], **named(entries), **GUIDED)
    assert not qwen_fast.report(fast).calls


def test_an_adapter_of_another_kind_is_refused(checkpoint):
    fast = qwen_fast.enable(stock(checkpoint))
    fast.transformer.add_adapter(LoHaConfig(r=2, target_modules=["to_k"]), adapter_name="other")
    with pytest.raises(ValueError, match="to_k is a .* of peft's loha"):
        fast(prompt="a", **named(["other"]), **SMALL)


def test_adapters_that_nobody_names_may_be_of_any_kind(checkpoint):
    """As long as they are off."""
    pipe, fast = pair(checkpoint)
    add(lora(use_dora=True))(fast)
    fast.transformer.set_adapters(["thing"], [WEIGHTS["thing"]])
    assert_as_alone(pipe, fast, PROMPTS[:2], ["style", BASE], **SMALL)


def test_a_call_that_would_be_stocks_is_refused(checkpoint):
    fast = qwen_fast.enable(stock(checkpoint))
    with_adapters(fast.transformer)
    with pytest.raises(ValueError, match="gradients"):
        type(fast).__call__.__wrapped__(fast, prompt="a", **named(["style"]), **SMALL)
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu", torch.bfloat16):
        fast(prompt="a", **named(["style"]), **SMALL)
    assert not qwen_fast.report(fast).calls


def test_adapters_of_a_controlnet_are_refused(checkpoint):
    member = MEMBERS["controlnet"]
    fast = qwen_fast.enable(member.pipe(checkpoint))
    with_adapters(fast.transformer)
    fast.controlnet.add_adapter(lora()(), adapter_name="own")
    with pytest.raises(ValueError, match="ControlNet"):
        member.draw(fast, **named(["style"]))
