"""Around the pipelines: schedulers that keep what users put on them, copies and pickles, prompts, gradients, early refusals."""

import copy
import pickle

import diffusers
import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

import qwen_fast
from qwen_fast.cli.generate import _destination
from qwen_fast.pipelines.opening import _lora_source
from qwen_fast.text.watch import EncoderWatch
from qwen_fast.transformer.call import ATTACHED
from qwen_fast.transformer.modulation import FromScheduledTable
from support.field import GUIDED, IMAGE_TO_IMAGE, INPAINT, SMALL, TEXT_TO_IMAGE, assert_same, draw, guided

EULER = diffusers.FlowMatchEulerDiscreteScheduler
CLASSES = pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINT], ids=["text", "img2img", "inpaint"])

# Schedulers


def weaken(scheduler):
    old = scheduler.step
    scheduler.step = lambda prediction, *args, **kwargs: old(prediction * 0.9, *args, **kwargs)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE])
def test_a_wrapper_that_came_after_enable_stays_after_disable(field, cls, drawn):
    """Also where our scheduler had taken the place of the user's, and the wrapper holds a method of ours."""
    theirs, ours = field.pipe(cls), qwen_fast.enable(field.pipe(cls))
    for pipe in (theirs, ours):
        weaken(pipe.scheduler)
    expected = draw(theirs, **guided(cls))
    if drawn:
        assert_same(draw(ours, **guided(cls)), expected)
    qwen_fast.disable(ours)
    assert type(ours.scheduler) is EULER and "step" in vars(ours.scheduler)
    assert torch.equal(draw(ours, **guided(cls)), expected)


def test_the_users_own_scheduler_comes_back(field):
    pipe = field.pipe(IMAGE_TO_IMAGE)
    own = pipe.scheduler
    with pytest.MonkeyPatch.context() as patch:
        qwen_fast.enable(pipe)
        assert pipe.scheduler is not own
        patch.setattr(EULER, "step", lambda self, *args, old=EULER.step, **kwargs: old(self, *args, **kwargs))
        draw(pipe, **guided(IMAGE_TO_IMAGE))
        assert pipe.scheduler is own, "our step goes around the one that was replaced"
    draw(pipe, **guided(IMAGE_TO_IMAGE))
    assert type(pipe.scheduler) is not EULER, "what was put back is stock's own again"
    assert pipe.fast_state.calls["cfg_euler_step"] == 3
    qwen_fast.disable(pipe)
    assert pipe.scheduler is own


def test_who_takes_the_steps(field):
    pipe = qwen_fast.enable(field.pipe())
    assert pipe.steps_itself() is None
    weaken(pipe.scheduler)
    assert "FlowMatchEulerDiscreteScheduler.step" in pipe.steps_itself()


@pytest.mark.parametrize("cls", [IMAGE_TO_IMAGE, INPAINT])
def test_a_timestep_that_the_scheduler_does_not_have_is_no_picture_of_nan(field, cls):
    """`get_timesteps` of one's own, between those of the schedule: computed for itself on the CPU, as in stock."""

    def between(pipe):
        old = pipe.get_timesteps

        def get_timesteps(*args, **kwargs):
            timesteps, steps = old(*args, **kwargs)
            return timesteps - 1.5, steps

        pipe.get_timesteps = get_timesteps
        return pipe

    expected = draw(between(field.pipe(cls)), **guided(cls))
    assert_same(draw(between(qwen_fast.enable(field.pipe(cls))), **guided(cls)), expected)


def test_a_row_that_is_not_there_raises_where_the_host_does_not_wait(field, monkeypatch):
    pipe = qwen_fast.enable(field.pipe(IMAGE_TO_IMAGE))
    monkeypatch.setattr("qwen_fast.pipelines.call.with_own_steps", lambda stock: None)  # a loop that is not known
    monkeypatch.setattr(FromScheduledTable, "begin", lambda self, _: setattr(self, "_found", torch.tensor(False)))
    with pytest.raises(RuntimeError, match="timestep that `pipe.scheduler.timesteps` does not hold.*modulation='layers'"):
        draw(pipe, **guided(IMAGE_TO_IMAGE))


def test_fewer_sigmas_than_timesteps_raise(field, monkeypatch):
    home = diffusers.pipelines.qwenimage.pipeline_qwenimage
    old = home.retrieve_timesteps

    def longer(*args, **kwargs):
        timesteps, steps = old(*args, **kwargs)
        return torch.cat([timesteps, timesteps[-1:]]), steps + 1

    monkeypatch.setattr(home, "retrieve_timesteps", longer)
    for pipe in (field.pipe(), qwen_fast.enable(field.pipe())):
        with pytest.raises(IndexError):
            draw(pipe, **GUIDED)


# Copies, pickles, other pipelines on the same parts


