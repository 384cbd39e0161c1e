"""How near is near enough: an error budget that follows from the dtype."""

import torch


def in_float64(arguments: tuple) -> list:
    """Arguments for the oracle."""
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def errors(actual: torch.Tensor, oracle: torch.Tensor) -> tuple[float, float]:
    """Largest and RMS difference from a float64 oracle, over the elements where the oracle is a finite number."""
    finite = torch.isfinite(oracle)
    difference = (actual.double() - oracle)[finite]
    return difference.abs().max().item(), difference.square().mean().sqrt().item()


def over_budget(actual: torch.Tensor, reference: torch.Tensor, oracle: torch.Tensor) -> str | None:
    """Why `actual` is more than twice as far from the float64 `oracle` as a same-dtype reference may be, or None.

    Budget: 2 x (error of the reference + eps x size of the oracle), for the largest error with the largest |oracle| as
    its size, and for the RMS error with the oracle's RMS. Where the oracle is not finite, `actual` must agree in kind.
    """
    if oracle.dtype != torch.float64:
        return f"the oracle has to be float64, not {oracle.dtype}"
    if actual.dtype != reference.dtype or not actual.shape == reference.shape == oracle.shape:
        return f"{actual.dtype} {tuple(actual.shape)} is not {reference.dtype} {tuple(reference.shape)}"
    finite = torch.isfinite(oracle)
    if not torch.equal(torch.isfinite(actual), finite):
        return "non-finite values in other places than in the oracle"
    if not torch.equal(torch.isnan(actual), torch.isnan(oracle)):
        return "NaN in other places than in the oracle"
    values = oracle[finite]
    if not values.numel():
        return None
    eps = torch.finfo(actual.dtype).eps
    sizes = (values.abs().max().item(), values.square().mean().sqrt().item())
    for name, error, allowed, size in zip(
        ("max", "RMS"), errors(actual, oracle), errors(reference, oracle), sizes, strict=True
    ):
        budget = 2.0 * (allowed + eps * size)
        if not error <= budget:
            return f"{name} error {error:.3e} exceeds its budget {budget:.3e} (reference: {allowed:.3e})"
    return None
