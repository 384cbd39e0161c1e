"""Pictures of different sizes in one call: each is the one that stock draws of its prompt and size alone."""

import copy

import diffusers
import numpy as np
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, stock
from qwen_fast.pipelines.sizes import listed
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG, QWEN_IMAGE_SCHEDULER_CONFIG
from qwen_fast.testing.family import EDIT_2511, build_pipeline
from qwen_fast.transformer import model

PROMPTS = ["a red circle", "two green squares on a hill by the sea, and a road", "x"]
# The last two have as many tokens, and so one schedule; the first has another.
SIZES = {"height": [64, 96, 48], "width": [96, 160, 320]}
GUIDED = {"negative_prompt": "blurry", "true_cfg_scale": 3.7, "num_inference_steps": 4, "output_type": "latent"}
UNGUIDED = {"negative_prompt": None, "true_cfg_scale": 1.0}
OF_EACH = ("prompt", "negative_prompt", "height", "width", "latents")
COUNTED = "call of several sizes"


@pytest.fixture(scope="module")
def pipe(checkpoint):
    """Stock's."""
    return stock(checkpoint)


@pytest.fixture
def fast(checkpoint):
    return qwen_fast.enable(stock(checkpoint))


def generators(count: int, seed: int = 5) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + n) for n in range(count)]


def alone(pipe, generator=None, **arguments) -> list:
    """What a pipeline draws prompt by prompt."""
    prompts, each, images = arguments["prompt"], arguments.get("num_images_per_prompt", 1), []
    for n in range(len(prompts)):
        own = dict(arguments)
        for name in OF_EACH:
            value = listed(own.get(name))
            own[name] = value[n] if isinstance(value, list) else value
        given = generator[n * each : (n + 1) * each] if isinstance(generator, list) else generator
        images += list(pipe(**own, generator=given).images)
    return images


def assert_as_alone(pipe, fast, make=generators, **arguments) -> list:
    """`fast` with lists of sizes draws what `pipe` draws one prompt after the other, and nothing of it on stock."""
    arguments = {"prompt": PROMPTS} | SIZES | GUIDED | arguments
    pictures = len(arguments["prompt"]) * arguments.get("num_images_per_prompt", 1)
    expected = alone(pipe, make(pictures), **arguments)
    before = fast.fast_state.calls[COUNTED]
    actual = fast(**arguments, generator=make(pictures)).images
    assert fast.fast_state.calls[COUNTED] == before + 1 and not fast.fast_state.fallbacks
    assert isinstance(actual, list) and len(actual) == pictures
    for one, other in zip(actual, expected, strict=True):
        assert_same_latents(one, other)
    return actual


@pytest.mark.parametrize("options", [{}, {"modulation": "layers"}], ids=str)
def test_compiled_blocks_get_each_picture_s_own_row(checkpoint, pipe, options):
    """A step of one schedule reads one row of a table, at one address; pictures of several have a row each."""
    compiled = stock(checkpoint)
    compiled.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert_as_alone(pipe, qwen_fast.enable(compiled, **options))
    assert qwen_fast.report(compiled).calls["compiled block"]


def add_lora(*pipes) -> None:
    from peft import LoraConfig

    for pipe in pipes:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["to_q", "add_v_proj", "img_mod.1", "net.2"], init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name="a")


@pytest.mark.parametrize(
    "others",
    [
        {},
        UNGUIDED,
        {"negative_prompt": ["blurry and dark", "b", "of a low quality"]},
        {"sigmas": [1.0, 0.6, 0.2]},
        {"sigmas": [0.9]},
        {"num_inference_steps": 8},
        {"num_images_per_prompt": 2},
        UNGUIDED | {"num_images_per_prompt": 2},
        {"prompt": PROMPTS[1:], "height": 96, "width": (64, 160)},
        {"prompt": PROMPTS[:2], "height": np.array([64, 96]), "width": 80},
        {"prompt": PROMPTS[:1], "height": [96], "width": 64},
        {"height": [64] * 3, "width": [96] * 3},
        {"height": [75, 96, 64], "width": [96, 90, 112]},  # rounded down, as in stock
    ],
    ids=str,
)
def test_as_alone(pipe, fast, others):
    assert_as_alone(pipe, fast, **others)


@pytest.mark.parametrize("each", [1, 2])
def test_one_generator_draws_one_prompts_noise_after_the_other(pipe, fast, each):
    assert_as_alone(pipe, fast, lambda _: torch.Generator().manual_seed(3), num_images_per_prompt=each)
    torch.manual_seed(4)
    expected = alone(pipe, prompt=PROMPTS, **SIZES, **GUIDED)
    torch.manual_seed(4)
    for one, other in zip(fast(PROMPTS, **SIZES, **GUIDED).images, expected, strict=True):
        assert_same_latents(one, other)


