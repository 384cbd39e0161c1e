"""Pipelines with parts missing, shared, saved whole or of other classes, and what `enable` and `report` say of them."""

import copy
import io
import pickle

import accelerate
import diffusers
import pytest
import torch

import qwen_fast
from support.field import (
    GUIDED,
    IMAGE_TO_IMAGE,
    INPAINT,
    TEXT_TO_IMAGE,
    assert_same,
    compare,
    draw,
    dtype_argument,
    guided,
    picture,
)

CLASSES = pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINT], ids=["text", "img2img", "inpaint"])

# Parts missing


@pytest.mark.parametrize("missing", [("transformer", "vae"), ("transformer", "vae", "scheduler"), ("vae",), ("transformer",)])
def test_encoding_without_the_other_parts(field, missing):
    """Trainers encode all their prompts first."""
    encoded = []
    for enabled in (False, True):
        pipe = field.load(**dict.fromkeys(missing))
        if enabled:
            qwen_fast.enable(pipe)
            assert qwen_fast.report(pipe).enabled and str(qwen_fast.report(pipe))
        with torch.no_grad():
            encoded.append(pipe.encode_prompt("a red circle")[0])
        assert type(qwen_fast.disable(pipe)) is TEXT_TO_IMAGE
    assert_same(encoded[1], encoded[0], 0.0)


