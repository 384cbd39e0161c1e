"""Matrix products of the model, shape by shape: what cuBLAS reaches in bf16, and what 8 bits would give.

    python -m benchmarks.parts.products --out DIR [--device cuda] [--seconds 0.06]

Each with its bias, on random data, through three sets of buffers by turns, so that no operand waits in the L2 cache. A row each
goes to products.csv; what torch refuses is a row with its reason. Of text products (few rows) GB/s is what counts, of image
products TFLOP/s. Nothing is compared: they are torch's own, and random weights in 8 bits would not say how a picture looks.
On a CPU the shapes are small and nothing is timed.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..attention.speed import fields_of, milliseconds, reason_of
from ..shared.machine import PROVENANCE, Sampler, provenance
from ..shared.rows import RowFile

FIELDS = [*PROVENANCE, *("m", "k", "n", "way", "status", "reason", "rounds", "ms_p50", "ms_p20", "tflop_per_s", "gb_per_s")]
WIDTH, SMALL_WIDTH = 3072, 32
TOKENS, SMALL_TOKENS = (8192, 4096, 2048, 1024, 36), (64, 4)
SETS = 3
Way = Callable[[], object]


def weights(width: int) -> list[tuple[int, int]]:
    """(K, N): projections, the three of an attention as one, the two layers of the MLP."""
    return [(width, width), (width, 3 * width), (width, 4 * width), (4 * width, width)]


def ways(m: int, k: int, n: int, device: torch.device) -> dict[str, Way]:
    """A call with buffers of its own each; 8 bits only for images, whose rows are many."""
    x = torch.randn(m, k, device=device).bfloat16()
    weight = (torch.randn(n, k, device=device) * k**-0.5).bfloat16()
    bias, out = torch.randn(n, device=device).bfloat16(), torch.empty(m, n, device=device, dtype=torch.bfloat16)
    found: dict[str, Way] = {"bf16": lambda: torch.addmm(bias, x, weight.t(), out=out)}
    if n == 4 * k:
        found["bf16 + GELU"] = lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return found | (_eight_bits(x, weight, bias) if m > TOKENS[-1] else {})


def _eight_bits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, Way]:
    (m, _), (n, _), device = x.shape, weight.shape, x.device
    x8, w8 = x.to(torch.float8_e4m3fn), (weight * 30).to(torch.float8_e4m3fn)
    scales = {
        "a scale a row": (torch.rand(m, 1, device=device) + 0.5, torch.rand(1, n, device=device) + 0.5),
        "one scale": (torch.ones((), device=device), torch.ones((), device=device)),
    }

    def fp8(name: str, fast: bool) -> Way:
        scale_a, scale_b = scales[name]
        more = {"scale_a": scale_a, "scale_b": scale_b, "bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
        return lambda: torch._scaled_mm(x8, w8.t(), **more)

    found = {f"fp8, {name}{end}": fp8(name, fast) for end, fast in (("", True), (", fp32 sums", False)) for name in scales}
    xi, wi = (torch.randint(-127, 128, one.shape, device=device, dtype=torch.int8) for one in (x, weight))
    return found | {"int8, no scales": lambda: torch._int_mm(xi, wi.t())}


def measured(m: int, k: int, n: int, way: str, runs: Sequence[Way], device: torch.device, seconds: float) -> dict[str, str]:
    """The columns of a product, whatever comes."""
    row = {"m": str(m), "k": str(k), "n": str(n), "way": way, "status": "failed"}
    try:
        times = milliseconds(runs, device, seconds)
    except Exception as error:  # torch's refusals
        return row | {"reason": reason_of(error)}
    found = {name: value for name, value in fields_of(times, 2.0 * m * k * n).items() if name in FIELDS}
    moved = (2 if way.startswith("bf16") else 1) * (m * k + k * n) + 2 * m * n  # the result has 16 bits
    if "tflop_per_s" in found:
        found["gb_per_s"] = f"{moved / float(found['ms_p50']) / 1e6:.5g}"
    return row | found | {"status": "ok"}


def measure(out: Path, device: torch.device, seconds: float) -> list[dict[str, str]]:
    """Every product in every way; the rows, which are in products.csv of `out` too."""
    rows, place, found = RowFile(out / "products.csv", FIELDS), provenance(device), []
    tokens, width = (TOKENS, WIDTH) if device.type == "cuda" else (SMALL_TOKENS, SMALL_WIDTH)
    for m, (k, n) in ((m, weight) for m in tokens for weight in weights(width)):
        sets = [ways(m, k, n, device) for _ in range(SETS)]
        for way in sets[0]:
            found.append(place | measured(m, k, n, way, [one[way] for one in sets], device, seconds))
            rows.add(found[-1])
            shown = ("m", "k", "n", "way", "ms_p50", "tflop_per_s", "gb_per_s", "reason")
            print(*(found[-1].get(name, "") for name in shown), sep="  ", flush=True)
        del sets
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of products.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.06, help="for which each is timed")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    with Sampler(device) as sampler:
        measure(options.out, device, options.seconds)
    print(" ".join(f"{name} {value}" for name, value in sampler.summary().items() if value))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