def test_sizes_in_another_order_and_other_prompts_in_later_calls(pipe, fast):
    first = assert_as_alone(pipe, fast)
    turned = {name: [values[n] for n in (2, 0, 1)] for name, values in (SIZES | {"prompt": PROMPTS}).items()}
    found = assert_as_alone(pipe, fast, lambda count: [generators(count)[n] for n in (2, 0, 1)], **turned)
    for one, n in zip(found, (2, 0, 1), strict=True):
        assert_same_latents(one, first[n])
    assert_as_alone(pipe, fast, prompt=PROMPTS[::-1])
    one = {"prompt": PROMPTS[0], "height": 64, "width": 96, **GUIDED}
    expected, actual = (drawer(**one, generator=generators(1)[0]).images for drawer in (pipe, fast))
    assert_same_latents(actual, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"modulation": "layers"},
        {"modulation": "host"},
        {"attention": "diffusers"},
        {"precise_sampler": True},
        {"check_nan": True},
        {"prompt_cache": None},
        {"cuda_graph": True},
        {"strict": True},
    ],
    ids=str,
)
def test_options(pipe, fast, options):
    qwen_fast.enable(fast, **options)
    assert_as_alone(pipe, fast)
    assert_as_alone(pipe, fast, num_images_per_prompt=2, **UNGUIDED)
    assert fast.fast_state.nan_note == ("all finite" if "check_nan" in options else None)
    assert fast.fast_state.graph == "pictures of several sizes in one call"


