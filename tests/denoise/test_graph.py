"""Steps captured in CUDA graphs: what is captured, what is re-used, what forbids it.

There is no GPU here, so `capture` is replaced: the stand-in keeps the step and runs it at each replay, on the static buffers
alone. The capture itself is shown on an emulated device (test_emulated_device.py) and by the tests marked `gpu` at the end.
"""

import threading
from unittest import mock

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, stock
from qwen_fast.denoise import graph
from qwen_fast.transformer.call import ATTACHED
from support.pipelines import GUIDED, SMALL

PROMPT = {"prompt": "a red circle"}
LONGER = {"prompt": "a red circle on a"}


@pytest.mark.parametrize("modulation", ["auto", "layers"])
@pytest.mark.parametrize("arguments", [SMALL, GUIDED, GUIDED | {"num_inference_steps": 1, "sigmas": [0.9]}], ids=len)
def test_the_picture_is_stocks(pair, captures, arguments, modulation):
    qwen_fast.enable(pair[1], cuda_graph=True, modulation=modulation)
    steps = 1 if "sigmas" in arguments else 4
    # The second call warms up with its first step, and captures behind it.
    for expected in ([], [], [1]) if steps == 1 else ([], [3], [7]):
        assert_same_latents(draw(pair[1], **PROMPT, **arguments), draw(pair[0], **PROMPT, **arguments))
        assert captures == expected
    report = qwen_fast.report(pair[1])
    forward = "packed transformer" if "negative_prompt" in arguments else "transformer"
    assert report.calls[forward] == 3 * steps and report.calls["graph captures"] == 1 and not report.fallbacks


def test_calls_give_the_same_bits_whichever_they_are(pair, captures):
    """Eager, captured, replayed, and beside another thread that holds the graph."""
    pictures = [draw(pair[1], **PROMPT, **GUIDED) for _ in range(3)]
    (kept,) = pair[1].transformer.__dict__[ATTACHED].graphs.values()
    with kept.lock:
        pictures.append(draw(pair[1], **PROMPT, **GUIDED))
    assert all(torch.equal(picture, pictures[0]) for picture in pictures) and captures == [7]


def test_threads_that_share_a_transformer(checkpoint, captures):
    """Each on a pipeline of its own; the one that finds the graph taken computes on buffers of its own."""
    first = qwen_fast.enable(stock(checkpoint), cuda_graph=True)
    second = qwen_fast.enable(diffusers.QwenImagePipeline(**stock(checkpoint).components | {"transformer": first.transformer}))
    second.set_progress_bar_config(disable=True)
    qwen_fast.enable(second, cuda_graph=True)
    expected = {seed: draw(first, seed, **PROMPT, **GUIDED) for seed in range(4)}
    wrong, barrier = [], threading.Barrier(2)

    def work(pipe, seeds):
        barrier.wait()
        for seed in seeds:
            if not torch.equal(draw(pipe, seed, **PROMPT, **GUIDED), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(pipe, range(4))) for pipe in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", ["three prompts in turn", "a sweep of guidance", "schedules", "sizes in turn"])
def test_what_is_captured_once(pair, captures, name):
    calls = {
        "three prompts in turn": [{"prompt": text} for text in ("a", "a red circle", "two green squares on a hill") * 3],
        "a sweep of guidance": [{"true_cfg_scale": scale} for scale in (3.0, 3.5, 4.0) * 2],
        "schedules": [{"num_inference_steps": steps} for steps in (2, 3, 4, 5)],
        "sizes in turn": [{"height": height} for height in (32, 64, 96) * 3],
    }[name]
    for call in calls:
        arguments = PROMPT | GUIDED | call
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert len(captures) == (3 if name == "sizes in turn" else 1)


