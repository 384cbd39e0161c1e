"""Another prompt about the same pictures asks the language model alone, and is encoded as in stock, to the bit."""

import copy
import threading
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import ModelOutput

import qwen_fast
from qwen_fast.common.recent import Recent
from qwen_fast.text import tower
from support.family import HIGH, MEMBERS, WIDE, small_references

WITH_PICTURES = ["edit", "edit plus", "edit inpaint"]


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


def looked(pipe) -> int:
    return qwen_fast.report(pipe).calls.get("vision tower", 0)


@torch.no_grad()
def encode(pipe, prompt: str, picture=WIDE) -> torch.Tensor:
    image = [picture] if "Plus" in type(pipe).__name__ else picture
    return pipe.encode_prompt(prompt=prompt, image=image, device=torch.device("cpu"))[0]


@pytest.mark.parametrize("name", WITH_PICTURES)
def test_the_tower_looks_at_a_picture_once(checkpoint, name):
    member = MEMBERS[name]
    pipes = member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint))
    for prompt in ("a red circle", "x", "a blue square on a green ground", "a red circle"):
        expected, actual = (encode(pipe, prompt) for pipe in pipes)
        assert torch.equal(actual, expected)
    assert looked(pipes[1]) == 1 and qwen_fast.report(pipes[1]).calls["text encoder with pictures"] == 3
    for picture in (HIGH, WIDE):
        expected, actual = (encode(pipe, "y", picture) for pipe in pipes)
        assert torch.equal(actual, expected)
    assert looked(pipes[1]) == 2
    assert "forward" not in vars(pipes[1].text_encoder.model.visual)


def test_both_prompts_of_a_call_share_it(checkpoint):
    member = MEMBERS["edit plus"]
    pipe = member.pipe(checkpoint)
    expected = member.draw(pipe)
    member.assert_same(member.draw(qwen_fast.enable(pipe)), expected)
    assert looked(pipe) == 1 and qwen_fast.report(pipe).memory["vision features"] > 0


def a_weight(pipe, monkeypatch) -> None:
    pipe.text_encoder.model.visual.blocks[0].mlp.down_proj.weight.data.mul_(1.5)


def the_merger(pipe, monkeypatch) -> None:
    pipe.text_encoder.model.visual.merger.mlp[0].weight.data.mul_(1.5)


def a_hook(pipe, monkeypatch) -> None:
    pipe.text_encoder.model.visual.blocks[0].register_forward_hook(lambda module, args, output: output * 1.5)


def a_hook_on_the_tower(pipe, monkeypatch) -> None:
    def changed(module, args, output):
        if isinstance(output, torch.Tensor):
            return output * 1.5
        output.pooler_output = output.pooler_output * 1.5
        return output

    pipe.text_encoder.model.visual.register_forward_hook(changed)


def a_forward(pipe, monkeypatch) -> None:
    visual = pipe.text_encoder.model.visual
    forward = visual.forward

    def changed(*args, **kwargs):
        output = forward(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return output * 1.5
        output.pooler_output = output.pooler_output * 1.5
        return output

    visual.forward = changed


CHANGES = [a_weight, the_merger, a_hook, a_hook_on_the_tower, a_forward]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_tower_looks_again(checkpoint, monkeypatch, change):
    member = MEMBERS["edit"]
    pipes, drawn = (member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint))), []
    for pipe in pipes:
        before = encode(pipe, "a red circle")
        change(pipe, monkeypatch)
        drawn.append(encode(pipe, "a red circle"))
        assert not torch.equal(drawn[-1], before)
        drawn.append(encode(pipe, "x"))
    assert torch.equal(drawn[0], drawn[2]) and torch.equal(drawn[1], drawn[3])


def test_nothing_is_kept_without_a_prompt_cache(checkpoint):
    pipe = qwen_fast.enable(MEMBERS["edit"].pipe(checkpoint), prompt_cache=None)
    for prompt in ("a", "b"):
        encode(pipe, prompt)
    assert looked(pipe) == 0 and pipe.fast_state.texts.features.nbytes == 0


def test_an_output_that_is_not_known_is_not_kept(checkpoint, monkeypatch):
    def unknown(output):
        raise tower._Unknown

    monkeypatch.setattr(tower, "_copied", unknown)
    member = MEMBERS["edit"]
    pipes = member.pipe(checkpoint), qwen_fast.enable(member.pipe(checkpoint))
    for prompt in ("a", "b"):
        assert torch.equal(*(encode(pipe, prompt) for pipe in pipes))
    assert looked(pipes[1]) == 2 and pipes[1].fast_state.texts.features.nbytes == 0


