"""Adapters in the formats and kinds people have: they are known, so that they serve under strict=True too."""

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model

from support.field import IMAGE_TO_IMAGE, ORDERS, compare, draw, guided

LAYERS = (
    *("attn.to_q", "attn.add_v_proj", "attn.to_out.0", "img_mlp.net.2"),
    *("txt_mlp.net.0.proj", "img_mod.1", "txt_mod.1"),
)
EVERYWHERE = ["to_q", "to_out.0", "img_mlp.net.2", "img_mod.1", "txt_in", "proj_out", "norm_out.linear", "linear_1"]
STRICT = {"strict": True}


def state_dict(run, prefix, down, up, seed=0, rank=4, alpha=None, blocks=(0, 1), mixed=False):
    """A LoRA for some layers, in the keys of a trainer."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for index in blocks:
        for place, layer in enumerate(LAYERS):
            linear = run.block(index).get_submodule(layer)
            linear = getattr(linear, "base_layer", linear)
            size, key = rank + place if mixed else rank, prefix(index, layer)
            state[f"{key}.{down}.weight"] = 0.3 * torch.randn(size, linear.in_features, generator=generator)
            state[f"{key}.{up}.weight"] = 0.3 * torch.randn(linear.out_features, size, generator=generator)
            if alpha is not None:
                state[f"{key}.alpha"] = torch.tensor(float(place + 1) if mixed else alpha)
    return state


def kohya(run, seed=0, rank=4, alpha=2.0):
    def prefix(index, layer):
        return f"lora_unet_transformer_blocks_{index}_{layer.replace('.', '_')}"

    return state_dict(run, prefix, "lora_down", "lora_up", seed, rank, alpha)


def kohya_keys(run):
    run.pipe.load_lora_weights(kohya(run))


def ai_toolkit_keys(run):
    state = state_dict(run, lambda i, layer: f"diffusion_model.transformer_blocks.{i}.{layer}", "lora_A", "lora_B")
    run.pipe.load_lora_weights(state)


def lightning_keys(run):
    state = state_dict(run, lambda i, layer: f"transformer_blocks.{i}.{layer}", "lora_down", "lora_up", alpha=2.0)
    run.pipe.load_lora_weights(state)


def mixed_ranks(run):
    def prefix(index, layer):
        return f"transformer.transformer_blocks.{index}.{layer}"

    state = state_dict(run, prefix, "lora_A", "lora_B", rank=2, blocks=(0,), mixed=True)
    run.pipe.load_lora_weights(state)


def adapter(configuration, parts):
    """A situation: an adapter of PEFT with weights that show."""

    def situation(run):
        torch.manual_seed(1)
        run.transformer.add_adapter(configuration())
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, weight in run.transformer.named_parameters():
                if any(part in name for part in parts):
                    weight.add_(0.1 * torch.randn(weight.shape, generator=generator))

    return situation


def lora_config(**arguments):
    return lambda: LoraConfig(r=4, lora_alpha=8, **{"target_modules": EVERYWHERE} | arguments)


SAVED = ["norm_out", "proj_out", "norm_q", "txt_norm"]
SMALL_TARGETS = ["to_q", "to_out.0", "img_mlp.net.2", "img_mod.1"]
ADAPTERS = {
    "kohya keys": kohya_keys,
    "ai-toolkit keys": ai_toolkit_keys,
    "lightning keys": lightning_keys,
    "mixed ranks": mixed_ranks,
    "DoRA": adapter(lora_config(use_dora=True), ["lora_B"]),
    "rsLoRA with bias": adapter(lora_config(use_rslora=True, lora_bias=True), ["lora_B"]),
    "LoKr": adapter(lambda: LoKrConfig(r=4, target_modules=SMALL_TARGETS), ["lokr_w"]),
    "LoHa": adapter(lambda: LoHaConfig(r=4, target_modules=SMALL_TARGETS), ["hada_w"]),
    "OFT": adapter(lambda: OFTConfig(r=0, oft_block_size=8, target_modules=["to_q", "img_mlp.net.2"]), ["oft_R"]),
    "IA3": adapter(
        lambda: IA3Config(target_modules=["to_q", "to_v", "img_mlp.net.2"], feedforward_modules=["img_mlp.net.2"]), ["ia3_l"]
    ),
    "modules to save": adapter(lora_config(target_modules=["to_q"], modules_to_save=SAVED), ["lora_B", "modules_to_save"]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter(field, name, order):
    """Under strict=True: an adapter is known and does not raise."""
    compare(field, ADAPTERS[name], order, options=STRICT)


@pytest.mark.parametrize("name", ["kohya keys", "DoRA"])
def test_an_adapter_in_image_to_image(field, name):
    compare(field, ADAPTERS[name], "after", cls=IMAGE_TO_IMAGE, options=STRICT)


# Sequences of calls


def hotswapped(run):
    run.pipe.load_lora_weights(kohya(run, 0), adapter_name="a")
    first = draw(run.pipe, **guided())
    run.pipe.load_lora_weights(kohya(run, 1, alpha=4.0), adapter_name="a", hotswap=True)
    return [first, draw(run.pipe, **guided())]


def hotswapped_with_another_rank(run):
    run.pipe.enable_lora_hotswap(target_rank=8)
    run.pipe.load_lora_weights(kohya(run, 0), adapter_name="a")
    first = draw(run.pipe, **guided())
    run.pipe.load_lora_weights(kohya(run, 1, rank=8, alpha=4.0), adapter_name="a", hotswap=True)
    return [first, draw(run.pipe, **guided())]


def fused_and_unfused(run):
    pipe = run.pipe
    pipe.load_lora_weights(kohya(run, 0), adapter_name="a")
    pipe.load_lora_weights(kohya(run, 1), adapter_name="b")
    pipe.set_adapters(["a", "b"], [0.7, 0.3])
    pictures = [draw(pipe, **guided())]
    pipe.fuse_lora(adapter_names=["a", "b"])
    pictures.append(draw(pipe, **guided()))
    pipe.unfuse_lora()
    pipe.set_adapters(["b"], [1.2])
    return [*pictures, draw(pipe, **guided())]


def blockwise(run):
    run.pipe.load_lora_weights(kohya(run), adapter_name="a")
    run.pipe.set_adapters("a", {"transformer": {"blocks": 0.3}})
    return draw(run.pipe, **guided())


def weights_between_calls(run):
    run.pipe.load_lora_weights(kohya(run, 0), adapter_name="a")
    run.pipe.load_lora_weights(kohya(run, 1), adapter_name="b")
    pictures = []
    for names, weights in ((["a"], [1.0]), (["a", "b"], [0.5, 0.9]), (["b"], [-0.4]), (["a"], [1.0])):
        run.pipe.set_adapters(names, weights)
        pictures.append(draw(run.pipe, **guided()))
    return pictures


def scales_between_calls(run):
    adapter(lora_config(init_lora_weights=False), [])(run)
    return [draw(run.pipe, **guided(attention_kwargs={"scale": scale})) for scale in (1.0, 0.3, 1.0)]


def unloaded(run):
    run.pipe.load_lora_weights(kohya(run), adapter_name="a")
    first = draw(run.pipe, **guided())
    run.pipe.unload_lora_weights()
    return [first, draw(run.pipe, **guided())]


def deleted_and_off(run):
    run.pipe.load_lora_weights(kohya(run, 0), adapter_name="a")
    run.pipe.load_lora_weights(kohya(run, 1), adapter_name="b")
    pictures = [draw(run.pipe, **guided())]
    run.pipe.delete_adapters("a")
    pictures.append(draw(run.pipe, **guided()))
    run.pipe.disable_lora()
    pictures.append(draw(run.pipe, **guided()))
    run.pipe.enable_lora()
    return [*pictures, draw(run.pipe, **guided())]


def trained_a_little(run):
    """An optimizer's step on the LoRA between two calls."""
    run.pipe.load_lora_weights(kohya(run), adapter_name="a")
    pictures = [draw(run.pipe, **guided())]
    with torch.no_grad():
        for name, weight in run.transformer.named_parameters():
            if "lora_B" in name:
                weight.mul_(0.5)
    return [*pictures, draw(run.pipe, **guided())]


