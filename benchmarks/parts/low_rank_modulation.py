"""How many numbers a step would serve any schedule: the rank of silu(temb(t)), and what it costs the modulations.

    python -m benchmarks.parts.low_rank_modulation [--width 3072] [--layers 3] [--seed 0]    (90 s of one core)

All modulations are linear in silu(temb(t)), a curve of one parameter. With its first r directions and the products of the
*_mod weights with them (2 * 60 * 6 * C * r numbers), any schedule needs r coefficients a step and no *_mod weight at all.

Random weights of unit gain (qwen_fast.testing.initialize): no trained ones are at hand, and the rank is a matter of how
much of the fast sinusoids the trained embedding listens to. So both ends are shown: an embedding that hears all 128
frequencies alike, and one that is deaf to the faster half (angles up to 1000 rad over a schedule; the others up to 10).
Directions are fitted to every second of the bf16 timesteps and judged on the others.
"""

import argparse
from typing import Any

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenTimestepProjEmbeddings
from torch import nn

from qwen_fast.testing import initialize

RANKS = (4, 8, 16, 32, 64, 128, 256)
FREQUENCIES = 128  # of the sinusoidal embedding, the fastest first


def model_timesteps(lowest: float = 0.0) -> torch.Tensor:
    """`[N]` fp32, ascending: every value that a bf16 model gets for timesteps of a fine grid over [lowest, 1000]."""
    return (torch.linspace(lowest, 1000, 64001).to(torch.bfloat16) / 1000).unique().float()


def curve(timesteps: torch.Tensor, width: int, heard: int, seed: int) -> torch.Tensor:
    """`[N, width]` fp32: silu(temb), of an embedding that hears the `heard` slowest frequencies."""
    embed = QwenTimestepProjEmbeddings(width)
    initialize(embed, "time_text_embed", seed)
    columns = embed.timestep_embedder.linear_1.weight.view(width, 2, FREQUENCIES)  # cosines, sines
    columns[:, :, : FREQUENCIES - heard] = 0
    columns *= (FREQUENCIES / heard) ** 0.5
    return nn.functional.silu(embed(timesteps, timesteps))


def measure(width: int, layers: int, heard: int, seed: int) -> list[dict[str, Any]]:
    """One row a rank and kind of fit: relative RMS and largest relative error of a layer's modulation over the timesteps.

    An error is the norm of a timestep's difference over the norm of its exact modulation without bias. `bf16` is the error
    of stock's own arithmetic in bf16 (weights as they are in bf16, so that rounding them does not count).
    """
    s = curve(model_timesteps(), width, heard, seed)
    fitted, judged = s[::2].double(), s[1::2]
    weights = []
    for layer in range(layers):
        linear = nn.Linear(width, 6 * width)
        initialize(linear, f"transformer_blocks.{layer}.img_mod", seed)
        weights.append(linear.weight.to(torch.bfloat16).float())
    exact = [judged @ weight.T for weight in weights]
    bf16 = [(judged.bfloat16() @ weight.bfloat16().T).float() for weight in weights]
    rows = [{"heard": heard, "fit": "stock in bf16", "rank": width, "energy": 0.0, **_errors(exact, bf16)}]
    for fit, mean in (("centred", fitted.mean(0)), ("plain", torch.zeros(width, dtype=torch.float64))):
        # Of the Gram matrix of the timesteps, which is the smaller one: its eigenvalues are the squared singular values.
        offsets = fitted - mean
        squares, vectors = torch.linalg.eigh(offsets @ offsets.T)
        for rank in RANKS:
            directions = nn.functional.normalize(offsets.T @ vectors[:, -rank:], dim=0)
            basis, _ = torch.linalg.qr(directions)
            moved = judged.double() - mean
            near = (mean + moved @ basis @ basis.T).float()
            lost = squares[:-rank].clamp_min(0).sum() / squares.sum()
            errors = _errors(exact, [near @ weight.T for weight in weights])
            rows.append({"heard": heard, "fit": fit, "rank": rank, "energy": lost.item(), **errors})
    return rows


def _errors(exact: list[torch.Tensor], near: list[torch.Tensor]) -> dict[str, float]:
    relative = torch.stack([(n - e).norm(dim=1) / e.norm(dim=1) for e, n in zip(exact, near, strict=True)])
    return {"rms": relative.square().mean().sqrt().item(), "largest": relative.max().item()}


@torch.no_grad()
def main() -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=3072)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for heard in (128, 64) for row in measure(options.width, options.layers, heard, options.seed)]
    count, useful = len(model_timesteps()), len(model_timesteps(20))
    print(f"width {options.width}, {options.layers} random layers, seed {options.seed}, {count} timesteps; without biases")
    print("heard  fit            rank  energy lost  relative RMS  largest  MB for 60 layers in bf16")
    for row in rows:
        numbers = f"{row['energy']:11.2e}  {row['rms']:12.2e}  {row['largest']:7.1e}"
        megabytes = 60 * 2 * 6 * options.width * row["rank"] * 2 / 1e6
        print(f"{row['heard']:5d}  {row['fit']:13s} {row['rank']:5d}  {numbers}  {megabytes:24.0f}")
    exact = 60 * 2 * 6 * options.width * useful * 2 / 1e6
    print(f"exact, a row for each of the {useful} timesteps from 20 to 1000 that bf16 tells apart: {exact:.0f} MB")
    return rows


if __name__ == "__main__":
    main()
