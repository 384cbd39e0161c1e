"""`enable` changes one object, `disable` leaves no trace; img2img and inpaint; hooks, LoRA, saving, exceptions."""

import copy
import itertools

import accelerate.hooks
import diffusers
import diffusers.hooks
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.common.family import TEXT_TO_IMAGE
from qwen_fast.pipelines.family import ACCELERATED
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG as LIGHTNING
from support.pipelines import DTYPES, GUIDED, SMALL, assert_same_picture
from support.snapshots import EDITING, snapshot

PROMPT = {"prompt": "a red circle"}

CLASSES = [getattr(diffusers, name) for name in TEXT_TO_IMAGE]  # the others: test_family.py


@pytest.fixture
def pipe(checkpoint):
    return stock(checkpoint)


@pytest.mark.parametrize("cls", CLASSES)
def test_disable_leaves_no_trace(checkpoint, cls):
    pipe = stock(checkpoint, cls=cls)
    draw(pipe, **PROMPT, **GUIDED, **EDITING.get(cls, {}))  # a run of stock's leaves its own caches and hook registry
    before, class_dict = snapshot(pipe), dict(vars(cls))
    assert qwen_fast.enable(pipe) is pipe and qwen_fast.enable(pipe) is pipe
    assert type(pipe) is ACCELERATED[cls] and isinstance(pipe, cls)
    draw(pipe, **PROMPT, **GUIDED, **EDITING.get(cls, {}))
    assert qwen_fast.disable(pipe) is pipe and qwen_fast.disable(pipe) is pipe
    assert snapshot(pipe) == before and dict(vars(cls)) == class_dict
    assert not qwen_fast.report(pipe).enabled


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", EDITING)
def test_image_to_image_and_inpaint_equal_stock(checkpoint, cls, dtype):
    assert_same_picture(stock(checkpoint, dtype, cls), **PROMPT, **GUIDED, **EDITING[cls])


@pytest.mark.parametrize("cls", EDITING)
@pytest.mark.parametrize("arguments", [{"strength": 1.0}, {"sigmas": [1.0, 0.6, 0.2]}, {"num_images_per_prompt": 2}])
def test_arguments_of_the_editing_pipelines(checkpoint, cls, arguments):
    assert_same_picture(stock(checkpoint, cls=cls), **(PROMPT | GUIDED | EDITING[cls] | arguments))


@pytest.mark.parametrize("cls", EDITING)
def test_mixed_lengths_with_several_pictures_in_the_editing_pipelines(checkpoint, cls):
    pipe = stock(checkpoint, cls=cls)
    prompts = ["a red circle", "two green squares on a hill"]
    embeds, mask = qwen_fast.enable(pipe).encode_prompt(prompts, num_images_per_prompt=2)
    lengths = [qwen_fast.disable(pipe).encode_prompt(prompt)[0].shape[1] for prompt in prompts]
    assert mask.sum(1).tolist() == [lengths[0]] * 2 + [lengths[1]] * 2
    assert torch.equal(embeds[0], embeds[1]) and embeds[0, lengths[0] :].abs().sum() == 0


@pytest.mark.parametrize("cls", EDITING)
def test_scheduler_put_in_after_enable_is_adopted_and_given_back(checkpoint, cls):
    pipe, other = stock(checkpoint, cls=cls), stock(checkpoint, cls=cls)
    lightning = diffusers.FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING)
    other.scheduler = copy.deepcopy(lightning)
    qwen_fast.enable(pipe)
    pipe.scheduler = lightning
    assert_same_picture(other, pipe, **PROMPT, **GUIDED, **EDITING[cls])
    assert qwen_fast.disable(pipe).scheduler is lightning


def test_other_pipelines_and_classes_are_not_touched(checkpoint, pipe):
    neighbour = diffusers.QwenImageImg2ImgPipeline.from_pipe(pipe)
    before = snapshot(neighbour)
    qwen_fast.enable(neighbour)
    assert type(pipe) is diffusers.QwenImagePipeline and type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    assert pipe.scheduler is qwen_fast.disable(neighbour).scheduler and snapshot(neighbour) == before


class _Boom(Exception):
    pass


@pytest.mark.parametrize("cls", CLASSES)
def test_an_exception_in_a_run_leaves_nothing_behind(checkpoint, cls):
    pipe = stock(checkpoint, cls=cls)
    arguments = PROMPT | GUIDED | EDITING.get(cls, {})
    expected, before = draw(pipe, **arguments), snapshot(pipe)

    def fail(pipe, step, timestep, tensors):
        raise _Boom

    with pytest.raises(_Boom):
        draw(qwen_fast.enable(pipe), callback_on_step_end=fail, **arguments)
    assert_same_latents(draw(pipe, **arguments), expected)
    with pytest.raises(_Boom):
        draw(pipe, callback_on_step_end=fail, **arguments)
    assert snapshot(qwen_fast.disable(pipe)) == before
    assert torch.equal(draw(pipe, **arguments), expected)


