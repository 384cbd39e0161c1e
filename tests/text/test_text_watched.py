"""Whatever changes what a text encoder gives changes the prompts kept: attributes, functions, classes, tokenizers."""

import copy
import cProfile
import functools
import pstats

import diffusers
import peft
import pytest
import torch
import torchao.quantization
import transformers
from optimum import quanto
from torch import nn
from transformers import masking_utils
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

import qwen_fast
from benchmarks.shared import stock as reference
from qwen_fast.text.watch import EncoderWatch
from support.adapters import add_style

PROMPTS = ["a red fox that jumps over a small brook in the evening", "a cat"]
loaded = functools.cache(reference.stock)


@pytest.fixture
def pipe(checkpoint):
    return copy.deepcopy(loaded(checkpoint, torch.float32, diffusers.QwenImagePipeline))


@torch.no_grad()
def encode(pipe, prompts=PROMPTS) -> torch.Tensor:
    return pipe.encode_prompt(prompts)[0]


def language(pipe) -> nn.Module:
    return pipe.text_encoder.model.language_model


def attention(pipe) -> nn.Module:
    return language(pipe).layers[0].self_attn


def own_config(pipe):
    """One layer with a config of its own, which asks for another function."""
    attention(pipe).config = copy.deepcopy(attention(pipe).config)
    attention(pipe).config._attn_implementation_internal = "halved"


def lora(pipe):
    torch.manual_seed(3)
    add_style(pipe.text_encoder, ["q_proj", "v_proj"])


def scale_lora(pipe):
    for module in pipe.text_encoder.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("style", 3.0)


def rotary(pipe):
    """`inv_freq` as a plain attribute, as an older transformers keeps a copy of it."""
    frequencies = language(pipe).rotary_emb.inv_freq.clone() * 0.5
    del language(pipe).rotary_emb.inv_freq
    language(pipe).rotary_emb.inv_freq = frequencies


def attended_otherwise(module, query, key, value, mask, **arguments):
    """An attention of one's own."""
    out, weights = modeling.eager_attention_forward(module, query, key, value, mask, **arguments)
    return out * 0.5, weights


