"""What is tuned: the sizes of the model."""

from dataclasses import replace

from ..operators.cases import BF16, PACKED, Case, Size

_VAE_PIXELS = {96: 1024**2, 192: 512**2, 384: 256**2}  # of one picture of 1024x1024, by channels


def _rows(op: str, *counts: int, **variant) -> list[Case]:
    return [Case(op, f"{rows} rows", BF16, Size((), (rows,)), variant) for rows in counts]


# The model's sizes, what is likely to gain most first: one picture and both branches of CFG at 1024x1024, 512x512, a prompt.
CASES: list[Case] = [
    Case("joint_attention", "one sequence"),
    *_rows("linear_gelu", 8192, 4096, 1024, 60),
    Case("qk_norm_rope", "one sequence", variant={"layout": "rows"}),
    Case("gated_residual_ada_layer_norm", "one sequence"),
    Case("joint_attention", "key mask", BF16, PACKED, {"masked": True}),
    *_rows("linear_gated_residual", 8192, 4096),
    *(replace(case, name=f"attention, {case.name}") for case in _rows("linear_gated_residual", 8192, 4096, expansion=1)),
    Case("ada_layer_norm", "one sequence"),
    Case("gated_residual", "one sequence"),
    # Without a residual, which the operator would change from launch to launch: the same kernel, the same configuration.
    *(Case("rms_norm_silu", f"{c} channels", BF16, Size((), (pixels,), 1, c)) for c, pixels in _VAE_PIXELS.items()),
]
