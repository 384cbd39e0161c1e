"""Schedulers: their step wrapped or replaced, other tables, subclasses, other samplers."""

import functools

import diffusers
import pytest
import torch

import qwen_fast
from support.field import IMAGE_TO_IMAGE, INPAINT, ORDERS, TEXT_TO_IMAGE, assert_not_stocks_own, compare, draw, guided

EULER = diffusers.FlowMatchEulerDiscreteScheduler
BOTH = pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE], ids=["text", "img2img"])


def weaker_step(run):
    """A prediction that is changed on its way into the scheduler."""
    old = run.pipe.scheduler.step

    def step(prediction, timestep, sample, **kwargs):
        run.note("step", prediction, timestep, sample, **kwargs)
        return old(prediction * 0.9, timestep, sample, **kwargs)

    run.pipe.scheduler.step = step


def weaker_step_of_the_class(run):
    old = EULER.step

    def step(self, prediction, *args, **kwargs):
        run.note("step", prediction, *args, **kwargs)
        return old(self, prediction * 0.9, *args, **kwargs)

    run.patch.setattr(EULER, "step", step)


def watched_step(run):
    """A profiler's wrapper, which changes nothing."""
    run.wrap(run.pipe.scheduler, "step")


def watched_set_timesteps(run):
    run.wrap(run.pipe.scheduler, "set_timesteps")


def other_set_timesteps(run):
    """A schedule of one's own in the scheduler's place."""
    scheduler, old = run.pipe.scheduler, run.pipe.scheduler.set_timesteps

    @functools.wraps(old)  # stock reads from the signature whether it takes sigmas
    def set_timesteps(*args, **kwargs):
        run.note("set_timesteps", **{name: value for name, value in kwargs.items() if name in ("mu", "device")})
        old(*args, **kwargs)
        scheduler.sigmas = scheduler.sigmas**1.2
        scheduler.timesteps = scheduler.sigmas[:-1] * 1000

    scheduler.set_timesteps = set_timesteps


def set_timesteps_of_the_class(run):
    old = EULER.set_timesteps

    @functools.wraps(old)
    def set_timesteps(self, *args, **kwargs):
        old(self, *args, **kwargs)
        self.sigmas = self.sigmas**1.2
        self.timesteps = self.sigmas[:-1] * 1000

    run.patch.setattr(EULER, "set_timesteps", set_timesteps)


def time_shift_of_the_class(run):
    run.wrap(EULER, "time_shift", lambda sigmas: sigmas**1.2)


def stretch_of_the_object(run):
    run.wrap(run.pipe.scheduler, "stretch_shift_to_terminal", lambda sigmas: sigmas**1.1)


STEPS = {
    "step": (weaker_step, "step"),
    "step of the class": (weaker_step_of_the_class, "step"),
    "set_timesteps": (other_set_timesteps, "set_timesteps"),
    "set_timesteps of the class": (set_timesteps_of_the_class, "set_timesteps"),
    "time_shift of the class": (time_shift_of_the_class, "time_shift"),
    "stretch_shift_to_terminal": (stretch_of_the_object, "stretch_shift_to_terminal"),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", STEPS)
def test_a_method_of_the_scheduler(field, name, order):
    compare(field, STEPS[name][0], order)


@pytest.mark.parametrize(("name", "order"), list(zip(STEPS, ORDERS * len(STEPS), strict=False)))
def test_a_method_of_the_scheduler_in_image_to_image(field, name, order):
    compare(field, STEPS[name][0], order, cls=IMAGE_TO_IMAGE)


@BOTH
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [watched_step, watched_set_timesteps])
def test_a_wrapper_that_changes_nothing(field, situation, cls, order):
    compare(field, situation, order, cls=cls, moves=False)


@BOTH
def test_a_wrapper_that_changes_nothing_with_modulation_in_layers(field, cls):
    compare(field, watched_step, "before", cls=cls, moves=False, options={"modulation": "layers"})


def test_inpainting_with_a_wrapped_step(field):
    compare(field, weaker_step, "before", cls=INPAINT)


# Tables changed from a callback


def with_callback(change):
    def act(run):
        def callback(pipe, step, timestep, tensors):
            if step == 0:
                change(pipe.scheduler)
            return {}

        cls = next(cls for cls in type(run.pipe).__mro__ if cls.__module__.startswith("diffusers.pipelines"))
        return draw(run.pipe, callback_on_step_end=callback, **guided(cls))

    return act


def other_sigmas(scheduler):
    sigmas = scheduler.sigmas.clone()
    sigmas[2:] *= 0.8
    scheduler.sigmas = sigmas


def sigmas_in_place(scheduler):
    scheduler.sigmas[2:] *= 0.8


def another_step_method(scheduler):
    old = scheduler.step
    scheduler.step = lambda prediction, *args, **kwargs: old(prediction * 0.9, *args, **kwargs)


