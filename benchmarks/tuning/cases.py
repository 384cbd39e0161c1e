"""What is tuned: the sizes of the model."""

from dataclasses import replace

from ..operators.cases import BF16, PACKED, OperatorCase, Size

_VAE_PIXELS = {96: 1024**2, 192: 512**2, 384: 256**2}  # of one picture of 1024x1024, by channels


def _rows(op: str, *counts: int, **variant) -> list[OperatorCase]:
    return [OperatorCase(op, f"{rows} rows", BF16, Size((), (rows,)), variant) for rows in counts]


# The model's sizes, what is likely to gain most first: one picture and both branches of CFG at 1024x1024, 512x512, a prompt.
CASES: list[OperatorCase] = [
    OperatorCase("joint_attention", "one sequence"),
    *_rows("linear_gelu", 8192, 4096, 1024, 60),
    OperatorCase("qk_norm_rope", "one sequence", variant={"layout": "rows"}),
    OperatorCase("gated_residual_ada_layer_norm", "one sequence"),
    OperatorCase("joint_attention", "key mask", BF16, PACKED, {"masked": True}),
    *_rows("linear_gated_residual", 8192, 4096),
    *(replace(case, name=f"attention, {case.name}") for case in _rows("linear_gated_residual", 8192, 4096, expansion=1)),
    OperatorCase("ada_layer_norm", "one sequence"),
    OperatorCase("gated_residual", "one sequence"),
    # Without a residual, which the operator would change from launch to launch: the same kernel, the same configuration.
    *(OperatorCase("rms_norm_silu", f"{c} channels", BF16, Size((), (pixels,), 1, c)) for c, pixels in _VAE_PIXELS.items()),
]
