"""Encoded prompts equal stock's to the bit, whichever prompts share a forward, and follow whatever changes the encoder."""

import copy
import functools
import threading

import accelerate
import diffusers
import pytest
import torch
import transformers
from packaging.version import Version

import qwen_fast
from benchmarks.shared import stock as reference
from benchmarks.shared.stock import draw
from support.adapters import add_style
from support.pipelines import GUIDED, SMALL

LONG, SHORT = "a red fox that jumps over a small brook in the evening", "a cat"
PROMPTS = {
    "one": SHORT,
    "empty": "",
    "equal lengths": ["a cat", "a dog"],
    "mixed lengths": [SHORT, LONG, "two cats on a chair"],
    "twice the same": [SHORT, SHORT],
    "longer than the encoder takes": ["fox " * 1500, SHORT],
}


loaded = functools.cache(reference.stock)


def stock(checkpoint, dtype=torch.float32, cls=diffusers.QwenImagePipeline):
    """A copy: loading takes longer than the tests."""
    return copy.deepcopy(loaded(checkpoint, dtype, cls))


@pytest.fixture(scope="module")
def pair(checkpoint):
    """A stock pipeline, and an enabled one with the same weights."""
    return stock(checkpoint), qwen_fast.enable(stock(checkpoint))


@torch.no_grad()
def encode(pipe, prompt, **arguments):
    return pipe.encode_prompt(prompt, **arguments)


def assert_equal(actual, expected):
    assert torch.equal(actual[0], expected[0]) and actual[0].dtype == expected[0].dtype
    assert (actual[1] is None) == (expected[1] is None)
    assert actual[1] is None or (torch.equal(actual[1], expected[1]) and actual[1].dtype == expected[1].dtype)


def encoder_calls(pipe) -> int:
    return qwen_fast.report(pipe).calls.get("text encoder", 0)


@pytest.mark.parametrize("what", PROMPTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_equal_stock_to_the_bit(checkpoint, what, dtype):
    """Encoded, and found again, and after other prompts were encoded with other lengths."""
    theirs, ours = stock(checkpoint, dtype), qwen_fast.enable(stock(checkpoint, dtype))
    expected = encode(theirs, PROMPTS[what])
    encode(ours, ["x" * 40, SHORT])
    for _ in range(2):
        assert_equal(encode(ours, PROMPTS[what]), expected)
    assert not qwen_fast.report(ours).fallbacks


def test_arguments_of_encode_prompt(pair):
    theirs, ours = pair
    for arguments in ({"max_sequence_length": 7}, {"max_sequence_length": 1024}, {"device": torch.device("cpu")}):
        assert_equal(encode(ours, LONG, **arguments), encode(theirs, LONG, **arguments))
    assert_equal(encode(ours, SHORT, num_images_per_prompt=3), encode(theirs, SHORT, num_images_per_prompt=3))
    embeds, mask = encode(theirs, [SHORT, LONG])
    assert_equal(
        encode(ours, None, prompt_embeds=embeds, prompt_embeds_mask=mask),
        encode(theirs, None, prompt_embeds=embeds, prompt_embeds_mask=mask),
    )
    with torch.no_grad():
        actual, expected = (pipe._get_qwen_prompt_embeds(SHORT, dtype=torch.float16) for pipe in (ours, theirs))
    assert_equal(actual, expected)


def test_a_tokenizer_that_pads_left(checkpoint):
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    theirs.tokenizer.padding_side = ours.tokenizer.padding_side = "left"
    assert_equal(encode(ours, [SHORT, LONG]), encode(theirs, [SHORT, LONG]))


def test_a_prompt_padded_to_another_width_is_another(checkpoint):
    """Its last digits depend on the width, and stock's too."""
    pipe = qwen_fast.enable(stock(checkpoint))
    for prompt, hits, misses in ((SHORT, 0, 1), ([SHORT, LONG], 0, 3), (LONG, 1, 3), ([LONG, SHORT], 3, 3)):
        encode(pipe, prompt)
        cache = qwen_fast.report(pipe).prompt_cache
        assert (cache["hits"], cache["misses"]) == (hits, misses), prompt


class Unasked(torch.nn.Module):
    def forward(self, *_):
        pytest.fail("logits were computed")


def test_prompts_of_one_width_share_a_forward(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint))
    seen = []
    pipe.text_encoder.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    pipe.text_encoder.lm_head = Unasked()
    arguments = SMALL | {"true_cfg_scale": 4.0, "num_inference_steps": 1}
    draw(pipe, prompt="a cat", negative_prompt="a dog", **arguments)
    assert [batch for batch, _ in seen] == [2]
    seen.clear()
    draw(pipe, prompt="a cow", negative_prompt="", **arguments)
    assert [batch for batch, _ in seen] == [1, 1]
    seen.clear()
    draw(pipe, prompt="a cow", negative_prompt="a dog", **arguments | {"true_cfg_scale": 1.0})
    assert [batch for batch, _ in seen] == [1]  # without guidance the negative prompt is not encoded


