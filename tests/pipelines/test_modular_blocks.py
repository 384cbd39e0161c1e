"""Blocks, loops and guiders of a user's own in modular pipelines: called as they are, and all around them stays fused."""

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.qwenimage.denoise import (
    QwenImageDenoiseStep,
    QwenImageLoopAfterDenoiser,
    QwenImageLoopDenoiser,
)

import qwen_fast
from qwen_fast.pipelines.denoiser_blocks import code_of, is_update
from support.modular import WORKFLOWS, assert_near, loop_of, small_references

TEXT = WORKFLOWS["text"]


@pytest.fixture(autouse=True)
def _small():
    with small_references():
        yield


def block(function, base=ModularPipelineBlocks, **attributes):
    """A block of a user's own that runs `function(components, block_state, i, t)`."""

    def call(self, components, block_state, i, t):
        function(components, block_state, i, t)
        return components, block_state

    return type("Mine", (base,), {"__call__": call, "model_name": "qwenimage", **attributes})()


def both(checkpoint, change, workflow=TEXT, guider=None, **options):
    """(latents of stock, of ours, our report) of pipelines that `change` has changed."""
    drawn = []
    for enabled in (False, True):
        pipe = workflow.pipe(checkpoint, guider=guider() if guider else None)
        change(pipe)
        if enabled:
            qwen_fast.enable(pipe, **options)
        drawn.append(workflow.draw(pipe, num_inference_steps=4))
    return *drawn, qwen_fast.report(pipe)


def put(name, place, function, **more):
    """Insert a block of a user's own into the loop."""
    return lambda pipe: loop_of(pipe).sub_blocks.insert(name, block(function, **more), place)


def replace(name, function, **more):
    """Put a block of a user's own in the place of one of the loop's."""

    def change(pipe):
        loop_of(pipe).sub_blocks[name] = block(function, **more)

    return change


def test_all_denoisers_and_updates_of_diffusers_are_known():
    from diffusers.modular_pipelines.qwenimage import denoise

    known = {name: cls for name, cls in vars(denoise).items() if getattr(cls, "__module__", None) == denoise.__name__}
    denoisers = {name for name, cls in known.items() if code_of(cls()) is not None and code_of(cls()).rescales}
    assert denoisers == {"QwenImageLoopDenoiser", "QwenImageEditLoopDenoiser"}
    assert {name for name, cls in known.items() if is_update(cls())} == {"QwenImageLoopAfterDenoiser"}


