"""Modular pipelines draw what stock's draw, with our steps in their loops, and are diffusers' own again behind `disable`."""

import copy
import pickle

import diffusers
import pytest
import torch

import qwen_fast
from qwen_fast.common.family import MODULAR
from qwen_fast.pipelines.family import ACCELERATED
from support.modular import WORKFLOWS, assert_near, blocks_of, loop_of, silence, small_references
from support.snapshots import snapshot

EACH = pytest.mark.parametrize("name", WORKFLOWS)
TEXT = WORKFLOWS["text"]


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


def everything(pipe) -> dict:
    """What a pipeline is, and its tree of blocks."""
    blocks = [(id(one), type(one), dict(vars(one))) for one in blocks_of(pipe._blocks)]
    return snapshot(pipe) | {"blocks": blocks, "names": set(vars(pipe))}


@EACH
def test_the_latents_are_stocks_and_all_of_it_is_fast(checkpoint, name):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint)
    expected = workflow.draw(pipe)
    before = everything(pipe)
    qwen_fast.enable(pipe, strict=True)
    assert type(pipe) is ACCELERATED[before["class"]] and type(pipe).__name__ == before["class"].__name__
    for _ in range(2):
        assert_near(workflow.draw(pipe), expected)
    report = qwen_fast.report(pipe)
    taken = report.calls["packed transformer"]
    assert taken == report.calls["cfg_euler_step"] >= 4 and report.calls["flow_match_schedule"] == 2
    assert "transformer" not in report.calls and pipe.fast_state.no_table is None and not report.fallbacks
    assert "denoising loops of blocks" in report.replaced and str(report)
    qwen_fast.disable(pipe)
    assert everything(pipe) == before and torch.equal(workflow.draw(pipe), expected)


def test_all_are_there():
    assert {stock.__name__ for stock in ACCELERATED if "Modular" in stock.__name__} == set(MODULAR)


@pytest.mark.parametrize("name", ["text", "controlnet", "edit plus 2511", "layered"])
@pytest.mark.parametrize(
    "options", [{"modulation": "layers"}, {"precise_sampler": True, "check_nan": True}, {"attention": "diffusers"}], ids=str
)
def test_options(checkpoint, name, options):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint)
    expected = workflow.draw(pipe)
    assert_near(workflow.draw(qwen_fast.enable(pipe, **options)), expected)
    if "check_nan" in options:
        assert pipe.fast_state.nan_note == "all finite"


def test_nan_is_named_by_its_step(checkpoint):
    pipe = qwen_fast.enable(TEXT.pipe(checkpoint), check_nan=True)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    assert TEXT.draw(pipe).isnan().all()
    assert "not finite after step 0 of 0 to 2" in pipe.fast_state.nan_note


@pytest.mark.parametrize("name", ["text", "inpaint", "edit"])
def test_halves_are_as_near_to_fp32_as_stocks(checkpoint, name):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint, torch.bfloat16)
    wide = copy.deepcopy(pipe)
    for part in wide.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float32)
    exact, expected = workflow.draw(wide), workflow.draw(pipe).float()
    actual = workflow.draw(qwen_fast.enable(pipe))
    assert actual.dtype == torch.bfloat16
    ours, theirs = ((one - exact).square().mean().sqrt() for one in (actual.float(), expected))
    assert 0 < theirs and ours <= 1.5 * theirs, (ours, theirs)


@EACH
def test_without_a_negative_prompt(checkpoint, name):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint)
    expected = workflow.draw(pipe, negative_prompt=None)
    assert_near(workflow.draw(qwen_fast.enable(pipe, strict=True), negative_prompt=None), expected)
    assert pipe.fast_state.calls["cfg_euler_step"]


@EACH
def test_without_guidance(checkpoint, name):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint, guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0))
    expected = workflow.draw(pipe)
    assert_near(workflow.draw(qwen_fast.enable(pipe, strict=True)), expected)
    assert pipe.fast_state.calls["transformer"] == pipe.fast_state.calls["euler_step"] >= 2


@pytest.mark.parametrize("name", ["text", "image", "controlnet"])
def test_prompts_of_different_lengths_with_several_pictures_each(checkpoint, name):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint)
    several = {"prompt": ["a red circle", "a much longer prompt about two blue squares"], "num_images_per_prompt": 2}
    several["negative_prompt"] = ["x", "y"]
    expected = workflow.draw(pipe, **several)
    assert len(expected) == 4
    assert_near(workflow.draw(qwen_fast.enable(pipe, strict=True), **several), expected)


def test_all_kinds_of_output(checkpoint):
    pipe = TEXT.pipe(checkpoint)
    both = {"output": ["latents", "images"], "output_type": "pt"}
    expected = TEXT.draw(pipe, **both)
    qwen_fast.enable(pipe)
    actual, state = TEXT.draw(pipe, **both), TEXT.draw(pipe, output=None, output_type="pt")
    assert_near(actual["latents"], expected["latents"])
    assert torch.equal(state.get("latents"), actual["latents"]) and set(state.to_dict()["values"]) > {"timesteps", "latents"}
    for images in (actual["images"], state.get("images")):
        assert_near(images, expected["images"], 1e-5)


