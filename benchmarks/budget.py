"""How near is near enough, the kernels' own rule, and which tensors of a call it is asked of."""

import torch

from qwen_fast_kernels._budget import errors as errors
from qwen_fast_kernels._budget import in_float64 as in_float64
from qwen_fast_kernels._budget import over_budget as over_budget

IN_PLACE = {"qk_norm_rope": (0, 1, 9)}  # the arguments that are the results


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
