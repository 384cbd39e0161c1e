"""Every pipeline and option on an emulated CUDA device: the CPU's pictures, and nothing in a step that makes the host wait."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, in_fp32, stock
from qwen_fast import QwenImageTransformer2DModel
from qwen_fast.denoise import denoiser, graph
from qwen_fast.vae.bands import choose
from qwen_fast.vae.layers import decoder_layers
from support.emulated_cuda import StepsBar, notes
from support.pipelines import GUIDED, assert_ran_fast

PROMPT = {"prompt": "a red circle"}
PICTURE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8))
MASK = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 2, (64, 96), dtype=np.uint8) * 255)
IMAGE = {"image": PICTURE, "strength": 0.9}
TWO = {"prompt": ["a red circle", "two green squares on a hill"], "negative_prompt": ["x", "low quality"]}
CAPTURES = "qwen_fast/denoise/graph.py"  # waits once, for the memory of finished work
PACE = "qwen_fast/denoise/watch.py"  # the host stays two steps ahead of the device, by events
STOCK_INPAINT = ("pipeline_qwenimage_inpaint.py", "scheduling_flow_match_euler_discrete.py")


def add_lora(pipe: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["to_q", "net.0.proj", "proj_out"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="a")


@dataclass
class Case:
    """A pipeline, its options, and what is known to make the host wait from step 1 on.

    Attributes:
        options: of `enable`.
        arguments: of the call.
        prepare: done to the stock pipeline first.
        graph: whether the steps are captured.
        waits: parts of the places where the host waits all the same, and why that has to be.
    """

    options: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    cls: type = diffusers.QwenImagePipeline
    prepare: Callable[[Any], None] = lambda pipe: None
    graph: bool = False
    waits: tuple[str, ...] = ()


def graphed(arguments: dict | None = None, **others: Any) -> Case:
    options = {"cuda_graph": True} | others.pop("options", {})
    return Case(options, arguments or {}, graph=True, **others)


def eager(arguments: dict | None = None, **others: Any) -> Case:
    options = {"cuda_graph": False} | others.pop("options", {})
    return Case(options, arguments or {}, **others)


def keep_out(pipe, step, timestep, tensors):
    return {}


CASES = {
    "as it comes": Case(graph=True),
    "graph": graphed(),
    "eager": eager(),
    "picture": graphed({"output_type": "pt"}),
    "eager picture": eager({"output_type": "pt"}),
    "unguided": graphed({"negative_prompt": None, "true_cfg_scale": 1.0}),
    "weights on the host": graphed(options={"modulation": "host"}),
    "eager, weights on the host": eager(options={"modulation": "host"}),
    "layers": graphed(options={"modulation": "layers"}),
    "eager layers": eager(options={"modulation": "layers"}),
    "our attention": eager(options={"attention": "triton"}),
    "diffusers' attention": eager(options={"attention": "diffusers"}),
    "precise sampler": graphed(options={"precise_sampler": True}),
    "check_nan": graphed(options={"check_nan": True}),
    "eager check_nan": eager(options={"check_nan": True}),
    "no prompt cache": graphed(options={"prompt_cache": None}),
    "encoder offloaded": graphed(options={"text_encoder_mode": "offload"}),
    "encoder freed": graphed(options={"text_encoder_mode": "free"}),
    "diffusers' VAE": eager({"output_type": "pt"}, options={"vae_mode": "diffusers"}),
    "VAE in bands": eager({"output_type": "pt", "height": 128}, options={"vae_memory": 2**20}),
    "batch": graphed(TWO),
    "eager batch": eager(TWO),
    "batch apart": graphed(TWO, options={"batch_invariant": True}),
    "eager batch apart": eager(TWO | {"output_type": "pt"}, options={"batch_invariant": True}),
    "two of one": graphed({"num_images_per_prompt": 2}),
    "own sigmas": graphed({"sigmas": [1.0, 0.7, 0.3]}),
    "one step": graphed({"sigmas": [0.9], "num_inference_steps": 1}),
    "LoRA": graphed(prepare=add_lora),
    "eager LoRA": eager(prepare=add_lora),
    "LoRA scale": graphed({"attention_kwargs": {"scale": 0.5}}, prepare=add_lora),
    "callback": eager({"callback_on_step_end": keep_out}),
    "callback, weights on the host": eager({"callback_on_step_end": keep_out}, options={"modulation": "host"}),
    "image to image": graphed(IMAGE, cls=diffusers.QwenImageImg2ImgPipeline),
    "eager image to image": eager(IMAGE, cls=diffusers.QwenImageImg2ImgPipeline),
    "image to image, two": graphed(IMAGE | {"num_images_per_prompt": 2}, cls=diffusers.QwenImageImg2ImgPipeline),
    # diffusers' own loop looks each step's timestep up and adds noise to the picture anew.
    "inpaint": graphed(IMAGE | {"mask_image": MASK}, cls=diffusers.QwenImageInpaintPipeline, waits=STOCK_INPAINT),
}  # fmt: skip


def made(case: Case, checkpoint, dtype: torch.dtype = torch.float32):
    pipe = stock(checkpoint, dtype, case.cls)
    case.prepare(pipe)
    return pipe


def arguments_of(case: Case) -> dict:
    arguments = GUIDED | PROMPT | case.arguments
    return {name: value for name, value in arguments.items() if value is not None}


def assert_nothing_wrong(seen: notes.Notes) -> None:
    wrong = notes.MIXED, notes.ILLEGAL, notes.RACE, notes.FIRST
    assert not seen.of(*wrong), seen.counted(*wrong)


def assert_steps_go_on(seen: notes.Notes, allowed: tuple[str, ...] = ()) -> None:
    """From step 1 on the host waits for nothing but the pace, copies nothing, asks nothing."""
    kinds = (notes.SYNC, notes.TO_DEVICE, notes.TO_HOST, notes.QUERY, notes.CAPTURE)
    later = [note for note in seen.of(*kinds, phase="step") if note.phase != "step 0"]
    assert not [str(note) for note in later if not any(part in note.where for part in allowed)]
    assert all(note.where.startswith(PACE) for note in seen.of(notes.EVENT, phase="step") if note.phase != "step 0")


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As the contract of whole runs has it, with room for products that depend on their rows, and for a VAE behind them."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape and actual.isfinite().all()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max(), (actual - expected).abs().max()


@pytest.mark.triton
@pytest.mark.parametrize("name", CASES)
def test_the_cpus_picture_without_a_wait(checkpoint, emulated_cuda, name):
    case = CASES[name]
    arguments, seen = arguments_of(case), emulated_cuda.notes
    expected = draw(qwen_fast.enable(made(case, checkpoint), **case.options), **arguments)
    pipe = qwen_fast.enable(made(case, checkpoint).to("cuda"), **case.options)
    pipe.progress_bar = StepsBar(seen)
    taken, captured_in = [], 2 if name == "one step" else 1  # behind a step that warms up
    for call in range(4):
        seen.clear()
        seen.phase = "before"
        images = draw(pipe, **arguments)
        assert images.device.type == "cuda"
        assert_near(images.cpu(), expected)
        assert_nothing_wrong(seen)
        captures = case.graph and call == captured_in
        assert_steps_go_on(seen, (*case.waits, CAPTURES) if captures else case.waits)
        assert bool(seen.of(notes.CAPTURE)) is captures
        del images
        taken.append(emulated_cuda.memory.allocated)
    assert taken[2] == taken[3], "a call leaves memory behind"
    assert_ran_fast(pipe)
    if case.cls is diffusers.QwenImagePipeline:
        assert (pipe.fast_state.graph is None) is case.graph, pipe.fast_state.graph
    assert seen.of(notes.LAUNCH) or case.graph, "no kernel of ours was launched"


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["graph", "eager", "layers", "image to image"])
def test_halves_are_as_near_as_stock_on_the_cpu(checkpoint, emulated_cuda, dtype, name):
    case = CASES[name]
    arguments = arguments_of(case)
    pipe = made(case, checkpoint, dtype)
    expected = draw(pipe, **arguments)
    exact = in_fp32(pipe, 7, dtype, **arguments) if case.cls is diffusers.QwenImagePipeline else None
    actual = draw(qwen_fast.enable(pipe.to("cuda"), **case.options), **arguments).cpu()
    if exact is None:
        assert (actual - expected).abs().max() <= 0.04 * expected.abs().max()
    else:
        assert_same_latents(actual, expected, exact)
    assert_nothing_wrong(emulated_cuda.notes)


@pytest.mark.triton
def test_a_new_prompt_replays_without_a_capture(checkpoint, emulated_cuda):
    seen = emulated_cuda.notes
    pipe, reference = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=True), qwen_fast.enable(stock(checkpoint))
    pipe.progress_bar = StepsBar(seen)
    for count, prompt in enumerate(["a red circle", "a", "a red one", ""]):
        seen.clear()
        arguments = GUIDED | {"prompt": prompt}
        assert_near(draw(pipe, **arguments).cpu(), draw(reference, **arguments))
        assert bool(seen.of(notes.CAPTURE)) is (count == 1)
        assert_steps_go_on(seen, (CAPTURES,) if count == 1 else ())
    assert_nothing_wrong(seen)


@pytest.mark.triton
@pytest.mark.parametrize("offload", ["model", "sequential", "block_level", "block_level stream", "leaf_level"])
def test_offloaded(checkpoint, emulated_cuda, offload):
    """Weights that come and go: the host may wait for them, but nothing mixes and no stream overtakes another."""
    arguments = GUIDED | PROMPT
    expected = draw(qwen_fast.enable(stock(checkpoint)), **arguments)
    pipe = stock(checkpoint)
    if offload == "model":
        pipe.enable_model_cpu_offload(device="cuda")
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device="cuda")
    else:
        level, _, stream = offload.partition(" ")
        blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
        places = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
        pipe.transformer.enable_group_offload(**places, offload_type=level, use_stream=bool(stream), **blocks)
        pipe.vae.to("cuda")
        pipe.text_encoder.to("cuda")
    pipe = qwen_fast.enable(pipe)
    for _ in range(2):
        assert_near(draw(pipe, **arguments).cpu(), expected)
    assert_nothing_wrong(emulated_cuda.notes)


@pytest.mark.triton
def test_memory_too_short_for_one_forward(checkpoint, emulated_cuda):
    arguments = GUIDED | PROMPT | {"width": 128, "height": 128}
    expected = draw(qwen_fast.enable(stock(checkpoint)), **arguments)
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=False)
    draw(pipe, **arguments)
    emulated_cuda.memory.total = emulated_cuda.memory.allocated + 500_000
    assert_near(draw(qwen_fast.enable(pipe, cuda_graph=True), **arguments).cpu(), expected)
    assert "memory is too short" in pipe.fast_state.graph and pipe.fast_state.calls["transformer"]
    assert_nothing_wrong(emulated_cuda.notes)


@pytest.mark.triton
@pytest.mark.parametrize("size", [16, 32])
def test_the_vae_takes_the_memory_that_it_says(checkpoint, emulated_cuda, size):
    """Its plan is made from its layers' own estimates; the device counts what is really alive."""
    vae = stock(checkpoint).vae.to("cuda")
    latents = torch.randn(1, 16, 1, size, size, generator=torch.Generator().manual_seed(0)).to("cuda")
    pictures = []
    for memory in (None, 2**22, 2**21, 2**20):
        qwen_fast.enable_vae(vae, memory=memory)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            pictures.append(vae.decode(latents).sample)
        taken = torch.cuda.max_memory_allocated() - before
        layers, shape = decoder_layers(vae), latents[:, :, 0].shape
        plan = choose(layers, shape, 4, memory)
        assert 0.95 * plan.peak <= taken <= 1.05 * plan.peak, (plan, taken)
        assert plan.bands > 1 or memory is None or memory >= taken
    for picture in pictures[1:]:
        torch.testing.assert_close(picture, pictures[0], rtol=0, atol=2e-5)