def test_a_lora_with_a_scale(checkpoint):
    from peft import LoraConfig

    pipe = TEXT.pipe(checkpoint)
    plain = TEXT.draw(pipe)
    torch.manual_seed(1)
    targets = ["to_q", "add_v_proj", "to_out.0", "img_mod.1", "proj_out"]
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False), adapter_name="a")
    halved, full = TEXT.draw(pipe, attention_kwargs={"scale": 0.5}), TEXT.draw(pipe)
    qwen_fast.enable(pipe, strict=True)
    for scale, expected in ((0.5, halved), (1.0, full), (0.5, halved)):
        assert_near(TEXT.draw(pipe, attention_kwargs={"scale": scale}), expected)
    pipe.transformer.delete_adapters("a")
    assert_near(TEXT.draw(pipe), plain)


def test_a_lora_with_a_scale_and_a_guider_that_asks_one_by_one(checkpoint):
    from peft import LoraConfig

    pipe = TEXT.pipe(checkpoint, guider=diffusers.ClassifierFreeGuidance(3.0, guidance_rescale=0.5))
    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    expected = TEXT.draw(pipe, attention_kwargs={"scale": 0.5})
    assert_near(TEXT.draw(qwen_fast.enable(pipe), attention_kwargs={"scale": 0.5}), expected)


def test_enabled_before_there_are_components(checkpoint):
    complete = TEXT.pipe(checkpoint)
    expected = TEXT.draw(complete)
    pipe = qwen_fast.enable(diffusers.QwenImageAutoBlocks().init_pipeline(), strict=True)
    silence(pipe)
    assert qwen_fast.report(pipe).enabled and pipe.null_component_names
    pipe.update_components(**{name: part for name, part in complete.components.items() if part is not None})
    assert_near(TEXT.draw(pipe), expected)
    assert pipe.fast_state.calls["cfg_euler_step"] == 3
    qwen_fast.disable(pipe)
    assert type(pipe.transformer) is diffusers.QwenImageTransformer2DModel and torch.equal(TEXT.draw(pipe), expected)


def test_components_that_are_replaced(checkpoint):
    pipe, other = TEXT.pipe(checkpoint), TEXT.pipe(checkpoint)
    for part in (other.transformer, other.vae):
        with torch.no_grad():
            for weight in part.parameters():
                weight.mul_(1.01)
    other.update_components(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0))
    other.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0))
    expected = TEXT.draw(other)
    qwen_fast.enable(pipe, strict=True)
    TEXT.draw(pipe)
    replaced, parts = pipe.transformer, ("transformer", "vae", "scheduler", "guider")
    pipe.update_components(**{name: getattr(other, name) for name in parts})
    assert_near(TEXT.draw(pipe), expected)
    assert type(replaced) is diffusers.QwenImageTransformer2DModel
    scheduler = other.scheduler
    qwen_fast.disable(pipe)
    assert pipe.scheduler is scheduler and type(scheduler) is diffusers.FlowMatchEulerDiscreteScheduler


