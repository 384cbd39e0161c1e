"""How near is near enough, the kernels' own rule, and which tensors of a call it is asked of."""

import torch

from qwen_fast_kernels._budget import errors as errors
from qwen_fast_kernels._budget import in_float64 as in_float64
from qwen_fast_kernels._budget import over_budget as over_budget

IN_PLACE = {"qk_norm_rope"}  # the first two arguments are the results


def results(op: str, result: object, arguments: tuple) -> tuple[torch.Tensor, ...]:
    """The tensors that a call of an operator made, whether it returned them or wrote them into its arguments."""
    if result is None and op in IN_PLACE:
        return tuple(arguments[:2])
    return result if isinstance(result, tuple) else (result,)