class _CountingHook:
    """A hook that counts the forwards of a module, as accelerate or as diffusers attaches one."""

    def __init__(self) -> None:
        self.calls = 0

    def counting(self, base: type):
        outer = self

        class Count(base):
            def pre_forward(self, module, *args, **kwargs):
                outer.calls += 1
                return args, kwargs

        return Count()


class _AccelerateHook(_CountingHook):
    def add(self, module):
        accelerate.hooks.add_hook_to_module(module, self.counting(accelerate.hooks.ModelHook))

    def remove(self, module):
        accelerate.hooks.remove_hook_from_module(module)


class _DiffusersHook(_CountingHook):
    def add(self, module):
        registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(module)
        registry.register_hook(self.counting(diffusers.hooks.ModelHook), "count")

    def remove(self, module):
        diffusers.hooks.HookRegistry.check_if_exists_or_initialize(module).remove_hook("count")


@pytest.mark.parametrize("kind", [_AccelerateHook, _DiffusersHook])
@pytest.mark.parametrize(("added_before", "removed_before"), list(itertools.product([True, False], repeat=2)))
def test_hooks_in_every_order(checkpoint, kind, added_before, removed_before):
    control, pipe, hook = stock(checkpoint), stock(checkpoint), kind()
    expected = draw(control, **PROMPT, **GUIDED)
    hook.add(control.transformer)
    hook.remove(control.transformer)

    steps = [lambda: hook.add(pipe.transformer), lambda: qwen_fast.enable(pipe)]
    for step in steps if added_before else reversed(steps):
        step()
    assert_same_latents(draw(pipe, **PROMPT, **GUIDED), expected)
    # What is not known is called as stock calls it: with the prompt, and without.
    assert hook.calls == 8 and qwen_fast.report(pipe).calls["transformer"] == 8
    assert len(qwen_fast.report(pipe).fallbacks) == 1
    steps = [lambda: hook.remove(pipe.transformer), lambda: qwen_fast.disable(pipe)]
    for step in steps if removed_before else reversed(steps):
        step()
    assert torch.equal(draw(pipe, **PROMPT, **GUIDED), expected) and hook.calls == 8
    assert snapshot(pipe)["dicts"] == snapshot(control)["dicts"]


def test_first_block_cache_and_layerwise_casting_keep_working(checkpoint):
    from diffusers import FirstBlockCacheConfig

    pipe = stock(checkpoint)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    assert_same_picture(pipe, **PROMPT, **GUIDED)


def test_a_lora_fused_meanwhile_stays(checkpoint, pipe):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k"], init_lora_weights=False)

    def with_lora(pipe):
        torch.manual_seed(3)
        pipe.transformer.add_adapter(config, adapter_name="style")
        return pipe

    expected_pipe = with_lora(stock(checkpoint))
    qwen_fast.enable(pipe)
    plain = draw(pipe, **PROMPT, **GUIDED)
    with_lora(pipe)
    assert_same_picture(expected_pipe, pipe, **PROMPT, **GUIDED)
    expected_pipe.fuse_lora(adapter_names=["style"])
    pipe.fuse_lora(adapter_names=["style"])
    assert_same_picture(expected_pipe, pipe, **PROMPT, **GUIDED)
    fused = draw(qwen_fast.disable(pipe), **PROMPT, **GUIDED)
    assert torch.equal(fused, draw(expected_pipe, **PROMPT, **GUIDED)) and not torch.equal(fused, plain)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_saved_pipeline_loads_in_stock_bit_equal(checkpoint, cls, tmp_path):
    pipe = stock(checkpoint, cls=cls)
    arguments = PROMPT | GUIDED | EDITING.get(cls, {})
    qwen_fast.enable(pipe).save_pretrained(tmp_path / "fast")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "fast")
    again.set_progress_bar_config(disable=True)
    assert type(again) is cls and type(again.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    qwen_fast.disable(pipe).save_pretrained(tmp_path / "stock")
    for file in sorted(p for p in (tmp_path / "stock").rglob("*") if p.is_file()):
        assert file.read_bytes() == (tmp_path / "fast" / file.relative_to(tmp_path / "stock")).read_bytes(), file
    assert torch.equal(draw(again, **arguments), draw(pipe, **arguments))


def test_deepcopy_of_an_enabled_pipeline_is_independent(pipe):
    twin = copy.deepcopy(qwen_fast.enable(pipe))
    draw(twin, **PROMPT, **SMALL)
    assert qwen_fast.report(twin).calls and not qwen_fast.report(pipe).calls


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: diffusers.UniPCMultistepScheduler.from_config(c, use_flow_sigmas=True), "UniPCMultistepScheduler"),
        (
            lambda c: diffusers.FlowMatchEulerDiscreteScheduler.from_config(c, stochastic_sampling=True),
            "stochastic_sampling",
        ),
    ],
)
def test_other_samplers_step_as_in_stock_and_are_named(pipe, caplog, change, reason):
    """The fused transformer stays, and on the CPU the latents within 2e-6 of the largest."""
    pipe.scheduler = change(dict(LIGHTNING))

    def attempt():
        torch.manual_seed(0)
        try:
            return draw(pipe, **PROMPT, **GUIDED)
        except Exception as error:  # a scheduler that stock cannot use either
            return error

    expected = attempt()
    qwen_fast.enable(pipe)
    actual = attempt()
    assert any(reason in text for text in qwen_fast.report(pipe).fallbacks) and reason in caplog.text
    if isinstance(expected, Exception):
        assert type(actual) is type(expected) and str(actual) == str(expected)
    else:
        assert (actual - expected).abs().max() <= 2e-6 * expected.abs().max()
        calls = qwen_fast.report(pipe).calls
        assert calls["packed transformer"] == 4 and "cfg_euler_step" not in calls
    with pytest.raises(RuntimeError, match=reason):
        draw(qwen_fast.enable(pipe, strict=True), **PROMPT, **GUIDED)


