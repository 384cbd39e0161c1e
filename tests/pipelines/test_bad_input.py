"""Bad arguments: an error that names the argument, the value and what would work; before any work, nothing left patched."""

import dataclasses
import inspect

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.common.family import TEXT_TO_IMAGE
from qwen_fast.common.options import NAMES, Options
from support.pipelines import GUIDED, SMALL
from support.snapshots import EDITING, snapshot

EMBEDS = torch.zeros(1, 9, 32)

CLASSES = [getattr(diffusers, name) for name in TEXT_TO_IMAGE]  # the others: test_family.py


@pytest.fixture(scope="module")
def pipes(checkpoint):
    return {cls: qwen_fast.enable(stock(checkpoint, cls=cls)) for cls in CLASSES}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0; a whole number of at least 1"),
        ({"num_inference_steps": -1}, "`num_inference_steps` is -1"),
        ({"height": 8}, "`height` is 8; one patch is 16 pixels"),
        ({"width": 0}, "`width` is 0"),
        ({"sigmas": []}, r"`sigmas` has shape \(0,\)"),
        ({"sigmas": [0.1, 0.9]}, "`sigmas` ascends"),
        ({"sigmas": [2.0, 1.0]}, "`sigmas` holds 2; every value must lie in"),
        ({"prompt": None}, "`prompt` and `prompt_embeds` are both None"),
        ({"prompt_embeds": EMBEDS}, "`prompt` and `prompt_embeds` are both given"),
        ({"negative_prompt_embeds": EMBEDS}, "`negative_prompt` and `negative_prompt_embeds` are both given"),
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": 3}, "`prompt` is a int"),
        ({"prompt": None, "prompt_embeds": EMBEDS[0]}, r"`prompt_embeds` has shape \(9, 32\)"),
        (
            {"prompt": None, "prompt_embeds": EMBEDS, "prompt_embeds_mask": torch.ones(1, 8)},
            r"`prompt_embeds_mask` has shape \(1, 8\); the embeddings need \(1, 9\)",
        ),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` holds 2 prompts for 1"),
        ({"generator": [torch.Generator()] * 3}, "`generator` is a list of 3 for 1 pictures"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    ],
    ids=lambda a: "-".join(a) if isinstance(a, dict) else "",
)
def test_call(pipes, cls, arguments, message, monkeypatch):
    pipe = pipes[cls]
    before = snapshot(pipe)
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        draw(pipe, **({"prompt": "a red circle"} | GUIDED | EDITING.get(cls, {}) | arguments))
    monkeypatch.undo()
    assert snapshot(pipe) == before


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (getattr(diffusers, "QwenImage21ModularPipeline", None), "QwenImage21ModularPipeline, which is not accelerated yet"),
        (diffusers.ModularPipeline, "`pipe` is a ModularPipeline, not a pipeline of the Qwen-Image family"),
        (diffusers.FluxPipeline, "`pipe` is a FluxPipeline, not a pipeline of the Qwen-Image family"),
        (dict, "`pipe` is a dict, not a pipeline"),
    ],
)
def test_enable_refuses_other_pipelines_by_name(cls, message):
    if cls is None:
        pytest.skip("a diffusers without it")
    pipe = cls.__new__(cls)
    with pytest.raises(ValueError, match=message):
        qwen_fast.enable(pipe)
    assert type(pipe) is cls


def test_enable_refuses_a_subclass_with_a_call_of_its_own(checkpoint):
    class Custom(diffusers.QwenImagePipeline):
        def __call__(self, *args, **kwargs):
            return "mine"

    pipe = stock(checkpoint, cls=Custom)
    with pytest.raises(ValueError, match="`pipe` is a Custom, a subclass"):
        qwen_fast.enable(pipe)
    assert type(pipe) is Custom and pipe() == "mine"


@pytest.mark.parametrize("name", ["precision", "vae", "vae_option", "modulation_cache"])
def test_an_unknown_option_is_named_with_those_that_there_are(checkpoint, name):
    message = f"unknown option `{name}`;.* there are precise_sampler, modulation, .*, vae_mode, .*, text_encoder_mode, .*strict"
    pipe = stock(checkpoint)
    with pytest.raises(TypeError, match=message):
        qwen_fast.enable(pipe, **{name: "image"})
    assert type(pipe) is diffusers.QwenImagePipeline
    if name not in pipe.components:
        with pytest.raises(TypeError, match=message):
            qwen_fast.QwenImagePipeline(**pipe.components, **{name: "image"})
        with pytest.raises(TypeError, match=message):
            qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, **{name: "image"})


def test_options_have_the_same_names_everywhere(checkpoint):
    """In `enable`, the constructor and `from_pretrained`, and each is documented."""
    given = {"vae_mode": "diffusers", "text_encoder_mode": "offload", "modulation": "device", "check_nan": True}
    pipe = stock(checkpoint)
    made = [
        qwen_fast.enable(pipe, **given),
        qwen_fast.QwenImagePipeline(**pipe.components, **given),
        qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, **given),
    ]
    assert {one.fast_state.options for one in made} == {Options(**given)}
    for function in (qwen_fast.enable, qwen_fast.QwenImagePipeline.__init__):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in NAMES} == dataclasses.asdict(Options())
    assert all(f"\n        {name}: " in qwen_fast.enable.__doc__ for name in NAMES)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipe.fast_state.options.strict = True


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_asked_for_where_there_is_none(pipes):
    for pipe in pipes.values():
        with pytest.raises(ValueError, match="`device` is cuda, but PyTorch"):
            pipe.to("cuda")
        assert pipe.device.type == "cpu"


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match="model_index.json"):
        qwen_fast.QwenImagePipeline.from_pretrained(tmp_path)


def test_hardware_that_triton_does_not_support(checkpoint, monkeypatch, caplog):
    monkeypatch.setattr(
        "qwen_fast.pipelines.enable.unsupported_reason", lambda device: "Tesla T4 is sm_75; sm_80 or newer is needed"
    )
    pipe = stock(checkpoint)
    assert type(qwen_fast.enable(pipe)) is diffusers.QwenImagePipeline
    assert "stays on stock diffusers: Tesla T4 is sm_75" in caplog.text
    with pytest.raises(RuntimeError, match="Tesla T4"):
        qwen_fast.enable(pipe, strict=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_moved_to_unsupported_hardware_after_enable(checkpoint, monkeypatch, cls):
    pipe = stock(checkpoint, cls=cls)
    arguments = {"prompt": "a red circle"} | SMALL | EDITING.get(cls, {})
    expected = draw(pipe, **arguments)
    qwen_fast.enable(pipe)
    monkeypatch.setattr("qwen_fast.pipelines.call.unsupported_reason", lambda device: "Tesla T4 is sm_75")
    assert torch.equal(draw(pipe, **arguments), expected)
    report = qwen_fast.report(pipe)
    assert report.fallbacks == {"Tesla T4 is sm_75": 1}
    assert set(report.calls) == {"text encoder"}, "a kernel was launched there all the same"
    monkeypatch.undo()
    assert_same_latents(draw(pipe, **arguments), expected)
    assert len(qwen_fast.report(pipe).calls) > 1


@pytest.mark.parametrize(
    ("name", "value"), [("modulation", "table"), ("attention", "flash3"), ("cuda_graph", 1), ("vae_mode", None)]
)
def test_unknown_values_of_options(checkpoint, name, value):
    pipe = stock(checkpoint)
    with pytest.raises(ValueError, match=f"`{name}` is {value!r}; use one of"):
        qwen_fast.enable(pipe, **{name: value})
    assert type(pipe) is diffusers.QwenImagePipeline
    with pytest.raises(ValueError, match=f"`{name}` is"):
        qwen_fast.QwenImagePipeline(**pipe.components, **{name: value})


@pytest.mark.parametrize("attention", ["cudnn", "efficient"])
def test_an_attention_that_the_device_lacks_is_named(checkpoint, attention):
    pipe = qwen_fast.enable(stock(checkpoint), attention=attention)
    with pytest.raises(ValueError, match=f"`attention` is '{attention}', .* not for cpu; use 'auto'"):
        draw(pipe, prompt="a red circle", **SMALL)