@pytest.mark.parametrize("when", ["at the start", "within", "at the end"])
def test_a_capture_that_fails_costs_a_message(pair, monkeypatch, caplog, when):
    monkeypatch.setattr(graph, "DEVICES", ("cpu", "cuda"))
    tried = []

    def capture(step, device):
        tried.append(when)
        if when == "within":
            with mock.patch.object(type(pair[1].transformer), "predict", side_effect=RuntimeError("synchronized")):
                step()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "capture", capture)
    expected = draw(pair[0], **PROMPT, **GUIDED)
    assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), expected)
    assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), expected)
    report = qwen_fast.report(pair[1])
    assert report.calls["graph captures that failed"] == 1 and "graph captures" not in report.calls
    assert "could not be captured" in caplog.text and report.calls["packed transformer"] == 8


def test_a_shorter_prompt_sees_nothing_of_a_longer_one(pair, captures):
    texts = ["a red circle on a", "a", "a red circle", ""]
    assert len({pair[0].encode_prompt(text)[0].shape[1] for text in texts}) == 4
    for text in texts:
        assert_same_latents(draw(pair[1], prompt=text, **GUIDED), draw(pair[0], prompt=text, **GUIDED))
    assert len(captures) == 1


def test_a_text_beyond_the_capacity_takes_another_graph(pair, captures):
    arguments = {name: value for name, value in SMALL.items()}
    for length in (9, 128, 129, 9, 129):
        embeds = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(length))
        own = arguments | {"prompt_embeds": embeds}
        assert_same_latents(draw(pair[1], **own), draw(pair[0], **own))
    assert len(captures) == 2 and [graph.capacity(n) for n in (1, 128, 129, 1025)] == [128, 128, 256, 1536]


def test_prompts_of_different_lengths_in_a_batch(pair, captures):
    arguments = GUIDED | {"prompt": ["a red circle", "two green squares on a hill"], "negative_prompt": ["x", "low quality"]}
    for seed in (1, 2):
        assert_same_latents(draw(pair[1], seed, **arguments), draw(pair[0], seed, **arguments))
    assert captures == [3]


def test_a_mask_with_holes_brings_its_own_positions(pair, captures):
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0))
    arguments = {name: value for name, value in SMALL.items()} | {"prompt_embeds": embeds}
    for holes in ([3], [0, 1, 7], []):
        mask = torch.ones(1, 9, dtype=torch.long)
        mask[0, holes] = 0
        arguments["prompt_embeds_mask"] = mask
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert len(captures) == 1


OTHER_CALLS = {
    "size": {"height": 96},
    "guidance": {"negative_prompt": None},
    "batch": {"num_images_per_prompt": 2},
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_calls_take_a_graph_of_their_own(pair, captures, name):
    other = GUIDED | PROMPT | OTHER_CALLS[name]
    for arguments in (PROMPT | GUIDED, other) * 2:
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert len(captures) == 2
    assert len(pair[1].transformer.__dict__[ATTACHED].graphs) == 2


def assert_followed(pair, change, calls: int) -> None:
    """Behind a graph that was captured, ours draws with `change` what stock does."""
    for _ in range(2):
        before = draw(pair[1], **PROMPT, **GUIDED)
    for pipe in pair:
        change(pipe)
    expected = draw(pair[0], **PROMPT, **GUIDED)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    for _ in range(calls):
        assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), expected)


def edit_weight(pipe):
    pipe.transformer.transformer_blocks[0].img_mod[1].weight.data.mul_(1.2)


def replace_weight(pipe):
    layer = pipe.transformer.proj_out
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 0.5)


def add_lora(pipe):
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), adapter_name="a")


@pytest.mark.parametrize("change", [edit_weight, replace_weight, add_lora])
def test_changed_weights_never_meet_a_stale_graph(pair, captures, change):
    assert_followed(pair, change, 2)
    # What is edited in place is read anew by each replay.
    assert len(captures) == (1 if change is edit_weight else 2)


