"""Which functions count as diffusers' and torch's own, and which as somebody else's, whenever they came."""

import copy
import functools
import gc
import inspect
import subprocess
import sys
import timeit
import types
import unittest.mock
import weakref
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.transformers import transformer_qwenimage
from diffusers.modular_pipelines.qwenimage.denoise import QwenImageDenoiseStep, QwenImageLoopDenoiser
from diffusers.pipelines.qwenimage import pipeline_qwenimage
from torch import nn

from qwen_fast.common.family import FAMILY
from qwen_fast.common.own import foreign_functions, foreign_methods, foreign_on, is_own_function
from qwen_fast.common.stages import staged
from qwen_fast.pipelines.family import ACCELERATED
from qwen_fast.pipelines.guiders import GUIDER
from qwen_fast.transformer import block_module, model

SCHEDULER, TRANSFORMER = diffusers.FlowMatchEulerDiscreteScheduler, diffusers.QwenImageTransformer2DModel
STOCK = {
    SCHEDULER: ("set_timesteps", "step", "set_begin_index", "scale_noise", "step_index", "begin_index", "_init_step_index"),
    TRANSFORMER: ("forward", "__call__", "cache_context", "is_cache_enabled"),
    transformer_qwenimage.QwenImageTransformerBlock: ("forward", "_modulate", "__call__"),
    transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0: ("__call__",),
    transformer_qwenimage.QwenEmbedRope: ("forward", "_compute_video_freqs", "rope_params"),
    diffusers.AutoencoderKLQwenImage: ("encode", "decode", "_encode", "_decode", "forward"),
    diffusers.QwenImagePipeline: (
        "__call__",
        "encode_prompt",
        "check_inputs",
        "prepare_latents",
        "_pack_latents",
        "interrupt",
        "progress_bar",
    ),
    QwenImageLoopDenoiser: ("__call__",),
    QwenImageDenoiseStep: ("__call__", "loop_step"),
    diffusers.ClassifierFreeGuidance: GUIDER,
    diffusers.image_processor.VaeImageProcessor: ("postprocess", "pt_to_numpy", "numpy_to_pil"),
    transformers.Qwen2_5_VLForConditionalGeneration: ("forward", "__call__"),
    nn.Linear: ("forward", "__call__", "_call_impl"),
    nn.LayerNorm: ("forward",),
    nn.ModuleList: ("forward", "__call__"),
}


@pytest.mark.parametrize(
    "cls",
    [*STOCK, *(ACCELERATED[cls] for cls in ACCELERATED if cls.__name__ in FAMILY)],
    ids=lambda cls: f"{cls.__module__}.{cls.__name__}",
)
def test_what_the_packages_define_is_their_own(cls):
    names = STOCK.get(cls) or STOCK[diffusers.QwenImagePipeline]
    assert foreign_methods(cls, names) == []
    for name in names:
        assert hasattr(cls, name) or cls is transformer_qwenimage.QwenEmbedRope, f"{name} is asked about for nothing"


def test_our_classes_in_stock_s_place_are_own():
    assert foreign_methods(model.QwenImageTransformer2DModel, STOCK[TRANSFORMER]) == []
    assert foreign_methods(block_module.QwenImageTransformerBlock, ("forward",)) == []


def wrapped(old):
    @functools.wraps(old)
    def call(*args, **kwargs):
        return old(*args, **kwargs)

    return call


class Callable:
    def __call__(self, *args, **kwargs):
        return None