CALLS = [
    hotswapped,
    hotswapped_with_another_rank,
    fused_and_unfused,
    blockwise,
    weights_between_calls,
    scales_between_calls,
    unloaded,
    deleted_and_off,
    trained_a_little,
]


@pytest.mark.parametrize("calls", CALLS)
def test_adapters_between_calls(field, calls):
    compare(field, None, act=calls, options=STRICT, moves=False)


def test_fused_unloaded_and_saved(field, tmp_path):
    """A folder that an enabled pipeline saved is drawn by stock."""

    def saved(run):
        run.pipe.load_lora_weights(kohya(run), adapter_name="a")
        run.pipe.fuse_lora(adapter_names=["a"], lora_scale=0.6)
        run.pipe.unload_lora_weights()
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run.pipe.save_pretrained(folder)
        stock = type(field.pipe()).from_pretrained(folder)
        assert type(stock.transformer).__module__.startswith("diffusers.")
        stock.set_progress_bar_config(disable=True)
        return draw(stock, **guided())

    compare(field, None, act=saved, options=STRICT, moves=False)


def test_a_lora_in_training_mode(field):
    """Its dropout draws from torch's own generator, in stock's order and shapes."""

    def situation(run):
        adapter(lora_config(target_modules=["to_v", "img_mlp.net.2"], lora_dropout=0.5, init_lora_weights=False), [])(run)
        run.transformer.train()

    def act(run):
        torch.manual_seed(5)
        return draw(run.pipe, **guided())

    compare(field, situation, "after", act=act)


@pytest.mark.parametrize("order", ORDERS)
def test_a_peft_model_in_the_transformers_place(field, order):
    def situation(run):
        torch.manual_seed(3)
        configuration = LoraConfig(r=4, target_modules=["to_q", "img_mod.1"], init_lora_weights=False)
        run.pipe.transformer = get_peft_model(run.transformer, configuration)

    compare(field, situation, order)