@pytest.mark.triton
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_pictures_side_by_side(checkpoint, emulated_cuda, cuda_graph):
    """A picture is decoded on a second stream, in a second thread, while the next one denoises."""
    prompts = ["a red circle", "a", "two green squares"]
    settings = GUIDED | {"output_type": "pt"}
    reference = qwen_fast.enable(stock(checkpoint))
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=cuda_graph)
    for index, picture in enumerate(qwen_fast.generate(pipe, prompts, seed=3, **settings)):
        alone = {"prompt": prompts[index], "seed": 3 + index} | settings
        assert picture.index == index and torch.equal(picture.image, draw(pipe, **alone)[0])  # while the next is decoded
        assert_near(picture.image.cpu(), draw(reference, **alone)[0])
    assert_nothing_wrong(emulated_cuda.notes)


@pytest.mark.triton
def test_straight_to_the_device(checkpoint, emulated_cuda):
    """Modulation weights that rest on the host never come to the device, and disabling brings them there."""
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, device="cuda", dtype=torch.float32, modulation="host")
    pipe.set_progress_bar_config(disable=True)
    module = pipe.transformer.transformer_blocks[0].img_mod[1]
    assert pipe.vae.device.type == "cuda" and module.weight.device.type == "cpu" and module.weight.is_pinned()
    expected = draw(stock(checkpoint), **GUIDED, **PROMPT)
    assert_near(draw(pipe, **GUIDED, **PROMPT).cpu(), expected)
    qwen_fast.disable(pipe)
    assert module.weight.is_cuda
    assert_near(draw(pipe, **GUIDED, **PROMPT).cpu(), expected)
    assert_nothing_wrong(emulated_cuda.notes)


