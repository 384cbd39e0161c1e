"""What people do between two steps, computed or replayed by the stand-in for a CUDA graph, and what it leaves behind."""

import copy
import functools
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import diffusers
import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from test_field_callbacks import lora, type_of

import qwen_fast
from denoise import conftest
from qwen_fast.pipelines.base import AcceleratedPipeline
from support.field import GUIDED, IMAGE_TO_IMAGE, INPAINT, TEXT_TO_IMAGE, assert_same, assert_same_calls, draw, guided

captures, pytestmark = conftest.captures, pytest.mark.usefixtures("captures")
CLASSES = pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE, INPAINT], ids=["text", "image", "inpaint"])
HOW = pytest.mark.parametrize("how", ["eager", "graph"])
SCALED = {"attention_kwargs": {"scale": 0.5}}
Scheduler = diffusers.FlowMatchEulerDiscreteScheduler


def calling(callback, step=0, inputs=("latents",), again=True, **arguments):
    """A call whose callback does something after one step (None: after each), and a call without it."""

    def act(run):
        def called(pipe, index, timestep, tensors):
            return (callback(run, tensors) if step in (None, index) else None) or {}

        given = {"callback_on_step_end": called, "callback_on_step_end_tensor_inputs": list(inputs)}
        found = [draw(run.pipe, **guided(type_of(run), **given, **arguments))]
        return [*found, draw(run.pipe, **guided(type_of(run)))] if again else found

    return act


def plain(run):
    return draw(run.pipe, **guided(type_of(run)))


def as_stock(field, act, cls=TEXT_TO_IMAGE, how="eager", setup=None, tolerance=2e-6, **options):
    """Stock's pictures and calls of the user's code; in mode "graph" the enabled pipeline has captured its step before."""
    with field.run(cls) as run:
        if setup is not None:
            setup(run)
        expected, seen = act(run), run.seen
    with field.run(cls) as run:
        qwen_fast.enable(run.pipe, cuda_graph=how == "graph", **options)
        for _ in range(2 if how == "graph" else 1):
            plain(run)
        if setup is not None:
            setup(run)
        assert_same(act(run), expected, tolerance)
        assert_same_calls(run.seen, seen)
        qwen_fast.disable(run.pipe)
        assert type(run.pipe) is cls


