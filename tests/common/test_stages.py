"""Stages: what a pipeline's call is made of, for a recorder and for a profiler, and the table of it."""

import contextvars
import threading
import time

import diffusers
import pytest
import torch
from PIL import Image

import qwen_fast
from benchmarks.shared.stock import draw, stock
from qwen_fast.common.stages import STAGES, Recorder, Span, record, stage, stage_table, staged, steps
from support.pipelines import SMALL

CALL = {"prompt": "a cat", "negative_prompt": "blurry", "true_cfg_scale": 3.7, **SMALL, "output_type": "pil"}
PICTURE = Image.new("RGB", (96, 64), (200, 30, 90))


def spans(recorder: Recorder, name: str) -> list[Span]:
    return [span for span in recorder.spans if span.name == name]


def covered_in(pipe) -> set[str]:
    """Which of the methods that `staged` covers are covered now."""
    names = {"encode_prompt", "progress_bar", "set_timesteps", "encode", "decode", "postprocess"}
    return names & {name for owner in (pipe, pipe.vae, pipe.scheduler, pipe.image_processor) for name in vars(owner)}


def test_an_accelerated_call_is_covered_by_its_stages(checkpoint):
    pipe, shares = qwen_fast.enable(stock(checkpoint)), []
    for _ in range(5):  # each takes 40 ms, and other processes may come between
        with record() as recorder:
            draw(pipe, **CALL)
        shares.append(sum(recorder.own_seconds()[0].values()) / recorder.wall)
    assert 0.8 < max(shares) <= 1, shares
    seconds = recorder.seconds()
    assert list(seconds) == ["text", "schedule", "modulation", "denoise", "vae"]
    assert seconds["modulation"] < seconds["denoise"]
    (table,), (loop,), (decode, _shown) = (spans(recorder, name) for name in ("modulation", "denoise", "vae"))
    assert loop.begin <= table.begin <= table.end <= loop.end <= decode.begin
    assert not spans(recorder, "step")

    with record(steps=True) as again:
        draw(pipe, **CALL)
    assert not spans(again, "modulation")[1:], "the table is looked up once a call"
    assert len(spans(again, "step")) == 4
    assert sum(span.end - span.begin for span in spans(again, "step")) <= again.seconds()["denoise"]
    with record() as latents:
        draw(pipe, **CALL | {"output_type": "latent"})
    assert "vae" not in latents.seconds()


@pytest.mark.parametrize("fast", [False, True], ids=["stock", "enabled"])
@pytest.mark.parametrize(
    ("cls", "inputs", "coded"),
    [
        (diffusers.QwenImagePipeline, {}, 1),
        (diffusers.QwenImageImg2ImgPipeline, {"image": PICTURE, "strength": 0.8}, 2),
        (diffusers.QwenImageInpaintPipeline, {"image": PICTURE, "mask_image": PICTURE.convert("L"), "strength": 0.8}, 3),
    ],
)
def test_stocks_loop_has_stages_and_gets_its_methods_back(checkpoint, cls, inputs, coded, fast):
    pipe = stock(checkpoint, cls=cls)
    if fast:
        qwen_fast.enable(pipe)
    with record() as recorder:
        if fast:
            draw(pipe, **CALL, **inputs)
        else:
            with staged(pipe):
                draw(pipe, **CALL, **inputs)
    assert [name for name in recorder.seconds() if name != "modulation"] == ["text", "schedule", "denoise", "vae"]
    assert len(spans(recorder, "text")) == 2
    assert sum(span.end - span.begin for span in recorder.spans if span.name != "modulation") <= recorder.wall
    postprocessed = 1
    assert len(spans(recorder, "vae")) == coded + postprocessed
    assert not covered_in(pipe)


def test_staged_leaves_nothing_behind_after_an_error(checkpoint):
    pipe = stock(checkpoint)
    own = vars(pipe)["encode_prompt"] = pipe.encode_prompt  # someone else's cover stays

    def fail(*_):
        raise RuntimeError("in a step")

    with record() as recorder, pytest.raises(RuntimeError, match="in a step"), staged(pipe):
        draw(pipe, **CALL, callback_on_step_end=fail)
    assert recorder.seconds()["denoise"] > 0 and "vae" not in recorder.seconds()
    assert vars(pipe)["encode_prompt"] is own and covered_in(pipe) == {"encode_prompt"}


def test_a_scheduler_that_is_not_ours_still_has_stages(checkpoint):
    """Its steps are its own, and the table of stages says where the time went."""
    pipe = stock(checkpoint)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, stochastic_sampling=True)
    qwen_fast.enable(pipe)
    with record() as recorder:
        draw(pipe, **CALL)
    assert qwen_fast.report(pipe).fallbacks
    assert list(recorder.seconds()) == ["text", "schedule", "modulation", "denoise", "vae"]


