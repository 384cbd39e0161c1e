"""One denoising step's forwards, stock against fused, on this machine's CPU, interleaved on the same weights.

    python -m benchmarks.parts.transformer [--repeats N] [--append benchmarks/results/transformer.csv]

Three ways of ours: "layers" does the work that stock does; "table" takes its modulations from a table; "packed" is the
default of the pipeline with guidance, one forward for both predictions, against stock's two. CPU time of one thread. A
difference beyond the numerical contract ends the run without a ratio.
"""

import argparse
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel

from qwen_fast.common.options import Options
from qwen_fast.common.state import State
from qwen_fast.testing import initialize
from qwen_fast.transformer.attach import attach
from qwen_fast.transformer.call import ATTACHED, PromptBatch, accelerated
from qwen_fast.transformer.modulation import FromTable

from ..shared.machine import provenance
from ..shared.measure import Difference, Spread, interleaved, ratio
from ..shared.rows import RowFile

MODELS = {
    "tiny": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 32, "axes_dims_rope": (4, 14, 14)},
    "middle": {"num_layers": 4, "num_attention_heads": 8, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)},
    "one layer": {"num_layers": 1, "num_attention_heads": 24, "attention_head_dim": 128},
    "four layers": {"num_layers": 4, "num_attention_heads": 24, "attention_head_dim": 128},
}
CASES = [  # model, pixels, text tokens with and without the prompt, dtype
    ("tiny", 64, (14, 6), torch.float32),
    ("tiny", 512, (14, 6), torch.float32),
    ("middle", 128, (14, 6), torch.float32),
    ("middle", 256, (14, 6), torch.float32),
    ("middle", 512, (14, 6), torch.float32),
    ("middle", 256, (128, 6), torch.float32),
    ("middle", 256, (14, 6), torch.bfloat16),
    ("middle", 512, (14, 6), torch.bfloat16),
    ("one layer", 256, (30, 6), torch.float32),
    ("one layer", 256, (30, 6), torch.bfloat16),
]
FIELDS = "date commit dirty machine torch diffusers dtype model pixels text_tokens mode repeats".split()
FIELDS += ["stock_p50", "fast_p20", "fast_p50", "fast_p80", "ratio_p50", "max_relative_difference"]


class StepForwards:
    """Stock's and our ways to compute the two predictions of a step, on one model."""

    def __init__(
        self,
        name: str,
        pixels: int,
        text_tokens: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(in_channels=64, out_channels=16, joint_attention_dim=64, **MODELS[name])
        with torch.no_grad():
            initialize(model, "transformer", 0)
        self.model, self.state, side = model.to(device, dtype).eval(), State(Options(modulation="layers")), pixels // 16
        attach(self.model, self.state)
        self.shapes = ((1, side, side),)
        self.latents = torch.randn(1, side * side, 64).to(device, dtype)
        self.texts = [torch.randn(1, tokens, 64).to(device, dtype) for tokens in text_tokens]
        timestep = torch.tensor([0.75], dtype=dtype)
        tables, index = self.model.__dict__[ATTACHED].tables, torch.zeros(1, dtype=torch.int32, device=device)
        self.table = FromTable(self.model, tables, timestep, index)
        self.timestep = timestep.to(device)
        layout = self.model.layout((self.shapes,) * 2, text_tokens, self.latents.device)
        embeds = torch.cat([text[0] for text in self.texts])
        self.prompts = PromptBatch(layout, embeds, 2, (self.shapes,) * 2)

    def stock(self) -> list[torch.Tensor]:
        """As stock's loop calls it: outside `accelerated` an attached model is stock to the bit."""
        return [self._forward(text) for text in self.texts]

    def layers(self) -> list[torch.Tensor]:
        with accelerated(self.model, self.state):
            return [self._forward(text) for text in self.texts]

    def from_table(self) -> list[torch.Tensor]:
        with accelerated(self.model, self.state) as call:
            call.source = self.table
            return [self._forward(text) for text in self.texts]

    def from_table_packed(self) -> list[torch.Tensor]:
        with accelerated(self.model, self.state) as call:
            call.source = self.table
            output = self.model.predict(call, self.latents, self.timestep, self.prompts)
        return list(output.chunk(2))

    def _forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.model(
            hidden_states=self.latents,
            encoder_hidden_states=text,
            timestep=self.timestep,
            img_shapes=[list(self.shapes)],
            return_dict=False,
        )[0]


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--append", type=Path, help="CSV file that gets three rows a case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = RowFile(options.append, FIELDS) if options.append else None
    for name, pixels, text_tokens, dtype in CASES:
        case = StepForwards(name, pixels, text_tokens, dtype)
        ways = {"layers": case.layers, "table": case.from_table, "packed": case.from_table_packed}
        expected, differences = case.stock(), {}
        for mode, way in ways.items():
            differences[mode] = max(Difference.between(a, b).largest for a, b in zip(way(), expected, strict=True))
        limit = 1e-5 if dtype == torch.float32 else 0.05
        if not max(differences.values()) <= limit:
            print(f"{name} {pixels} px, {dtype}: predictions differ by {differences}; no times are given")
            return 1
        seconds = interleaved({"stock": case.stock} | ways, options.repeats, torch.device("cpu"))
        stock_p50 = Spread.of(seconds["stock"]).p50
        for mode in ways:
            times, fast = ratio(seconds["stock"], seconds[mode]), Spread.of(seconds[mode])
            print(
                f"{name:9s} {pixels:4d} px, text {text_tokens}, {dtype}, {mode:6s}: stock {stock_p50:.5f} s, "
                f"ours {fast.p50:.5f} s, ratio {times:.3f}"
            )
            if rows:
                row = {key: value for key, value in provenance().items() if key in FIELDS}
                row |= {"dtype": str(dtype).removeprefix("torch."), "model": name, "pixels": pixels, "mode": mode}
                row |= {"text_tokens": "+".join(map(str, text_tokens)), "repeats": options.repeats}
                row |= {f"fast_{part}": f"{getattr(fast, part):.6f}" for part in ("p20", "p50", "p80")}
                row |= {"stock_p50": f"{stock_p50:.6f}", "ratio_p50": f"{times:.4f}"}
                rows.add(row | {"max_relative_difference": f"{differences[mode]:.3g}"})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
