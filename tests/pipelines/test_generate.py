"""generate(): each picture is the one drawn alone, in turn or decoded beside the next, and nothing that is drawn is lost."""

import threading

import diffusers
import numpy as np
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import stock
from qwen_fast.common.stages import record
from qwen_fast.pipelines import generate as drawing

PROMPTS = ["a red fox", "a blue bird over the sea", "a red fox"]
SETTINGS = {"negative_prompt": "blurry", "true_cfg_scale": 3.7, "height": 64, "width": 96, "num_inference_steps": 2}


@pytest.fixture
def pipe(checkpoint):
    return qwen_fast.enable(stock(checkpoint))


def alone(pipe, prompt: str, seed: int, **settings) -> np.ndarray:
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **SETTINGS, **settings).images[0])


def beside(pipe, prompts, seed=0, **settings):
    """As generate() draws on a GPU, here with the CPU for both threads."""
    return drawing._beside(pipe, prompts, seed, drawing._of_each({**SETTINGS, **settings}, len(prompts)))


def in_turn(pipe, prompts, seed=0, **settings):
    return qwen_fast.generate(pipe, prompts, seed=seed, **SETTINGS | settings)


BOTH = pytest.mark.parametrize("draw", [in_turn, beside])


@BOTH
def test_each_picture_has_a_size_of_its_own(pipe, draw):
    heights, widths = [96, 64, 48], (64, 48, 80)
    for index, image, _ in draw(pipe, PROMPTS, output_type="pt", height=heights, width=widths):
        own = {"height": heights[index], "width": widths[index]}
        generator = torch.Generator().manual_seed(index)
        expected = pipe(PROMPTS[index], generator=generator, output_type="pt", **SETTINGS | own).images[0]
        assert torch.equal(image, expected) and image.shape[1:] == (heights[index], widths[index])


def test_a_list_of_sizes_of_another_length_is_named(pipe):
    with pytest.raises(ValueError, match="`width` is a list of 2 for 3 prompts"):
        qwen_fast.generate(pipe, PROMPTS, width=[64, 64])


@BOTH
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_each_picture_is_the_one_drawn_alone(pipe, draw, output_type):
    pictures = list(draw(pipe, PROMPTS, seed=5, output_type=output_type))
    assert [picture.index for picture in pictures] == [0, 1, 2]
    for index, image, _ in pictures:
        assert np.array_equal(np.asarray(image), alone(pipe, PROMPTS[index], 5 + index, output_type=output_type))
    assert not np.array_equal(np.asarray(pictures[0].image), np.asarray(pictures[2].image)), "the seeds differ"


@BOTH
def test_options_of_the_pipeline_reach_the_decoding(checkpoint, draw):
    pipe = qwen_fast.enable(stock(checkpoint, torch.bfloat16), precise_sampler=True, vae_mode="diffusers")
    for index, image, _ in draw(pipe, PROMPTS[:2]):
        assert np.array_equal(np.asarray(image), alone(pipe, PROMPTS[index], index))
    assert "vae decode" not in qwen_fast.report(pipe).calls


def test_stock_draws_too(checkpoint):
    pipe = stock(checkpoint)
    for index, image, _ in qwen_fast.generate(pipe, PROMPTS[:2], **SETTINGS):
        assert np.array_equal(np.asarray(image), alone(pipe, PROMPTS[index], index))
    assert list(qwen_fast.generate(pipe, [], **SETTINGS)) == []


@BOTH
def test_seconds_belong_to_their_picture(pipe, draw):
    with record() as recorder:
        pictures = list(draw(pipe, PROMPTS))
    assert list(pictures[1].seconds) == ["text", "schedule", "modulation", "denoise", "vae"]
    totals = recorder.seconds()
    for name in ("text", "denoise", "vae"):
        own = sum(picture.seconds[name] for picture in pictures)
        own += sum(picture.seconds["modulation"] for picture in pictures) if name == "denoise" else 0
        assert own == pytest.approx(totals[name], abs=1e-6) or (name == "vae" and draw is beside and own < totals[name])
    assert bool(recorder.own_seconds()[1]) == (draw is beside)
    assert len(next(iter(qwen_fast.generate(pipe, ["x"], **SETTINGS))).seconds) == 5


def test_the_next_denoises_while_a_picture_is_decoded(pipe, monkeypatch):
    """The decoding of picture 0 waits here until picture 1 is being denoised: in turn it would wait for ever."""
    second_began = threading.Event()
    decode, call = drawing.decoded_latents, drawing._call

    def slow(self, *args):
        assert second_began.wait(30)
        return decode(self, *args)

    def watched(pipe, prompts, index, *args):
        if index == 1:
            second_began.set()
        return call(pipe, prompts, index, *args)

    monkeypatch.setattr(drawing, "decoded_latents", slow)
    monkeypatch.setattr(drawing, "_call", watched)
    assert len(list(beside(pipe, PROMPTS[:2]))) == 2