def test_ranges_for_a_profiler_and_none_per_step_without_one(checkpoint, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        draw(pipe, **CALL)
    counts = {event.key: event.count for event in profile.key_averages()}
    expected = {"text": 2, "schedule": 1, "modulation": 1, "denoise": 1, "vae": 2, "step": 4}
    assert {name: counts.get(f"qwen_fast::{name}") for name in expected} == expected

    entered = []
    monkeypatch.setattr(
        "qwen_fast.common.stages._range", lambda name: entered.append(name) or torch.profiler.record_function(name)
    )
    draw(pipe, **CALL)
    assert "step" not in entered and "denoise" in entered


def test_steps_yields_what_it_gets_and_closes_the_step_of_a_broken_loop():
    assert list(steps(iter("abc"))) == ["a", "b", "c"]
    with record(steps=True) as recorder:
        for item in steps("abc"):
            if item == "b":
                break
    assert [span.name for span in recorder.spans] == ["step", "step"]


def test_a_recorder_sees_its_own_context_and_those_inside():
    with record() as outer:
        with record() as inner, stage("png"):
            pass
        thread = threading.Thread(target=contextvars.Context().run, args=(lambda: stage("png").__enter__(),))
        thread.start()
        thread.join()
    assert [span.name for span in inner.spans] == ["png"] and outer.spans == inner.spans
    with stage("png"):
        pass
    assert len(inner.spans) == len(outer.spans) == 1


def test_a_stage_ends_where_an_error_leaves_it():
    with record() as recorder, pytest.raises(ValueError, match="inside"):
        with stage("vae"):
            raise ValueError("inside")
    assert [span.name for span in recorder.spans] == ["vae"]


def test_threads_take_part_in_a_copy_of_the_context():
    def work():
        with stage("png"):
            time.sleep(0.01)

    with record() as recorder:
        with stage("denoise"):
            thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
            thread.start()
            thread.join()
    here, beside = recorder.own_seconds()
    assert set(here) == {"denoise"} and set(beside) == {"png"} and here["denoise"] >= beside["png"] >= 0.01


def recorded(*given: tuple) -> Recorder:
    recorder = Recorder()
    here = recorder.thread
    recorder.spans = [Span(name, begin, end, here if len(rest) == 0 else here + 1) for name, begin, end, *rest in given]
    return recorder


def test_own_seconds_count_nothing_twice():
    recorder = recorded(
        ("modulation", 3.0, 5.0),
        ("step", 2.0, 6.0),
        ("denoise", 2.0, 8.0),
        ("vae", 8.0, 9.0),
        ("vae", 9.5, 10.0),
        ("mine", 0.0, 1.0),
    )
    here, beside = recorder.own_seconds()
    assert here == {"modulation": 2.0, "denoise": 4.0, "vae": 1.5, "mine": 1.0} and not beside
    assert list(here) == ["modulation", "denoise", "vae", "mine"]
    assert recorder.seconds()["denoise"] == 6.0
    assert set(here) - {"mine"} < set(STAGES)


def test_the_table_adds_up():
    recorder = recorded(("load", 0.0, 2.0), ("denoise", 2.0, 8.0), ("modulation", 2.0, 3.0), ("png", 4.0, 4.5, "beside"))
    assert stage_table(recorder, 10.0).splitlines() == [
        "stage         seconds    share",
        "load            2.000    20.0%",
        "modulation      1.000    10.0%",
        "denoise         5.000    50.0%",
        "other           2.000    20.0%",
        "total          10.000   100.0%",
        "meanwhile, in other threads:",
        "png             0.500",
    ]
    several = stage_table(recorder, 10.0, pictures=2).splitlines()
    assert several[0] == "stage         seconds    share  per picture"
    assert several[1] == "load            2.000    20.0%"
    assert several[3] == "denoise         5.000    50.0%        2.500"
    assert several[-1] == "png             0.500                 0.250"
    assert stage_table(recorded(), 0.0).splitlines()[-1].split() == ["total", "0.000", "100.0%"]


def test_a_bar_of_the_instance_is_kept(checkpoint):
    """Such as a benchmark's clock, which ends a call after some steps."""
    from benchmarks.shared.measure import clocked

    pipe = stock(checkpoint)
    with clocked(pipe, 2) as clock, staged(pipe), record() as recorder:
        draw(pipe, prompt="a red circle", **(SMALL | {"num_inference_steps": 5}))
    assert len(clock.steps) == 2 and recorder.seconds()["denoise"] > 0
    assert "progress_bar" not in vars(pipe)
