"""Graphs of calls whose prompts have adapters of their own: what differs between them is in the key, or in the buffers."""

import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, stock
from qwen_fast.transformer import modulation
from support.adapters import BASE, WEIGHTS, only, with_adapters
from support.emulated_cuda import StepsBar, notes
from support.family import MEMBERS, small_references
from support.pipelines import GUIDED

PROMPTS = ["a red circle", "two green squares on a hill"]
ENTRIES = {"first": ["style", ["speed", "thing"]], "second": ["speed", "style"], "none": [BASE, "speed"], "all": None}


def draw(pipe, prompts=PROMPTS, seed: int = 0, entries=None, scale: float = 1.0):
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(prompts))]
    kwargs = {"scale": scale} | ({} if entries is None else {"adapter_names": entries})
    return pipe(prompt=prompts, generator=generators, attention_kwargs=kwargs, **GUIDED).images


@pytest.mark.parametrize(("modulations", "modulation"), [(False, "auto"), (True, "auto"), (True, "layers")])
def test_calls_by_turns(checkpoint, captures, modulations, modulation):
    """Other names, another scale and none at all take other graphs; other prompts and seeds replay them."""
    pipe, fast = stock(checkpoint), stock(checkpoint)
    for one in (pipe, fast):
        with_adapters(one.transformer, modulations=modulations)
    qwen_fast.enable(fast, cuda_graph=True, modulation=modulation)
    expected, reference = {}, {}
    for name, entries in ENTRIES.items():
        for n, entry in enumerate(entries or ["thing"] * 2):
            only(pipe.transformer, entry)
            expected[name, n] = draw(pipe, PROMPTS[n : n + 1], n)
    for _ in range(3):
        for name, entries in ENTRIES.items():
            drawn = draw(fast, entries=entries)
            for n in range(2):
                assert_same_latents(drawn[n : n + 1], expected[name, n])
            assert torch.equal(reference.setdefault(name, drawn), drawn), "captured, replayed or neither"
    assert captures == [7] * len(ENTRIES) and fast.fast_state.graph is None
    only(pipe.transformer, "style")
    other = draw(fast, [PROMPTS[1], "a"], entries=ENTRIES["first"])
    assert_same_latents(other[:1], draw(pipe, PROMPTS[1:]))
    fast.transformer.set_adapters(["style"], [0.2])
    pipe.transformer.set_adapters(["style"], [0.2])
    weaker = draw(fast, entries=ENTRIES["first"], scale=0.5)
    assert_same_latents(weaker[:1], draw(pipe, PROMPTS[:1], scale=0.5))
    assert len(captures) == len(ENTRIES), "another weight and another scale are baked into no graph that is kept"
    assert WEIGHTS["style"] != 0.2


@pytest.mark.triton
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_an_emulated_device_without_a_wait(checkpoint, emulated_cuda, cuda_graph):
    seen, entries = emulated_cuda.notes, ENTRIES["first"]
    pipes = stock(checkpoint), stock(checkpoint)
    for pipe in pipes:
        with_adapters(pipe.transformer, modulations=True)
    expected = draw(qwen_fast.enable(pipes[0]), entries=entries)
    pipe = qwen_fast.enable(pipes[1].to("cuda"), cuda_graph=cuda_graph)
    pipe.progress_bar = StepsBar(seen)
    for _ in range(3):
        seen.clear()
        seen.phase = "before"
        images = draw(pipe, entries=entries)
        assert images.device.type == "cuda"
        assert (images.cpu() - expected).abs().max() <= 2e-5 * expected.abs().max()
        wrong = notes.MIXED, notes.ILLEGAL, notes.RACE, notes.FIRST
        assert not seen.of(*wrong), seen.counted(*wrong)
        kinds = (notes.SYNC, notes.TO_DEVICE, notes.TO_HOST, notes.QUERY)
        later = [note for note in seen.of(*kinds, phase="step") if note.phase != "step 0"]
        allowed = "qwen_fast/denoise/watch.py", "qwen_fast/denoise/graph.py"
        assert not [str(note) for note in later if not any(part in note.where for part in allowed)]
    assert not qwen_fast.report(pipe).fallbacks and (pipe.fast_state.graph is None) is cuda_graph


def test_tables_are_computed_once_a_call_and_not_in_its_steps(checkpoint, captures, monkeypatch):
    """A table for each set of adapters, whose rows the graph's buffer gets."""
    pipe = stock(checkpoint)
    with_adapters(pipe.transformer, modulations=True)
    qwen_fast.enable(pipe, cuda_graph=True)
    tables, compute = [], modulation.compute_table
    monkeypatch.setattr(modulation, "compute_table", lambda *arguments: tables.append(1) or compute(*arguments))
    for _ in range(3):
        tables.clear()
        draw(pipe, entries=["speed", "thing"])
        assert len(tables) == 2
    assert len(captures) == 1 and pipe.fast_state.graph is None


def test_layered(checkpoint, captures):
    """Its condition is in the tables."""
    member = MEMBERS["layered"]
    with small_references():
        pipe = member.pipe(checkpoint)
        with_adapters(pipe.transformer, modulations=True)
        only(pipe.transformer, "speed")
        expected = member.draw(pipe)
        qwen_fast.enable(pipe, cuda_graph=True)
        for _ in range(3):
            member.assert_same(member.draw(pipe, attention_kwargs={"adapter_names": ["speed"]}), expected)