@CLASSES
def test_a_copy_is_accelerated_and_a_pickle_is_stocks(field, cls):
    pipe = qwen_fast.enable(field.pipe(cls))
    expected = draw(pipe, **guided(cls))
    for twin in (copy.copy(pipe), copy.deepcopy(pipe)):
        assert type(twin) is type(pipe) and qwen_fast.report(twin).enabled
        assert torch.equal(draw(twin, **guided(cls)), expected)
    read = pickle.loads(pickle.dumps(pipe))
    assert type(read) is cls and not qwen_fast.report(read).enabled
    for name, part in read.components.items():
        assert type(part).__module__.split(".")[0] != "qwen_fast", name
        for module in part.modules() if isinstance(part, nn.Module) else ():
            assert not any("qwen_fast" in key for key in vars(module)), type(module)
            assert type(module).__mro__[1].__module__.split(".")[0] != "qwen_fast", type(module)
    assert type(read.scheduler) is EULER and not any("qwen_fast" in key for key in vars(read.scheduler))
    assert_same(draw(read, **guided(cls)), expected)


def test_a_users_subclass_is_pickled_as_itself():
    twin = pickle.loads(pickle.dumps(Mine()))
    assert type(twin) is Mine


class Mine(qwen_fast.QwenImagePipeline):
    def __init__(self):
        pass


@pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE])
def test_from_pipe_of_an_enabled_pipeline(field, cls):
    """diffusers compares the exact types of the models."""
    pipe = qwen_fast.enable(field.pipe())
    other = cls.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is cls and other.transformer is pipe.transformer and other.vae is pipe.vae
    assert torch.equal(draw(other, **guided(cls)), draw(field.pipe(cls), **guided(cls))), "stock, to the bit"


# Gradients through what stock has under its torch.no_grad


@CLASSES
def test_gradients_through_the_wrapped_call(field, cls):
    def gradient(pipe):
        embeds = field.pipe().encode_prompt("a red circle")[0].detach().requires_grad_(True)
        arguments = guided(cls, prompt=None, prompt_embeds=embeds, negative_prompt=None)
        latents = type(pipe).__call__.__wrapped__(pipe, generator=torch.Generator().manual_seed(7), **arguments).images
        latents.square().mean().backward()
        return embeds.grad

    pipe = qwen_fast.enable(field.pipe(cls))
    assert_same(gradient(pipe), gradient(field.pipe(cls)), 1e-4)
    assert any("gradients" in reason for reason in qwen_fast.report(pipe).fallbacks)
    draw(pipe, **guided(cls))
    assert qwen_fast.report(pipe).calls, "the next call is fast again"


# Prompts


class FakeEncoder(nn.Module):
    """The parts of a text encoder that a watch reads, with tables as large as to be sampled."""

    __module__ = modeling_qwen2_5_vl.__name__  # whose functions are asked about

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = nn.Sequential(nn.Embedding(5000, 64), nn.Linear(1000, 1000))
        config = diffusers.configuration_utils.FrozenDict(_attn_implementation="eager", attention_dropout=0.0)
        self.config = type("Config", (), {"get_text_config": lambda self: self, "to_json_string": lambda self: "", **config})()

    def get_input_embeddings(self):
        return self.model.language_model[0]


def test_a_write_that_the_sample_misses_gives_another_name():
    encoder, watch = FakeEncoder().eval(), EncoderWatch()
    first, reason = watch.look(encoder)
    assert reason is None and watch.look(encoder)[0] == first
    with torch.no_grad():
        encoder.model.language_model[1].weight[500, 3] += 1
    second, _ = watch.look(encoder)
    assert second != first and watch.look(encoder)[0] == second
    encoder.to(torch.float32)
    assert EncoderWatch().look(encoder)[0] == first, "which a sample alone would take for the same"


def test_rows_of_the_embedding_are_known_one_by_one():
    encoder, watch = FakeEncoder().eval(), EncoderWatch()
    name, rows = watch.look(encoder)[0], watch.rows(encoder, [7, 3, 7])
    assert list(rows) == [3, 7] and len(set(watch.rows(encoder, range(5000)).values())) == 5000
    table = encoder.get_input_embeddings().weight
    with torch.no_grad():
        table[7, 60] *= 1.001
    assert watch.look(encoder)[0] == name, "other prompts stay in the cache"
    assert watch.rows(encoder, [3])[3] == rows[3] and watch.rows(encoder, [7])[7] != rows[7]
    with torch.no_grad():
        table.data[9] = table.data[8]
    assert watch.rows(encoder, [8])[8] == watch.rows(encoder, [9])[9]
    expected = watch.rows(encoder, range(5000))
    watch.keep_rows(encoder)
    assert watch.rows(None, range(5000)) == expected
    other = EncoderWatch()
    assert other.rows(encoder, [3]) == watch.rows(None, [3]), "the same in every process"
    encoder.to(torch.bfloat16)
    assert watch.rows(encoder, [3])[3] != expected[3]


def test_a_freed_encoder_still_tells_prompts_apart(field, tmp_path):
    """Prompts that another process encoded are found in the folder after the encoder has gone."""
    there = qwen_fast.enable(field.pipe(), prompt_cache=tmp_path)
    draw(there, **SMALL | {"prompt": "a dog"})
    pipe = qwen_fast.enable(field.pipe(), prompt_cache=tmp_path, text_encoder_mode="free")
    draw(pipe, **SMALL)
    assert pipe.text_encoder is None
    assert torch.equal(draw(pipe, **SMALL | {"prompt": "a dog"}), draw(there, **SMALL | {"prompt": "a dog"}))