@BOTH
@pytest.mark.parametrize("change", [other_sigmas, sigmas_in_place, another_step_method])
def test_a_callback_changes_the_scheduler(field, change, cls):
    plain = field.stock(None, with_callback(lambda scheduler: None), cls, torch.float32, ("no change", cls))
    expected = field.stock(None, with_callback(change), cls, torch.float32, (change, cls))
    assert (plain.picture - expected.picture).abs().max() > 1e-3
    compare(field, None, cls=cls, act=with_callback(change), moves=False)


@BOTH
def test_a_callback_puts_another_scheduler_in(field, cls):
    """The loop goes on with the timesteps that it has; the steps are the new scheduler's."""

    def act(run):
        def callback(pipe, step, timestep, tensors):
            if step == 0:
                old, other = pipe.scheduler, EULER.from_config(pipe.scheduler.config)
                other.timesteps, other.sigmas = old.timesteps, old.sigmas**1.2
                other.set_begin_index(int(old.step_index))
                pipe.scheduler = other
            return {}

        return draw(run.pipe, callback_on_step_end=callback, **guided(cls))

    compare(field, None, cls=cls, act=act, moves=False)


# Other schedulers

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


class Weaker(EULER):
    """A subclass with a step of its own."""

    def step(self, model_output, timestep, sample, **kwargs):
        return super().step(model_output * 0.9, timestep, sample, **kwargs)


class Same(EULER):
    """A subclass with nothing of its own."""


SCHEDULERS = {
    "UniPC": lambda config: diffusers.UniPCMultistepScheduler.from_config(config, **FLOW),
    "DPM++": lambda config: diffusers.DPMSolverMultistepScheduler.from_config(config, **FLOW),
    "DEIS": lambda config: diffusers.DEISMultistepScheduler.from_config(config, **FLOW),
    "Heun": lambda config: diffusers.FlowMatchHeunDiscreteScheduler.from_config(config),
    "LCM": lambda config: diffusers.FlowMatchLCMScheduler.from_config(config),
    "beta": lambda config: EULER.from_config(config, use_beta_sigmas=True),
    "karras": lambda config: EULER.from_config(config, use_karras_sigmas=True),
    "exponential": lambda config: EULER.from_config(config, use_exponential_sigmas=True),
    "static shift": lambda config: EULER.from_config(config, use_dynamic_shifting=False, shift=3.1),
    "inverted": lambda config: EULER.from_config(config, invert_sigmas=True, shift_terminal=None),
    "linear": lambda config: EULER.from_config(config, time_shift_type="linear"),
    "stochastic": lambda config: EULER.from_config(config, stochastic_sampling=True),
    "subclass": Weaker.from_config,
    "subclass without a change": Same.from_config,
}


def sampled_with(name):
    def situation(run):
        torch.manual_seed(0)
        run.pipe.scheduler = SCHEDULERS[name](dict(run.pipe.scheduler.config))

    return situation


def seeded(cls):
    """LCM and stochastic sampling draw from torch's own generator."""

    def act(run):
        torch.manual_seed(0)
        return draw(run.pipe, **guided(cls))

    return act


@pytest.mark.parametrize("name", SCHEDULERS)
def test_another_scheduler(field, name):
    compare(field, sampled_with(name), "after", act=seeded(TEXT_TO_IMAGE), moves=False)


@pytest.mark.parametrize("name", ["UniPC", "Heun", "LCM", "beta", "static shift", "stochastic", "subclass"])
def test_another_scheduler_in_image_to_image(field, name):
    compare(field, sampled_with(name), "after", cls=IMAGE_TO_IMAGE, act=seeded(IMAGE_TO_IMAGE), moves=False)


@pytest.mark.parametrize("name", ["UniPC", "LCM", "beta", "subclass"])
def test_another_scheduler_before_enable(field, name):
    compare(field, sampled_with(name), "before", act=seeded(TEXT_TO_IMAGE), moves=False)


# The second contract: what is not stock's own is named, and raises under strict=True.


@BOTH
@pytest.mark.parametrize("name", STEPS)
def test_strict_a_method_of_the_scheduler_is_named_and_raises(field, name, cls):
    assert_not_stocks_own(field, *STEPS[name], cls=cls)


@pytest.mark.parametrize("name", ["UniPC", "stochastic", "subclass"])
def test_strict_another_scheduler_raises(field, name):
    word = {"UniPC": "UniPCMultistepScheduler", "stochastic": "stochastic_sampling", "subclass": "Weaker"}[name]
    assert_not_stocks_own(field, sampled_with(name), word)


@pytest.mark.parametrize("name", ["beta", "karras", "static shift", "linear"])
def test_strict_stocks_own_schedules_do_not_raise(field, name):
    with field.run() as run:
        sampled_with(name)(run)
        qwen_fast.enable(run.pipe, strict=True)
        draw(run.pipe, **guided())
        assert not qwen_fast.report(run.pipe).fallbacks
