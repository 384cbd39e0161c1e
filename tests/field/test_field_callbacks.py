"""Callbacks that do more than look: tensors edited in place, other embeddings, LoRA scales, transformers, an early end."""

import pytest
import torch

from support.field import IMAGE_TO_IMAGE, ORDERS, assert_same_calls, compare, draw, guided


def calling(callback, inputs=("latents",), **arguments):
    """What is done with a run: one call with a callback, which notes what it gets."""

    def act(run):
        def noted(pipe, step, timestep, tensors):
            assert pipe is run.pipe
            run.note("callback", step, timestep, tensors)
            return callback(run, step, timestep, tensors)

        given = {"callback_on_step_end": noted, "callback_on_step_end_tensor_inputs": list(inputs)}
        return draw(run.pipe, **guided(type_of(run), **given, **arguments))

    return act


def type_of(run):
    return next(cls for cls in type(run.pipe).__mro__ if cls.__module__.startswith("diffusers.pipelines"))


def embeddings_in_place(run, step, timestep, tensors):
    tensors["prompt_embeds"][:, 0] = 0
    return tensors


def embeddings_in_place_without_a_word(run, step, timestep, tensors):
    tensors["prompt_embeds"].mul_(torch.linspace(0.8, 1.2, tensors["prompt_embeds"].shape[-1]))
    return {}


def latents_in_place(run, step, timestep, tensors):
    tensors["latents"].mul_(0.9)
    return tensors


def latents_in_place_without_a_word(run, step, timestep, tensors):
    tensors["latents"].mul_(0.9)
    return {}


def other_latents(run, step, timestep, tensors):
    return {"latents": tensors["latents"] * 0.9 + 0.01}


