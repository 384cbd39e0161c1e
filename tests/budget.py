"""How near is near enough: an error budget that follows from the dtype, and bit equality that lets NaN equal NaN."""

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def errors(actual: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    """Largest and RMS difference from a float64 oracle, over the elements where the oracle is a finite number."""
    finite = torch.isfinite(oracle)
    difference = (actual.double() - oracle)[finite]
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def assert_within_budget(actual: torch.Tensor, reference: torch.Tensor, oracle: torch.Tensor) -> None:
    """Assert that `actual` is at most twice as far from the float64 `oracle` as a same-dtype reference may be.

    Budget: 2 x (error of the reference + eps x size of the oracle), for the largest error with the largest |oracle| as
    its size, and for the RMS error with the oracle's RMS. Where the oracle is not finite, `actual` must agree in kind.
    """
    assert oracle.dtype == torch.float64, "the oracle has to be float64"
    assert actual.dtype == reference.dtype and actual.shape == reference.shape == oracle.shape
    finite = torch.isfinite(oracle)
    assert torch.equal(torch.isfinite(actual), finite), "non-finite values in other places than in the oracle"
    assert torch.equal(torch.isnan(actual), torch.isnan(oracle)), "NaN in other places than in the oracle"
    values = oracle[finite]
    if not values.numel():
        return
    eps = torch.finfo(actual.dtype).eps
    sizes = (values.abs().max().item(), values.square().mean().sqrt().item())
    for name, error, allowed, size in zip(
        ("max", "RMS"), errors(actual, oracle), errors(reference, oracle), sizes, strict=True
    ):
        budget = 2.0 * (allowed + eps * size)
        assert error <= budget, f"{name} error {error:.3e} exceeds its budget {budget:.3e} (reference: {allowed:.3e})"


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
