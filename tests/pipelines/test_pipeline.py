"""The drop-in pipeline draws what stock diffusers draws, for every argument of the call."""

import copy
import inspect
import shutil

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.denoise import packing as forwards
from qwen_fast.denoise import watch
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG as LIGHTNING
from qwen_fast.transformer import blocks, modulation
from qwen_fast.transformer.call import ATTACHED
from qwen_fast_kernels import qk_norm_rope
from support.pipelines import DTYPES, GUIDED, SMALL, assert_ran_fast, assert_same_picture


@pytest.fixture
def pipe(checkpoint):
    return stock(checkpoint)


def test_signature_is_stocks():
    ours, theirs = qwen_fast.QwenImagePipeline, diffusers.QwenImagePipeline
    assert inspect.signature(ours.__call__) == inspect.signature(theirs.__call__)
    assert ours.__name__ == theirs.__name__ and issubclass(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arguments", [SMALL, GUIDED], ids=["plain", "guided"])
def test_from_pretrained_equals_stock(checkpoint, dtype, arguments):
    ours = stock(checkpoint, dtype, qwen_fast.QwenImagePipeline)
    assert_same_picture(stock(checkpoint, dtype), ours, prompt="a red circle", **arguments)


def _generators():
    return {"generator": [torch.Generator().manual_seed(seed) for seed in (1, 2)]}


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "a red circle", "num_inference_steps": 20},
        {"prompt": "a red circle", "num_inference_steps": 2},
        {"prompt": ["a red circle", "two green squares on a hill"], "negative_prompt": ["blurry", "low quality, text"]},
        {"prompt": ["a red circle", "two green squares on a hill"]},
        {"prompt": ["a red circle", "two green squares on a hill"], "make": _generators},
        {"prompt": "a red circle", "num_images_per_prompt": 2},
        {"prompt": "a red circle", "negative_prompt": ""},
        {"prompt": "a red circle", "true_cfg_scale": 1.0},
        {"prompt": "a red circle", "sigmas": [1.0, 0.8, 0.3], "num_inference_steps": 50},
        {"prompt": "a red circle", "height": 70, "width": 90},
        {"prompt": "a red circle", "height": 16, "width": 16},
        {"prompt": "a red circle", "guidance_scale": 2.0},
        {"prompt": "a red circle", "attention_kwargs": {}},
        {"prompt": "a long prompt " * 20, "max_sequence_length": 16},
        {"prompt": "a red circle", "latents": torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(1))},
        {"prompt": "a red circle", "latents": torch.randn(1, 64, 24).transpose(1, 2)},
    ],
    ids=lambda a: "-".join(a),
)
def test_arguments_of_the_call(pipe, arguments):
    assert_same_picture(pipe, **(GUIDED | arguments))


def test_embeddings_and_masks_with_holes(pipe):
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 3], mask[1, 6:] = 0, 0
    arguments = {k: v for k, v in GUIDED.items() if k != "negative_prompt"}
    assert_same_picture(
        pipe,
        prompt_embeds=torch.randn(2, 9, 32, generator=generator),
        prompt_embeds_mask=mask,
        negative_prompt_embeds=torch.randn(2, 5, 32, generator=generator),
        **arguments,
    )


def test_lightning_scheduler_put_in_after_enable(pipe):
    lightning = diffusers.FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING)
    expected_pipe = diffusers.QwenImagePipeline(**{**pipe.components, "scheduler": lightning})
    expected_pipe.set_progress_bar_config(disable=True)
    qwen_fast.enable(pipe)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING)
    assert_same_picture(expected_pipe, pipe, prompt="a red circle", **SMALL)


def test_guidance_embeddings(pipe):
    torch.manual_seed(0)
    config = {**pipe.transformer.config, "guidance_embeds": True}
    pipe.transformer = diffusers.QwenImageTransformer2DModel.from_config(config)
    if "guidance" not in inspect.getsource(type(pipe.transformer.time_text_embed).forward):
        # This diffusers accepts the config, but its embedding has no guidance: stock fails, and so must we.
        with pytest.raises(TypeError):
            draw(pipe, prompt="a red circle", guidance_scale=3.0, **SMALL)
        with pytest.raises(TypeError):
            draw(qwen_fast.enable(pipe), prompt="a red circle", guidance_scale=3.0, **SMALL)
        return
    assert_same_picture(pipe, prompt="a red circle", guidance_scale=3.0, **GUIDED)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_decoded_pictures_equal_stock(pipe, output_type):
    arguments = GUIDED | {"prompt": "a red circle", "output_type": output_type}
    expected = draw(pipe, **arguments)
    actual = draw(qwen_fast.enable(pipe), **arguments)
    assert_ran_fast(pipe)
    if output_type == "pil":
        assert isinstance(actual[0], PIL.Image.Image) and actual[0].size == (96, 64)
    # Latents differ in their last digits: in a PNG that is one step of 255 where a value lies on the edge.
    difference = np.abs(np.asarray(actual[0], dtype=np.float64) - np.asarray(expected[0], dtype=np.float64))
    assert difference.max() <= (1 if output_type == "pil" else 1e-5)
    assert np.asarray(actual[0], dtype=np.float32).std() > 0