@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_denoised_before_an_error_still_comes(pipe, draw, error):
    def fail(pipe, i, t, tensors):
        if pipe._progress_bar_config["desc"] == "2/3":
            raise error("in picture 1")
        return {}

    pipe.set_progress_bar_config(disable=True, desc="mine")
    pictures = draw(pipe, PROMPTS, callback_on_step_end=fail)
    index, image, _ = next(pictures)
    assert index == 0 and np.array_equal(np.asarray(image), alone(pipe, PROMPTS[0], 0))
    with pytest.raises(error, match="in picture 1"):
        next(pictures)
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qwen_fast_vae")]


def test_an_error_of_the_decoding_surfaces_with_its_picture(pipe, monkeypatch):
    def fail(*_):
        raise RuntimeError("no room to decode")

    monkeypatch.setattr(drawing, "decoded_latents", fail)
    with pytest.raises(RuntimeError, match="no room to decode"):
        list(beside(pipe, PROMPTS))
    monkeypatch.undo()
    assert np.array_equal(np.asarray(next(in_turn(pipe, PROMPTS)).image), alone(pipe, PROMPTS[0], 0))


def test_a_consumer_may_stop_early(pipe):
    pictures = beside(pipe, PROMPTS)
    next(pictures)
    pictures.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qwen_fast_vae")]


def test_nothing_is_decoded_beside_the_next_on_the_cpu(pipe):
    assert drawing._reason_against(pipe, [SETTINGS]) == "the device is cpu"


def test_what_keeps_the_decoding_in_turn(pipe, monkeypatch):
    monkeypatch.setattr(diffusers.QwenImagePipeline, "_execution_device", torch.device("cuda"))
    monkeypatch.setattr("qwen_fast.pipelines.call.unsupported_reason", lambda device: None)
    free = 10 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    assert drawing._reason_against(pipe, [SETTINGS]) is None
    assert drawing._reason_against(pipe, [{**SETTINGS, "output_type": "latent"}]) == "nothing is decoded"
    # In fp32 a decode at 1024x1024 is reckoned at 10.5 GiB.
    assert drawing._reason_against(pipe, [{"height": 1024, "width": 1024}]) == "memory is too short"
    assert drawing._reason_against(pipe, [{"height": 1024, "width": 944}]) is None
    assert drawing._reason_against(pipe, [SETTINGS, {"height": 1024, "width": 1024}]) == "memory is too short"
    handle = pipe.vae.register_forward_pre_hook(lambda *_: None)
    assert drawing._reason_against(pipe, [SETTINGS]) == "hooks move the models"
    handle.remove()
    assert drawing._reason_against(qwen_fast.disable(pipe), [SETTINGS]) == "the loop is diffusers'"


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "message"),
    [
        ("a cat", {}, TypeError, "`prompts` is 'a cat'; a list of str"),
        (["a cat", None], {}, TypeError, "a list of str is needed"),
        (["a cat"], {"generator": None}, ValueError, "`generator` is given"),
        (["a cat"], {"num_images_per_prompt": 2}, ValueError, "`num_images_per_prompt` is given"),
        (["a cat"], {"latents": None}, ValueError, "`latents` is given"),
        (["a cat", "b"], {"seed": 2**63 - 1}, ValueError, "`seed` is .*; with 2 pictures"),
        (["a cat"], {"seed": -1}, ValueError, "`seed` is -1"),
    ],
)
def test_bad_input_is_named_before_the_first_picture(pipe, prompts, settings, error, message):
    with pytest.raises(error, match=message):
        qwen_fast.generate(pipe, prompts, **settings)


def test_pipelines_that_need_more_than_a_prompt_are_refused(checkpoint):
    with pytest.raises(TypeError, match="`pipe` is a QwenImageImg2ImgPipeline"):
        qwen_fast.generate(stock(checkpoint, cls=diffusers.QwenImageImg2ImgPipeline), ["a cat"])


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_on_a_gpu_the_pictures_are_those_drawn_alone(checkpoint, cuda_graph):
    pipe = qwen_fast.enable(stock(checkpoint, torch.bfloat16).to("cuda"), cuda_graph=cuda_graph)
    assert drawing._reason_against(pipe, [SETTINGS]) is None
    prompts = [prompt * length for length, prompt in zip((1, 9, 1, 9), PROMPTS + PROMPTS[:1], strict=True)]
    for index, image, _ in qwen_fast.generate(pipe, prompts, output_type="pt", **SETTINGS):
        assert np.array_equal(image.float().cpu().numpy(), alone_on_gpu(pipe, prompts[index], index))


def alone_on_gpu(pipe, prompt: str, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type="pt", **SETTINGS).images[0].float().cpu().numpy()
