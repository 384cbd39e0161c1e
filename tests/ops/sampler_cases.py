"""What the tests of euler_step and cfg_euler_step share: dtypes, shapes, layouts, arguments that must be refused."""

from collections.abc import Callable

import torch

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF = [torch.bfloat16, torch.float16]

# One token, primes, tails of a block, an odd number of channels, several batches, a single element.
SHAPES = [(1, 1, 64), (1, 77, 64), (2, 77, 64), (3, 31, 64), (2, 13, 7), (1, 1, 1)]

LAYOUTS = ["transposed", "offset", "strided"]


def in_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides, or at a storage offset that no vector load is aligned to."""
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "offset":
        return torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(tensor.shape)
    assert layout == "strided"
    return torch.stack([tensor, tensor + 1], dim=-1)[..., 0]


def surrounded(sigmas: torch.Tensor) -> torch.Tensor:
    """The same table with ordinary numbers before and behind it: a read outside would give ordinary latents."""
    room = torch.linspace(2.0, -1.0, sigmas.numel() + 16, device=sigmas.device)
    room[8:-8] = sigmas
    return room[8:-8]


def scale_of(latents: torch.Tensor, value: float) -> torch.Tensor:
    """A guidance scale on the device of the latents, fp64 where they are."""
    dtype = torch.promote_types(latents.dtype, torch.float32)
    return torch.tensor([value], dtype=dtype, device=latents.device)


def with_a_float(function: Callable) -> Callable:
    """`function`, which reads the guidance scale from a tensor, called with a float."""

    def call(latents, cond, uncond, sigmas, step_index, true_cfg_scale):
        return function(latents, cond, uncond, sigmas, step_index, scale_of(latents, true_cfg_scale))

    return call


# For a schedule of 4 steps, all within the room of `surrounded`: a read further out could end the process.
STEPS_OUTSIDE = [-8, -2, -1, 4, 5, 11]


def bad_prediction(name: str) -> dict[str, tuple[str, torch.Tensor, str]]:
    """Case -> argument, value and message, for a prediction beside fp32 latents `[1, 4, 64]`."""
    shape = (1, 4, 64)
    return {
        f"{name} of another shape": (name, torch.zeros(1, 5, 64), rf"{name}: shape \(1, 5, 64\)"),
        f"{name} that would broadcast": (name, torch.zeros(1, 1, 64), rf"{name}: shape \(1, 1, 64\)"),
        f"{name} wider": (name, torch.zeros(shape, dtype=torch.float64), rf"{name}: dtype torch.float64"),
        f"{name} of integers": (name, torch.zeros(shape, dtype=torch.int64), rf"{name}: dtype torch.int64"),
        f"{name} elsewhere": (name, torch.zeros(shape, device="meta"), rf"{name}: on meta"),
    }


BAD_SCHEDULE = {
    "one sigma": ("sigmas", torch.ones(1), r"sigmas: got \(1,\)"),
    "sigma matrix": ("sigmas", torch.ones(2, 2), r"sigmas: got \(2, 2\)"),
    "fp64 sigmas": ("sigmas", torch.ones(3, dtype=torch.float64), r"sigmas: .*torch.float64"),
    "strided sigmas": ("sigmas", torch.ones(6)[::2], r"sigmas: .*contiguous"),
    "sigmas elsewhere": ("sigmas", torch.ones(3, device="meta"), r"sigmas: on meta"),
    "two indices": ("step_index", torch.tensor([0, 1]), r"step_index: got \(2,\)"),
    "scalar index": ("step_index", torch.tensor(0), r"step_index: got \(\)"),
    "fp32 index": ("step_index", torch.tensor([0.0]), r"step_index: .*torch.float32"),
    "index elsewhere": ("step_index", torch.zeros(1, dtype=torch.int32, device="meta"), r"step_index: on meta"),
}

BAD_LATENTS = {
    "no elements": ("latents", torch.zeros(1, 0, 64), r"latents: shape \(1, 0, 64\)"),
    "integer latents": ("latents", torch.zeros(1, 4, 64, dtype=torch.int32), r"latents: dtype torch.int32"),
    "fp8 latents": ("latents", torch.zeros(1, 4, 64).to(torch.float8_e4m3fn), r"latents: dtype torch.float8"),
}