def another(pipe):
    other = TEXT_TO_IMAGE(**pipe.components | {"scheduler": Scheduler.from_config(pipe.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    return other


def swaps_adapters(run, tensors):
    run.pipe.unload_lora_weights()
    lora(run)


def switches_off(run, tensors):
    if qwen_fast.report(run.pipe).enabled:
        qwen_fast.disable(run.pipe)


def switches_on_again(run, tensors):
    if qwen_fast.report(run.pipe).enabled:
        qwen_fast.enable(qwen_fast.disable(run.pipe))


ADAPTERS = {
    "set": lambda run, tensors: run.pipe.set_adapters(["a"], [0.3]),
    "fused": lambda run, tensors: run.pipe.fuse_lora(),
    "unloaded": lambda run, tensors: run.pipe.unload_lora_weights(),
    "swapped": swaps_adapters,
    "of another pipeline": lambda run, tensors: {"latents": tensors["latents"] + 0.1 * draw(another(run.pipe), 3, **guided())},
    "without scale": lambda run, tensors: setattr(run.pipe, "_attention_kwargs", None),
    "off": switches_off,
}


@pytest.mark.parametrize("arguments", [SCALED, {}], ids=["scaled", "plain"])
@pytest.mark.parametrize("callback", ADAPTERS.values(), ids=ADAPTERS)
@HOW
def test_a_callback_finds_lora_layers_as_in_stock(field, callback, how, arguments):
    as_stock(field, calling(callback, **arguments), IMAGE_TO_IMAGE, how, lora)


def replaced(name, model):
    owner, last = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    setattr(owner, last, torch.nn.Parameter(getattr(owner, last).detach() * 0.8))


def in_place(name, model):
    with torch.no_grad():
        model.get_parameter(name).mul_(0.8)


BLOCK = "transformer_blocks.0."
WEIGHTS = ["txt_norm.weight", "txt_in.weight", "img_in.weight", "proj_out.weight", "norm_out.linear.weight"]
WEIGHTS += [BLOCK + name for name in ("attn.norm_q.weight", "attn.norm_added_k.weight", "img_mod.1.weight", "attn.to_q.weight")]
EDITS = {f"{name} {edit.__name__}": functools.partial(edit, name) for name in WEIGHTS for edit in (in_place, replaced)} | {
    "rotary table": lambda model: model.pos_embed.pos_freqs.mul_(torch.tensor(0.9 + 0.1j)),
    "rotary form": lambda model: setattr(model.pos_embed, "scale_rope", False),
    "times": lambda model: setattr(model.time_text_embed.time_proj, "scale", 300),
    "eps": lambda model: setattr(model.norm_out.norm, "eps", 0.5),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@HOW
def test_a_callback_edits_the_model(field, edit, how):
    as_stock(field, calling(lambda run, tensors: (edit(run.transformer), None)[1], again=False), how=how)


@pytest.mark.parametrize("name", ["encode_prompt", "prepare_latents"])
@pytest.mark.parametrize("change", [lora, lambda run: run.transformer.register_forward_hook(lambda m, a, o: (o[0] * 0.5,))])
def test_the_pipelines_methods_change_the_model_before_the_first_step(field, name, change):
    def setup(run):
        old, called = getattr(run.pipe, name), []

        def method(*args, **kwargs):
            if not called:
                change(run)
            called.append(name)
            return old(*args, **kwargs)

        run.patch.setattr(run.pipe, name, method)

    as_stock(field, plain, setup=setup)


@CLASSES
def test_a_wrapped_step_calls_the_transformer(field, cls):
    def setup(run):
        old, pipe = run.pipe.scheduler.step, run.pipe
        text = torch.randn(1, 5, pipe.transformer.config.joint_attention_dim, generator=torch.Generator().manual_seed(1))

        def step(prediction, t, latents, **kwargs):
            given = {"encoder_hidden_states": text, "encoder_hidden_states_mask": None, "img_shapes": [[(1, 4, 6)]]}
            other = pipe.transformer(hidden_states=latents, timestep=t.reshape(1) / 2000, return_dict=False, **given)[0]
            return old(prediction + 0.3 * other, t, latents, **kwargs)

        run.patch.setattr(run.pipe.scheduler, "step", step)

    as_stock(field, plain, cls, setup=setup)


def test_the_class_of_the_transformer_is_called_through_a_wrapper(field):
    def setup(run):
        def call(self, *args, **kwargs):
            kwargs["timestep"] = kwargs["timestep"] * 0.5
            return torch.nn.Module.__call__(self, *args, **kwargs)

        run.patch.setattr(transformer_qwenimage.QwenImageTransformer2DModel, "__call__", call, raising=False)

    as_stock(field, plain, setup=setup)


@HOW
def test_gradients_are_switched_on_by_a_callback(field, how):
    as_stock(field, calling(lambda run, tensors: (torch.set_grad_enabled(True), None)[1], again=False), how=how)


def test_autocast_hands_over_what_stock_does(field):
    def setup(run):
        run.transformer.register_forward_pre_hook(lambda m, a, k: run.note("forward", **k), with_kwargs=True)

    as_stock(field, torch.autocast("cpu", torch.bfloat16)(plain), setup=setup, tolerance=5e-2)


SCHEDULES = {
    "timesteps cloned": lambda s: setattr(s, "timesteps", s.timesteps.clone()),
    "other timesteps": lambda s: setattr(s, "timesteps", s.timesteps * 0.9),
    "timesteps in place": lambda s: s.timesteps.mul_(0.9),
    "sigmas in place": lambda s: s.sigmas.mul_(0.9),
    "other sigmas": lambda s: setattr(s, "sigmas", s.sigmas * 0.9),
    "sigmas in half": lambda s: setattr(s, "sigmas", s.sigmas.half()),
    "sigmas in double": lambda s: setattr(s, "sigmas", s.sigmas.double()),
    "sigmas with gaps": lambda s: setattr(s, "sigmas", torch.stack([s.sigmas] * 2, 1)[:, 0]),
    "a list of sigmas": lambda s: setattr(s, "sigmas", s.sigmas.tolist()),
    "no timesteps": lambda s: setattr(s, "timesteps", None),
    "the index again": lambda s: setattr(s, "_step_index", 0),
    "no index": lambda s: setattr(s, "_step_index", None),
    "stochastic": lambda s: torch.manual_seed(0) and s.register_to_config(stochastic_sampling=True),
}


@pytest.mark.parametrize("change", SCHEDULES.values(), ids=SCHEDULES)
@HOW
def test_a_callback_edits_the_schedule(field, change, how):
    as_stock(field, calling(lambda run, tensors: (change(run.pipe.scheduler), None)[1], again=False), how=how)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_scheduler_that_was_copied_in_a_callback_serves_alone(field, copied):
    as_stock(field, calling(lambda run, tensors: setattr(run.pipe, "scheduler", copied(run.pipe.scheduler))), IMAGE_TO_IMAGE)


@pytest.mark.parametrize("what", ["timesteps", "embeddings"])
@HOW
def test_edits_in_inference_mode(field, what, how):
    kept = []

    def setup(run):
        old = run.pipe.encode_prompt
        run.patch.setattr(run.pipe, "encode_prompt", lambda *a, **k: kept.append(old(*a, **k)) or kept[-1])

    def edits(run, tensors):
        (run.pipe.scheduler.timesteps if what == "timesteps" else kept[-2][0])[..., ::2].mul_(0.5)

    as_stock(field, torch.inference_mode()(calling(edits, again=False)), how=how, setup=setup)


@pytest.mark.parametrize("callback", [switches_off, switches_on_again])
@HOW
@CLASSES
def test_a_callback_switches(field, callback, how, cls):
    as_stock(field, calling(callback), cls, how)


PATCHED = {"encode_prompt": None, "progress_bar": None, "decode": "vae", "set_timesteps": "scheduler"}


@pytest.mark.parametrize(("name", "part"), PATCHED.items())
def test_what_a_callback_patches_stays(field, name, part):
    def patches(run, tensors):
        owner = run.pipe if part is None else getattr(run.pipe, part)
        old = getattr(owner, name)
        run.mine = functools.wraps(old)(lambda *args, **kwargs: (run.note(name), old(*args, **kwargs))[1])
        vars(owner)[name] = run.mine

    def act(run):
        found = calling(patches)(run)
        run.note("kept", vars(run.pipe if part is None else getattr(run.pipe, part)).get(name) is run.mine)
        return found

    as_stock(field, act)


def test_a_pipeline_that_was_copied_in_a_callback_is_its_own(field):
    def act(run):
        made = []
        found = calling(lambda run, tensors: made.append(copy.deepcopy(run.pipe)))(run)
        for owner, name in ((run.pipe, "encode_prompt"), (run.pipe.vae, "decode"), (run.pipe.scheduler, "set_timesteps")):
            run.patch.setattr(owner, name, mock.Mock(side_effect=AssertionError("the original's")))
        return [*found, draw(made[0], **guided())]

    as_stock(field, act)


def test_threads_leave_nothing_on_a_vae_that_they_share(field):
    first = qwen_fast.enable(field.pipe())
    pipes = [first, qwen_fast.enable(another(first)), qwen_fast.enable(another(first))]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda n: [draw(pipes[n], **guided()) for _ in range(4 + n)], range(3)))
    assert not {"encode", "decode"} & vars(first.vae).keys()


KEPT = {"__call__": GUIDED, "encode_prompt": {"prompt": "a"}, "to": {"device": "cpu"}}


@pytest.mark.parametrize(("name", "arguments"), KEPT.items())
def test_a_bound_method_that_somebody_kept_outlives_disable(field, name, arguments):
    with field.run() as run:
        kept = getattr(qwen_fast.enable(run.pipe), name)
        qwen_fast.disable(run.pipe)
        kept(**arguments)


@CLASSES
@pytest.mark.parametrize("make", [lambda p: type(p)(**p.components), lambda p: type(p).from_pipe(p)], ids=["type", "from_pipe"])
def test_another_pipeline_of_the_enabled_ones_type(field, cls, make):
    def act(run):
        other = make(run.pipe)
        other.set_progress_bar_config(disable=True)
        return [draw(other, **guided(cls)), plain(run)]

    as_stock(field, act, cls)


def test_no_scheduler_of_ours_is_left_with_others(field):
    pipe = qwen_fast.enable(field.pipe())
    shares, derived = qwen_fast.enable(TEXT_TO_IMAGE(**pipe.components)), IMAGE_TO_IMAGE.from_pipe(pipe)
    found = [type(pipe.scheduler).from_config(pipe.scheduler.config)]
    found += [qwen_fast.disable(one).scheduler for one in (pipe, shares)] + [derived.scheduler]
    assert [type(one) is Scheduler for one in found] == [True] * 4


@pytest.mark.parametrize("name", ["install_transformer", "install_vae", "install_scheduler"])
def test_enable_that_raises_leaves_the_pipeline_as_it_was(field, name):
    pipe = field.pipe()
    before, failing = set(vars(pipe)), mock.patch.object(AcceleratedPipeline, name, side_effect=RuntimeError("no memory"))
    with failing, pytest.raises(RuntimeError, match="no memory"):
        qwen_fast.enable(pipe)
    assert type(pipe) is TEXT_TO_IMAGE and set(vars(pipe)) == before
    assert type(pipe.transformer) is diffusers.QwenImageTransformer2DModel and type(pipe.scheduler) is Scheduler


@pytest.mark.parametrize("options", [{}, {"check_nan": True}], ids=["plain", "check_nan"])
@CLASSES
def test_a_callback_drops_a_sample(field, cls, options):
    def drops(run, tensors):
        return {name: tensor[:1] for name, tensor in tensors.items()}

    prompts = {"prompt": ["a red circle"] * 2, "negative_prompt": None}
    as_stock(field, calling(drops, inputs=("latents", "prompt_embeds"), **prompts), cls, **options)


@pytest.mark.parametrize("change", [torch.Tensor.double, torch.Tensor.bfloat16, lambda latents: latents[:, :12]])
@HOW
def test_latents_that_stock_refuses(field, change, how):
    with field.run() as run:
        qwen_fast.enable(run.pipe, cuda_graph=how == "graph")
        plain(run)
        with pytest.raises((RuntimeError, ValueError)):
            calling(lambda run, tensors: {"latents": change(tensors["latents"])}, again=False)(run)


@pytest.mark.parametrize(
    "change",
    [lambda x: x.mT.contiguous().mT, lambda x: x.flip(1), torch.nn.Parameter],
    ids=["strided", "flipped", "a parameter"],
)
@HOW
@CLASSES
def test_latents_that_stock_takes(field, change, how, cls):
    as_stock(field, calling(lambda run, tensors: {"latents": change(tensors["latents"])}, None), cls, how)
