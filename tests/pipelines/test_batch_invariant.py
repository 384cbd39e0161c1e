"""`batch_invariant`: a picture is the same to the bit alone and in any batch, where every product, convolution, attention and
reduction depends on all its sizes; and without the option it is not, so that these tests can fail."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

import qwen_fast
from benchmarks.ladder.models import call_arguments, random_pipeline
from benchmarks.shared.shapes import PictureCase, Shape
from benchmarks.shared.stock import stock
from support.family import HIGH, MASK, MEMBERS, WIDE, small_references

PROMPTS = ("a red circle", "two green squares on a hill, and a rather long tail of words", "x")
NEGATIVES = ("", "low quality", "blurry and dull")
CALL = {"height": 32, "width": 48, "num_inference_steps": 2, "true_cfg_scale": 3.7, "output_type": "pt"}
EAGER, GRAPH = {"cuda_graph": False}, {"cuda_graph": True}
IMAGES = (WIDE, HIGH, WIDE.rotate(90))
IMAGE = {"image": IMAGES, "strength": 1.0}
INPAINT = IMAGE | {"mask_image": MASK}


@pytest.fixture
def by_shape(device) -> Iterator[None]:
    """An emulated GPU whose every result depends on the sizes of what goes in."""
    if device.type == "cuda":
        pytest.skip("with a GPU the tests marked gpu take its place")
    from support.emulated_cuda import emulated_cuda

    with emulated_cuda(shapes_show=True) as emulated:
        yield emulated


def add_lora(pipe: Any, **others: Any) -> None:
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    torch.manual_seed(0)
    targets = ["to_q", "add_v_proj", "img_mlp.net.2", "img_mod.1", "proj_out"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **others)
    pipe.transformer.add_adapter(config, adapter_name="a")


@dataclass
class Case:
    options: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    cls: type = diffusers.QwenImagePipeline
    prepare: Callable[[Any], None] = lambda pipe: None


CASES = {
    "graph": Case(GRAPH),
    "eager": Case(EAGER),
    "latents": Case(GRAPH, {"output_type": "latent"}),
    "unguided": Case(EAGER, {"true_cfg_scale": 1.0}),
    "layers": Case(EAGER | {"modulation": "layers"}),
    "our attention": Case(EAGER | {"attention": "triton", "precise_sampler": True}),
    "LoRA": Case(EAGER, prepare=add_lora),
    "LoRA layers that are called": Case(EAGER, prepare=lambda pipe: add_lora(pipe, use_dora=True)),
    "image to image": Case(GRAPH, IMAGE, diffusers.QwenImageImg2ImgPipeline),
    "inpaint": Case(EAGER, INPAINT, diffusers.QwenImageInpaintPipeline),
}  # fmt: skip


def enabled(checkpoint, case: Case, device="cuda", dtype=torch.float32, **options: Any):
    pipe = stock(checkpoint, dtype, case.cls)
    case.prepare(pipe)
    return qwen_fast.enable(pipe.to(device), **case.options | options)


def drawn(pipe: Any, case: Case, pictures: list[int], per_prompt: int = 1, **others: Any) -> torch.Tensor:
    """These pictures in one call; picture n of prompt p has the seed 10 * p + n."""
    generators = [torch.Generator().manual_seed(10 * one + n) for one in pictures for n in range(per_prompt)]
    prompts, negatives = ([texts[one] for one in pictures] for texts in (PROMPTS, NEGATIVES))
    arguments = CALL | {"prompt": prompts, "negative_prompt": negatives} | case.arguments | others
    if "image" in arguments:
        arguments["image"] = [IMAGES[one] for one in pictures for _ in range(per_prompt)]
    return pipe(generator=generators, num_images_per_prompt=per_prompt, **arguments).images


def assert_kept(pipe: Any) -> None:
    report = qwen_fast.report(pipe)
    assert report.calls and not report.fallbacks and not report.variant, str(report)
    assert "each picture by itself" in str(report) and "not kept" not in str(report)


@pytest.mark.triton
@pytest.mark.parametrize("name", CASES)
def test_alone_and_in_any_batch(checkpoint, by_shape, name):
    case = CASES[name]
    one, other = (enabled(checkpoint, case, batch_invariant=True) for _ in range(2))
    alone = [drawn(one, case, [n]) for n in range(3)]
    assert not torch.equal(alone[0], alone[1])
    for order in ([2, 0, 1], [0, 1]):
        batch = drawn(other, case, order)
        assert [torch.equal(picture, alone[n][0]) for n, picture in zip(order, batch, strict=True)] == [True] * len(order)
    assert (other.fast_state.graph is None) is (case.options is GRAPH), other.fast_state.graph
    for pipe in (one, other):
        assert_kept(pipe)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["graph", "unguided", "layers", "LoRA layers that are called", "inpaint"])
def test_without_it_a_picture_depends_on_its_batch(checkpoint, by_shape, name):
    """Of the same pipeline, so that even the prompts are the same."""
    case = CASES[name]
    pipe = enabled(checkpoint, case)
    alone = drawn(pipe, case, [0])
    assert torch.equal(drawn(pipe, case, [0]), alone)
    assert not torch.equal(drawn(pipe, case, [0, 1])[0], alone[0])


@pytest.mark.triton
def test_several_pictures_of_a_prompt(checkpoint, by_shape):
    case = CASES["graph"]
    one, other = (enabled(checkpoint, case, batch_invariant=True) for _ in range(2))
    batch = drawn(other, case, [1, 0], per_prompt=2)
    for place, (prompt, n) in enumerate((prompt, n) for prompt in (1, 0) for n in range(2)):
        alone = {"prompt": PROMPTS[prompt], "negative_prompt": NEGATIVES[prompt]}
        generator = torch.Generator().manual_seed(10 * prompt + n)
        assert torch.equal(one(generator=generator, **CALL, **alone).images[0], batch[place])


@pytest.mark.triton
def test_a_batch_replays_the_graphs_of_pictures_alone(checkpoint, by_shape):
    """Pictures whose texts get the same rows share one; a longer negative prompt has another."""
    case = CASES["graph"]
    pipe = enabled(checkpoint, case, batch_invariant=True)
    calls, negative = pipe.fast_state.calls, {"negative_prompt": "x"}
    alone = [drawn(pipe, case, [n], **negative) for n in (0, 0, 1, 2)][1:]  # the first one once more, captured
    assert calls["graph captures"] == 1
    assert torch.equal(drawn(pipe, case, [2, 1, 0], **negative), torch.cat(alone[::-1]))
    assert calls["graph captures"] == 1
    long = "a very long negative prompt of many words " * 2
    for _ in range(2):
        pictures = drawn(pipe, case, [0, 0], negative_prompt=["x", long])
    assert torch.equal(pictures[0], alone[0][0]) and calls["graph captures"] == 2
    assert torch.equal(pictures[1], drawn(pipe, case, [0], negative_prompt=long)[0])


@pytest.mark.triton
def test_a_callback_that_changes_a_prompt(checkpoint, by_shape):
    """What it changes of one picture leaves the others as they were."""

    def double(pipe, step, timestep, tensors):
        embeds = tensors["prompt_embeds"]
        return {"prompt_embeds": torch.cat([embeds[:1] * 2, embeds[1:]])} if step == 0 else {}

    for options in (GRAPH, EAGER):
        case = Case(options, {"callback_on_step_end": double, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]})
        pipe = enabled(checkpoint, case, batch_invariant=True)
        batch, changed = drawn(pipe, case, [0, 1]), drawn(pipe, case, [0])
        unchanged = drawn(pipe, case, [1], callback_on_step_end=lambda *_: {})
        assert torch.equal(batch[0], changed[0]) and torch.equal(batch[1], unchanged[0])


@pytest.mark.triton
def test_blocks_that_travel(checkpoint, by_shape):
    """Group offloading calls the transformer through its hooks, once for each picture."""
    case = Case(EAGER)
    pipe = stock(checkpoint)
    places = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
    pipe.transformer.enable_group_offload(**places, offload_type="block_level", num_blocks_per_group=1)
    for part in (pipe.vae, pipe.text_encoder):
        part.to("cuda")
    qwen_fast.enable(pipe, batch_invariant=True, strict=True)
    batch = drawn(pipe, case, [1, 0])
    assert all(torch.equal(drawn(pipe, case, [n])[0], batch[place]) for place, n in enumerate((1, 0)))
    assert torch.equal(drawn(enabled(checkpoint, case, batch_invariant=True), case, [0])[0], batch[1])


@pytest.mark.triton
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_what_a_callback_sees(checkpoint, by_shape, batch_invariant):
    names, seen = ["latents", "noise_pred", "noise_norm"], []
    watch = {"callback_on_step_end": lambda pipe, step, timestep, tensors: seen.append(tensors) or {}}
    case = Case(GRAPH, watch | {"callback_on_step_end_tensor_inputs": names})
    pipe = enabled(checkpoint, case, batch_invariant=batch_invariant)
    pipe._callback_tensor_inputs = names
    drawn(pipe, case, [1, 0])
    drawn(pipe, case, [0])
    for batch, alone in zip(seen[:2], seen[2:], strict=True):
        assert all(torch.equal(batch[name][1], alone[name][0]) for name in names) is batch_invariant


@pytest.mark.triton
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_an_edit(checkpoint, by_shape, batch_invariant):
    member = MEMBERS["edit"]
    with small_references():
        pipe = qwen_fast.enable(member.pipe(checkpoint).to("cuda"), batch_invariant=batch_invariant)
        generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
        batch = member.draw(pipe, generator=generators, num_images_per_prompt=2, output_type="pt")
        alone = member.draw(pipe, seed=4, output_type="pt")
    assert torch.equal(batch[1], alone[0]) is batch_invariant and not qwen_fast.report(pipe).variant


@pytest.mark.triton
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_edits_of_several_prompts(checkpoint, by_shape, batch_invariant):
    """Each with a picture of its own, as large as the others, since stock goes by the first; prompts of other lengths."""
    member, images, own = MEMBERS["edit"], [], (WIDE, WIDE.rotate(180))
    with small_references():
        one, other = (qwen_fast.enable(member.pipe(checkpoint).to("cuda"), batch_invariant=batch_invariant) for _ in range(2))
        for pipe, pictures in ((other, [1, 0]), (one, [0]), (one, [1])):
            prompts, negatives, references = ([those[n] for n in pictures] for those in (PROMPTS, NEGATIVES, own))
            generators = [torch.Generator().manual_seed(n) for n in pictures]
            given = {"prompt": prompts, "negative_prompt": negatives, "image": references, "generator": generators}
            images += member.draw(pipe, **given, output_type="pt")
    assert [torch.equal(*pair) for pair in zip(images[:2], images[:1:-1], strict=True)] == [batch_invariant] * 2
    assert not qwen_fast.report(other).variant


@pytest.mark.triton
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_prompts(checkpoint, by_shape, batch_invariant):
    """Encoded alone and with others, of other lengths and of the same, and those from a cache that has seen either."""
    case, prompts = Case({"batch_invariant": batch_invariant}), [*PROMPTS, "y"]
    first, second = (enabled(checkpoint, case) for _ in range(2))
    with torch.no_grad():
        alone = [first.encode_prompt(prompt)[0] for prompt in prompts]
        others = first.encode_prompt(prompts), second.encode_prompt(prompts), second.encode_prompt(prompts[2:])
    assert alone[2].shape == alone[3].shape
    for embeds, mask in others[:2]:
        equal = [torch.equal(row[own.bool()], one[0]) for row, own, one in zip(embeds, mask, alone, strict=True)]
        assert all(equal) is batch_invariant
    embeds, mask = others[2]
    assert mask is None and all(torch.equal(row, one[0]) for row, one in zip(embeds, alone[2:], strict=True)) is batch_invariant


@pytest.mark.triton
def test_a_prompt_kept_by_another_setting_is_not_taken(checkpoint, by_shape, tmp_path):
    kept = {"prompt_cache": tmp_path}
    with torch.no_grad():
        enabled(checkpoint, Case(kept)).encode_prompt([PROMPTS[1], NEGATIVES[1]])
        actual = enabled(checkpoint, Case(kept | {"batch_invariant": True})).encode_prompt(PROMPTS[1])[0]
        expected = enabled(checkpoint, Case({"batch_invariant": True})).encode_prompt(PROMPTS[1])[0]
    assert torch.equal(actual, expected)


@pytest.mark.triton
@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize("batch_invariant", [True, False])
def test_the_vae(checkpoint, by_shape, batch_invariant, tiling):
    pipe = enabled(checkpoint, Case({"batch_invariant": batch_invariant, "prompt_cache": None}))
    if tiling:
        pipe.vae.enable_tiling(tile_sample_min_height=32, tile_sample_min_width=32, tile_sample_stride_height=24)
    generator = torch.Generator().manual_seed(0)
    pictures = randn_tensor((3, 3, 1, 48, 48), generator=generator).to("cuda")
    latents = randn_tensor((3, 16, 1, 6, 6), generator=generator).to("cuda")
    with torch.no_grad(), pipe._images():
        for code, batch in (
            (lambda x: pipe.vae.encode(x).latent_dist.parameters, pictures),
            (lambda z: pipe.vae.decode(z).sample, latents),
        ):
            whole = code(batch)
            assert all(torch.equal(code(one)[0], own) for one, own in zip(batch.split(1), whole, strict=True)) is (
                batch_invariant
            )


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_alone_and_in_any_batch_on_a_gpu(checkpoint, device, name):
    case = CASES[name]
    one, other = (enabled(checkpoint, case, device, torch.bfloat16, batch_invariant=True) for _ in range(2))
    alone = [drawn(one, case, [n]) for n in range(3)]
    for order in ([2, 0, 1], [0, 1], [1, 0, 2]):
        assert all(torch.equal(picture, alone[n][0]) for n, picture in zip(order, drawn(other, case, order), strict=True))
    assert_kept(other)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize(("side", "cfg"), [(256, True), (512, True), (1024, False)])
def test_at_the_models_own_width_on_a_gpu(device, side, cfg, cuda_graph):
    """Where a library has many kernels to choose from: two layers of Qwen-Image's transformer, and its VAE."""
    case = PictureCase(side, side, 3, cfg, 4, 128, Shape(layers=2))
    pipe = random_pipeline(case.shape, device, torch.bfloat16)
    arguments = call_arguments(pipe, case) | {"output_type": "pt"}
    qwen_fast.enable(pipe, batch_invariant=True, strict=True, cuda_graph=cuda_graph)
    for _ in range(3):
        batch = pipe(**arguments).images
    for n, length in enumerate(case.text_lengths):
        own = {key: value[n : n + 1] for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        own["prompt_embeds"] = own["prompt_embeds"][:, :length]
        del own["prompt_embeds_mask"]
        assert torch.equal(pipe(**(arguments | own | {"prompt_embeds_mask": None})).images[0], batch[n])