@pytest.mark.parametrize("modulation", ["auto", "layers"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_lora(checkpoint, pipe, modulation, scale):
    adapted, fast = stock(checkpoint), qwen_fast.enable(stock(checkpoint), modulation=modulation)
    plain = alone(pipe, generators(3), prompt=PROMPTS, **SIZES, **GUIDED)
    add_lora(adapted, fast)
    others = {} if scale is None else {"attention_kwargs": {"scale": scale}}
    for one, other in zip(assert_as_alone(adapted, fast, **others), plain, strict=True):
        assert (one - other).abs().max() > 1e-3 * other.abs().max()
    assert_as_alone(adapted, fast, **others)


@pytest.mark.parametrize(
    ("config", "updates"),
    [
        (QWEN_IMAGE_SCHEDULER_CONFIG, 2),
        (LIGHTNING_SCHEDULER_CONFIG, 1),
        (QWEN_IMAGE_SCHEDULER_CONFIG | {"use_dynamic_shifting": False, "shift": 3.0}, 1),
        (QWEN_IMAGE_SCHEDULER_CONFIG | {"time_shift_type": "linear"}, 2),
        (QWEN_IMAGE_SCHEDULER_CONFIG | {"use_karras_sigmas": True}, 2),
    ],
    ids=["base", "lightning", "static", "linear", "karras"],
)
def test_schedules(checkpoint, config, updates):
    """Neighbours with the same schedule are updated at once."""
    pipe, fast = stock(checkpoint), stock(checkpoint)
    for one in (pipe, fast):
        one.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    qwen_fast.enable(fast)
    assert_as_alone(pipe, fast)
    calls = fast.fast_state.calls
    assert calls["flow_match_schedule"] == updates and calls["packed transformer"] == 4
    assert calls["cfg_euler_step"] == 4 * updates


@pytest.mark.parametrize(
    ("dtype", "precise"), [(torch.bfloat16, False), (torch.float16, False), (torch.bfloat16, True)], ids=str
)
def test_halves_are_as_near_to_fp32_as_stocks(checkpoint, dtype, precise):
    pipe, call = stock(checkpoint, dtype), {"prompt": PROMPTS} | SIZES | GUIDED
    fast, wide = qwen_fast.enable(stock(checkpoint, dtype), precise_sampler=precise), copy.deepcopy(pipe)
    for part in wide.components.values():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, torch.float32)
    noise = [torch.randn(1, (h // 16) * (w // 16), 64, generator=g).to(dtype)
             for h, w, g in zip(*SIZES.values(), generators(3), strict=True)]  # fmt: skip
    expected, exact = (alone(one, **call, latents=noise) for one in (pipe, wide))
    for one, other, exactly in zip(fast(**call, latents=noise).images, expected, exact, strict=True):
        assert one.dtype == (torch.float32 if precise else dtype)
        assert_same_latents(one.to(dtype), other, exactly)


def test_each_picture_has_the_timesteps_that_stock_rounds(checkpoint, monkeypatch):
    """Rounded to the model's dtype before they are divided; 0.2 % apart in bf16 otherwise, which no picture shows."""
    pipe, fast = stock(checkpoint, torch.bfloat16), qwen_fast.enable(stock(checkpoint, torch.bfloat16), modulation="layers")
    expected, actual, compute = [], [], model.FromLayers.__init__
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, given: expected.append(given["timestep"]), with_kwargs=True)
    call = {"prompt": PROMPTS} | SIZES | GUIDED | UNGUIDED
    alone(pipe, generators(3), **call)
    hook.remove()
    monkeypatch.setattr(model.FromLayers, "__init__", lambda *a: (actual.append(a[3]), compute(*a))[1])
    fast(**call, generator=generators(3))
    assert torch.equal(torch.stack(actual, dim=1).flatten(), torch.cat(expected)) and len(set(torch.cat(expected).tolist())) > 4


def test_latents_of_the_callers_own(pipe, fast):
    noise = [torch.randn(tokens, 64, generator=g) for tokens, g in zip((24, 24, 60, 60, 60, 60), generators(6), strict=True)]
    call = {"prompt": PROMPTS, "num_images_per_prompt": 2} | SIZES | GUIDED
    expected = alone(pipe, **call | {"latents": [torch.stack(noise[n : n + 2]) for n in (0, 2, 4)]})
    for given in (noise, [one[None] for one in noise]):
        for one, other in zip(fast(**call, latents=given).images, expected, strict=True):
            assert_same_latents(one, other)


def test_embeddings_with_masks(pipe, fast):
    """Padded as in a batch, with another prompt's padding; and one negative prompt for all."""
    embeds, mask = fast.encode_prompt(PROMPTS)
    negative, _ = fast.encode_prompt("blurry")
    call = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "negative_prompt_embeds": negative}
    actual = fast(**SIZES, **GUIDED | {"negative_prompt": None}, **call, generator=generators(3)).images
    for one, other in zip(actual, alone(pipe, generators(3), prompt=PROMPTS, **SIZES, **GUIDED), strict=True):
        assert_same_latents(one, other)


def test_prompts_are_kept_as_for_one_picture(fast):
    one = GUIDED | {"height": 64, "width": 64, "num_inference_steps": 1, "sigmas": [0.9]}
    for prompt in PROMPTS:
        fast(prompt, **one)
    asked = fast.fast_state.calls["text encoder"]
    fast(PROMPTS, **one | SIZES)
    assert fast.fast_state.calls["text encoder"] == asked


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_images_are_a_list_without_a_batch_dimension(pipe, fast, output_type):
    call = {"prompt": PROMPTS, "num_images_per_prompt": 2} | SIZES | GUIDED | {"output_type": output_type}
    expected = alone(pipe, generators(6), **call)
    actual = fast(**call, generator=generators(6), return_dict=False)
    assert isinstance(actual, tuple) and isinstance(actual[0], list) and len(actual[0]) == 6
    for one, other in zip(actual[0], expected, strict=True):
        assert type(one) is type(other)
        one, other = (np.asarray(picture).astype(np.float64) for picture in (one, other))
        assert one.shape == other.shape and np.abs(one - other).max() <= {"pil": 1, "latent": 1e-5}.get(output_type, 1e-5)


def test_a_callback_sees_lists_and_may_change_them(pipe, fast):
    def edit(where):
        def called(pipe, i, t, tensors):
            latents = tensors["latents"]
            if isinstance(latents, list):
                assert [one.shape for one in latents] == [(1, n, 64) for n in (24, 60, 60)] and t.shape == (3,)
                where.append(t)
                if i == 1:
                    latents[1].mul_(0.9)  # in place, as it may be in stock
                    return {"latents": [latents[0] * 1.1, latents[1], latents[2]]}
                return {}
            where.append(t)
            return {"latents": latents * {24: 1.1, 60: 0.9}[latents.shape[1]]} if i == 1 and pipe.own < 2 else {}

        return called

    seen, seen_alone, expected = [], [], []
    for pipe.own in range(3):
        one = {name: SIZES[name][pipe.own] for name in SIZES} | GUIDED | {"callback_on_step_end": edit(seen_alone)}
        expected += list(pipe(PROMPTS[pipe.own], **one, generator=generators(3)[pipe.own]).images)
    actual = fast(PROMPTS, **SIZES, **GUIDED, generator=generators(3), callback_on_step_end=edit(seen)).images
    for one, other in zip(actual, expected, strict=True):
        assert_same_latents(one, other)
    assert torch.equal(torch.stack(seen, dim=1).flatten(), torch.stack(seen_alone))
    assert fast.current_timestep is None and fast.num_timesteps == 4


def test_a_callback_may_interrupt_switch_adapters_and_draw(checkpoint):
    """All of it as in stock: the rest of the steps is left out, another adapter scale computes the next steps."""
    pipe, fast = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    add_lora(pipe, fast)

    def change(pipe, i, t, tensors):
        several = isinstance(tensors["latents"], list) and i == 1
        pipe(PROMPTS[:1], height=[32] if several else 32, width=32, sigmas=[0.9], output_type="latent")
        if i == 0:
            pipe.transformer.set_adapters(["a"], [0.3])
        pipe._interrupt = i == 2
        return {}

    expected = []
    for n, prompt in enumerate(PROMPTS):
        pipe.transformer.set_adapters(["a"], [1.0])

        def changed(pipe, i, t, tensors):  # stock's scheduler is left in the run of the picture drawn last
            held = vars(pipe.scheduler).copy()
            result = change(pipe, i, t, tensors)
            vars(pipe.scheduler).update(held)
            return result

        one = {name: SIZES[name][n] for name in SIZES} | GUIDED | {"callback_on_step_end": changed}
        expected += list(pipe(prompt, **one, generator=generators(3)[n]).images)
    actual = fast(PROMPTS, **SIZES, **GUIDED, generator=generators(3), callback_on_step_end=change).images
    for one, other in zip(actual, expected, strict=True):
        assert_same_latents(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: pipe.transformer.proj_out.register_forward_hook(lambda *_: None), "a forward hook"),
        (lambda pipe: pipe.scheduler.sigmas.mul_(0.9), "the scheduler has other sigmas"),
        (lambda pipe: qwen_fast.disable(pipe), "the pipeline is another one"),
        (lambda pipe: torch.set_grad_enabled(True), "gradients are asked for"),
    ],
)
def test_what_a_callback_may_not_change_is_named(fast, change, message):
    def called(pipe, i, t, tensors):
        change(pipe)
        return {}

    with pytest.raises(RuntimeError, match=message):
        fast(PROMPTS, **SIZES, **GUIDED, callback_on_step_end=called)