def replaced_norm(patch):
    norm = modeling_qwen2_5_vl.Qwen2RMSNorm if hasattr(modeling_qwen2_5_vl, "Qwen2RMSNorm") else None
    norm = norm or type(next(m for m in ENCODER[0].modules() if "RMSNorm" in type(m).__name__))
    old = norm.forward
    patch.setattr(norm, "forward", lambda self, x: old(self, x) * 1.1)


def replaced_rotary(patch):
    names = ("apply_multimodal_rotary_pos_emb", "apply_rotary_pos_emb")
    name = next(name for name in names if hasattr(modeling_qwen2_5_vl, name))
    old = getattr(modeling_qwen2_5_vl, name)
    patch.setattr(modeling_qwen2_5_vl, name, lambda q, k, *args, **kwargs: tuple(x * 1.1 for x in old(q, k, *args, **kwargs)))


ENCODER = []


@pytest.mark.parametrize("replace", [replaced_norm, replaced_rotary])
def test_functions_of_the_text_encoder_that_were_replaced(field, replace):
    """Kernels of others are put into transformers' classes and modules; a prompt from before is not what they give."""
    theirs, ours = field.pipe(), qwen_fast.enable(field.pipe())
    ENCODER[:] = [theirs.text_encoder]
    plain = draw(ours, **GUIDED)
    with pytest.MonkeyPatch.context() as patch:
        replace(patch)
        expected = draw(theirs, **GUIDED)
        assert (expected - plain).abs().max() > 1e-3
        assert_same(draw(ours, **GUIDED), expected)
    assert torch.equal(draw(ours, **GUIDED), plain)


def test_a_mode_that_sees_every_call_sees_the_encoders(field):
    class Louder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result * 1.1 if function is torch.nn.functional.silu else result

    pipes = field.pipe(), qwen_fast.enable(field.pipe())
    for pipe in pipes:
        with torch.no_grad():
            pipe.encode_prompt("a cat")
    with Louder(), torch.no_grad():
        expected, actual = (pipe.encode_prompt("a cat")[0] for pipe in pipes)
    assert torch.equal(actual, expected)
    with torch.device("cpu"), torch.no_grad():  # a mode too, which changes nothing
        pipes[1].encode_prompt("a cat")
    assert qwen_fast.report(pipes[1]).prompt_cache["hits"] == 1


# Callbacks


def test_names_for_a_callback_are_checked_before_any_work(field, monkeypatch):
    ours = qwen_fast.enable(field.pipe(TEXT_TO_IMAGE))
    monkeypatch.setattr(ours.text_encoder, "forward", lambda *a, **k: pytest.fail("work was begun"))
    names = {"callback_on_step_end_tensor_inputs": ["latents", "nothing"], "callback_on_step_end": print}
    with pytest.raises(ValueError, match="names 'nothing', but the loop has nothing by that name"):
        draw(ours, **guided(TEXT_TO_IMAGE), **names)


# What can be known before weights load


def test_a_missing_lora_is_named_before_loading(tmp_path):
    with pytest.raises(FileNotFoundError, match="--lora styles/missing.safetensors: no such file"):
        _lora_source("styles/missing.safetensors", tmp_path)
    assert _lora_source("owner/repository", tmp_path) == ("owner/repository", {})
    assert _lora_source("owner/repo/a.safetensors", tmp_path) == ("owner/repo", {"weight_name": "a.safetensors"})


def test_a_place_that_cannot_be_written_is_named_before_loading(tmp_path, monkeypatch):
    assert _destination(str(tmp_path / "a" / "b"), 2, False) == (tmp_path / "a" / "b", None)
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--out .*nothing can be written in .*file"):
        _destination(str(tmp_path / "file" / "below"), 2, False)


def test_a_mistyped_option_is_named_before_loading(field, tmp_path):
    with pytest.raises(TypeError, match="`modulatoin`; did you mean `modulation`"):
        qwen_fast.QwenImagePipeline.from_pretrained(tmp_path, modulatoin="table")
    known = {"torch_dtype": torch.float32, "low_cpu_mem_usage": True, "local_files_only": True, "use_safetensors": True}
    assert qwen_fast.QwenImagePipeline.from_pretrained(field.checkpoint, strict=True, **known)


# Graphs


def test_graphs_that_nobody_wants_go(field):
    """And with the model's device all that is kept of sizes."""
    first = field.pipe()
    second = TEXT_TO_IMAGE(**first.components)
    for pipe in (first, second):
        qwen_fast.enable(pipe)
    attachment = vars(first.transformer)[ATTACHED]
    cpu = torch.device("cpu")
    attachment.graphs["a", cpu] = attachment.layouts["b", cpu] = object()
    qwen_fast.enable(first, cuda_graph=False)
    assert attachment.graphs, "the other pipeline wants them"
    qwen_fast.enable(second, cuda_graph=False)
    assert not attachment.graphs and attachment.layouts
    first.to("meta")
    assert not attachment.layouts