def test_one_that_looks_on_costs_nothing_but_its_name(checkpoint):
    seen = []

    def look(components, state, i, t):
        seen.append((state.latents.clone(), state.noise_pred.clone()))

    expected, actual, report = both(checkpoint, put("look", 3, look), strict=True)
    assert_near(actual, expected)
    assert report.calls["packed transformer"] == report.calls["cfg_euler_step"] == 4 and not report.fallbacks
    assert any("called as they are: Mine" in line for line in report.replaced)
    for ours, theirs in zip(seen[4:], seen[:4], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert_near(one, other)


def rescale(components, state, i, t):
    components.guider.guidance_scale = 1.0 if i == 3 else 2.0 + i


def turn_off(components, state, i, t):
    components.guider = diffusers.ClassifierFreeGuidance(3.0, guidance_rescale=0.7 if i == 1 else 0.0)


def edit_weights(components, state, i, t):
    if i == 1:
        with torch.no_grad():
            components.transformer.proj_out.weight.mul_(1.1)


def edit_prompt(components, state, i, t):
    if i == 1:
        state.prompt_embeds = state.prompt_embeds * 0.5


def edit_latents(components, state, i, t):
    state.latents = state.latents * 0.9 + 0.01 * i


def hook(components, state, i, t):
    if i == 1:
        components.transformer.transformer_blocks[0].register_forward_hook(
            lambda module, args, output: (output[0], output[1] * 0.9)
        )


def half_prompt(components, state, i, t):
    state.timestep = state.timestep * 0.9


def input_of_its_own(components, state, i, t):
    state.latent_model_input = state.latents * 1.05


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize(
    "function", [rescale, turn_off, edit_weights, edit_prompt, edit_latents, hook], ids=lambda f: f.__name__
)
def test_what_one_changes_is_followed(checkpoint, function, place):
    expected, actual, _ = both(checkpoint, put("mine", place, function))
    assert_near(actual, expected)


@pytest.mark.parametrize("function", [half_prompt, input_of_its_own], ids=lambda f: f.__name__)
def test_what_one_gives_the_transformer_is_what_it_gets(checkpoint, function):
    expected, actual, report = both(checkpoint, put("mine", 1, function))
    assert_near(actual, expected)
    named = "a block of the loop gives the transformer another timestep than the scheduler's"
    assert (report.fallbacks.get(named, 0) > 0) is (function is half_prompt)


def test_another_transformer_from_the_second_step_on(checkpoint):
    def change(pipe):
        other = TEXT.pipe(checkpoint).transformer
        with torch.no_grad():
            other.proj_out.weight.mul_(1.1)

        def swap(components, state, i, t):
            if i == 1:
                components.update_components(transformer=other)

        put("swap", 0, swap)(pipe)

    expected, actual, report = both(checkpoint, change)
    assert_near(actual, expected)
    assert report.calls["packed transformer"] == 4


def test_between_the_denoiser_and_the_step(checkpoint):
    def halve(components, state, i, t):
        state.noise_pred = state.noise_pred * 0.5

    expected, actual, report = both(checkpoint, put("halve", 2, halve))
    assert_near(actual, expected)
    assert report.calls["packed transformer"] == report.calls["euler_step"] == 4 and "transformer" not in report.calls
    assert any("no scheduler step of diffusers' own right behind" in reason for reason in report.fallbacks)


def own_step(components, state, i, t):
    state.latents = state.latents + (components.scheduler.sigmas[i + 1] - components.scheduler.sigmas[i]) * state.noise_pred


def own_denoiser(components, state, i, t):
    arguments = {"hidden_states": state.latent_model_input, "timestep": state.timestep / 1000, "img_shapes": state.img_shapes}
    arguments |= {"encoder_hidden_states": state.prompt_embeds, "encoder_hidden_states_mask": state.prompt_embeds_mask}
    state.noise_pred = components.transformer(**arguments, return_dict=False)[0]


@pytest.mark.parametrize(
    ("name", "function", "base", "calls"),
    [
        ("after_denoiser", own_step, QwenImageLoopAfterDenoiser, {"packed transformer": 4}),
        ("denoiser", own_denoiser, QwenImageLoopDenoiser, {"transformer": 4, "euler_step": 4}),
    ],
    ids=["step", "denoiser"],
)
def test_in_the_place_of_stocks(checkpoint, name, function, base, calls):
    expected, actual, report = both(checkpoint, replace(name, function, base=base))
    assert_near(actual, expected)
    for operator, count in calls.items():
        assert report.calls[operator] == count
    assert len(report.fallbacks) == 1 and "Mine" in next(iter(report.fallbacks))
    with pytest.raises(RuntimeError, match="strict=True and this call would run on stock diffusers: no .* among the blocks"):
        both(checkpoint, replace(name, function, base=base), strict=True)


def test_without_a_step_the_latents_stay(checkpoint):
    expected, actual, _ = both(checkpoint, lambda pipe: loop_of(pipe).sub_blocks.pop("after_denoiser"))
    assert torch.equal(actual, expected)


def test_a_subclass_that_changes_no_code_is_stocks(checkpoint):
    class Same(QwenImageLoopDenoiser):
        note = "mine"

    def change(pipe):
        loop_of(pipe).sub_blocks["denoiser"] = Same()

    expected, actual, report = both(checkpoint, change, strict=True)
    assert_near(actual, expected)
    assert report.calls["cfg_euler_step"] == 4


def test_a_replaced_method_of_diffusers_class(checkpoint, monkeypatch):
    def change(pipe):
        monkeypatch.undo()
        original = QwenImageLoopAfterDenoiser.__call__

        def call(self, components, state, i, t):
            state.noise_pred = state.noise_pred * 0.5
            return original(self, components, state, i=i, t=t)

        monkeypatch.setattr(QwenImageLoopAfterDenoiser, "__call__", call)

    expected, actual, report = both(checkpoint, change)
    assert_near(actual, expected)
    assert report.calls["packed transformer"] == 4 and report.fallbacks


class Loop(QwenImageDenoiseStep):
    """Goes through its timesteps by itself, and before the last halves the latents and hooks the model."""

    def __call__(self, components, state):
        found = self.get_block_state(state)
        found.additional_cond_kwargs = {}
        for i, t in enumerate(found.timesteps):
            if i == len(found.timesteps) - 1:
                found.latents = found.latents * 0.5
                hook(components, found, 1, t)
                components.guider.guidance_scale = 2.0
            components, found = self.loop_step(components, found, i=i, t=t)
        self.set_block_state(state, found)
        return components, state


class Turns(QwenImageDenoiseStep):
    """Takes the blocks of a turn by itself."""

    def loop_step(self, components, state, **kwargs):
        for one in self.sub_blocks.values():
            components, state = one(components, state, **kwargs)
        state.latents = state.latents * 0.9
        return components, state


@pytest.mark.parametrize(("cls", "taken"), [(Loop, {"cfg_euler_step": 4}), (Turns, {"transformer": 8, "euler_step": 4})])
def test_a_loop_of_a_users_own(checkpoint, cls, taken):
    def change(pipe):
        loop_of(pipe).__class__ = cls

    expected, actual, report = both(checkpoint, change)
    assert_near(actual, expected)
    assert {name: report.calls[name] for name in taken} == taken
    assert any(cls.__name__ in line for line in report.replaced)
    turns = [reason for reason in report.fallbacks if reason.startswith("Turns.loop_step is not diffusers' own")]
    assert bool(turns) is (cls is Turns)


def test_a_turn_replaced_on_the_loop_itself(checkpoint):
    def change(pipe):
        loop = loop_of(pipe)
        loop.loop_step = lambda components, state, **kwargs: Turns.loop_step(loop, components, state, **kwargs)

    expected, actual, report = both(checkpoint, change)
    assert_near(actual, expected)
    assert report.calls["transformer"] == 8 and any("loop_step is not diffusers' own" in reason for reason in report.fallbacks)


def test_a_block_that_draws_with_the_same_pipeline(checkpoint):
    """As a preview would: its own call leaves the scheduler behind its last step, and ours goes on where it was."""

    def change(pipe):
        inner = []

        def draw(components, state, i, t):
            if i == 1 and not inner:
                inner.append(True)
                kept = dict(vars(components.scheduler))
                TEXT.draw(components, seed=3, num_inference_steps=2)
                vars(components.scheduler).update(kept)

        put("draw", 3, draw)(pipe)

    expected, actual, _ = both(checkpoint, change)
    assert_near(actual, expected)


PACKED = {"packed transformer": 4, "euler_step": 4}
SCORES = LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False)
GUIDERS = {
    "rescaled": (lambda: diffusers.ClassifierFreeGuidance(3.0, guidance_rescale=0.5), PACKED, "guidance_rescale=0.5"),
    "original": (
        lambda: diffusers.ClassifierFreeGuidance(2.0, use_original_formulation=True),
        PACKED,
        "use_original_formulation=True",
    ),
    "late": (lambda: diffusers.ClassifierFreeGuidance(3.0, start=0.5), {"cfg_euler_step": 2, "euler_step": 2}, None),
    "early": (lambda: diffusers.ClassifierFreeGuidance(3.0, stop=0.5), {"cfg_euler_step": 2, "euler_step": 2}, None),
    "off": (lambda: diffusers.ClassifierFreeGuidance(3.0, enabled=False), {"transformer": 4, "euler_step": 4}, None),
    "one": (lambda: diffusers.ClassifierFreeGuidance(1.0), {"transformer": 4, "euler_step": 4}, None),
    "zero star": (
        lambda: diffusers.ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0),
        PACKED,
        "ClassifierFreeZeroStarGuidance",
    ),
    "projected": (lambda: diffusers.AdaptiveProjectedGuidance(3.0), PACKED, "AdaptiveProjectedGuidance"),
    "perturbed": (
        lambda: diffusers.PerturbedAttentionGuidance(
            3.0, perturbed_guidance_config=SCORES, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
        ),
        {"transformer": 11, "euler_step": 4},
        "PerturbedAttentionGuidance() changes the model between two predictions",
    ),
}