def test_behind_a_call_that_fails(checkpoint):
    pipe = TEXT.pipe(checkpoint)
    expected = TEXT.draw(pipe)
    before = everything(pipe)
    qwen_fast.enable(pipe)
    enabled = everything(pipe)
    for part, name in ((pipe.transformer, "forward"), (pipe.text_encoder, "forward"), (pipe.vae, "decode")):
        setattr(part, name, lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            TEXT.draw(pipe)
        delattr(part, name)
        assert everything(pipe) == enabled and pipe.fast_state.device is None
        assert_near(TEXT.draw(pipe), expected)
    qwen_fast.disable(pipe)
    assert everything(pipe) == before


def test_a_failing_enable_leaves_it_as_it_was(checkpoint, monkeypatch):
    pipe = TEXT.pipe(checkpoint)
    before = everything(pipe)
    monkeypatch.setattr(ACCELERATED[type(pipe)], "install_vae", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        qwen_fast.enable(pipe)
    assert everything(pipe) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_encoder_mode": "free"}, "`text_encoder_mode` is 'free'; modular pipelines have 'keep' only"),
        ({"prompt_cache": "folder"}, "`prompt_cache` is '.*folder'; modular pipelines keep no prompts: use None"),
    ],
    ids=str,
)
def test_options_about_the_text_encoder_are_refused(checkpoint, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = TEXT.pipe(checkpoint)
    before = everything(pipe)
    with pytest.raises(ValueError, match=message):
        qwen_fast.enable(pipe, **options)
    assert everything(pipe) == before
    qwen_fast.enable(pipe, prompt_cache=None)
    with pytest.raises(ValueError, match="`num_inference_steps` is 0"):
        TEXT.draw(pipe, num_inference_steps=0)


def test_copies_and_blocks_for_others_are_diffusers_own(checkpoint):
    pipe = TEXT.pipe(checkpoint)
    expected = TEXT.draw(copy.deepcopy(pipe))  # transformers' hooks of a call keep a text encoder from being pickled
    qwen_fast.enable(pipe)
    read = pickle.loads(pickle.dumps(pipe))
    given = []

    class Keeps(diffusers.modular_pipelines.qwenimage.denoise.QwenImageLoopAfterDenoiser):
        def __call__(self, components, state, i, t):
            given.append(type(components))
            return super().__call__(components, state, i=i, t=t)

    twin = copy.deepcopy(pipe)
    assert_near(TEXT.draw(twin), expected)
    assert qwen_fast.report(twin).enabled and twin.fast_state is not pipe.fast_state
    assert type(read) is diffusers.QwenImageModularPipeline and not qwen_fast.report(read).enabled
    assert torch.equal(TEXT.draw(read), expected)
    blocks = pipe.blocks
    assert all(type(one).__module__.startswith("diffusers.") for one in blocks_of(blocks))
    loop_of(pipe).sub_blocks["after_denoiser"] = Keeps()
    assert_near(TEXT.draw(pipe), expected)
    assert given == [type(pipe)] * 3


def test_another_pipeline_with_the_same_parts_and_blocks_stays_stock(checkpoint):
    pipe = TEXT.pipe(checkpoint)
    other = diffusers.QwenImageModularPipeline(blocks=pipe._blocks)
    other.update_components(**{name: part for name, part in pipe.components.items() if part is not None})
    expected = TEXT.draw(other)
    qwen_fast.enable(pipe)
    assert_near(TEXT.draw(pipe), expected)
    assert torch.equal(TEXT.draw(other), expected)


def test_text_and_pictures_in_pipelines_of_their_own(checkpoint):
    """The blocks of a workflow in three pipelines, which hand on their state; the one in the middle has neither end."""

    def draw(enabled):
        whole = TEXT.pipe(checkpoint)
        blocks = whole.blocks.get_workflow("text2image").sub_blocks
        names, state = list(blocks), None
        ends = [name for name in names if name.startswith("text_encoder")], [n for n in names if n.startswith("decode")]
        middle = [name for name in names if name not in ends[0] + ends[1]]
        assert ends[0] and ends[1] and len(middle) > 3
        for part in (ends[0], middle, ends[1]):
            own = diffusers.SequentialPipelineBlocks.from_blocks_dict({name: blocks[name] for name in part})
            pipe = diffusers.QwenImageModularPipeline(blocks=own)
            given = {name: one for name, one in whole.components.items() if name in pipe.component_names}
            pipe.update_components(**given)
            if enabled:
                qwen_fast.enable(pipe, strict=True)
            arguments = {"prompt": "a red circle", "negative_prompt": "x", "height": 64, "width": 96, "num_inference_steps": 3}
            arguments |= {"output_type": "pt", "generator": torch.Generator().manual_seed(7)}
            wanted = {name: value for name, value in arguments.items() if name in pipe._blocks.input_names}
            state = pipe(state=state, **wanted)
            calls = dict(pipe.fast_state.calls) if enabled else {}
            assert not enabled or part is not middle or calls["packed transformer"] == calls["cfg_euler_step"] == 3
        return state

    expected, actual = draw(False), draw(True)
    assert_near(actual.get("images"), expected.get("images"), 1e-5)


class Own(diffusers.FlowMatchEulerDiscreteScheduler):
    """Takes larger steps."""

    def step(self, model_output, *args, **kwargs):
        return super().step(model_output * 1.1, *args, **kwargs)


def test_a_scheduler_of_a_users_own(checkpoint):
    pipe = TEXT.pipe(checkpoint)
    pipe.update_components(scheduler=Own.from_config(pipe.scheduler.config))
    expected = TEXT.draw(pipe)
    scheduler = pipe.scheduler
    qwen_fast.enable(pipe)
    assert_near(TEXT.draw(pipe), expected)
    report = qwen_fast.report(pipe)
    assert pipe.scheduler is scheduler and report.calls["packed transformer"] == 3
    assert "scheduler is a Own, not a FlowMatchEulerDiscreteScheduler" in report.fallbacks


def test_a_hook_on_the_transformer(checkpoint):
    pipe = TEXT.pipe(checkpoint)
    pipe.transformer.register_forward_hook(lambda module, args, output: (output[0] * 0.9,))
    expected = TEXT.draw(pipe)
    assert_near(TEXT.draw(qwen_fast.enable(pipe)), expected)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["text", "inpaint", "edit", "controlnet"])
def test_steps_as_a_graph_on_the_emulated_device(checkpoint, emulated_cuda, name):
    workflow = WORKFLOWS[name]
    expected = workflow.draw(workflow.pipe(checkpoint))
    pipe = qwen_fast.enable(workflow.pipe(checkpoint).to("cuda"), cuda_graph=True)
    for _ in range(3):
        latents = workflow.draw(pipe)
        assert latents.device.type == "cuda"
        assert (latents.cpu() - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (pipe.fast_state.graph is None) is (name != "controlnet") and not qwen_fast.report(pipe).fallbacks
    assert bool(pipe.fast_state.calls["graph captures"]) is (name != "controlnet")
