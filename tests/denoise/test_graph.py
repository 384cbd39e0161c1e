"""Steps captured in CUDA graphs: what is captured, what is re-used, what forbids it.

There is no GPU here, so `capture` is replaced: the stand-in keeps the step and runs it at each replay, on the static buffers
alone. That shows everything but the capture itself, which the tests marked `gpu` at the end show.
"""

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


@pytest.fixture
def captures(monkeypatch) -> list:
    """Each captured step, with its number of replays."""
    monkeypatch.setattr(graph, "AUTO", True)
    log = []

    def capture(step, rewind, device):
        for _ in range(3):  # as the real one; an index beyond the schedule is an error on the CPU too
            rewind()
            step()
        log.append(0)
        index = len(log) - 1

        def replay():
            log[index] += 1
            step()

        return replay

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(graph, "DEVICES", ("cpu", "cuda"))
    return log


@pytest.fixture
def pair(checkpoint):
    return stock(checkpoint), qwen_fast.enable(stock(checkpoint), cuda_graph=True)


@pytest.mark.parametrize("modulation", ["auto", "layers"])
@pytest.mark.parametrize("arguments", [SMALL, GUIDED, GUIDED | {"num_inference_steps": 1, "sigmas": [0.9]}], ids=len)
def test_the_picture_is_stocks(pair, captures, arguments, modulation):
    qwen_fast.enable(pair[1], cuda_graph=True, modulation=modulation)
    steps = 1 if "sigmas" in arguments else 4
    for run in (1, 2, 3):
        assert_same_latents(draw(pair[1], **PROMPT, **arguments), draw(pair[0], **PROMPT, **arguments))
        assert captures == [run * steps]
    report = qwen_fast.report(pair[1])
    forward = "packed transformer" if "negative_prompt" in arguments else "transformer"
    assert report.calls[forward] == 3 * steps and report.calls["graph captures"] == 1 and not report.fallbacks


def test_a_new_prompt_of_the_same_bucket_takes_the_same_graph(pair, captures):
    """Longer and shorter ones by turns: a row that an earlier prompt left behind must not be seen."""
    texts = ["a red circle on a", "a", "a red circle", ""]
    lengths = {pair[0].encode_prompt(text)[0].shape[1] for text in texts}
    assert len(lengths) == 4 and {graph.bucket(length) for length in lengths} == {16, 32} - {32 * (max(lengths) <= 16)}
    for text in texts:
        assert_same_latents(draw(pair[1], prompt=text, **GUIDED), draw(pair[0], prompt=text, **GUIDED))
    assert len(captures) == len({graph.bucket(length) for length in lengths})


def test_prompts_of_different_lengths_in_a_batch(pair, captures):
    arguments = GUIDED | {"prompt": ["a red circle", "two green squares on a hill"], "negative_prompt": ["x", "low quality"]}
    for seed in (1, 2):
        assert_same_latents(draw(pair[1], seed, **arguments), draw(pair[0], seed, **arguments))
    assert captures == [8]


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
    "guidance scale": {"true_cfg_scale": 2.0},
    "schedule": {"num_inference_steps": 3},
    "batch": {"num_images_per_prompt": 2},
    "bucket": {"prompt": "a much longer prompt with many more words than before"},
}


@pytest.mark.parametrize("name", OTHER_CALLS)
def test_other_calls_take_a_graph_of_their_own(pair, captures, name):
    other = GUIDED | PROMPT | OTHER_CALLS[name]
    for arguments in (PROMPT | GUIDED, other, PROMPT | GUIDED, other):
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert len(captures) == 2
    assert len(pair[1].transformer.__dict__[ATTACHED].graphs) == 2


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
    before = draw(pair[1], **PROMPT, **GUIDED)
    for pipe in pair:
        change(pipe)
    expected = draw(pair[0], **PROMPT, **GUIDED)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), expected)
    assert len(captures) == 2


def test_lora_scales_are_part_of_the_key(pair, captures):
    for pipe in pair:
        add_lora(pipe)
    for scale in (1.0, 0.3, 1.0):
        for pipe in pair:
            pipe.transformer.set_adapters(["a"], [scale])
        assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), draw(pair[0], **PROMPT, **GUIDED))
    assert captures == [8, 4]


def forbid_callback(pipe):
    return {"callback_on_step_end": lambda pipe, i, t, tensors: {}}


def forbid_cache(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))


def forbid_hook(pipe):
    pipe.transformer.register_forward_pre_hook(lambda module, args: None)


def forbid_processor(pipe):
    class Own(diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0):
        pass

    pipe.transformer.transformer_blocks[0].attn.set_processor(Own())


def forbid_option(pipe):
    qwen_fast.enable(pipe, cuda_graph=False)


