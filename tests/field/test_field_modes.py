"""Modes of torch around a call: autocast, compilation, export, gradients, training, functional calls, function modes."""

from collections import Counter

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qwen_fast
from support.field import GUIDED, IMAGE_TO_IMAGE, ORDERS, SMALL, TEXT_TO_IMAGE, assert_same, compare, distance, draw, guided

FORWARD = {
    "hidden_states": torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0)),
    "encoder_hidden_states": torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([0.5]),
    "img_shapes": [[(1, 4, 6)]],
    "return_dict": False,
}


class Products(TorchDispatchMode):
    """Counts matrix products by the dtype of their first tensor."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(part in name for part in ("mm.", "mm_out", "linear_")):
            self.seen[next(one for one in args if isinstance(one, torch.Tensor)).dtype] += 1
        return function(*args, **(kwargs or {}))


# Autocast


def in_bf16(pipe, cls=TEXT_TO_IMAGE):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return draw(pipe, **guided(cls))


@pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE], ids=["text", "img2img"])
def test_autocast_over_fp32_weights(field, cls):
    """Stock's dtype, and no farther from the exact picture than 1.25 x stock's own distance (RMS)."""
    exact = draw(field.pipe(cls), **guided(cls))
    expected, actual = in_bf16(field.pipe(cls), cls), in_bf16(qwen_fast.enable(field.pipe(cls)), cls)
    assert actual.dtype == expected.dtype
    ours, theirs = ((one.float() - exact).square().mean().sqrt() for one in (actual, expected))
    assert 0 < ours <= 1.25 * theirs


def test_autocast_reaches_the_products(field):
    """One in fp32 is slow on a GPU and takes twice the memory. In stock there is none, with transformers 4 there are two."""
    counts = []
    for pipe in (field.pipe(), qwen_fast.enable(field.pipe())):
        with Products() as products:
            in_bf16(pipe)
        counts.append(products.seen)
    stocks = 0 if Version(transformers.__version__) >= Version("5") else 2
    assert counts[0][torch.float32] == stocks and counts[1][torch.float32] == stocks, counts


def test_after_autocast_a_call_is_exact_again(field):
    pipe = qwen_fast.enable(field.pipe())
    in_bf16(pipe)
    assert_same(draw(pipe, **GUIDED), draw(field.pipe(), **GUIDED))


def test_validation_on_an_unwrapped_training_model(field):
    """The dreambooth LoRA trainer: accelerate wraps the forward for bf16 and leaves that behind when it unwraps."""
    pictures = []
    for enabled in (False, True):
        trainer = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
        pipe = field.pipe()
        pipe.transformer = trainer.unwrap_model(trainer.prepare(pipe.transformer))
        if enabled:
            qwen_fast.enable(pipe)
        pictures.append(draw(pipe, **SMALL))
    assert pictures[1].dtype == pictures[0].dtype
    assert distance(pictures[1].float(), pictures[0].float()) <= 5e-2
    assert_same(pictures[1].float(), pictures[0].float())


# Compilation and export


def compiled_forward(run):
    run.transformer.forward = torch.compile(run.transformer.forward, backend="eager")


def compiled_model(run):
    run.pipe.transformer = torch.compile(run.transformer, backend="eager")


def compiled_layers(run):
    run.block().attn.to_v.compile(backend="eager")
    run.pipe.vae.post_quant_conv.compile(backend="eager")


# Every guard costs seconds of tracing: one prompt length, two steps.
TRACED = {"negative_prompt": None, "num_inference_steps": 2}


@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_forward(field, compiler, order):
    compare(field, compiled_forward, order, moves=False, **TRACED)


def test_a_compiled_model(field, compiler):
    compare(field, compiled_model, "after", moves=False, **TRACED)


def test_compiled_layers(field, compiler):
    compare(field, compiled_layers, "before", moves=False, output_type="pt", tolerance=1e-5, **TRACED)


def test_export_of_the_transformer(field):
    results = []
    for pipe in (field.pipe(), qwen_fast.enable(field.pipe())):
        del pipe.transformer.transformer_blocks[1:]
        with torch.no_grad():
            exported = torch.export.export(pipe.transformer, args=(), kwargs=FORWARD, strict=False)
            results.append(exported.module()(**FORWARD)[0])
    assert_same(results[1], results[0])


# Gradients and training


def test_gradients_through_the_undecorated_call(field):
    """Reward tuning calls the pipeline without its `no_grad`."""
    gradients = []
    with torch.no_grad():
        embeds = field.pipe().encode_prompt("a red circle")[0]
    for pipe in (field.pipe(), qwen_fast.enable(field.pipe())):
        given = embeds.clone().requires_grad_(True)
        latents = (
            type(pipe)
            .__call__.__wrapped__(
                pipe,
                prompt_embeds=given,
                height=64,
                width=96,
                num_inference_steps=2,
                output_type="latent",
                generator=torch.Generator().manual_seed(7),
            )
            .images
        )
        latents.square().mean().backward()
        gradients.append(given.grad)
    assert_same(gradients[1], gradients[0], 1e-4)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_transformer(field, checkpointing):
    gradients = []
    for pipe in (field.pipe(), qwen_fast.enable(field.pipe())):
        model = pipe.transformer
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        model(**FORWARD)[0].square().mean().backward()
        gradients.append([weight.grad for weight in (model.img_in.weight, model.transformer_blocks[0].img_mod[1].weight)])
    assert_same(gradients[1], gradients[0], 1e-5)


def test_a_training_step_between_two_calls(field):
    def act(run):
        model = run.transformer
        pictures = [draw(run.pipe, **guided())]
        model.enable_gradient_checkpointing()
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model(**FORWARD)[0].square().mean().backward()
        optimizer.step()
        model.eval()
        return [*pictures, draw(run.pipe, **guided())]

    compare(field, None, act=act, moves=False, tolerance=1e-5)


def test_in_inference_mode(field):
    def act(run):
        with torch.inference_mode():
            first = draw(run.pipe, **guided()).clone()
        return [first, draw(run.pipe, **guided())]

    compare(field, None, act=act, moves=False)


def test_under_enable_grad(field):
    """A caller's grad mode does not matter: the call has its own."""

    def act(run):
        with torch.enable_grad():
            latents = draw(run.pipe, **guided())
        assert not latents.requires_grad
        return latents

    compare(field, None, act=act, moves=False)