@pytest.mark.triton
@pytest.mark.parametrize("modulation", ["auto", "host"])
def test_two_pipelines_of_one_model(checkpoint, emulated_cuda, modulation):
    """Ours and a stock one share a transformer; where its modulation weights rest on the host, stock's forward brings them."""
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=True, modulation=modulation)
    other = diffusers.QwenImagePipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    expected = draw(stock(checkpoint), **GUIDED, **PROMPT)
    for one in (pipe, other, pipe, other):
        assert_near(draw(one, **GUIDED, **PROMPT).cpu(), expected)
    assert_nothing_wrong(emulated_cuda.notes)


@pytest.mark.triton
def test_a_prompt_encoded_on_the_cpu_by_weights_on_the_device(checkpoint, emulated_cuda):
    """The weights' copies are there before the CPU reads them."""
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"))
    with torch.no_grad():
        (actual, _), (expected, _) = (
            one.encode_prompt("a cat", device=torch.device("cpu")) for one in (pipe, stock(checkpoint))
        )
    torch.testing.assert_close(actual, expected)


# Seeded faults: each of them would be invisible on a CPU, and none of them is here. ------------------------------------


def a_value_is_asked_for(monkeypatch):
    step = QwenImageTransformer2DModel.predict

    def asked(self, call, latents, timestep, prompts, **others):
        timestep.item()
        return step(self, call, latents, timestep, prompts, **others)

    monkeypatch.setattr(QwenImageTransformer2DModel, "predict", asked)


