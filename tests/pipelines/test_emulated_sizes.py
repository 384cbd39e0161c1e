"""Pictures of several sizes on the emulated device: the CPU's pictures, and no wait from the second step on."""

from unittest import mock

import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import stock
from support.emulated_cuda import StepsBar, notes

CALL = {"prompt": ["a red circle", "two green squares on a hill", "x"], "height": [64, 96, 48], "width": [96, 160, 80]}
CALL |= {"negative_prompt": "blurry", "true_cfg_scale": 3.7, "num_inference_steps": 4, "output_type": "latent"}
PACE = "qwen_fast/denoise/watch.py"


def draw(pipe, **others) -> list[torch.Tensor]:
    return pipe(**CALL | others, generator=[torch.Generator().manual_seed(n) for n in range(3)]).images


def assert_near(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.device.type == "cuda" and (one.cpu() - other).abs().max() <= 1e-5 * other.abs().max()


def assert_nothing_wrong(seen: notes.Notes) -> None:
    wrong = notes.MIXED, notes.ILLEGAL, notes.RACE, notes.FIRST
    assert not seen.of(*wrong), seen.counted(*wrong)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({}, {}),
        ({"cuda_graph": True, "attention": "triton"}, {"negative_prompt": None, "true_cfg_scale": 1.0}),
        ({"modulation": "layers"}, {}),
        ({"modulation": "host"}, {"callback_on_step_end": lambda pipe, i, t, tensors: tensors}),
        ({"precise_sampler": True, "check_nan": True}, {"output_type": "pt"}),
    ],
    ids=["as it comes", "unguided", "layers", "weights on the host, callback", "precise, check_nan, pictures"],
)
def test_the_cpus_pictures_without_a_wait(checkpoint, emulated_cuda, options, others):
    seen = emulated_cuda.notes
    expected = draw(qwen_fast.enable(stock(checkpoint), **options), **others)
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), **options)
    pipe.progress_bar, taken = StepsBar(seen), []
    for _ in range(3):
        seen.clear()
        seen.phase = "before"
        images = draw(pipe, **others)
        assert_near(images, expected)
        assert_nothing_wrong(seen)
        kinds = (notes.SYNC, notes.TO_DEVICE, notes.TO_HOST, notes.QUERY, notes.CAPTURE)
        later = [note for note in seen.of(*kinds, phase="step") if note.phase != "step 0"]
        assert not [str(note) for note in later if not note.where.startswith(PACE)]
        assert seen.of(notes.LAUNCH), "no kernel of ours was launched"
        del images
        taken.append(emulated_cuda.memory.allocated)
    assert taken[1] == taken[2], "a call leaves memory behind"
    assert not qwen_fast.report(pipe).fallbacks and pipe.fast_state.graph == "pictures of several sizes in one call"


@pytest.mark.triton
@pytest.mark.parametrize("offload", ["model", "block_level"])
def test_offloaded(checkpoint, emulated_cuda, offload):
    expected, pipe = draw(qwen_fast.enable(stock(checkpoint))), stock(checkpoint)
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cuda")
    else:
        places = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu"), "num_blocks_per_group": 1}
        pipe.transformer.enable_group_offload(**places, offload_type=offload, use_stream=True)
        pipe.vae.to("cuda")
        pipe.text_encoder.to("cuda")
    qwen_fast.enable(pipe)
    for _ in range(2):
        assert_near(draw(pipe), expected)
    assert_nothing_wrong(emulated_cuda.notes)


@pytest.mark.triton
def test_memory_too_short_for_one_forward(checkpoint, emulated_cuda):
    expected = draw(qwen_fast.enable(stock(checkpoint)))
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"))
    draw(pipe)
    emulated_cuda.memory.total = emulated_cuda.memory.allocated + 900_000
    assert_near(draw(pipe), expected)
    assert pipe.fast_state.calls["transformer"] == 8 and pipe.fast_state.calls["packed transformer"] == 4
    assert_nothing_wrong(emulated_cuda.notes)


def test_memory_that_runs_out_in_a_forward(checkpoint, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint))
    expected, predict = draw(pipe), pipe.transformer.predict

    def short(call, hidden, timestep, pack, **others):
        if pack.copies > 1:
            raise torch.OutOfMemoryError("no room")
        return predict(call, hidden, timestep, pack, **others)

    monkeypatch.setattr(type(pipe.transformer), "predict", lambda self, *args, **others: short(*args, **others))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for one, other in zip(draw(pipe), expected, strict=True):
        assert (one - other).abs().max() <= 2e-6 * other.abs().max()
    assert pipe.fast_state.calls["packed transformer out of memory"] == 1
    unguided = {"negative_prompt": None, "true_cfg_scale": 1.0}
    monkeypatch.setattr(type(pipe.transformer), "predict", lambda *_, **__: short(None, None, None, mock.Mock(copies=2)))
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe, **unguided)


@pytest.mark.triton
def test_offloading_that_brings_the_weights_of_norms_is_refused(checkpoint, emulated_cuda):
    pipe = stock(checkpoint)
    pipe.enable_sequential_cpu_offload(device="cuda")
    with pytest.raises(ValueError, match="offloading brings the weights of query and key norms"):
        draw(qwen_fast.enable(pipe))