@CLASSES
@pytest.mark.parametrize("missing", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_call_without_a_part_fails_as_in_stock(field, cls, missing):
    def situation(run):
        run.pipe.register_modules(**{missing: None})

    compare(field, situation, "before", cls=cls, moves=False, output_type="pt", tolerance=1e-5)


def test_encode_first_and_draw_later(field):
    """Text with one pipeline, the picture with another that has no text encoder."""
    pictures = []
    for enabled in (False, True):
        first = field.load(transformer=None, vae=None)
        second = field.load(text_encoder=None, tokenizer=None)
        if enabled:
            qwen_fast.enable(first)
            qwen_fast.enable(second)
        with torch.no_grad():
            embeds, mask = first.encode_prompt("a red circle")
            negative, negative_mask = first.encode_prompt("blurry")
        given = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
        given |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
        pictures.append(draw(second, **guided(prompt=None, negative_prompt=None, output_type="pt", **given)))
    assert_same(pictures[1], pictures[0], 1e-5)


def test_a_part_put_in_later(field):
    whole, pipe = field.pipe(), field.load(transformer=None, vae=None)
    expected = draw(whole, **GUIDED)
    qwen_fast.enable(pipe)
    pipe.register_modules(transformer=whole.transformer, vae=whole.vae)
    pipe.vae_scale_factor = whole.vae_scale_factor
    assert_same(draw(pipe, **GUIDED), expected)


def test_the_text_encoder_taken_out_after_encoding(field):
    """As scripts free memory between the two."""

    def act(run):
        with torch.no_grad():
            embeds, _ = run.pipe.encode_prompt("a red circle")
        run.pipe.text_encoder = None
        return draw(run.pipe, **guided(prompt=None, prompt_embeds=embeds, negative_prompt=None))

    compare(field, None, act=act, moves=False)


# The report of a transformer alone


def test_report_of_a_transformer(field):
    pipe = field.pipe()
    transformer = pipe.transformer
    before = qwen_fast.report(transformer)
    assert not before.enabled and "enable_vae" not in str(before) and "not accelerated" in str(before)
    qwen_fast.enable(pipe)
    draw(pipe, **GUIDED)
    report = qwen_fast.report(transformer)
    assert report.enabled and "is accelerated" in str(report) and "not accelerated" not in str(report)
    assert "transformer" in report.memory and "vae" not in report.memory
    assert any("transformer" in part for part in report.replaced) and not any("VAE" in part for part in report.replaced)
    qwen_fast.disable(pipe)
    assert not qwen_fast.report(transformer).enabled


def test_report_of_our_transformer_class(field):
    model = qwen_fast.QwenImageTransformer2DModel.from_pretrained(field.checkpoint, subfolder="transformer")
    report = qwen_fast.report(model)
    assert report.enabled and "transformer" in report.memory, str(report)


# Saved whole


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WHOLE = [(cls, "after") for cls in (TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINT)] + [(TEXT_TO_IMAGE, "before")]


@pytest.mark.parametrize(("cls", "order"), WHOLE)
@pytest.mark.parametrize("way", [pickled, saved, copy.deepcopy])
def test_a_pipeline_as_a_whole(field, cls, way, order):
    """For spawned workers; the copy draws the same, and the original still does.

    Before the first call: transformers puts a hook into a text encoder that has encoded, which cannot be pickled.
    """

    def act(run):
        copied = way(run.pipe)
        copied.set_progress_bar_config(disable=True)
        return [draw(copied, **guided(cls)), draw(run.pipe, **guided(cls))]

    compare(field, None, order, cls=cls, act=act, moves=False, first=way is copy.deepcopy)


@pytest.mark.parametrize("way", [pickled, saved])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler"])
def test_a_part_as_a_whole(field, way, part):
    """What comes back is put into stock's pipeline and into the enabled one."""

    def act(run):
        copied = way(getattr(run.pipe, part))
        stock = field.pipe()
        stock.register_modules(**{part: copied})
        run.pipe.register_modules(**{part: way(getattr(run.pipe, part))})
        return [draw(pipe, **guided(output_type="pt")) for pipe in (stock, run.pipe)]

    compare(field, None, act=act, moves=False, tolerance=1e-5, first=part != "text_encoder")


class WithoutUs(pickle.Unpickler):
    """Reads on a machine where qwen_fast is not installed."""

    def find_class(self, module, name):
        if module.split(".")[0] in ("qwen_fast", "qwen_fast_kernels"):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
        return super().find_class(module, name)


def test_what_was_pickled_is_stocks_where_qwen_fast_is_not_installed(field):
    """Pipeline, transformer and VAE of an enabled pipeline; the last two after it has drawn."""
    pipe, expected = qwen_fast.enable(field.pipe()), draw(field.pipe(), **guided(output_type="pt"))
    read = WithoutUs(io.BytesIO(pickle.dumps(pipe))).load()
    draw(pipe, **guided(output_type="pt"))
    parts = {name: WithoutUs(io.BytesIO(pickle.dumps(getattr(pipe, name)))).load() for name in ("transformer", "vae")}
    assert type(read) is TEXT_TO_IMAGE and not qwen_fast.report(read).enabled
    assert type(parts["transformer"]) is type(field.pipe().transformer) and type(parts["vae"]) is type(field.pipe().vae)
    assert not any("qwen_fast" in name for part in (read, *parts.values()) for name in vars(part))
    assert_same(draw(read, **guided(output_type="pt")), expected, 0.0)
    other = field.pipe()
    other.register_modules(**parts)
    assert_same(draw(other, **guided(output_type="pt")), expected, 0.0)


# Other classes


class Regional(TEXT_TO_IMAGE):
    """A pipeline of one's own."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def test_a_subclass_is_refused_by_its_name(field):
    pipe = Regional(**field.pipe().components)
    with pytest.raises(ValueError, match="Regional"):
        qwen_fast.enable(pipe)
    assert type(pipe) is Regional and type(pipe.transformer) is diffusers.QwenImageTransformer2DModel


REFUSED = [
    *("QwenImage21Pipeline", "QwenImage21ModularPipeline", "QwenImage21TurboModularPipeline"),
]


@pytest.mark.parametrize("name", [name for name in REFUSED if hasattr(diffusers, name)])
def test_the_rest_of_the_family_is_refused_by_name_and_not_called_foreign(name):
    cls = getattr(diffusers, name)
    with pytest.raises(ValueError, match=name) as raised:
        qwen_fast.enable(cls.__new__(cls))
    assert "not a pipeline of the Qwen-Image family" not in str(raised.value)


# Stock's other pipelines with our parts


def modular(pipe):
    built = diffusers.QwenImageAutoBlocks().init_pipeline()
    parts = ("text_encoder", "tokenizer", "vae", "scheduler", "transformer")
    built.update_components(**{name: pipe.components[name] for name in parts})
    built.set_progress_bar_config(disable=True)
    arguments = {name: value for name, value in GUIDED.items() if name != "true_cfg_scale"} | {"output_type": "pt"}
    return built(**arguments, generator=torch.Generator().manual_seed(7), output="images")


@pytest.mark.parametrize("drawn", [False, True])
def test_a_modular_pipeline_on_an_enabled_ones_parts(field, drawn):
    pipe = field.pipe()
    expected = modular(pipe)
    qwen_fast.enable(pipe)
    if drawn:
        draw(pipe, **GUIDED)
    assert_same(modular(pipe), expected, 1e-5)
    assert_same(draw(pipe, **GUIDED), draw(field.pipe(), **GUIDED))


@pytest.mark.parametrize("multi", [False, True])
def test_our_transformer_class_in_controlnets_pipeline(field, multi):
    torch.manual_seed(0)
    control = diffusers.QwenImageControlNetModel(
        num_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 14, 14)
    ).eval()
    for weight in control.parameters():
        weight.data = 0.2 * torch.randn(weight.shape)
    pictures = []
    for cls in (diffusers.QwenImageTransformer2DModel, qwen_fast.QwenImageTransformer2DModel):
        parts = field.pipe().components | {"transformer": cls.from_pretrained(field.checkpoint, subfolder="transformer")}
        net = diffusers.QwenImageMultiControlNetModel([control]) if multi else control
        pipe = diffusers.QwenImageControlNetPipeline(**parts, controlnet=net)
        pipe.set_progress_bar_config(disable=True)
        image, scale = ([picture()], [0.7]) if multi else (picture(), 0.7)
        pictures.append(draw(pipe, **GUIDED, control_image=image, controlnet_conditioning_scale=scale))
    assert_same(pictures[1], pictures[0])


# Weights that lie elsewhere


def test_a_device_map(field):
    pipes = [field.load(device_map="cpu") for _ in range(2)]
    assert_same(draw(qwen_fast.enable(pipes[1]), **GUIDED), draw(pipes[0], **GUIDED))


@pytest.mark.parametrize("order", ["before", "after"])
def test_offloaded_by_accelerate(field, order):
    def situation(run):
        accelerate.cpu_offload(run.transformer, execution_device=torch.device("cpu"))

    compare(field, situation, order, moves=False)


def test_loaded_in_inference_mode(field):
    with torch.inference_mode():
        pipes = [field.load() for _ in range(2)]
    assert_same(draw(qwen_fast.enable(pipes[1]), **GUIDED), draw(pipes[0], **GUIDED))


def test_other_weights_loaded_in_place(field):
    """`load_state_dict` into an enabled pipeline, with and without `assign`."""
    other = {name: value * 0.9 for name, value in field.pipe().transformer.state_dict().items()}

    def act(run):
        pictures = [draw(run.pipe, **guided())]
        for assign in (False, True):
            weights = {name: value * (0.9 if assign else 1) for name, value in other.items()}
            run.transformer.load_state_dict(weights, assign=assign)
            pictures.append(draw(run.pipe, **guided()))
        return pictures

    compare(field, None, act=act, moves=False)


def test_state_dicts_are_stocks(field):
    """Names, order and values, on an enabled pipeline that has drawn."""
    pipe, stock = qwen_fast.enable(field.pipe()), field.pipe()
    draw(pipe, **GUIDED)
    for part in ("transformer", "vae", "text_encoder"):
        ours, theirs = getattr(pipe, part).state_dict(), getattr(stock, part).state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert dtype_argument() in ("dtype", "torch_dtype")
