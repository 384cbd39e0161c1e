"""Matrix products of the model, shape by shape: what cuBLAS reaches in bf16, and what 8 bits would give.

    python -m benchmarks.products --out DIR

Each with its bias, into a slice that is there already, on random data and rotating buffers. Rows go to products.csv. Of text
products (few rows) GB/s is what counts, of image products TFLOP/s.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from .attention_speed import milliseconds
from .machine import PROVENANCE, Sampler, provenance
from .rows import Rows

FIELDS = [*PROVENANCE, *("m", "k", "n", "way", "status", "reason", "rounds", "ms_p50", "ms_p20", "tflop_per_s", "gb_per_s")]
WIDTH = 3072
WEIGHTS = ((WIDTH, WIDTH), (WIDTH, 3 * WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))  # K, N
TOKENS = (8192, 4096, 2048, 1024, 36)
SETS = 3


def ways(m: int, k: int, n: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """A call with buffers of its own each."""
    x = torch.randn(m, k, device=device).bfloat16()
    weight = (torch.randn(n, k, device=device) * k**-0.5).bfloat16()
    bias, out = torch.randn(n, device=device).bfloat16(), torch.empty(m, n, device=device, dtype=torch.bfloat16)
    found = {"bf16": lambda: torch.addmm(bias, x, weight.t(), out=out)}
    if n == 4 * WIDTH:
        found["bf16 + GELU"] = lambda: torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    if m >= 1024:
        scales = torch.rand(m, 1, device=device) + 0.5, torch.rand(1, n, device=device) + 0.5
        x8, w8 = x.to(torch.float8_e4m3fn), (weight * 30).to(torch.float8_e4m3fn)
        row_wise = {"scale_a": scales[0], "scale_b": scales[1]}
        one = {"scale_a": torch.ones((), device=device), "scale_b": torch.ones((), device=device)}
        for name, fast in (("", True), (", fp32 sums", False)):
            more = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": fast}
            found[f"fp8, a scale a row{name}"] = lambda more=more: torch._scaled_mm(x8, w8.t(), **row_wise, **more)
            found[f"fp8, one scale{name}"] = lambda more=more: torch._scaled_mm(x8, w8.t(), **one, **more)
        xi, wi = (torch.randint(-127, 128, size, device=device, dtype=torch.int8) for size in ((m, k), (n, k)))
        found["int8, no scales"] = lambda: torch._int_mm(xi, wi.t())
    return found


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=0.06)
    options = parser.parse_args()
    device = torch.device("cuda")
    options.out.mkdir(parents=True, exist_ok=True)
    rows, place = Rows(options.out / "products.csv", FIELDS), provenance(device)
    with Sampler(device) as sampler:
        for m in TOKENS:
            for k, n in WEIGHTS:
                sets = [ways(m, k, n, device) for _ in range(SETS)]
                for way in sets[0]:
                    row = place | {"m": m, "k": k, "n": n, "way": way, "status": "failed"}
                    try:
                        times = milliseconds([one[way] for one in sets], device, options.seconds)
                        p50, size = statistics.median(times), 1 if "8" in way.split()[0][-2:] else 2
                        row |= {"status": "ok", "rounds": len(times), "ms_p50": f"{p50:.5g}", "ms_p20": f"{min(times):.5g}"}
                        row["tflop_per_s"] = f"{2.0 * m * k * n / p50 / 1e9:.5g}"
                        row["gb_per_s"] = f"{(size * (m * k + k * n) + 2 * m * n) / p50 / 1e6:.5g}"
                    except Exception as failure:  # torch's refusals
                        row["reason"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
                    rows.add({name: str(value) for name, value in row.items()})
                    shown = ("m", "k", "n", "way", "ms_p50", "tflop_per_s", "gb_per_s", "reason")
                    print(*(row.get(name, "") for name in shown), sep="  ", flush=True)
                del sets
                torch.cuda.empty_cache()
    print(sampler.summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