def a_constant_is_made_in_the_loop(monkeypatch):
    step = denoiser.sampler_step

    def scaled(state, latents, *others):
        return step(state, latents * torch.tensor([1.0]).to(latents.device, latents.dtype), *others)

    monkeypatch.setattr(denoiser, "sampler_step", scaled)


@pytest.mark.triton
@pytest.mark.parametrize("fault", [a_value_is_asked_for, a_constant_is_made_in_the_loop])
def test_a_wait_in_the_loop_is_seen(checkpoint, emulated_cuda, monkeypatch, fault):
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=False)
    pipe.progress_bar = StepsBar(emulated_cuda.notes)
    fault(monkeypatch)
    draw(pipe, **GUIDED, **PROMPT)
    with pytest.raises(AssertionError, match="qwen_fast/denoise/watch.py|tests/pipelines/test_emulated"):
        assert_steps_go_on(emulated_cuda.notes)


@pytest.mark.triton
def test_a_value_asked_for_in_a_capture_is_seen(checkpoint, emulated_cuda, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=True)
    expected = draw(pipe, **GUIDED, **PROMPT)
    a_value_is_asked_for(monkeypatch)
    assert torch.equal(draw(pipe, **GUIDED, **PROMPT), expected)  # the capture fails, the picture does not
    assert pipe.fast_state.calls["graph captures that failed"] == 1 and emulated_cuda.notes.of(notes.ILLEGAL)


@pytest.mark.triton
def test_a_buffer_that_a_graph_reads_and_nobody_keeps_is_seen(checkpoint, emulated_cuda):
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=True)
    for _ in range(2):
        draw(pipe, **GUIDED, **PROMPT)
    (kept,) = pipe.transformer.__dict__["_qwen_fast_attachment"].graphs.values()
    kept.sigmas = torch.empty_like(kept.sigmas)
    with pytest.raises(RuntimeError, match="freed since the capture"):
        draw(pipe, **GUIDED, **PROMPT)


@pytest.mark.triton
def test_a_buffer_that_is_not_loaded_again_is_seen(checkpoint, emulated_cuda, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=True)
    for _ in range(2):
        expected = draw(pipe, **GUIDED, **PROMPT).clone()
    run = graph.StepGraph.run
    monkeypatch.setattr(graph.StepGraph, "run", lambda self, index, row, latents: run(self, index, row, self.latents))
    assert (draw(pipe, **GUIDED, **PROMPT) - expected).abs().max() > 0.1


@pytest.mark.triton
def test_a_stream_that_is_not_waited_for_is_seen(checkpoint, emulated_cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
    pipe = qwen_fast.enable(stock(checkpoint).to("cuda"), cuda_graph=False, modulation="host")
    list(qwen_fast.generate(pipe, ["a", "a red circle", "x"], **GUIDED | {"output_type": "pt"}))
    assert emulated_cuda.notes.of(notes.RACE)
