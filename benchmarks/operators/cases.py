"""The cases of every operator, each with its arguments and its launch; shared by the compile table and the benchmarks.

Imports neither diffusers nor Triton's compiler. Token rows are joint as in the operators: all text rows, then all image rows.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from qwen_fast_kernels._arguments import ARGUMENTS, Maker, Size

from .arguments import DIMENSIONS, TRAFFIC

MODEL = Size()  # Qwen-Image at 1024 x 1024 with a short prompt
PACKED = Size((30, 77, 11), (4096, 1024, 2304))  # sequences of different lengths in one batch
GUIDED = Size((32, 32), (4096, 4096))  # both branches of CFG, row counts that 16 divides
FEW = Size((13,), (64,))
MIDDLE, TINY, TINIEST = Size((13,), (256,), 8, 64), Size((13,), (64,), 2, 32), Size((13,), (64,), 2, 16)
SMALL, SMALL_PACKED = Size((13,), (256,), 8, 64), Size((13, 7), (256, 64), 8, 64)  # what a CPU measures


@dataclass(frozen=True)
class OperatorCase:
    """One way to call an operator. `variant` are keywords of the op's function below."""

    op: str
    name: str
    dtype: torch.dtype = torch.bfloat16
    size: Size = MODEL
    variant: dict = field(default_factory=dict)
    measured: bool = False  # one of the benchmarks
    default: bool = False  # compiled for two architectures by every run of the tests

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"

    def module(self):
        return importlib.import_module(f"qwen_fast_kernels.{self.op}")

    def arguments(self, make: Maker) -> tuple:
        return ARGUMENTS[self.op](make, self.dtype, self.size, **self.variant)

    def config(self, capability: int, arguments: tuple) -> dict:
        module = self.module()
        if hasattr(module, "DEFAULT_CONFIG"):
            return module.DEFAULT_CONFIG
        return module.default_config(capability, *DIMENSIONS[self.op](*arguments))

    def launch(self, arguments: tuple, config: dict) -> object:
        return getattr(self.module(), f"launch_{self.op}")(*arguments, config=config)

    def operator(self) -> Callable[..., object]:
        module = self.module()  # registers it; the overloads of rms_norm_silu are one public function
        return getattr(module if self.op == "rms_norm_silu" else torch.ops.qwen_fast, self.op)

    def reference(self, *arguments) -> object:
        return getattr(self.module(), f"{self.op}_reference")(*arguments)

    def traffic(self, arguments: tuple) -> tuple[int, int]:  # bytes and FLOPs, as the operator's docstring declares them
        return TRAFFIC[self.op](*arguments)

    def small(self) -> "OperatorCase":
        return replace(self, size=SMALL_PACKED if len(self.size.txt) > 1 else SMALL)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_LATENTS = Size((), (4096, 4096))
PIXELS = 1024 * 1024  # that the VAE's operator gets
# Channels of AutoencoderKLQwenImage, then of the encoder and the decoder of AutoencoderKLQwenImage21.
WIDTHS = (96, 192, 384, 768, 144, 288, 576, 1152)


def _cases_of_the_sampler(op: str) -> list[OperatorCase]:
    common = {"size": _LATENTS, "default": True}
    return [
        OperatorCase(op, "bf16", BF16, measured=True, **common),
        OperatorCase(op, "fp16", FP16, **common),
        OperatorCase(op, "fp32", FP32, measured=True, **common),
        OperatorCase(op, "precise", FP32, variant={"prediction_dtype": BF16}, **common),
        OperatorCase(op, "offset", BF16, variant={"shape": (1, 77, 64), "offset": 3}, **common),
        OperatorCase(op, "odd channels", BF16, variant={"shape": (1, 77, 7)}, **common),
        # An argument that is 1 becomes a constant.
        OperatorCase(op, "all ones", BF16, variant={"shape": (1, 1, 1), "steps": 1}, **common),
    ]


def _cases_of_the_schedule() -> list[OperatorCase]:
    variants = {
        "Qwen-Image": {},
        "Lightning": {"steps": 8, "arguments": (3.0, "dynamic", 0.0, 1000.0, False)},
        "one step": {"steps": 1},
        "custom sigmas": {"steps": 50, "own": True},
        "static": {"arguments": (3.0, "static", 0.02, 1000.0, False)},
        "shift 1, inverted": {"own": True, "arguments": (1.0, "static", 0.0, 1.0, True)},
    }
    common = {"op": "flow_match_schedule", "dtype": FP32, "default": True}
    return [OperatorCase(name=n, variant=variant, measured=n == "Qwen-Image", **common) for n, variant in variants.items()]


def _cases_of_token_rows(op: str, **variant) -> list[OperatorCase]:
    """`variant` goes with every case."""

    def case(name: str, dtype=BF16, size=MODEL, *, measured=False, default=False, **more) -> OperatorCase:
        return OperatorCase(op, name, dtype, size, variant | more, measured, default)

    found = [
        case("bf16", measured=True, default=True),
        case("fp16", FP16, default=not op.startswith("linear"), **({"clip": True} if "gated" in op else {})),
        case("fp32", FP32, measured=True),
        case("few rows", size=FEW),
        case("part of wider rows", layout="part"),
        case("offset", layout="offset"),
        *(
            case(f"{size.channels} channels, {name}", dtype, size)
            for size in (MIDDLE, TINY)
            for name, dtype in (("bf16", BF16), ("fp32", FP32))
        ),
    ]
    if op.startswith("linear"):  # the tiles depend on the rows
        found += [case(f"{rows} rows", size=Size((), (rows,))) for rows in (8, 24, 60, 256, 1054)]
        found += [case("offset, fp32", FP32, layout="offset")]
    if op != "linear_gelu":
        found += [
            case("packed", size=PACKED, packed=True, default=True),
            case("image rows only", size=Size((), (4096,)), streams=1),
        ]
    return found


