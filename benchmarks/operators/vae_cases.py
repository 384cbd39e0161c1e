"""The cases of the VAE's operator, for benchmarks/operators/cases.py: arguments, bytes and FLOPs, widths of both VAEs."""

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PIXELS = 1024 * 1024
# Channels of AutoencoderKLQwenImage, then of the encoder and the decoder of AutoencoderKLQwenImage21.
WIDTHS = (96, 192, 384, 768, 144, 288, 576, 1152)


def rms_norm_silu_traffic(x, gamma, x_bias, residual, *_) -> tuple[int, int]:
    passes = 4 if isinstance(residual, torch.Tensor) else 2  # `silu` has that place in the overload without a residual
    return passes * x.numel() * x.element_size(), 10 * x.numel()


_BLOCK = {"bias": True, "residual": True}  # between two residual blocks

# Name, dtype, pixels, channels, variant, and keywords of the Case.
CASES: list[tuple[str, torch.dtype, int, int, dict, dict]] = [
    ("bf16", BF16, PIXELS, 96, {}, {"measured": True, "default": True}),
    ("fp32", FP32, PIXELS, 96, {}, {"measured": True}),
    ("fp16", FP16, PIXELS, 96, {}, {}),
    ("bias", BF16, PIXELS, 96, {"bias": True}, {}),
    ("bias and residual", BF16, PIXELS, 96, _BLOCK, {"measured": True, "default": True}),
    ("residual, fp16", FP16, PIXELS, 96, {"residual": True}, {}),
    ("norm alone", BF16, PIXELS // 64, 384, {"silu": False}, {"default": True}),
    ("offset", BF16, PIXELS, 96, {"offset": 3}, {}),
    ("odd channels", BF16, 77, 7, _BLOCK, {}),
    *(
        (f"{width} channels, {name}", dtype, PIXELS // 16, width, _BLOCK, {})
        for width in (8, 32, *WIDTHS)
        for name, dtype in (("bf16", BF16), ("fp32", FP32))
    ),
]
