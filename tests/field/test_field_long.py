"""What only many calls show: nothing grows, nothing wears off, and what stops a call in its middle leaves nothing behind."""

import gc
import sys

import pytest
import torch

import qwen_fast
from support.family import MEMBERS, small_references
from support.snapshots import snapshot


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


def resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("name", "calls"), [pytest.param("text", 1000, marks=pytest.mark.slow), ("edit plus 2511", 200)])
def test_calls_do_not_grow(checkpoint, name, calls):
    """Other prompts, sizes, scales and pictures in turn, with a callback now and then."""
    member = MEMBERS[name]
    pipe = qwen_fast.enable(member.pipe(checkpoint))
    words = [f"a red circle {number}" for number in range(7)]

    def call(number: int) -> None:
        others = {"prompt": words[number % 7], "num_inference_steps": 1 + number % 2, "true_cfg_scale": 2.0 + number % 3}
        others |= {"width": 32 * (1 + number % 3), "height": 32}
        if number % 5 == 0:
            others["callback_on_step_end"] = lambda pipe, i, t, tensors: {}
        member.draw(pipe, number % 11, **others)

    def seen() -> tuple[int, float]:
        gc.collect()
        return len(gc.get_objects()), resident_mib()

    for number in range(calls // 5):
        call(number)
    objects, mib = seen()
    for number in range(calls // 5, calls):
        call(number)
    more_objects, more_mib = seen()
    assert more_objects - objects < 500, "objects"
    assert more_mib - mib < 40, "memory"


@pytest.mark.parametrize("name", ["text", "inpaint", "edit plus 2511", "controlnet"])
def test_a_hundred_switches_leave_stock(checkpoint, name):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    expected = member.draw(pipe)
    before = snapshot(pipe)
    for number in range(100):
        qwen_fast.enable(pipe, modulation="host" if number % 2 else "auto")
        if number % 25 == 0:
            member.assert_same(member.draw(pipe), expected)
        qwen_fast.disable(pipe)
    after = snapshot(pipe)
    for key in before:
        assert after[key] == before[key], key
    assert torch.equal(member.draw(pipe), expected)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_stops_a_call_leaves_the_next_one_as_it_was(checkpoint, name, error):
    member = MEMBERS[name]
    pipe = member.pipe(checkpoint)
    expected = member.draw(pipe)
    qwen_fast.enable(pipe)

    def stop(pipe, i, t, tensors):
        raise error("in a callback")

    def interrupt(pipe, i, t, tensors):
        pipe._interrupt = True
        return {}

    with pytest.raises(error, match="in a callback"):
        member.draw(pipe, callback_on_step_end=stop, attention_kwargs={"scale": 0.5})
    handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(lambda *_: stop(None, 0, 0, {}))
    with pytest.raises(error, match="in a callback"):
        member.draw(pipe)
    handle.remove()
    member.draw(pipe, callback_on_step_end=interrupt)
    member.assert_same(member.draw(pipe), expected)
    qwen_fast.disable(pipe)
    assert torch.equal(member.draw(pipe), expected)