# Functional calls and function modes


def test_functional_call(field):
    """torch.func with other weights than the model's own."""
    results = []
    for pipe in (field.pipe(), qwen_fast.enable(field.pipe())):
        model = pipe.transformer
        if type(pipe) is not TEXT_TO_IMAGE:
            draw(pipe, **GUIDED)
        weights = {name: value.detach() * 0.9 for name, value in model.named_parameters()}
        with torch.no_grad():
            results.append(torch.func.functional_call(model, weights, (), FORWARD)[0])
            results.append(model(**FORWARD)[0])
    assert_same(results[2:], results[:2])
    assert distance(results[0], results[1]) > 1e-3


def test_functional_call_of_a_pipelines_forward(field):
    """A forward that runs the model with other weights, put in the model's place."""

    def situation(run):
        old = run.transformer.forward
        weights = {name: value.detach() * 0.9 for name, value in run.transformer.named_parameters()}
        inside = []

        def forward(*args, **kwargs):
            if inside:
                return old(*args, **kwargs)
            run.note("forward", *args, **kwargs)
            inside.append(True)
            try:
                return torch.func.functional_call(run.transformer, weights, args, kwargs)
            finally:
                inside.pop()

        run.transformer.forward = forward

    compare(field, situation, "after")
    compare(field, situation, "before")


class Halving(TorchFunctionMode):
    """Changes what one of torch's functions gives."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 0.5 if function is self.function else result


class Looking(TorchFunctionMode):
    """Counts torch's functions."""

    def __init__(self, run, names):
        super().__init__()
        self.run, self.names = run, names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.names:
            self.run.note(function.__name__, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def mode(make):
    def situation(run):
        run.later.enter_context(make(run))

    return situation


@pytest.mark.parametrize("function", [F.scaled_dot_product_attention, F.linear, F.layer_norm, F.gelu], ids=lambda f: f.__name__)
def test_a_function_mode_that_changes_a_function(field, function):
    compare(field, mode(lambda run: Halving(function)), "after")


def test_a_function_mode_that_only_looks(field):
    compare(field, mode(lambda run: Looking(run, {"scaled_dot_product_attention"})), "after", moves=False)


class Tracing(torch.Tensor):
    """A tensor subclass that notes the functions it met."""

    met: Counter = Counter()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.met[getattr(function, "__name__", str(function))] += 1
        return super().__torch_function__(function, types, args, kwargs or {})


def test_latents_of_a_tensor_subclass(field):
    def act(run):
        noise = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3))
        return torch.Tensor(draw(run.pipe, **guided(latents=noise.as_subclass(Tracing)))).as_subclass(torch.Tensor)

    compare(field, None, act=act, moves=False)


@pytest.mark.parametrize("name", ["gelu", "silu", "linear", "layer_norm"])
def test_a_function_of_torch_replaced(field, name):
    """Patched in torch.nn.functional, where stock's modules look it up."""
    compare(field, lambda run: run.wrap(F, name, lambda out: out * 0.9), "after")


def test_under_a_profiler(field):
    def act(run):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
            return draw(run.pipe, **guided(num_inference_steps=2))

    compare(field, None, act=act, moves=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_stock(field, dtype):
    """The same weights: no farther from what they give in fp32 than 1.25 x stock's own distance (RMS)."""
    wide = field.pipe(dtype=dtype)
    for part in (wide.transformer, wide.text_encoder, wide.vae):
        part.float()
    noise = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = draw(wide, **GUIDED, latents=noise.float())
    distances = []
    for pipe in (field.pipe(dtype=dtype), qwen_fast.enable(field.pipe(dtype=dtype))):
        latents = draw(pipe, **GUIDED, latents=noise)
        assert latents.dtype == dtype
        distances.append((latents.float() - exact).square().mean().sqrt())
    assert 0 < distances[1] <= 1.25 * distances[0]