def test_lora_scales_are_part_of_the_key(pair, captures):
    for pipe in pair:
        add_lora(pipe)
    for scale in (1.0, 0.3, 1.0, 0.3):
        for pipe in pair:
            pipe.transformer.set_adapters(["a"], [scale])
        assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), draw(pair[0], **PROMPT, **GUIDED))
    assert captures == [3, 3]


def test_the_scale_of_a_call_is_part_of_the_key(pair, captures):
    for pipe in pair:
        add_lora(pipe)
    for scale in (0.5, 1.0, 0.2, 0.5, 1.0, 0.2, 0.5):
        arguments = PROMPT | GUIDED | {"attention_kwargs": {"scale": scale}}
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert captures == [7, 3, 3]


def test_a_callback_that_changes_the_scale(pair, captures):
    for pipe in pair:
        add_lora(pipe)

    def rescale(pipe, i, t, tensors):
        pipe._attention_kwargs = {"scale": 0.2 if i else 0.7}
        return {}

    for _ in range(3):
        arguments = PROMPT | GUIDED | {"attention_kwargs": {"scale": 0.5}, "callback_on_step_end": rescale}
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))


def change_eps(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.img_norm1.eps = block.attn.norm_q.eps = 0.3


def change_theta(pipe):
    module = pipe.transformer.pos_embed
    pipe.transformer.pos_embed = type(module)(50.0, module.axes_dim, module.scale_rope)


@pytest.mark.parametrize("change", [change_eps, change_theta])
def test_numbers_that_a_graph_would_bake_in(pair, captures, change):
    assert_followed(pair, change, 3)


def progress(pipe, i, t, tensors):
    return {}


def edit_latents(pipe, i, t, tensors):
    return {"latents": tensors["latents"] * 0.9}


def edit_prompt(pipe, i, t, tensors):
    return {"prompt_embeds": tensors["prompt_embeds"] * (0.5 if i == 1 else 1.0)}


@pytest.mark.parametrize(
    ("callback", "names", "replays"),
    # Another prompt is loaded into the same graph.
    [(progress, [], [3, 7]), (edit_latents, ["latents"], [3, 7]), (edit_prompt, ["latents", "prompt_embeds"], [3, 7])],
)
def test_a_callback_keeps_the_graph_where_it_changes_latents_or_prompt(pair, captures, callback, names, replays):
    others = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    for expected in ([], *([count] for count in replays)):
        assert_same_latents(draw(pair[1], **PROMPT, **GUIDED, **others), draw(pair[0], **PROMPT, **GUIDED, **others))
        assert captures == expected


def test_latents_that_a_callback_keeps_stay_what_they_were(pair, captures):
    for pipe in pair * 2:
        seen = []
        others = {"callback_on_step_end": lambda pipe, i, t, tensors, seen=seen: seen.append(tensors["latents"]) or {}}
        final = draw(pipe, **PROMPT, **GUIDED, **others)
        assert torch.equal(seen[-1], final)
        pipe.seen = seen
    for ours, theirs in zip(pair[1].seen, pair[0].seen, strict=True):
        assert_same_latents(ours, theirs)


def test_returned_latents_are_the_callers_own(pair, captures):
    first = draw(pair[1], **PROMPT, **GUIDED)
    kept = first.clone()
    draw(pair[1], 8, **PROMPT, **GUIDED)
    assert torch.equal(first, kept)


def test_interrupt_stops_the_replays(pair, captures, monkeypatch):
    original = type(pair[1]).progress_bar

    def interrupting(self, *args, **kwargs):
        bar = original(self, *args, **kwargs)
        update = bar.update
        bar.update = lambda n=1: (update(n), setattr(self, "_interrupt", True))
        return bar

    monkeypatch.setattr(type(pair[1]), "progress_bar", interrupting)
    draw(pair[1], **PROMPT, **GUIDED)
    for _ in range(2):
        draw(pair[1], **PROMPT, **GUIDED)
    assert captures == [1]


class Addresses(TorchDispatchMode):
    """Per operator call: its name and the addresses of the tensors that it reads."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        self.calls.append((func.overloadpacket.__name__, [tensor.data_ptr() for tensor in tensors], tensors))
        return func(*args, **(kwargs or {}))


def test_every_step_reads_the_same_addresses(pair, captures, monkeypatch):
    """What a graph needs: the same operators on the same inputs at each step, and no host synchronisation.

    The recorder keeps every tensor alive, so an address that returns is one that was meant.
    """
    recorder, marks = Addresses(), []
    compute = graph.StepGraph._compute

    def marked(self):
        with recorder:
            marks.append(len(recorder.calls))
            return compute(self)

    monkeypatch.setattr(graph.StepGraph, "_compute", marked)
    draw(pair[1], **PROMPT, **GUIDED)
    steps = [recorder.calls[start:stop] for start, stop in zip(marks, [*marks[1:], None], strict=True)]
    persistent = set.intersection(*({address for _, own, _ in step for address in own} for step in steps))
    names = [[name for name, _, _ in step] for step in steps]
    assert len(steps) == 4 and names[2:] == names[1:-1]  # the first one also computes what the layout keeps
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(names[1])
    kept = next(iter(pair[1].transformer.__dict__[ATTACHED].graphs.values()))
    layout = kept.prompts.layout
    for static in (kept.latents, kept.sigmas, kept.step_index, kept.guidance, layout.rope, layout.spans, kept.prompts.text):
        assert static.data_ptr() in persistent
    weights = {parameter.data_ptr() for parameter in pair[1].transformer.parameters()}
    assert len(weights & persistent) > 50


@pytest.mark.gpu
@pytest.mark.parametrize("modulation", ["auto", "layers"])
def test_a_captured_step_draws_what_the_eager_loop_draws(checkpoint, device, modulation):
    arguments = GUIDED | {"num_inference_steps": 8, "generator": None}
    latents = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    pictures = []
    for cuda_graph in (False, True):
        pipe = qwen_fast.enable(stock(checkpoint, torch.bfloat16).to(device), cuda_graph=cuda_graph, modulation=modulation)
        pictures.append([draw(pipe, latents=latents, **PROMPT, **arguments) for _ in range(2)])
    assert pipe.fast_state.graph is None and qwen_fast.report(pipe).calls["graph captures"] == 1
    assert all(torch.equal(picture, pictures[0][0]) for run in pictures for picture in run)


@pytest.mark.gpu
def test_a_new_prompt_replays_on_a_gpu(checkpoint, device):
    eager = qwen_fast.enable(stock(checkpoint, torch.bfloat16).to(device), cuda_graph=False)
    captured = qwen_fast.enable(stock(checkpoint, torch.bfloat16).to(device), cuda_graph=True)
    latents = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(3)).to(device, torch.bfloat16)
    for text in ("a red circle", "a", "a red one"):
        expected, actual = (draw(pipe, prompt=text, latents=latents, **GUIDED) for pipe in (eager, captured))
        assert (actual - expected).abs().max() <= 0.02 * expected.abs().max()
    assert qwen_fast.report(captured).calls["graph captures"] == 1


@pytest.mark.gpu
def test_behind_a_capture_that_fails_work_and_captures_go_on(device):
    values, weight = torch.zeros(8, 64, device=device), torch.ones(64, 64, device=device)

    def step():
        values.add_(torch.mm(values + 1, weight))

    def waits():
        step()
        values.sum().item()

    step()
    with pytest.raises(RuntimeError):
        graph.capture(waits, device)
    values.zero_()
    replay = graph.capture(step, device)
    step()  # takes and gives back memory and a workspace
    torch._C._cuda_clearCublasWorkspaces()
    spoilt = [torch.full((2**25,), float("nan"), device=device) for _ in range(4)]
    values.zero_()
    replay()
    assert torch.equal(values, torch.full_like(values, 64)) and len(spoilt) == 4