def forbid_backend(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor._attention_backend = "native"


def forbid_hook_on_a_layer(pipe):
    pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: None)


def forbid_diffusers_attention(pipe):
    qwen_fast.enable(pipe, cuda_graph=True, attention="diffusers")


REASONS = {
    forbid_hook_on_a_layer: "or a layer",
    forbid_diffusers_attention: "attention='diffusers'",
    forbid_callback: "a callback",
    forbid_cache: "hooks, caches",
    forbid_hook: "a hook on the transformer",
    forbid_processor: "custom attention processors",
    forbid_option: "cuda_graph=False",
    forbid_backend: "an attention backend",
}


@pytest.mark.parametrize("forbid", REASONS)
def test_bypassed_and_said_so(pair, captures, forbid):
    draw(pair[1], **PROMPT, **GUIDED)
    others = forbid(pair[1]) or {}
    actual = draw(pair[1], **PROMPT, **GUIDED, **others)
    assert_same_latents(actual, draw(pair[0], **PROMPT, **GUIDED))
    assert captures == [4], "a graph was replayed"
    assert REASONS[forbid] in pair[1].fast_state.graph and REASONS[forbid] in str(qwen_fast.report(pair[1]))


def test_a_graph_keeps_what_it_reads(pair, captures):
    """A replay reads the table and the timesteps by address, whatever the caches forget."""
    draw(pair[1], **PROMPT, **GUIDED)
    attachment = pair[1].transformer.__dict__[ATTACHED]
    (captured,) = attachment.graphs.values()
    timesteps, table = captured._read
    assert timesteps.numel() == 4 and len(table.values) == 4


def test_memory_too_short_for_one_forward(pair, captures, monkeypatch):
    monkeypatch.setattr("qwen_fast.denoise.denoiser.fits_in_memory", lambda *_: False)
    assert_same_latents(draw(pair[1], **PROMPT, **GUIDED), draw(pair[0], **PROMPT, **GUIDED))
    assert not captures and "memory is too short" in pair[1].fast_state.graph


@pytest.mark.parametrize(
    ("height", "guided", "captured"), [(1536, {}, True), (1552, {}, False), (768, GUIDED, True), (784, GUIDED, False)]
)
def test_auto_decides_by_the_image_tokens_of_a_step(checkpoint, captures, monkeypatch, height, guided, captured):
    pipe = qwen_fast.enable(stock(checkpoint))
    monkeypatch.setattr(graph.CapturedStep, "run", lambda self, state: self.latents)
    monkeypatch.setattr(
        "qwen_fast.denoise.denoiser.Forwards.predict", lambda self, latents: (latents,) * len(self.task.prompts)
    )
    draw(pipe, **PROMPT, **(SMALL | guided | {"height": height, "width": 512, "num_inference_steps": 2}))
    assert bool(captures) is captured and (pipe.fast_state.graph is None) is captured


@pytest.mark.parametrize("attention", ["flash", "diffusers"])
def test_an_attention_that_was_named_is_not_replaced_in_a_graph(checkpoint, captures, attention):
    pipe = qwen_fast.enable(stock(checkpoint), attention=attention, cuda_graph=True)
    draw(pipe, **PROMPT, **SMALL)
    assert not captures and f"attention='{attention}' cannot read" in pipe.fast_state.graph


def test_auto_takes_no_graph_for_now(checkpoint, captures, monkeypatch):
    monkeypatch.setattr(graph, "AUTO", False)
    pipe = qwen_fast.enable(stock(checkpoint))
    draw(pipe, **PROMPT, **SMALL)
    assert not captures and "cuda_graph=True captures" in pipe.fast_state.graph


def test_without_a_gpu_nothing_is_captured(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint), cuda_graph=True)
    draw(pipe, **PROMPT, **SMALL)
    assert pipe.fast_state.graph == "the device is cpu"


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
    run = graph.CapturedStep.run

    def marked(self, state):
        with recorder:
            marks.append(len(recorder.calls))
            return run(self, state)

    monkeypatch.setattr(graph.CapturedStep, "run", marked)
    draw(pair[1], **PROMPT, **GUIDED)
    steps = [recorder.calls[start:stop] for start, stop in zip(marks, [*marks[1:], None], strict=True)]
    persistent = set.intersection(*({address for _, own, _ in step for address in own} for step in steps))
    names = [[name for name, _, _ in step] for step in steps]
    assert len(steps) == 4 and names[1:] == names[:-1]
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(names[0])
    captured = next(iter(pair[1].transformer.__dict__[ATTACHED].graphs.values()))
    pack = captured.pack
    for static in (
        captured.latents,
        captured.sigmas,
        captured.step_index,
        pack.layout.rope,
        pack.layout.spans,
        pack.text,
    ):
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