def _cases_of_heads(op: str) -> list[OperatorCase]:
    return [
        OperatorCase(op, "bf16", BF16, measured=True, default=True),
        OperatorCase(op, "fp16", FP16),
        OperatorCase(op, "fp32", FP32, measured=True),
        OperatorCase(op, "packed", BF16, PACKED, measured=True),
        OperatorCase(op, "few rows", BF16, FEW),
        OperatorCase(op, "rows by 16", BF16, GUIDED),
        OperatorCase(op, "separate projections", BF16, variant={"layout": "rows"}),
        OperatorCase(op, "offset", BF16, variant={"layout": "offset"}),
        *(
            OperatorCase(op, f"head_dim {size.head_dim}, {name}", dtype, size)
            for size in (MIDDLE, TINY, TINIEST)
            for name, dtype in (("bf16", BF16), ("fp32", FP32))
        ),
    ]


def _cases_of_the_vae(op: str) -> list[OperatorCase]:
    block = {"bias": True, "residual": True}  # between two residual blocks

    def case(name: str, dtype=BF16, pixels=PIXELS, channels=96, *, measured=False, default=False, **variant) -> OperatorCase:
        return OperatorCase(op, name, dtype, Size((), (pixels,), 1, channels), variant, measured, default)

    return [
        case("bf16", measured=True, default=True),
        case("fp32", FP32, measured=True),
        case("fp16", FP16),
        case("bias", bias=True),
        case("bias and residual", **block, measured=True, default=True),
        case("residual, fp16", FP16, residual=True),
        case("norm alone", pixels=PIXELS // 64, channels=384, silu=False, default=True),
        case("offset", offset=3),
        case("odd channels", pixels=77, channels=7, **block),
        *(
            case(f"{width} channels, {name}", dtype, PIXELS // 16, width, **block)
            for width in (8, 32, *WIDTHS)
            for name, dtype in (("bf16", BF16), ("fp32", FP32))
        ),
    ]


CASES: list[OperatorCase] = [
    *_cases_of_the_schedule(),
    *_cases_of_the_sampler("euler_step"),
    *_cases_of_the_sampler("cfg_euler_step"),
    *_cases_of_token_rows("ada_layer_norm"),
    *_cases_of_token_rows("gated_residual"),
    *_cases_of_token_rows("gated_residual_ada_layer_norm"),
    *(
        OperatorCase(
            "gated_residual_ada_layer_norm", f"ControlNet, {name}", dtype, size, {"added": True, **more}, default=default
        )
        for name, dtype, size, more, default in (
            ("bf16", BF16, GUIDED, {}, True),
            ("fp16", FP16, GUIDED, {"clip": True}, False),
            ("fp32", FP32, GUIDED, {}, False),
            ("512 channels, bf16", BF16, MIDDLE, {}, False),
            ("64 channels, fp32", FP32, TINY, {}, False),
        )
    ),
    *_cases_of_heads("qk_norm_rope"),
    *_cases_of_heads("joint_attention"),
    OperatorCase("joint_attention", "key mask", BF16, PACKED, {"masked": True}, default=True),
    *(
        OperatorCase("joint_attention", f"key mask, {name}", dtype, size, {"masked": True, **layout})
        for name, dtype, size, layout in (
            ("fp32", FP32, PACKED, {}),
            ("offset", BF16, PACKED, {"layout": "offset"}),
            ("head_dim 64", BF16, MIDDLE, {}),
            ("head_dim 32", BF16, TINY, {}),
        )
    ),
    *_cases_of_token_rows("linear_gelu"),
    OperatorCase("linear_gelu", "no bias", BF16, variant={"bias": False}),
    # A LoRA's rank, and one whose rows no wide load takes. Not in fp32, which is the library's.
    *(
        OperatorCase("linear_gelu", f"rank {ranks}, {name}", dtype, size, {"ranks": ranks} | more, *flags)
        for ranks in (32, 20)
        for name, dtype, size, more, flags in (
            ("bf16", BF16, MODEL, {}, (ranks == 32, ranks == 32)),
            ("fp16", FP16, MODEL, {}, ()),
            ("offset", BF16, MODEL, {"layout": "offset"}, ()),
            ("few rows", BF16, FEW, {}, ()),
            *((f"{rows} rows", BF16, Size((), (rows,)), {}, ()) for rows in (8, 24, 60, 256, 1054)),
        )
    ),
    *_cases_of_token_rows("linear_gated_residual"),
    OperatorCase("linear_gated_residual", "attention", BF16, variant={"expansion": 1}, measured=True),
    OperatorCase("linear_gated_residual", "no bias", BF16, variant={"bias": False}),
    *_cases_of_the_vae("rms_norm_silu"),
]
