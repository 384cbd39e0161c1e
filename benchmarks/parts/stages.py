"""The stages of a picture, stock against ours, on this machine's CPU, interleaved, on the same weights.

    python -m benchmarks.parts.stages [--repeats N] [--append benchmarks/results/stages.csv]

Text encoding, schedule, the two forwards of a step, CFG with the Euler step, VAE; and whole pictures of both. CPU time of one
thread. A result beyond the numerical contract ends the run without a ratio.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps

import qwen_fast
from qwen_fast.testing import build_checkpoint

from ..operators.bench_operators import stock_cfg_euler_step
from ..shared.machine import PROVENANCE, provenance
from ..shared.measure import Difference, Spread, interleaved, ratio, silence
from ..shared.rows import RowFile
from .pipeline import MODELS
from .transformer import StepForwards

CASES = [  # model, pixels, steps, token counts of prompt and negative prompt in the forwards
    ("tiny", 64, 4, (14, 6)),
    ("tiny", 256, 20, (14, 6)),
    ("middle", 256, 20, (14, 6)),
]
FIELDS = [*PROVENANCE, "model", "pixels", "steps", "stage", "repeats", "stock_p50", "fast_p50", "ratio_p50", "share_of_stock"]
FIELDS += ["max_difference"]
LIMIT = 2e-6  # of the largest value, in fp32
WIDER = {"VAE": 1e-5, "forwards of a step": 1e-5, "forwards, stock's work": 1e-5}

Way = Callable[[], torch.Tensor]
Ways = dict[str, tuple[Way, Way, int]]


def stages(
    stock: Any, ours: Any, model: str, pixels: int, steps: int, tokens: tuple[int, int]
) -> dict[str, tuple[Way, Way, int]]:
    """Stock's and our way of each stage, and how often a picture with guidance has it."""
    image_tokens = (pixels // 16) ** 2
    generator = torch.Generator().manual_seed(0)
    latents, cond, uncond = (torch.randn(1, image_tokens, 64, generator=generator) for _ in range(3))
    config = stock.scheduler.config

    def stock_schedule() -> torch.Tensor:
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(image_tokens, *(config[name] for name in names))
        sigmas = torch.linspace(1.0, 1 / steps, steps).numpy()
        retrieve_timesteps(stock.scheduler, steps, "cpu", sigmas=sigmas, mu=mu)
        return stock.scheduler.sigmas

    def our_schedule() -> torch.Tensor:
        return qwen_fast.Schedule.from_scheduler(ours.scheduler, steps, image_seq_len=image_tokens).sigmas

    sigmas, index, scale = stock_schedule().clone(), torch.zeros(1, dtype=torch.int32), torch.tensor([4.0])
    stock_step, _ = stock_cfg_euler_step(latents, cond, uncond, sigmas, index, scale)
    forwards = StepForwards(model, pixels, tokens, torch.float32)
    frame = torch.randn(1, 16, 1, pixels // 8, pixels // 8, generator=generator)

    def text(pipe: Any) -> Way:
        return lambda: torch.cat([pipe.encode_prompt(prompt=prompt)[0] for prompt in ("a red circle", "blurry")], dim=1)

    def decode(pipe: Any, context: Callable[[], Any]) -> Way:
        def way() -> torch.Tensor:
            with context():
                return pipe.vae.decode(frame, return_dict=False)[0]

        return way

    arguments = {"prompt": "a red circle", "negative_prompt": "blurry", "true_cfg_scale": 4.0, "num_inference_steps": steps}
    arguments |= {"width": pixels, "height": pixels, "output_type": "latent"}

    def picture(pipe: Any) -> Way:
        return lambda: pipe(**arguments, generator=torch.Generator().manual_seed(0)).images

    return {
        "text": (text(stock), text(ours), 1),
        "schedule": (stock_schedule, our_schedule, 1),
        "forwards of a step": (lambda: torch.cat(forwards.stock()), lambda: torch.cat(forwards.from_table_packed()), steps),
        "forwards, stock's work": (lambda: torch.cat(forwards.stock()), lambda: torch.cat(forwards.layers()), 0),
        "CFG and Euler step": (
            stock_step,
            lambda: torch.ops.qwen_fast.cfg_euler_step(latents, cond, uncond, sigmas, index, scale),
            steps,
        ),
        "VAE": (decode(stock, contextlib.nullcontext), decode(ours, ours._images), 1),
        "picture without VAE": (picture(stock), picture(ours), 0),
    }


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--append", type=Path, help="CSV file that gets a row for each stage")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = RowFile(options.append, FIELDS) if options.append else None
    with tempfile.TemporaryDirectory() as folder, silence():
        for model, pixels, steps, tokens in CASES:
            checkpoint = Path(folder, model)
            if not checkpoint.exists():
                build_checkpoint(checkpoint, **MODELS[model])
            stock = diffusers.QwenImagePipeline.from_pretrained(checkpoint)
            ours = qwen_fast.QwenImagePipeline.from_pipe(stock)
            for pipe in (stock, ours):
                pipe.set_progress_bar_config(disable=True)
            ways = stages(stock, ours, model, pixels, steps, tokens)
            measured = {}
            for name, (theirs, fast, _) in ways.items():
                difference = Difference.between(fast(), theirs()).largest
                if not difference <= WIDER.get(name, LIMIT):
                    print(f"{model} {pixels} px, {name}: differs by {difference:g} of the largest value; no times are given")
                    return 1
                seconds = interleaved({"stock": theirs, "fast": fast}, options.repeats, torch.device("cpu"))
                medians = {which: Spread.of(values).p50 for which, values in seconds.items()}
                measured[name] = medians | {"ratio": ratio(seconds["stock"], seconds["fast"]), "difference": difference}
            whole = sum(measured[name]["stock"] * count for name, (_, _, count) in ways.items())
            for name, (_, _, count) in ways.items():
                one = measured[name]
                share = one["stock"] * count / whole
                print(
                    f"{model:6s} {pixels:3d} px, {steps:2d} steps, {name:22s}: stock {one['stock'] * 1e3:9.3f} ms, ours "
                    f"{one['fast'] * 1e3:9.3f} ms, {one['ratio']:.3f}x" + (f", {share:.1%} of a picture" if count else "")
                )
                if rows:
                    times = {f"{which}_p50": f"{one[which]:.6g}" for which in ("stock", "fast")}
                    row = provenance() | {"model": model, "pixels": pixels, "steps": steps, "stage": name} | times
                    row |= {"ratio_p50": f"{one['ratio']:.4f}", "max_difference": f"{one['difference']:.3g}"}
                    rows.add(row | {"repeats": options.repeats, "share_of_stock": f"{share:.4f}" if count else ""})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