@pytest.mark.parametrize(
    "cls", [diffusers.QwenImagePipeline, diffusers.QwenImageImg2ImgPipeline, diffusers.QwenImageInpaintPipeline]
)
def test_all_pipelines_encode_once_and_find_it_again(checkpoint, cls):
    pipe = stock(checkpoint, cls=cls)
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    others = {} if cls is diffusers.QwenImagePipeline else {"image": picture, "strength": 0.75}
    if cls is diffusers.QwenImageInpaintPipeline:
        others["mask_image"] = torch.ones(1, 1, 64, 96)
    expected = draw(pipe, prompt=SHORT, **GUIDED, **others)
    qwen_fast.enable(pipe)
    first = draw(pipe, prompt=SHORT, **GUIDED, **others)
    calls = encoder_calls(pipe)
    second = draw(pipe, prompt=SHORT, **GUIDED, **others)
    assert (first - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert torch.equal(first, second) and encoder_calls(pipe) == calls > 0
    cache = qwen_fast.report(pipe).prompt_cache
    assert (cache["hits"], cache["misses"]) == (2, 2) and cache["bytes"] > 0
    draw(pipe, prompt="a dog", **GUIDED, **others)  # with the negative prompt that is known
    assert qwen_fast.report(pipe).prompt_cache["hits"] == 3


CHANGES = {
    "LoRA on the text encoder": lambda pipe: add_style(pipe.text_encoder, ["q_proj", "v_proj"]),
    "written through .data": lambda pipe: pipe.text_encoder.model.language_model.layers[1].mlp.up_proj.weight.data.mul_(0.9),
    "a norm written": lambda pipe: pipe.text_encoder.model.language_model.norm.weight.data.add_(0.1),
    "one word's embedding": lambda pipe: pipe.text_encoder.model.language_model.embed_tokens.weight.data.add_(0.01),
    "a module replaced": lambda pipe: setattr(
        pipe.text_encoder.model.language_model.layers[0],
        "mlp",
        copy.deepcopy(pipe.text_encoder.model.language_model.layers[1].mlp),
    ),
    "the dtype": lambda pipe: pipe.text_encoder.to(torch.bfloat16),
    "another encoder": lambda pipe: setattr(pipe, "text_encoder", _scaled(copy.deepcopy(pipe.text_encoder))),
    "another template": lambda pipe: setattr(
        pipe, "prompt_template_encode", pipe.prompt_template_encode.replace("color", "shape")
    ),
}


def _scaled(encoder):
    for parameter in encoder.parameters():
        parameter.data.mul_(1.1)
    return encoder


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_encoder_is_noticed(checkpoint, change):
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    before = encode(ours, [SHORT, LONG])
    for pipe in (theirs, ours):
        torch.manual_seed(3)
        CHANGES[change](pipe)
    expected = encode(theirs, [SHORT, LONG])
    assert not torch.equal(before[0], expected[0])
    assert_equal(encode(ours, [SHORT, LONG]), expected)
    hits = qwen_fast.report(ours).prompt_cache["hits"]
    encode(ours, [SHORT, LONG])
    assert qwen_fast.report(ours).prompt_cache["hits"] == hits + 2


def test_a_lora_taken_away_finds_the_first_again(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint))
    first = encode(pipe, SHORT)
    add_style(pipe.text_encoder, ["q_proj"])
    assert not torch.equal(encode(pipe, SHORT)[0], first[0])
    for parameter in pipe.text_encoder.parameters():
        parameter.data = parameter.data.clone()  # as offloading does
    pipe.text_encoder.disable_adapters()
    assert_equal(encode(pipe, SHORT), first)