FOREIGN = {
    "a wrapper": wrapped,
    "a wrapper that does not say what it wraps": lambda old: lambda *args, **kwargs: old(*args, **kwargs),
    "under torch's decorator": lambda old: torch.no_grad()(wrapped(old)),
    "a partial": lambda old: functools.partial(old),
    "a partial method": lambda old: functools.partialmethod(old),
    "a callable object": lambda old: Callable(),
    "a mock": lambda old: unittest.mock.MagicMock(wraps=old),
    "stock's of another class": lambda old: diffusers.FluxTransformer2DModel.forward,
    "stock's of another name": lambda old: TRANSFORMER.fuse_qkv_projections,
    "compiled": lambda old: torch.compile(old),
    "under autocast": lambda old: torch.autocast("cpu", torch.bfloat16)(old),
    "of another file by the same name": lambda old: types.FunctionType(
        wrapped(old).__code__, {}, closure=(types.CellType(old),)
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("cls, name", [(TRANSFORMER, "forward"), (SCHEDULER, "step"), (nn.Linear, "forward")])
def test_what_is_put_in_its_place_is_not(monkeypatch, cls, name, kind):
    monkeypatch.setattr(cls, name, FOREIGN[kind](getattr(cls, name)))
    assert foreign_methods(cls, (name,)) == [f"{cls.__name__}.{name}"]
    monkeypatch.undo()
    assert foreign_methods(cls, (name,)) == []


@pytest.mark.parametrize("cls", [model.QwenImageTransformer2DModel, model.STOCK])
def test_behind_our_class_and_on_it(monkeypatch, cls):
    monkeypatch.setattr(cls, "forward", wrapped(cls.forward))
    assert foreign_methods(model.QwenImageTransformer2DModel, ("forward",)) == ["QwenImageTransformer2DModel.forward"]


def test_harmless_decorators_are_none(monkeypatch):
    monkeypatch.setattr(SCHEDULER, "step", torch.no_grad()(SCHEDULER.step))
    assert foreign_methods(SCHEDULER, ("step",)) == []


def test_a_subclass_s_own_method_is_not_stock_s():
    class Mine(SCHEDULER):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    assert foreign_methods(Mine, ("step", "set_timesteps")) == ["Mine.step"]


def test_a_property_and_a_static_method(monkeypatch):
    pipeline = diffusers.QwenImagePipeline
    monkeypatch.setattr(pipeline, "interrupt", property(lambda self: False))
    monkeypatch.setattr(pipeline, "_pack_latents", staticmethod(lambda *args: None))
    found = foreign_methods(pipeline, ("interrupt", "_pack_latents", "_unpack_latents"))
    assert found == ["QwenImagePipeline.interrupt", "QwenImagePipeline._pack_latents"]


def test_attributes_of_an_object():
    scheduler = SCHEDULER()
    assert foreign_on(scheduler, ("step", "sigmas")) == ["FlowMatchEulerDiscreteScheduler.sigmas"]
    scheduler.step = scheduler.step  # what a removed hook leaves behind
    assert foreign_on(scheduler, ("step",)) == []
    scheduler.step = wrapped(SCHEDULER.step.__get__(scheduler))
    assert foreign_on(scheduler, ("step", "set_timesteps")) == ["FlowMatchEulerDiscreteScheduler.step"]
    scheduler.step = scheduler.set_timesteps
    assert foreign_on(scheduler, ("step",)) == ["FlowMatchEulerDiscreteScheduler.step"]
    del scheduler.step
    other = copy.copy(scheduler)
    other.step = scheduler.step  # bound to another
    assert foreign_on(other, ("step",)) == ["FlowMatchEulerDiscreteScheduler.step"]


def test_our_covers_of_methods_are_own():
    """`staged` puts them on the pipeline's objects while diffusers' own loop runs."""
    pipe = types.SimpleNamespace(scheduler=SCHEDULER(), vae=None, image_processor=unittest.mock.Mock())
    pipe.progress_bar = pipe.encode_prompt = len
    with staged(pipe):
        assert foreign_on(pipe.scheduler, ("set_timesteps",)) == []
    pipe.scheduler.set_timesteps = wrapped(pipe.scheduler.set_timesteps)
    with staged(pipe):
        assert foreign_on(pipe.scheduler, ("set_timesteps",)) == ["FlowMatchEulerDiscreteScheduler.set_timesteps"]


def test_functions_of_modules(monkeypatch):
    names = ("retrieve_timesteps", "calculate_shift", "randn_tensor", "not_there")
    assert foreign_functions(pipeline_qwenimage, names) == []
    monkeypatch.setattr(pipeline_qwenimage, "calculate_shift", wrapped(pipeline_qwenimage.calculate_shift))
    assert foreign_functions(pipeline_qwenimage, names) == ["pipeline_qwenimage.calculate_shift"]
    assert foreign_functions(F, ("scaled_dot_product_attention", "linear", "silu")) == []
    monkeypatch.setattr(F, "scaled_dot_product_attention", wrapped(F.scaled_dot_product_attention))
    monkeypatch.setattr(F, "linear", F.gelu)
    assert foreign_functions(F, ("scaled_dot_product_attention", "linear", "silu")) == [
        "functional.scaled_dot_product_attention",
        "functional.linear",
    ]


def test_what_was_replaced_before_the_import_is_seen():
    """A trainer patches the classes first, and imports this package when it comes to draw."""
    program = """
import diffusers
M, S = diffusers.QwenImageTransformer2DModel, diffusers.FlowMatchEulerDiscreteScheduler
old, step = M.forward, S.step
M.forward = lambda self, *args, **kwargs: old(self, *args, **kwargs)
S.step = lambda self, *args, **kwargs: step(self, *args, **kwargs)
from qwen_fast.common.own import foreign_methods
print(foreign_methods(M, ("forward", "__call__")), foreign_methods(S, ("step", "set_timesteps")))
"""
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["['QwenImageTransformer2DModel.forward']", "['FlowMatchEulerDiscreteScheduler.step']"]


def test_asking_keeps_nothing_alive(monkeypatch):
    """A replacement may hold a pipeline with all its weights."""
    held = nn.Linear(1, 1)
    gone = weakref.ref(held)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", lambda self, x, held=held: x)
        assert foreign_methods(nn.Linear, ("forward",))
    del held
    gc.collect()
    assert gone() is None


def test_asking_is_cheap():
    """About 1 us a name here; 20 leave room for a busy machine."""
    seconds = min(timeit.repeat(lambda: foreign_methods(TRANSFORMER, ("forward",)), number=100, repeat=5)) / 100
    assert seconds < 20e-6


OLDER_WRAPPER = """
def apply_forward_hook(method):
    def wrapper(self, *args, **kwargs):
        return method(self, *args, **kwargs)
    return wrapper
"""


def test_a_decorator_of_diffusers_that_does_not_say_what_it_wraps_is_looked_through(monkeypatch):
    """diffusers 0.38: encode and decode of the VAE."""
    scope = {}
    exec(compile(OLDER_WRAPPER, str(Path(diffusers.__file__).parent / "utils" / "accelerate_utils.py"), "exec"), scope)
    vae, own = diffusers.AutoencoderKLQwenImage, inspect.unwrap(diffusers.AutoencoderKLQwenImage.decode)
    monkeypatch.setattr(vae, "decode", scope["apply_forward_hook"](own))
    assert foreign_methods(vae, ("decode",)) == []
    monkeypatch.setattr(vae, "decode", scope["apply_forward_hook"](lambda self, z, return_dict=True: own(self, z)))
    assert foreign_methods(vae, ("decode",)) == ["AutoencoderKLQwenImage.decode"]
    # Somebody's of the same name, whose variables have names of their own.
    exec(compile(OLDER_WRAPPER.replace("method", "other"), __file__, "exec"), scope)
    monkeypatch.setattr(vae, "decode", scope["apply_forward_hook"](own))
    assert foreign_methods(vae, ("decode",)) == ["AutoencoderKLQwenImage.decode"]


def test_a_function_that_an_older_transformers_defines_by_another_name():
    scope = {}
    file = str(Path(transformers.__file__).parent / "masking_utils.py")
    exec(compile("def sdpa_mask_recent_torch(): pass\ndef other(): pass", file, "exec"), scope)
    assert is_own_function(scope["sdpa_mask_recent_torch"], "transformers", "sdpa_mask")
    assert not is_own_function(scope["other"], "transformers", "sdpa_mask")
    assert not is_own_function(scope["sdpa_mask_recent_torch"], "transformers", "other")