@pytest.mark.parametrize("workflow", ["text", "edit"])
@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(checkpoint, name, workflow):
    make, calls, reason = GUIDERS[name]
    expected, actual, report = both(checkpoint, lambda pipe: None, WORKFLOWS[workflow], make)
    assert_near(actual, expected)
    assert {operator: report.calls[operator] for operator in calls} == calls
    assert len(report.fallbacks) == (reason is not None) and (reason or "") in "".join(report.fallbacks)


class Doubled(diffusers.ClassifierFreeGuidance):
    """A guider of a user's own: with another formula, and a hook that it sets on the model for each prediction."""

    def prepare_models(self, denoiser):
        super().prepare_models(denoiser)
        factor = 1.0 if self._count_prepared == 1 else 0.9
        self.hook = denoiser.transformer_blocks[0].register_forward_hook(lambda m, a, out: (out[0], out[1] * factor))

    def cleanup_models(self, denoiser):
        self.hook.remove()

    def forward(self, pred_cond, pred_uncond=None):
        return super().forward(pred_cond * 2, pred_uncond)


def test_a_guider_of_a_users_own(checkpoint):
    expected, actual, report = both(checkpoint, lambda pipe: None, guider=lambda: Doubled(3.0))
    assert_near(actual, expected)
    assert report.calls["transformer"] == 8 and "not diffusers' own" in "".join(report.fallbacks)


def test_a_replaced_method_of_a_plain_guider(checkpoint):
    def change(pipe):
        guider = pipe.guider
        guider.forward = lambda pred_cond, pred_uncond=None: type(guider).forward(guider, pred_cond * 2, pred_uncond)

    expected, actual, report = both(checkpoint, change)
    assert_near(actual, expected)
    assert "ClassifierFreeGuidance.forward: not diffusers' own" in report.fallbacks


def test_the_guider_is_left_as_stock_leaves_it(checkpoint):
    found = []

    def keep(pipe):
        found.append(pipe)

    both(checkpoint, keep)
    stock, ours = ({k: v for k, v in vars(pipe.guider).items() if k != "_internal_dict"} for pipe in found)
    assert torch.equal(stock.pop("_timestep"), ours.pop("_timestep")) and stock == ours
