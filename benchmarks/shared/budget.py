"""How near is near enough: the kernels' own rule, which tensors of a call it is asked of, and equality to the bit."""

import torch

from qwen_fast_kernels._budget import errors as errors
from qwen_fast_kernels._budget import in_float64 as in_float64
from qwen_fast_kernels._budget import over_budget as over_budget

IN_PLACE = {"qk_norm_rope": (0, 1, 9)}  # the arguments that are the results
LIMIT = 5e-3  # relative RMS error; a right attention has 2e-3 in bf16
LAUNCHES = 20  # that have to agree to the bit
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def results(op: str, result: object, arguments: tuple) -> tuple[torch.Tensor, ...]:
    """The tensors that a call of an operator made, whether it returned them or wrote them into its arguments."""
    if result is None and op in IN_PLACE:
        return tuple(arguments[n] for n in IN_PLACE[op])
    return result if isinstance(result, tuple) else (result,)


def relative_errors(actual: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Largest and RMS difference from a float64 tensor, as parts of its largest and RMS value."""
    sizes = exact.abs().max().item(), exact.square().mean().sqrt().item()
    return {
        name: error / size for name, error, size in zip(("max_error", "rms_error"), errors(actual, exact), sizes, strict=True)
    }


def assert_within_budget(actual: torch.Tensor, reference: torch.Tensor, oracle: torch.Tensor) -> None:
    """Assert that `actual` is at most twice as far from the float64 `oracle` as a same-dtype reference may be."""
    reason = over_budget(actual, reference, oracle)
    assert reason is None, reason


def differing(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Boolean mask of the elements whose bits differ; any NaN equals any NaN, and 0 differs from -0."""
    assert actual.dtype == expected.dtype, f"{actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    integer = _INTEGERS[actual.element_size()]
    differs = actual.contiguous().view(integer) != expected.contiguous().view(integer)
    return differs & ~(torch.isnan(actual) & torch.isnan(expected))


def assert_bit_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that two floating-point tensors hold the same bits, NaN equal to NaN."""
    where = differing(actual, expected)
    if where.any():
        index = tuple(where.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(where.sum())} of {where.numel()} elements differ; first at {index}: "
            f"{actual[index].item()!r}, expected {expected[index].item()!r}"
        )


def rounding_distance(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Relative distance of positive float64 `values` from the nearest point where rounding to `dtype` changes.

    The rounding boundaries of `dtype` are the midpoints between neighbouring numbers.
    """
    nearest = values.to(dtype)
    bits = nearest.view(_INTEGERS[nearest.element_size()])
    below, above = (bits - 1).view(dtype).double(), (bits + 1).view(dtype).double()  # positive: bits order as values do
    nearest = nearest.double()
    midpoints = torch.stack([(below + nearest) / 2, (nearest + above) / 2])
    return ((values - midpoints).abs() / values).amin(dim=0)
