"""Features together, each case a fault that was found where two of them met."""

import threading

import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, stock
from support.modular import WORKFLOWS

pytest.importorskip("peft", reason="LoRA needs peft")
from peft import LoraConfig

CALL = {"height": 64, "width": 96, "num_inference_steps": 3, "true_cfg_scale": 3.0, "negative_prompt": "x"}
CALL |= {"output_type": "latent"}
PROMPTS = ["a red circle", "two green squares"]
TARGETS = ["to_q", "img_mod.1", "net.2"]
NAMES = {"adapter_names": ["a", "b"], "scale": 0.5}


def with_adapters(pipe, targets=TARGETS):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name=name)
    return pipe


def generators():
    return [torch.Generator().manual_seed(seed) for seed in range(2)]


def alone(pipe, **others):
    """What stock draws of each prompt with its own adapter on."""
    found = []
    for prompt, name, generator in zip(PROMPTS, "ab", generators(), strict=True):
        pipe.transformer.set_adapters(name, 1.0)
        kwargs = {"attention_kwargs": {"scale": NAMES["scale"]}}
        found.append(pipe(prompt, generator=generator, **CALL | kwargs | others).images)
    return torch.cat(found)


def test_names_do_not_go_with_batch_invariance_in_any_pipeline(checkpoint):
    pipe = qwen_fast.enable(with_adapters(stock(checkpoint)), batch_invariant=True)
    modular = qwen_fast.enable(with_adapters(WORKFLOWS["text"].pipe(checkpoint)), batch_invariant=True)
    with pytest.raises(ValueError, match="against it: batch_invariant=True; call the pipeline once for each prompt"):
        pipe(PROMPTS, attention_kwargs=NAMES, generator=generators(), **CALL)
    with pytest.raises(ValueError, match="against it: batch_invariant=True"):
        WORKFLOWS["text"].draw(modular, prompt=PROMPTS, negative_prompt=["x", "y"], attention_kwargs=NAMES)


def test_scalings_of_hotswapping_stay_as_they_were(checkpoint):
    pipe = with_adapters(stock(checkpoint))
    layers = [module for module in pipe.transformer.modules() if hasattr(module, "scaling")]
    for layer in layers:
        layer.scaling = {name: torch.tensor(value) for name, value in layer.scaling.items()}
    before = [dict(layer.scaling) for layer in layers]
    qwen_fast.enable(pipe)(PROMPTS, attention_kwargs=NAMES, generator=generators(), **CALL)
    for layer, scaling in zip(layers, before, strict=True):
        assert all(layer.scaling[name] is value and value == 2 for name, value in scaling.items())  # of rank 4 and alpha 8


def test_a_modular_pipeline_on_stock_refuses_names(checkpoint):
    workflow = WORKFLOWS["text"]
    pipe = with_adapters(workflow.pipe(checkpoint))
    pipe.transformer.__class__ = type("Mine", (type(pipe.transformer),), {})
    qwen_fast.enable(pipe)
    with pytest.raises(ValueError, match="against it: the transformer is not qwen_fast's"):
        workflow.draw(pipe, attention_kwargs={"adapter_names": ["a"]})


def test_several_sizes_over_a_compiled_transformer(checkpoint):
    pipe = stock(checkpoint)
    sizes = {"height": [64, 96], "width": [96, 48]}
    expected = qwen_fast.enable(pipe)(PROMPTS, generator=generators(), **CALL | sizes).images
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    drawn = pipe(PROMPTS, generator=generators(), **CALL | sizes).images
    for one, other in zip(drawn, expected, strict=True):
        assert_same_latents(one, other)


@pytest.mark.parametrize("kwargs", [{"adapter_names": ["a"]}, {"scale": 0.3}], ids=str)
def test_a_preview_in_a_callback_leaves_the_calls_adapters(checkpoint, kwargs):
    pipe = with_adapters(stock(checkpoint))
    pipe.transformer.set_adapters("a", 1.0)
    scale = {"attention_kwargs": {"scale": kwargs.get("scale", 1.0)}}
    expected = pipe(PROMPTS[0], generator=generators()[0], **CALL | scale).images
    pipe.transformer.set_adapters("b" if "adapter_names" in kwargs else "a", 1.0)

    def preview(pipe, i, t, tensors):
        if i == 1:
            pipe("a cat", height=64, width=64, num_inference_steps=1, output_type="latent")
        return {}

    qwen_fast.enable(pipe)
    others = {"attention_kwargs": kwargs, "callback_on_step_end": preview}
    assert_same_latents(pipe(PROMPTS[0], generator=generators()[0], **CALL | others).images, expected)


def test_threads_that_share_a_model_do_not_see_each_others_adapters(checkpoint):
    first = with_adapters(stock(checkpoint))
    expected = alone(first)
    second = type(first)(**first.components | {"scheduler": type(first.scheduler).from_config(first.scheduler.config)})
    second.set_progress_bar_config(disable=True)
    first.transformer.set_adapters("a", 1.0)
    plain = first(PROMPTS[0], generator=generators()[0], **CALL).images
    for pipe in (first, second):
        qwen_fast.enable(pipe)
    wrong = []

    def drawn(pipe, wanted, *args, **kwargs):
        for _ in range(6):
            images = pipe(*args, generator=generators()[: len(wanted)], **CALL | kwargs).images
            if (images - wanted).abs().max() > 2e-6 * wanted.abs().max():
                wrong.append(kwargs)

    threads = [threading.Thread(target=drawn, args=(first, expected, PROMPTS), kwargs={"attention_kwargs": NAMES})]
    threads += [threading.Thread(target=drawn, args=(second, plain, PROMPTS[:1]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
