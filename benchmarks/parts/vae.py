"""Decoding and encoding one picture, stock against qwen_fast, on this machine's CPU, interleaved, on the same weights.

    python -m benchmarks.parts.vae [--pixels 256 512] [--repeats N] [--append benchmarks/results/vae.csv]
    python -m benchmarks.parts.vae --pixels 1024 --repeats 1 --what decode --dtypes float32   a pair that takes minutes

The full-width VAE of Qwen-Image (base_dim 96) with random weights; CPU time of one thread. A difference beyond 1e-5 in fp32
ends the run without a ratio.
"""

import argparse
import datetime
import platform
import statistics
import time
from pathlib import Path

import diffusers
import torch

import qwen_fast
from qwen_fast.testing import initialize

from ..shared.rows import append
from ..shared.source import git

FIELDS = "date commit dirty machine torch diffusers dtype pixels what repeats stock_p50 fast_p50 ratio_p50".split()
FIELDS += ["max_difference"]


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pixels", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--what", nargs="+", choices=("decode", "encode"), default=["decode", "encode"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--append", type=Path, help="CSV file that gets a row as each case is done")
    options = parser.parse_args()
    torch.set_num_threads(1)
    vae = diffusers.AutoencoderKLQwenImage()
    initialize(vae, "vae", 0)
    commit, dirty = git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain"))
    for dtype in options.dtypes:
        vae = torch.nn.Module.to(vae, getattr(torch, dtype)).eval()
        for pixels in options.pixels:
            inputs = {
                "decode": torch.randn(1, 16, 1, pixels // 8, pixels // 8),
                "encode": torch.rand(1, 3, 1, pixels, pixels) * 2 - 1,
            }
            for what in options.what:
                value, outputs, seconds = inputs[what].to(vae.dtype), {}, {"stock": [], "fast": []}
                for repeat in range(options.repeats):
                    for name in sorted(seconds, reverse=bool(repeat % 2)):
                        (qwen_fast.enable_vae if name == "fast" else qwen_fast.disable_vae)(vae)
                        begin = time.thread_time()
                        decoding = what == "decode"
                        outputs[name] = vae.decode(value).sample if decoding else vae.encode(value).latent_dist.mean
                        seconds[name].append(time.thread_time() - begin)
                difference = (outputs["fast"] - outputs["stock"]).abs().max().item()
                if dtype == "float32" and difference > 1e-5 * max(1.0, outputs["stock"].abs().max().item()):
                    print(f"{what} {pixels} px: differs by {difference:g}; no times are given")
                    return 1
                medians = {name: statistics.median(values) for name, values in seconds.items()}
                ratio = statistics.median(s / f for s, f in zip(seconds["stock"], seconds["fast"], strict=True))
                print(
                    f"{what} {pixels:4d} px, {dtype}: stock {medians['stock']:.3f} s, ours {medians['fast']:.3f} s, "
                    f"ratio {ratio:.2f}, largest difference {difference:g}",
                    flush=True,
                )
                row = [
                    datetime.date.today(), commit, dirty, f"{platform.machine()} CPU, 1 thread", torch.__version__,
                    diffusers.__version__, dtype, pixels, what, options.repeats,
                    f"{medians['stock']:.4f}", f"{medians['fast']:.4f}", f"{ratio:.4f}", f"{difference:.3g}",
                ]  # fmt: skip
                if options.append:
                    append(options.append, FIELDS, [row])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