def test_report_reads_well(pipe):
    assert "is not accelerated" in str(qwen_fast.report(pipe))
    draw(qwen_fast.enable(pipe), **PROMPT, **GUIDED)
    report = qwen_fast.report(pipe)
    assert report.calls == {"text encoder": 2, "flow_match_schedule": 1, "packed transformer": 4, "cfg_euler_step": 4}
    assert report.fallbacks == {} and report.memory["transformer"] > 10**6
    assert report.memory["modulation tables"] == 0, "of weights on the device none is kept"
    for text in ("11 fast calls, 0 on stock", "4 x cfg_euler_step", "lossy:     nothing", "MiB transformer", "fused blocks"):
        assert text in str(report), text
    assert "no CUDA graph: the device is cpu" in str(report)


@pytest.mark.parametrize("cls", CLASSES)
def test_an_enable_that_fails_leaves_the_pipeline_as_it_was(checkpoint, monkeypatch, cls):
    pipe = stock(checkpoint, cls=cls)
    before = snapshot(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(ACCELERATED[cls], "install_vae", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            qwen_fast.enable(pipe)
        assert snapshot(pipe) == before and not qwen_fast.report(pipe).enabled
    qwen_fast.enable(pipe, strict=True)
    scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="`prompt_cache`"):
        qwen_fast.enable(pipe, prompt_cache="/dev/null/nowhere")
    assert pipe.fast_state.options.strict and pipe.scheduler is scheduler and qwen_fast.report(pipe).enabled
    assert snapshot(qwen_fast.disable(pipe)) == before


@pytest.mark.parametrize("cls", CLASSES)
def test_what_the_type_of_an_enabled_pipeline_makes_is_enabled(checkpoint, cls):
    arguments = GUIDED | {"prompt": "a red circle"} | EDITING.get(cls, {})
    pipe = stock(checkpoint, cls=cls)
    expected = draw(pipe, **arguments)
    qwen_fast.enable(pipe)
    twin = type(pipe)(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    assert qwen_fast.report(twin).enabled
    assert_same_latents(draw(twin, **arguments), expected)
    qwen_fast.disable(pipe)
    assert_same_latents(draw(twin, **arguments), expected)


def test_parts_alone_are_told_what_is_for_them(checkpoint):
    pipe = stock(checkpoint)
    with pytest.raises(ValueError, match="a transformer alone is fused as a qwen_fast.QwenImageTransformer2DModel"):
        qwen_fast.enable(pipe.transformer)
    with pytest.raises(ValueError, match="for a VAE alone there is qwen_fast.enable_vae"):
        qwen_fast.enable(pipe.vae)
    with pytest.raises(TypeError, match="`pipe` is a AutoencoderKLQwenImage, not a pipeline; .* qwen_fast.disable_vae"):
        qwen_fast.disable(pipe.vae)
    with pytest.raises(TypeError, match="`pipe` is a object, not a pipeline"):
        qwen_fast.disable(object())
    assert qwen_fast.disable(pipe) is pipe, "a pipeline that is not enabled is left as it is"
