"""Natively: pictures of several sizes in one call, blocks that Inductor compiled, modular pipelines."""

import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import stock
from support.modular import WORKFLOWS, small_references

pytestmark = pytest.mark.gpu

PROMPTS = ["a red circle", "two green squares on a hill by the sea, and a road", "x"]
CALL = {"negative_prompt": "blurry", "true_cfg_scale": 3.0, "num_inference_steps": 4, "output_type": "pt"}
SIZE = {"height": 96, "width": 64}


@pytest.fixture(autouse=True)
def _exact():
    with small_references(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def assert_near(actual, expected):
    assert expected.isfinite().all() and expected.std() > 0.01
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max(), (actual - expected).abs().max()


@pytest.mark.parametrize("options", [{}, {"modulation": "layers"}], ids=str)
def test_pictures_of_several_sizes(checkpoint, device, options):
    pipe = stock(checkpoint).to(device)
    sizes = [(64, 96), (96, 160), (48, 320)]
    call = CALL | {"output_type": "latent"}
    expected = [
        pipe(prompt, height=height, width=width, generator=generators([n]), **call).images[0]
        for n, (prompt, (height, width)) in enumerate(zip(PROMPTS, sizes, strict=True))
    ]
    qwen_fast.enable(pipe, **options)
    heights, widths = zip(*sizes, strict=True)
    for _ in range(2):
        drawn = pipe(PROMPTS, height=list(heights), width=list(widths), generator=generators(range(3)), **call).images
        for one, other in zip(drawn, expected, strict=True):
            assert_near(one, other)


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_blocks_that_inductor_compiled(checkpoint, device, cuda_graph, whole):
    pipe = stock(checkpoint).to(device)
    call = CALL | {"output_type": "latent"}
    expected = [pipe(PROMPTS[n], generator=generators([n]), **call, **SIZE).images for n in range(2)]
    if whole:
        pipe.transformer.compile(fullgraph=True)
    else:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    qwen_fast.enable(pipe, cuda_graph=cuda_graph)
    for n in (0, 0, 1, 0):
        assert_near(pipe(PROMPTS[n], generator=generators([n]), **call, **SIZE).images, expected[n])
    report = qwen_fast.report(pipe)
    assert report.calls["compiled block"] and not report.fallbacks
    assert (pipe.fast_state.graph is None) is cuda_graph, pipe.fast_state.graph


@pytest.mark.parametrize("name", ["text", "edit plus"])
def test_a_modular_pipeline(checkpoint, device, name):
    workflow = WORKFLOWS[name]
    pipe = workflow.pipe(checkpoint)
    pipe.to(device)
    expected = workflow.draw(pipe)
    qwen_fast.enable(pipe)
    for _ in range(3):
        assert_near(workflow.draw(pipe), expected)
    assert qwen_fast.report(pipe).calls["packed transformer"] and not qwen_fast.report(pipe).fallbacks