@pytest.mark.parametrize(
    "change",
    [lambda one: one[:, 1:], lambda one: one.double(), lambda one: one[0], None],
    ids=["fewer tokens", "another dtype", "no batch", "no list"],
)
def test_latents_of_a_callback_that_do_not_fit(fast, change):
    def called(pipe, i, t, tensors):
        return {"latents": change and list(map(change, tensors["latents"]))}

    with pytest.raises(ValueError, match="a callback gave back `latents`"):
        fast(PROMPTS, **SIZES, **GUIDED, callback_on_step_end=called)


@pytest.mark.parametrize("modulation", ["auto", "layers"])
def test_a_transformer_that_knows_references(checkpoint, modulation):
    """`zero_cond_t` has a row of modulations for reference pictures, of which there are none here."""
    pipe, fast = (build_pipeline(diffusers.QwenImagePipeline, checkpoint, **EDIT_2511) for _ in range(2))
    assert pipe.transformer.config.zero_cond_t
    assert_as_alone(pipe, qwen_fast.enable(fast, modulation=modulation))
    assert_as_alone(pipe, fast, prompt=PROMPTS[1:], height=[96, 48], width=[160, 320])  # one schedule


def test_in_inference_mode(pipe, fast):
    call = {"prompt": PROMPTS} | SIZES | GUIDED | {"callback_on_step_end": lambda pipe, i, t, tensors: {}}
    with torch.inference_mode():
        actual = fast(**call, generator=generators(3)).images
    for one, other in zip(actual, alone(pipe, generators(3), **call), strict=True):
        assert_same_latents(one, other)


def test_check_nan_names_the_picture_and_its_own_timestep(fast, caplog):
    qwen_fast.enable(fast, check_nan=True)
    seen = []

    def spoil(pipe, i, t, tensors):
        seen.append(t)
        if i == 1:
            tensors["latents"][2][0, 3, 5] = torch.inf
        return {}

    fast(PROMPTS, **SIZES, **GUIDED, callback_on_step_end=spoil)
    assert fast.fast_state.nan_note == (
        f"the latents of picture 2 are not finite after step 1 of 0 to 3 (timestep {seen[1][2].item():g})"
    )
    assert seen[1][0] != seen[1][2]