def test_return_dict_false(pipe):
    images = qwen_fast.enable(pipe)(prompt="a red circle", return_dict=False, **SMALL)
    assert isinstance(images, tuple) and images[0].shape == (1, 24, 64)


def test_callbacks_change_latents_and_embeddings(pipe):
    seen = {"stock": [], "fast": []}
    longer = torch.randn(1, 21, 32, generator=torch.Generator().manual_seed(5))

    def callback_for(name):
        def callback(pipe, step, timestep, tensors):
            scheduler = pipe.scheduler
            seen[name].append((step, timestep.item(), scheduler.step_index, pipe.num_timesteps, scheduler.timesteps.tolist()))
            assert pipe.current_timestep is timestep or pipe.current_timestep == timestep
            if step == 1:
                return {"latents": tensors["latents"] * 0.5}
            return {"prompt_embeds": longer} if step == 2 else {}

        return callback

    arguments = GUIDED | {"prompt": "a red circle", "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = draw(pipe, **arguments, callback_on_step_end=callback_for("stock"))
    actual = draw(qwen_fast.enable(pipe), **arguments, callback_on_step_end=callback_for("fast"))
    assert_ran_fast(pipe)
    assert_same_latents(actual, expected)
    assert seen["fast"] == seen["stock"] and len(seen["fast"]) == 4


def test_latents_given_to_a_callback_are_its_own(pipe):
    kept = []
    draw(
        qwen_fast.enable(pipe),
        prompt="a red circle",
        callback_on_step_end=lambda p, i, t, tensors: kept.append(tensors["latents"]) or {},
        **GUIDED,
    )
    assert len({tensor.data_ptr() for tensor in kept}) == 4
    assert not torch.equal(kept[0], kept[1])


def test_interrupt_keeps_the_partial_result(pipe):
    def interrupt(pipe, step, timestep, tensors):
        pipe._interrupt = step == 1
        return {}

    assert_same_picture(pipe, prompt="a red circle", callback_on_step_end=interrupt, **GUIDED)
    assert_same_picture(qwen_fast.disable(pipe), prompt="a red circle", **GUIDED)  # and the next run is whole again


def test_one_step_draws_a_picture_where_stock_gives_nan(pipe):
    latents = draw(qwen_fast.enable(pipe), prompt="a red circle", **(GUIDED | {"num_inference_steps": 1}))
    assert latents.isfinite().all()


def test_prompts_of_different_lengths_with_several_pictures_each(pipe):
    prompts, negatives = ["a red circle", "two green squares on a hill"], ["blurry", "low quality, text"]
    latents = torch.randn(4, 24, 64, generator=torch.Generator().manual_seed(3))
    arguments = {k: v for k, v in GUIDED.items() if k != "negative_prompt"}
    singles = [
        draw(pipe, prompt=prompts[i // 2], negative_prompt=negatives[i // 2], latents=latents[i : i + 1], **arguments)
        for i in range(4)
    ]
    expected = torch.cat(singles)
    qwen_fast.enable(pipe)
    actual = draw(pipe, prompt=prompts, negative_prompt=negatives, num_images_per_prompt=2, latents=latents, **arguments)
    assert_ran_fast(pipe)
    # Padding changes the order of sums in attention, nothing more; wrong masks are off by 4e-2.
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_one_negative_prompt_for_several_prompts_with_several_pictures(pipe):
    arguments = GUIDED | {"prompt": ["a red circle", "two green squares"], "num_images_per_prompt": 2}
    latents = torch.randn(4, 24, 64, generator=torch.Generator().manual_seed(3))
    one = draw(qwen_fast.enable(pipe), latents=latents, **arguments)
    each = draw(pipe, latents=latents, **(arguments | {"negative_prompt": ["blurry", "blurry"]}))
    assert torch.equal(one, each)


def test_precise_sampler_keeps_fp32_latents(checkpoint):
    arguments = GUIDED | {"prompt": "a red circle", "num_inference_steps": 20}
    noise = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    exact = draw(stock(checkpoint), latents=noise, **arguments)
    pipe = stock(checkpoint, torch.bfloat16)
    rounded = draw(pipe, latents=noise, **arguments)
    precise = draw(qwen_fast.enable(pipe, precise_sampler=True), latents=noise, **arguments)
    assert_ran_fast(pipe)
    assert precise.dtype == torch.float32 and "fp32 latents" in str(qwen_fast.report(pipe))
    assert not torch.equal(precise.bfloat16(), rounded)
    assert (precise - exact).norm() < (rounded.float() - exact).norm()


def test_options_through_the_constructor(checkpoint):
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, precise_sampler=True, strict=True)
    assert pipe.fast_state.options.precise_sampler and pipe.fast_state.options.strict


def test_components_given_to_from_pretrained_need_no_files(checkpoint, tmp_path, pipe):
    folder = tmp_path / "without-text"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        qwen_fast.QwenImagePipeline.from_pretrained(folder)
    ours = qwen_fast.QwenImagePipeline.from_pretrained(folder, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    ours.set_progress_bar_config(disable=True)
    assert_same_picture(pipe, ours, prompt="a red circle", **SMALL)


def test_from_pipe(pipe):
    ours = qwen_fast.QwenImagePipeline.from_pipe(pipe)
    ours.set_progress_bar_config(disable=True)
    assert ours.transformer is pipe.transformer and type(pipe) is diffusers.QwenImagePipeline
    assert_same_picture(pipe, ours, prompt="a red circle", **GUIDED)


def test_progress_bar_counts_the_steps(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    draw(qwen_fast.enable(pipe), prompt="a red circle", **SMALL)
    assert "4/4" in capsys.readouterr().err


class Recorder(TorchDispatchMode):
    """Every operator that runs, and the device of its tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("modulation", ["auto", "layers"])
def test_the_loop_never_waits_for_the_device(checkpoint, modulation, monkeypatch):
    """No `_local_scalar_dense` (item), no `nonzero` and no `_to_copy` between devices from the first step to the last."""
    pipe = stock(checkpoint, cls=qwen_fast.QwenImagePipeline)
    qwen_fast.enable(pipe, modulation=modulation)
    recorder, marks = Recorder(), []
    monkeypatch.setattr(watch.Pace, "step", lambda self: marks.append(len(recorder.names)))
    with recorder:
        draw(pipe, prompt="a red circle", **GUIDED)
    loop = recorder.names[marks[0] : marks[-1]]
    assert loop.count("cfg_euler_step") == 3 and loop.count("joint_attention") == 6
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(loop)


def test_cond_and_uncond_go_packed_and_without_padding(checkpoint, monkeypatch):
    """The token rows of each forward are the sum of all true lengths: two prompts and their negatives, two pictures."""
    pipe = stock(checkpoint, cls=qwen_fast.QwenImagePipeline)
    prompts, negatives = ["a red circle", "two green squares on a hill"], ["blurry", "low quality, text"]
    lengths = [stock(checkpoint).encode_prompt(prompt)[0].shape[1] for prompt in prompts + negatives]
    rows = []
    monkeypatch.setattr(blocks, "qk_norm_rope", lambda query, *args: (rows.append(len(query)), qk_norm_rope(query, *args)))
    draw(pipe, prompt=prompts, **(GUIDED | {"negative_prompt": negatives}))
    assert len(set(lengths)) > 1 and set(rows) == {sum(lengths) + 4 * 24} and len(rows) == 4 * 2
    assert qwen_fast.report(pipe).calls["packed transformer"] == 4


def test_apart_when_memory_is_short(checkpoint, pipe, monkeypatch):
    monkeypatch.setattr(forwards, "fits_in_memory", lambda *_: False)
    assert_same_picture(pipe, prompt="a red circle", **GUIDED)
    assert qwen_fast.report(pipe).calls["transformer"] == 8 and "packed transformer" not in qwen_fast.report(pipe).calls


@pytest.mark.parametrize("modulation", ["auto", "layers"])
@pytest.mark.parametrize("attention", ["auto", "triton", "diffusers"])
def test_options_draw_the_same_picture(pipe, modulation, attention):
    fast = qwen_fast.enable(copy.deepcopy(pipe), modulation=modulation, attention=attention)
    arguments = GUIDED | {"prompt": ["a red circle", "two green squares on a hill"]}
    assert_same_picture(pipe, fast, **arguments)


def test_a_table_is_computed_once_a_call_and_not_kept(pipe, monkeypatch):
    """Where the weights are on the device of the call: whatever became of them is seen."""
    qwen_fast.enable(pipe)
    computed, compute = [], modulation.compute_table
    monkeypatch.setattr(modulation, "compute_table", lambda *args: computed.append(args[1]) or compute(*args))
    for _ in range(3):
        draw(pipe, prompt="a red circle", **GUIDED)
    assert [len(timesteps) for timesteps in computed] == [4, 4, 4]
    tables = pipe.transformer.__dict__[ATTACHED].tables
    assert (tables.misses, tables.hits, tables.nbytes) == (0, 0, 0)


def test_a_sample_whose_text_is_all_masked(pipe):
    mask = torch.tensor([[1] * 9, [0] * 9])
    embeds = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    assert_same_picture(pipe, prompt_embeds=embeds, prompt_embeds_mask=mask, **SMALL)


def test_the_host_stays_two_steps_behind_the_device_at_most(monkeypatch):
    log = []

    class Event:
        def __init__(self):
            self.number = sum(entry[0] == "record" for entry in log)

        def record(self, stream):
            assert stream == "of cuda:1"
            log.append(("record", self.number))

        def synchronize(self):
            log.append(("wait", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", "of {}".format)
    pace = watch.Pace(torch.device("cuda:1"))
    for _ in range(4):
        pace.step()
    assert log == [("record", 0), ("record", 1), ("record", 2), ("wait", 0), ("record", 3), ("wait", 1)]