@pytest.mark.parametrize("change", ["LoRA on txt_in", "txt_in written", "txt_norm written"])
def test_the_projection_follows_the_transformer(checkpoint, change):
    def apply(pipe):
        if change == "LoRA on txt_in":
            torch.manual_seed(3)
            add_style(pipe.transformer, ["txt_in"])
        else:
            getattr(pipe.transformer, change.split()[0]).weight.data.mul_(0.8)

    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    before = draw(ours, prompt=SHORT, **GUIDED)
    apply(theirs)
    apply(ours)
    expected = draw(theirs, prompt=SHORT, **GUIDED)
    actual = draw(ours, prompt=SHORT, **GUIDED)
    assert (before - expected).abs().max() > 1e-3
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert qwen_fast.report(ours).prompt_cache["hits"] == 2  # the encoder's output was good


def test_embeddings_are_the_callers_own(pair):
    """What a caller does to them in place does not reach the cache."""
    theirs, ours = pair
    embeds, _ = encode(ours, SHORT)
    embeds.mul_(0)
    assert_equal(encode(ours, SHORT), encode(theirs, SHORT))


@pytest.mark.parametrize("name", ["encode_prompt", "_get_qwen_prompt_embeds"])
def test_a_method_of_the_users_own_is_asked(checkpoint, name):
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    before = draw(ours, prompt=SHORT, **GUIDED)
    for pipe in (theirs, ours):
        original = getattr(pipe, name)

        def first_word_twice(*args, original=original, **kwargs):
            embeds, mask = original(*args, **kwargs)
            embeds[:, 1] = embeds[:, 0]  # in place: the very tensor that the original returned
            return embeds, mask

        setattr(pipe, name, first_word_twice)
    expected, actual = (draw(pipe, prompt=SHORT, **GUIDED) for pipe in (theirs, ours))
    assert (before - expected).abs().max() > 1e-3
    assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_hooks_on_the_encoder_run(checkpoint):
    """On the whole of it: called as a whole. Inside: their effect cannot be known, so nothing is kept."""
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    seen = []
    ours.text_encoder.register_forward_hook(lambda _, args, output: seen.append(output.logits.shape[1]))
    assert_equal(encode(ours, [SHORT, LONG]), encode(theirs, [SHORT, LONG]))
    assert seen == [1] and "for its hooks" in str(qwen_fast.report(ours))
    for pipe in (theirs, ours):
        pipe.text_encoder.model.language_model.layers[0].mlp.register_forward_hook(lambda _, args, output: output * 0.5)
    for _ in range(2):
        assert_equal(encode(ours, SHORT), encode(theirs, SHORT))
    report = qwen_fast.report(ours)
    assert report.prompt_cache["hits"] == 0 and "no prompt cache: a hook on its" in str(report)


@pytest.mark.parametrize("part", ["", "model"])
def test_a_hook_that_changes_its_mind(checkpoint, part):
    """On the encoder or on the model below its head: what it does cannot be read off the weights, so it is asked each time."""
    theirs, ours, factor = stock(checkpoint), qwen_fast.enable(stock(checkpoint)), [1.0]

    def scale(_, args, kwargs):
        ids = kwargs["input_ids"]
        if Version(transformers.__version__).major >= 5:  # before, positions were read off them too
            del kwargs["input_ids"]
        return args, kwargs | {"inputs_embeds": embed(ids) * factor[0]}

    for pipe in (theirs, ours):
        embed = pipe.text_encoder.get_input_embeddings()
        pipe.text_encoder.get_submodule(part).register_forward_pre_hook(scale, with_kwargs=True)
    for factor[0] in (1.0, 0.5):
        assert_equal(encode(ours, SHORT), encode(theirs, SHORT))