SETTINGS = {
    "eps": lambda pipe: setattr(language(pipe).layers[0].input_layernorm, "variance_epsilon", 0.5),
    "eps of the last norm": lambda pipe: setattr(language(pipe).norm, "variance_epsilon", 0.5),
    "scaling": lambda pipe: setattr(attention(pipe), "scaling", 0.7),
    "rope": lambda pipe: setattr(language(pipe).rotary_emb, "attention_scaling", 1.5),
    "frequencies": lambda pipe: language(pipe).rotary_emb.inv_freq.mul_(0.5),
    "frequencies through .data": lambda pipe: language(pipe).rotary_emb.inv_freq.data.mul_(0.5),
    "frequencies as an attribute": rotary,
    "activation": lambda pipe: setattr(language(pipe).layers[0].mlp, "act_fn", nn.GELU()),
    "config of a layer": own_config,
    "implementation": lambda pipe: setattr(language(pipe).config, "_attn_implementation_internal", "halved"),
    "fewer layers": lambda pipe: setattr(language(pipe), "layers", language(pipe).layers[:-1]),
    "layers exchanged": lambda pipe: setattr(language(pipe), "layers", nn.ModuleList(reversed(language(pipe).layers))),
    "LoRA": lora,
    "LoRA scaled": lambda pipe: (lora(pipe), scale_lora(pipe)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changed_in_place(pipe, name, monkeypatch):
    """Between two calls with the same prompts; set back, the first ones are found again where nothing else was changed."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "halved", attended_otherwise)
    monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, "halved", masking_utils.eager_mask)
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    before = encode(ours)
    for changed in (pipe, ours):
        with torch.no_grad():
            SETTINGS[name](changed)
    expected = encode(pipe)
    assert not torch.equal(before, expected), "the change shows nothing"
    assert torch.equal(encode(ours), expected)
    assert torch.equal(encode(ours), expected)


def test_a_setting_set_back_finds_the_first_again(pipe):
    ours = qwen_fast.enable(pipe)
    before = encode(ours)
    attention(pipe).scaling *= 0.5
    changed = encode(ours)
    encode(ours)
    attention(pipe).scaling *= 2
    misses = qwen_fast.report(ours).prompt_cache["misses"]
    assert torch.equal(encode(ours), before) and not torch.equal(changed, before)
    assert qwen_fast.report(ours).prompt_cache["misses"] == misses == 2 * len(PROMPTS)


def test_a_lora_switched_and_scaled(pipe):
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    for change in (
        lora,
        scale_lora,
        lambda pipe: pipe.text_encoder.disable_adapters(),
        lambda pipe: pipe.text_encoder.enable_adapters(),
    ):
        change(pipe), change(ours)
        assert torch.equal(encode(ours), encode(pipe))


def times(factor: float, old):
    def change(*args, **kwargs):
        result = old(*args, **kwargs)
        if result is None:
            return None
        return (result[0] * factor, *result[1:]) if isinstance(result, tuple) else (result * factor if factor != 1 else result)

    return change


class Times:
    """The same as an object, which is no function."""

    def __init__(self, factor, old):
        self.factor, self.old = factor, old

    def __call__(self, *args, **kwargs):
        return times(self.factor, self.old)(*args, **kwargs)


def text_classes() -> dict[str, type]:
    """Classes whose modules a text passes through."""
    named = {
        "layer": modeling.Qwen2_5_VLDecoderLayer,
        "attention": modeling.Qwen2_5_VLAttention,
        "mlp": modeling.Qwen2MLP,
        "norm": getattr(modeling, "Qwen2_5_VLRMSNorm", None) or modeling.Qwen2RMSNorm,
        "rotary": modeling.Qwen2_5_VLRotaryEmbedding,
        "linear": nn.Linear,
        "embedding": nn.Embedding,
    }
    return named


@pytest.mark.parametrize("method", ["__call__", "forward"])
@pytest.mark.parametrize("name", text_classes())
def test_a_method_of_a_class_replaced(pipe, name, method, monkeypatch):
    cls = text_classes()[name]
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    before = encode(ours)
    monkeypatch.setattr(cls, method, times(1.1, getattr(cls, method)), raising=False)
    assert_encodes_anew(ours, pipe, before)
    monkeypatch.undo()
    assert torch.equal(encode(ours), before)


def assert_encodes_anew(ours, theirs, before) -> None:
    """As stock, each time, and `report` says why nothing is kept."""
    expected = encode(theirs)
    assert not torch.equal(before, expected), "the change shows nothing"
    assert torch.equal(encode(ours), expected) and torch.equal(encode(ours), expected)
    assert "no prompt cache: " in str(qwen_fast.report(ours)) or qwen_fast.report(ours).fallbacks


@pytest.mark.parametrize("make", [times, Times])
@pytest.mark.parametrize("table", ["attention", "local attention", "mask"])
def test_an_entry_of_a_table_replaced(pipe, table, make, monkeypatch):
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    before = encode(ours)
    implementation = language(pipe).config._attn_implementation
    entries = {
        "attention": ALL_ATTENTION_FUNCTIONS._global_mapping,
        "local attention": ALL_ATTENTION_FUNCTIONS._local_mapping,
        "mask": masking_utils.AttentionMaskInterface._global_mapping,
    }[table]
    if table == "mask":
        new = make(1, lambda *args, **kwargs: torch.ones(1, 1, 1, 1, dtype=torch.bool))
    else:
        new = make(1.1, ALL_ATTENTION_FUNCTIONS[implementation])
    monkeypatch.setitem(entries, implementation, new)
    assert_encodes_anew(ours, pipe, before)


def test_another_function_of_transformers_in_a_table(pipe, monkeypatch):
    """Its own, but another one; what is kept of it is kept apart."""
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    before = encode(ours)
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._local_mapping, language(pipe).config._attn_implementation, modeling.eager_attention_forward
    )
    assert torch.equal(encode(ours), encode(pipe))
    assert qwen_fast.report(ours).prompt_cache["misses"] == 2 * len(PROMPTS)
    monkeypatch.undo()
    assert torch.equal(encode(ours), before)
    assert qwen_fast.report(ours).prompt_cache["misses"] == 2 * len(PROMPTS)


@pytest.mark.parametrize("make", [times, Times])
@pytest.mark.parametrize(
    ("home", "name"),
    [
        (sdpa_attention, "sdpa_attention_forward"),
        (sdpa_attention, "use_gqa_in_sdpa"),
        (modeling, "rotate_half"),
    ],
)
def test_a_function_of_a_module_replaced(pipe, home, name, make, monkeypatch):
    """By a function or by another object that can be called; what was bound elsewhere before has no part in it."""
    if not hasattr(home, name):
        pytest.skip(f"this transformers has no {name}")
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    encode(ours)
    monkeypatch.setattr(home, name, make(1.1, getattr(home, name)))
    assert torch.equal(encode(ours), encode(pipe))


def add_token(pipe):
    pipe.tokenizer.add_tokens(["fox"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer) + 512, mean_resizing=False)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[-600:] = 0.3


TOKENIZERS = {
    "added token": add_token,
    "padding side": lambda pipe: setattr(pipe.tokenizer, "padding_side", "left"),
    "chat template": lambda pipe: setattr(pipe.tokenizer, "chat_template", "{{ messages }}"),
    "longest prompt": lambda pipe: setattr(pipe, "tokenizer_max_length", 3),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_changed_in_place(pipe, name):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    encode(ours)
    for changed in (pipe, ours):
        TOKENIZERS[name](changed)
    assert torch.equal(encode(ours), encode(pipe))


def test_a_method_on_the_model_itself(pipe):
    """Positions of one's own."""
    ours, names = qwen_fast.enable(copy.deepcopy(pipe)), ("compute_3d_position_ids", "get_rope_index")
    encode(ours)
    for changed in (pipe, ours):
        model = changed.text_encoder.model
        for name in names:
            if hasattr(model, name):
                setattr(model, name, Times(2, getattr(model, name)))
    assert torch.equal(encode(ours), encode(pipe))


def test_dropout_in_one_layer(pipe):
    """Random numbers are not kept."""
    ours = qwen_fast.enable(pipe)
    encode(ours)
    attention(pipe).attention_dropout = 0.5
    attention(pipe).train()
    assert not torch.equal(encode(ours), encode(ours))


@pytest.mark.parametrize("factor", [1.1, 1.5])
def test_a_class_of_ones_own_is_called_each_time(pipe, factor):
    """Its name and its weights do not tell what it computes."""
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    before = encode(ours)
    for changed in (pipe, ours):

        class Own(type(language(changed).layers[0].mlp)):
            def forward(self, x):
                return super().forward(x) * factor

        language(changed).layers[0].mlp.__class__ = Own
    assert_encodes_anew(ours, pipe, before)
    Own.forward = lambda self, x: x
    assert not torch.equal(encode(ours), encode(pipe)), "that of the other's class"


@pytest.mark.parametrize("cls", [transformers.Qwen2_5_VLForConditionalGeneration, modeling.Qwen2_5_VLModel])
def test_the_call_of_the_encoder_s_class_replaced(pipe, cls, monkeypatch):
    """It is called as in stock."""
    ours = qwen_fast.enable(copy.deepcopy(pipe))
    encode(ours)
    called = []
    monkeypatch.setattr(
        cls, "__call__", lambda self, *args, **kwargs: called.append(1) or nn.Module.__call__(self, *args, **kwargs)
    )
    expected = encode(pipe)
    theirs = len(called)
    assert torch.equal(encode(ours), expected) and len(called) == 2 * theirs > 0
    assert f"{cls.__name__}.__call__" in str(qwen_fast.report(ours).fallbacks)
    with pytest.raises(RuntimeError, match=f"strict=True.*{cls.__name__}.__call__"):
        encode(qwen_fast.enable(ours, strict=True))


UNSEEN = {
    "a list written": lambda pipe: setattr(attention(pipe), "own", [1, 2]) or attention(pipe).own.append(3),
    "the place of a layer": lambda pipe: setattr(attention(pipe), "layer_idx", 1),
    "an attribute added": lambda pipe: setattr(language(pipe).layers[1].mlp.up_proj, "own", 3),
    "rope of the config": lambda pipe: language(pipe).config.__dict__.update(rope_theta=3.0),
    "a tensor held": lambda pipe: setattr(attention(pipe), "own", torch.ones(3)),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_changes_no_text_of_this_model_is_seen_too(pipe, name):
    """A fingerprint changes, and is that of before when all is set back; another watch finds the same."""
    watch = EncoderWatch()
    before, reason = watch.look(pipe.text_encoder)
    kept = [(part, dict(vars(part))) for part in (*language(pipe).modules(), language(pipe).config)]
    UNSEEN[name](pipe)
    after, _ = watch.look(pipe.text_encoder)
    assert reason is None and after not in (before, None)
    assert EncoderWatch().look(pipe.text_encoder) == watch.look(pipe.text_encoder) == (after, None)
    for part, attributes in kept:
        vars(part).clear()
        vars(part).update(attributes)
    assert watch.look(pipe.text_encoder) == (before, None)


def by_quanto(model):
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)


def by_torchao(model):
    torchao.quantization.quantize_(model, torchao.quantization.Int8WeightOnlyConfig())


@pytest.mark.parametrize("quantise", [by_quanto, by_torchao])
def test_prompts_of_a_quantised_encoder_are_kept(pipe, quantise):
    """Its classes are none of transformers', but an installed package's."""
    quantise(language(pipe))
    expected = encode(pipe)
    ours = qwen_fast.enable(pipe)
    assert torch.equal(encode(ours), expected) and torch.equal(encode(ours), expected)
    assert qwen_fast.report(ours).prompt_cache["hits"] == len(PROMPTS)


def test_a_look_costs_few_calls(pipe):
    """A wait of every call of the pipeline, told in calls of Python's and C's functions: time varies with the machine."""
    watch = EncoderWatch()
    watch.look(pipe.text_encoder)
    modules = sum(1 for _ in language(pipe).modules())
    profile = cProfile.Profile()
    profile.runcall(watch.look, pipe.text_encoder)
    assert pstats.Stats(profile).total_calls <= 1500 + 12 * modules
