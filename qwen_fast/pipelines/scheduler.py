"""Schedule and Euler step behind the interface of diffusers' scheduler."""

import copy
from typing import Any

import diffusers
import torch

from qwen_fast_kernels import euler_step

from ..common.pickled import PickledAsStock
from ..common.state import State
from ..schedule import Schedule

STOCK = diffusers.FlowMatchEulerDiscreteScheduler


class _MakesStock(type):
    """Whoever calls the class, such as `type(scheduler).from_config`, gets diffusers' own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> STOCK:
        return STOCK(*args, **kwargs)


class FlowMatchEulerDiscreteScheduler(PickledAsStock, STOCK, metaclass=_MakesStock):
    """diffusers' scheduler, its tables computed on the device and its step one kernel with the index on the device.

    Everything else (`scale_noise`, `index_for_timestep`, the config, saving) is stock's. It shares all attributes with the
    scheduler that it stands for, so that whoever holds that one sees the same run. Copies and pickles of it are stock's.
    """

    __slots__ = ("_own_state", "_device_step_index", "_stock")
    STANDS_FOR = STOCK

    @classmethod
    def adopt(cls, scheduler: STOCK, state: State) -> "FlowMatchEulerDiscreteScheduler":
        """Another object with the attributes of `scheduler`, which counts into `state`."""
        adopted = cls.__new__(cls)
        adopted.__dict__ = scheduler.__dict__
        adopted._stock = scheduler._stock if isinstance(scheduler, cls) else scheduler
        adopted._own_state: State | None = state
        adopted._device_step_index = None  # ([1] int32 tensor, the value it holds)
        return adopted

    def is_of(self, state: State) -> bool:
        """Whether it counts into `state`."""
        return self._own_state is state

    @property
    def stock(self) -> STOCK:
        """The scheduler that it stands for."""
        return self._stock

    def release(self) -> None:
        """From now on its methods, which somebody's wrapper may still hold, are stock's."""
        self._own_state = self._device_step_index = None

    def __copy__(self) -> STOCK:
        twin = STOCK.__new__(STOCK)
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> STOCK:
        twin = memo[id(self)] = STOCK.__new__(STOCK)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """As stock's, for the `sigmas` that the Qwen-Image pipelines pass; one step gives sigmas [1, 0] instead of NaN."""
        if self._own_state is None:
            return super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        self._device_step_index = None
        if sigmas is None or timesteps is not None:
            self._own_state.fall_back("set_timesteps without sigmas, or with timesteps of the caller")
            return super().set_timesteps(num_inference_steps, device, sigmas=sigmas, mu=mu, timesteps=timesteps)
        if num_inference_steps is not None and num_inference_steps != len(sigmas):
            raise ValueError(f"`sigmas` has {len(sigmas)} values, but `num_inference_steps` is {num_inference_steps}.")
        if self.config.use_dynamic_shifting and mu is None:
            raise ValueError("`mu` is None; a scheduler with use_dynamic_shifting needs it.")
        schedule = Schedule.from_scheduler(self, mu=mu, sigmas=sigmas, device=device or "cpu")
        self.num_inference_steps = schedule.num_inference_steps
        self.timesteps, self.sigmas = schedule.timesteps, schedule.sigmas
        self._step_index = self._begin_index = None
        self._own_state.calls["flow_match_schedule"] += 1

    def step(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As stock's, bit for bit; stochastic sampling, per-token timesteps and mixed dtypes run on stock."""
        if self._own_state is None:
            return super().step(model_output, timestep, sample, *args, **kwargs)
        reason = None
        if self.config.stochastic_sampling:
            reason = "stochastic_sampling"
        elif args or kwargs.get("per_token_timesteps") is not None:
            reason = "per-token timesteps or positional arguments beyond the sample in scheduler.step"
        elif not (isinstance(timestep, torch.Tensor) and timestep.is_floating_point()):
            reason = "a timestep that is not a floating-point tensor"
        elif model_output.dtype != sample.dtype or model_output.shape != sample.shape:
            reason = "a prediction whose dtype or shape differs from the sample's"
        elif not isinstance(self.sigmas, torch.Tensor) or self.sigmas.dtype != torch.float32 or not self.sigmas.is_contiguous():
            reason = "sigmas of another kind than fp32, one behind the other"
        elif (self.step_index or 0) + 1 >= len(self.sigmas):
            reason = "a step beyond the last sigma"  # which raises there
        if reason is not None:
            self._own_state.fall_back(reason)
            return super().step(model_output, timestep, sample, *args, **kwargs)

        if self.step_index is None:
            self._init_step_index(timestep)
        held = self._device_step_index
        if held is None or held[1] != self._step_index or held[0].device != sample.device:
            held = (torch.full((1,), self._step_index, dtype=torch.int32, device=sample.device), self._step_index)
        prev_sample = euler_step(sample, model_output, self.sigmas.to(sample.device), held[0])
        self._step_index += 1
        self._device_step_index = (held[0].add_(1), self._step_index)
        self._own_state.calls["euler_step"] += 1
        if not kwargs.get("return_dict", True):
            return (prev_sample,)
        return diffusers.schedulers.scheduling_flow_match_euler_discrete.FlowMatchEulerDiscreteSchedulerOutput(
            prev_sample=prev_sample
        )


# A pipeline writes module and class name of its scheduler into model_index.json; a saved folder must load in stock diffusers.
FlowMatchEulerDiscreteScheduler.__module__ = STOCK.__module__