def test_a_forward_that_was_replaced_is_called(checkpoint):
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    for pipe in (theirs, ours):
        norm = pipe.text_encoder.model.language_model.norm
        norm.forward = lambda hidden, norm=norm: type(norm).forward(norm, hidden) + 1
    for _ in range(2):
        assert_equal(encode(ours, SHORT), encode(theirs, SHORT))
    assert qwen_fast.report(ours).prompt_cache["hits"] == 0


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_by_accelerate(checkpoint, offload):
    """Whoever places the weights is asked; where they are out of reach between calls, nothing can be kept."""
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    if offload == "model":
        accelerate.cpu_offload_with_hook(ours.text_encoder, execution_device="cpu")
    else:
        accelerate.cpu_offload(ours.text_encoder, execution_device="cpu")
    for _ in range(2):
        assert_equal(encode(ours, [SHORT, LONG], device="cpu"), encode(theirs, [SHORT, LONG]))
    report = qwen_fast.report(ours)
    assert report.calls == {"text encoder as a whole, for its hooks": 1 if offload == "model" else 2}
    assert report.prompt_cache["hits"] == (2 if offload == "model" else 0)
    assert ("its weights are on meta" in str(report)) == (offload == "sequential")


def test_with_gradients_stock_encodes(pair):
    theirs, ours = pair
    before = dict(qwen_fast.report(ours).fallbacks)
    embeds, _ = ours.encode_prompt(SHORT)
    assert embeds.requires_grad and torch.equal(embeds, theirs.encode_prompt(SHORT)[0])
    assert qwen_fast.report(ours).fallbacks != before


def test_an_encoder_of_another_class_goes_stocks_way(checkpoint):
    class Encoder(type(stock(checkpoint).text_encoder)):
        pass

    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    ours.text_encoder.__class__ = Encoder
    assert_equal(encode(ours, SHORT), encode(theirs, SHORT))
    assert any("text_encoder is a Encoder" in reason for reason in qwen_fast.report(ours).fallbacks)
    with pytest.raises(RuntimeError, match="text_encoder is a Encoder"):
        encode(qwen_fast.enable(ours, strict=True), SHORT)


def test_a_template_that_this_tokenizer_cuts_otherwise(checkpoint, caplog):
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    for pipe in (theirs, ours):
        pipe.prompt_template_encode_start_idx = 30
    for _ in range(2):
        assert_equal(encode(ours, SHORT), encode(theirs, SHORT))
    assert caplog.text.count("34 tokens of the prompt template's prefix") == 1
    with pytest.raises(ValueError, match="`prompt_template_encode_start_idx` is 30"):
        encode(qwen_fast.enable(qwen_fast.disable(ours), strict=True), SHORT)


def test_two_pipelines_on_one_encoder_in_two_threads(checkpoint):
    theirs = stock(checkpoint)
    pipes = [qwen_fast.enable(diffusers.QwenImagePipeline(**theirs.components)) for _ in range(2)]
    words = [f"{'very ' * n}old cat" for n in range(6)]
    expected = {word: encode(stock(checkpoint), word) for word in words}
    failures = []

    def work(pipe, order):
        try:
            for _ in range(3):
                for word in order:
                    assert_equal(encode(pipe, word), expected[word])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(pipe, order)) for pipe in pipes for order in (words, words[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(qwen_fast.report(pipe).prompt_cache["hits"] >= 12 for pipe in pipes)


def test_an_exception_leaves_nothing_behind(checkpoint, monkeypatch):
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    with monkeypatch.context() as patch:
        patch.setattr(ours.text_encoder.model.language_model.norm, "forward", lambda *_: 1 / 0, raising=False)
        with pytest.raises(ZeroDivisionError):
            draw(ours, prompt=SHORT, **GUIDED)
    encode(ours, SHORT)
    assert_equal(encode(ours, SHORT), encode(theirs, SHORT))


def test_disabled_it_is_stock_again(checkpoint):
    pipe = stock(checkpoint)
    attributes, encoder = set(vars(pipe.text_encoder)), pipe.text_encoder
    expected = encode(pipe, SHORT)
    qwen_fast.enable(pipe)
    encode(pipe, LONG)
    qwen_fast.disable(pipe)
    assert type(pipe) is diffusers.QwenImagePipeline and pipe.text_encoder is encoder
    assert set(vars(pipe.text_encoder)) - attributes <= {"_output_capturing_hooks_installed"}
    assert_equal(encode(pipe, SHORT), expected)