def other_embeddings(run, step, timestep, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"].flip(-1)}


def shorter_embeddings(run, step, timestep, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"][:, :-2]}


BOTH = ("latents", "prompt_embeds")
CALLBACKS = [
    embeddings_in_place,
    embeddings_in_place_without_a_word,
    latents_in_place,
    latents_in_place_without_a_word,
    other_latents,
    other_embeddings,
    shorter_embeddings,
]


@pytest.mark.parametrize("callback", CALLBACKS)
def test_a_callback_changes_what_it_would_in_stock(field, callback):
    compare(field, None, act=calling(callback, BOTH), moves=False)


@pytest.mark.parametrize("callback", [embeddings_in_place, latents_in_place, other_latents])
def test_the_same_in_image_to_image(field, callback):
    compare(field, None, act=calling(callback, BOTH), moves=False, cls=IMAGE_TO_IMAGE)


@pytest.mark.parametrize("callback", [embeddings_in_place, other_embeddings])
def test_the_same_without_guidance(field, callback):
    compare(field, None, act=calling(callback, BOTH, negative_prompt=None), moves=False)


def test_embeddings_in_place_do_not_reach_the_next_call(field):
    """What a callback did to its call's embeddings is not what the prompt is encoded to the next time."""

    def act(run):
        first = calling(embeddings_in_place, BOTH)(run)
        return [first, draw(run.pipe, **guided()), calling(embeddings_in_place, BOTH)(run)]

    compare(field, None, act=act, moves=False)


# Names beyond stock's two


@pytest.mark.parametrize("on", ["object", "class"])
def test_noise_pred_for_the_callback(field, on):
    """SD.Next extends the names; stock takes what its loop calls by that name."""
    values = []

    def situation(run):
        names = [*type(run.pipe)._callback_tensor_inputs, "noise_pred"]
        if on == "object":
            run.pipe._callback_tensor_inputs = names
        else:
            run.patch.setattr(type_of(run), "_callback_tensor_inputs", names)

    def look(run, step, timestep, tensors):
        values.append(tensors["noise_pred"].clone())
        return {}

    compare(field, situation, act=calling(look, ("latents", "noise_pred")), moves=False)
    for other, one in zip(values[:3], values[3:], strict=True):  # stock's three steps come first
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(
    "name",
    ["neg_noise_pred", "prompt_embeds_mask", "negative_prompt_embeds", "timestep", "timesteps", "i", "t", "image_seq_len"],
)
def test_other_names_of_stocks_loop(field, name):
    """Served as in stock, or refused by a ValueError that says the name; never a KeyError in the middle of a call."""

    def situation(run):
        run.pipe._callback_tensor_inputs = [*run.pipe._callback_tensor_inputs, name]

    look = calling(lambda run, step, timestep, tensors: {}, ("latents", name))
    compare(field, situation, act=look, moves=False, refused=name)


def test_a_name_that_stock_does_not_know(field):
    """Stock's own words."""
    compare(field, None, act=calling(lambda *_: {}, ("latents", "nothing")), moves=False)


def test_the_pipelines_state_in_a_callback(field):
    def look(run, step, timestep, tensors):
        pipe = run.pipe
        current = None if pipe.current_timestep is None else float(pipe.current_timestep)
        run.note("state", step, pipe.num_timesteps, current, pipe.guidance_scale, pipe.interrupt)
        run.note("scheduler", pipe.scheduler.step_index, pipe.scheduler.begin_index, pipe.scheduler.num_inference_steps)
        run.note("sigmas", pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps.tolist())
        return {}

    compare(field, None, act=calling(look), moves=False)


# An early end, another transformer


def test_an_interrupted_call(field):
    def stop(run, step, timestep, tensors):
        run.pipe._interrupt = step == 1
        return {}

    compare(field, None, act=calling(stop), moves=False)


def test_an_exception_in_a_callback(field):
    class Stopped(Exception):
        pass

    def stop(run, step, timestep, tensors):
        raise Stopped("enough")

    compare(field, None, act=calling(stop), moves=False)


@pytest.mark.parametrize("how", ["attribute", "register_modules"])
def test_a_callback_swaps_the_transformer(field, how):
    def swap(run, step, timestep, tensors):
        if step == 0:
            other = field.pipe().transformer
            with torch.no_grad():
                other.proj_out.weight.mul_(0.5)
            if how == "attribute":
                run.pipe.transformer = other
            else:
                run.pipe.register_modules(transformer=other)
        return {}

    compare(field, None, act=calling(swap), moves=False)


def test_a_callback_changes_a_weight(field):
    def change(run, step, timestep, tensors):
        with torch.no_grad():
            run.block().img_mod[1].weight.mul_(0.9)
            run.block().attn.to_v.weight.mul_(0.9)
        return {}

    compare(field, None, act=calling(change), moves=False)


# LoRA scales


def lora(run, layers=("attn.to_q", "attn.to_v", "img_mlp.net.2", "img_mod.1")):
    generator, state = torch.Generator().manual_seed(0), {}
    for index, block in enumerate(run.transformer.transformer_blocks):
        for layer in layers:
            linear, key = block.get_submodule(layer), f"transformer.transformer_blocks.{index}.{layer}"
            state[f"{key}.lora_A.weight"] = 0.3 * torch.randn(4, linear.in_features, generator=generator)
            state[f"{key}.lora_B.weight"] = 0.3 * torch.randn(linear.out_features, 4, generator=generator)
    run.pipe.load_lora_weights(state, adapter_name="a")


def scale_of_the_attribute(run, step, timestep, tensors):
    run.pipe._attention_kwargs = {"scale": 0.2}
    return {}


def scale_of_the_pipelines_dictionary(run, step, timestep, tensors):
    run.pipe.attention_kwargs["scale"] = 0.2
    return {}


def adapters_by_step(run, step, timestep, tensors):
    run.pipe.set_adapters(["a"], [0.2 * step])
    return {}


def adapter_off(run, step, timestep, tensors):
    if step == 0:
        run.pipe.disable_lora()
    return {}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("callback", [scale_of_the_attribute, scale_of_the_pipelines_dictionary, adapters_by_step, adapter_off])
def test_a_callback_sets_a_lora_scale(field, callback, order):
    compare(field, lora, order, act=lambda run: calling(callback, attention_kwargs={"scale": 1.0})(run), moves=False)


def test_a_callback_changes_the_dictionary_that_it_gave(field):
    def act(run):
        given = {"scale": 1.0}

        def change(run, step, timestep, tensors):
            given["scale"] = 0.2
            return {}

        return calling(change, attention_kwargs=given)(run)

    compare(field, lora, act=act, moves=False)


@pytest.mark.parametrize("options", [{}, {"modulation": "layers"}], ids=["table", "layers"])
@pytest.mark.parametrize("layers", [("attn.to_q", "attn.to_v"), ("attn.to_q", "img_mod.1")], ids=["attention", "modulation"])
def test_a_pre_hook_sets_the_scale_by_the_timestep(field, layers, options):
    def situation(run):
        lora(run, layers)

        def hook(module, args, kwargs):
            run.note("hook", *args, **kwargs)
            run.pipe.set_adapters(["a"], [float(kwargs["timestep"].flatten()[0])])

        run.transformer.register_forward_pre_hook(hook, with_kwargs=True)

    compare(field, situation, "after", options=options)


def test_calls_are_told_apart():
    """The helper itself: a call more, or another shape, is not the same."""
    with pytest.raises(AssertionError):
        assert_same_calls({"a": [1, 1]}, {"a": [1]})
    with pytest.raises(AssertionError, match="call 0 of a"):
        assert_same_calls({"a": [((("tensor", (2, 3)),), ())]}, {"a": [((("tensor", (1, 3)),), ())]})