def test_the_oldest_goes_first_and_a_copy_starts_empty(checkpoint):
    pipe = qwen_fast.enable(MEMBERS["edit"].pipe(checkpoint))
    encode(pipe, "a", WIDE)
    features = pipe.fast_state.texts.features
    features.max_bytes = features.nbytes
    assert copy.deepcopy(pipe).fast_state.texts.features.nbytes == 0
    encode(pipe, "a", HIGH)
    assert 0 < features.nbytes <= features.max_bytes and looked(pipe) == 2
    encode(pipe, "b", WIDE)
    assert looked(pipe) == 3
    features.leave(torch.device("cuda", 0))
    assert features.nbytes == 0


def test_threads_that_encode_with_one_encoder(checkpoint):
    member = MEMBERS["edit"]
    pipe, stock = qwen_fast.enable(member.pipe(checkpoint)), member.pipe(checkpoint)
    prompts = [f"number {n}" for n in range(8)]
    expected = {prompt: encode(stock, prompt) for prompt in prompts}
    found, failures = {}, []

    def work(own):
        try:
            found.update({prompt: encode(pipe, prompt) for prompt in own})
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(prompts[n::2],)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all(torch.equal(found[prompt], expected[prompt]) for prompt in prompts)
    assert "forward" not in vars(pipe.text_encoder.model.visual)


# What a tower of another version may give


@dataclass
class Output(ModelOutput):
    pooler_output: torch.Tensor | None = None
    deepstack_features: list | None = None
    hidden_states: tuple | None = None


class Tower(torch.nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output, self.asked = output, 0

    def forward(self, pixel_values, grid_thw=None, **kwargs):
        self.asked += 1
        return self.output()


def ask(visual: Tower, pixels: torch.Tensor, **kwargs):
    texts = SimpleNamespace(content="content", features=Recent())
    state = SimpleNamespace(texts=texts, calls=Counter()) if not hasattr(visual, "state") else visual.state
    visual.state = state
    with tower.kept_tower(SimpleNamespace(model=SimpleNamespace(visual=visual)), state):
        return visual(pixels, grid_thw=torch.tensor([[1, 2, 2]]), **kwargs)


PIXELS = torch.arange(8.0).view(4, 2)


def test_a_plain_tensor():  # transformers 4
    visual = Tower(lambda: torch.ones(2, 3))
    first, second = (ask(visual, PIXELS) for _ in range(2))
    assert visual.asked == 1 and torch.equal(first, second) and second is not first
    second.mul_(2)
    assert torch.equal(ask(visual, PIXELS), torch.ones(2, 3))


def test_an_output_with_several_levels():
    def output():
        return Output(
            pooler_output=torch.ones(2, 3), deepstack_features=[torch.zeros(1), torch.ones(1)], hidden_states=(PIXELS,)
        )

    visual = Tower(output)
    first = ask(visual, PIXELS, return_dict=True)
    first.pooler_output = torch.split(first.pooler_output, 1)  # as get_image_features does
    second = ask(visual, PIXELS, return_dict=True)
    assert visual.asked == 1 and type(second) is Output and torch.equal(second.pooler_output, torch.ones(2, 3))
    assert [one.item() for one in second.deepstack_features] == [0, 1] and second.hidden_states is None


@pytest.mark.parametrize(
    "output", [lambda: {"a": torch.ones(1)}, lambda: [torch.ones(1), object()], lambda: 3], ids=["dict", "object", "number"]
)
def test_what_is_not_known_is_asked_again(output):
    visual = Tower(output)
    for _ in range(2):
        ask(visual, PIXELS)
    assert visual.asked == 2 and visual.state.texts.features.nbytes == 0


def test_what_it_is_given_is_told_apart():
    visual = Tower(lambda: torch.ones(1))
    for pixels, others in (
        (PIXELS, {}),
        (PIXELS + 1, {}),
        (PIXELS.view(2, 4), {}),
        (PIXELS.double(), {}),
        (PIXELS, {"window": 4}),
        (PIXELS, {"mask": torch.ones(1)}),
    ):
        asked = visual.asked
        for _ in range(2):
            ask(visual, pixels, **others)
        assert visual.asked == asked + 1
    for _ in range(2):
        ask(visual, PIXELS, lengths=[object()])
    assert visual.asked == asked + 3


def test_hooked_towers_and_encoders_without_a_fingerprint_are_asked():
    visual = Tower(lambda: torch.ones(1))
    handle = visual.register_forward_hook(lambda *_: None)
    for _ in range(2):
        ask(visual, PIXELS)
    assert visual.asked == 2
    handle.remove()
    visual.state.texts.content = None
    for _ in range(2):
        ask(visual, PIXELS)
    assert visual.asked == 4
