"""Train the demo checkpoint: VAE, text encoder, denoiser, few-step LoRA, and the judge's table of the result.

python -m qwen_fast.demo.train --out FOLDER
"""

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

from ...common.hardware import device_and_dtype
from ...schedule.configs import LIGHTNING_SCHEDULER_CONFIG
from .. import LIGHTNING, accuracy
from .denoiser import encode_scenes, train_denoiser
from .few_steps import STEPS, distil, draw_trajectories
from .plan import Plan
from .saving import CARD, finish, save_checkpoint
from .text import NEGATIVE, Features, build_text, encode_prompts
from .vae import sharpen_decoder, train_vae


def train(plan: Plan, out: Path, device: torch.device, *, pictures: int = 200, keep_every: int = 500) -> Path:
    """Run every stage that `out` does not hold yet; an interrupted run goes on where its last state was written.

    Args:
        plan (Plan): the recipe.
        out (Path): gets state files, times and the checkpoint; a folder of another plan is refused.
        device (torch.device): where to train.
        pictures (int): of one thing that are drawn and judged in the end, and half as many of two.
        keep_every (int): optimiser steps between states.

    Returns:
        Path: the checkpoint's folder.

    Raises:
        ValueError: `out` holds the states of another plan.
        ImportError: peft is missing.
    """
    if importlib.util.find_spec("peft") is None:
        raise ImportError("the few-step LoRA is trained with peft, which is not installed; pip install peft")
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, plan)
    stage = _Stages(out / "seconds.json")
    checkpoint = out / "checkpoint"

    def parts(transformer: torch.nn.Module) -> dict[str, Any]:
        return {"vae": vae, "text_encoder": encoder, "tokenizer": out / "tokenizer", "transformer": transformer}

    def keep(step: int, average: torch.nn.Module) -> None:
        if step % (10 * keep_every) == 0 and step < plan.denoiser.steps:
            save_checkpoint(out / f"checkpoint-{step}", **parts(average))

    vae = stage("vae", lambda: train_vae(plan, out / "vae.pt", device, keep_every=keep_every))
    data = stage("latents", lambda: encode_scenes(plan, vae, out / "latents.pt"))
    tokenizer, encoder = stage("text", lambda: build_text(plan, out))
    encoder.to(device)

    def encoded(parts: Sequence[Any]) -> Features:
        prompts = [NEGATIVE, *sorted({prompt for part in parts for prompt in part.prompts})]
        return stage("text", lambda: encode_prompts(tokenizer, encoder, prompts))

    features = encoded(data)
    transformer = stage(
        "denoiser",
        lambda: train_denoiser(plan, data, features, out / "denoiser.pt", device, keep_every=keep_every, look=keep),
    )
    stage("decoder", lambda: sharpen_decoder(plan, vae, out / "decoder.pt", device, keep_every=keep_every))
    save_checkpoint(checkpoint, **parts(transformer))
    # From here on with the weights as saved: rounded to bf16.
    teacher = accuracy.load_stock(checkpoint, device)
    paths = stage("few steps", lambda: draw_trajectories(plan, teacher, out / "trajectories.pt", device))
    features = encoded(paths)
    lora = stage(
        "few steps",
        lambda: distil(plan, paths, features, teacher.transformer, out / "few_steps.pt", device, keep_every=keep_every),
    )
    QwenImagePipeline.save_lora_weights(checkpoint / LIGHTNING, transformer_lora_layers=lora)
    table = stage("judge", lambda: _judge(checkpoint, plan, device, pictures))
    finish(checkpoint, _card(plan, table, stage.seconds, parts(transformer)))
    print(table)
    print(f"seconds: {', '.join(f'{name} {seconds:.0f}' for name, seconds in stage.seconds.items())}")
    print(f"checkpoint: {checkpoint}")
    return checkpoint


class _Stages:
    """Runs stages and adds up their wall seconds in a file, over interruptions."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        began = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            self.file.write_text(json.dumps(self.seconds))


def _claim(out: Path, plan: Plan) -> None:
    """Write the plan down, or compare it with the one whose states lie in `out`."""
    text = json.dumps(dataclasses.asdict(plan), indent=2)
    file = out / "plan.json"
    if not file.is_file():
        file.write_text(text, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != text:
        raise ValueError(f"{file} is of another plan, whose states cannot be continued; give another --out")


def _judge(checkpoint: Path, plan: Plan, device: torch.device, pictures: int) -> str:
    pipe = accuracy.load_stock(checkpoint, device)
    rows = {}
    for width, height in plan.sizes:
        for kind in accuracy.KINDS:
            wanted = accuracy.held_out_requests(pictures if kind == "one" else max(1, pictures // 2), kind)
            rows[f"{kind}, {width}x{height}"] = accuracy.draw(pipe, wanted, width=width, height=height)[1]
    pipe.load_lora_weights(checkpoint / LIGHTNING, weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(LIGHTNING_SCHEDULER_CONFIG)
    call = {"num_inference_steps": STEPS, "true_cfg_scale": 1.0, "negative_prompt": None}
    for width, height in plan.sizes:
        wanted = accuracy.held_out_requests(pictures, "one")
        rows[f"one, {width}x{height}, {STEPS} steps"] = accuracy.draw(pipe, wanted, width=width, height=height, **call)[1]
    return accuracy.table(rows)


def _card(plan: Plan, table: str, seconds: dict[str, float], parts: dict[str, Any]) -> str:
    counts = {
        name: sum(parameter.numel() for parameter in module.parameters()) / 1e6
        for name, module in parts.items()
        if isinstance(module, torch.nn.Module)
    }
    return CARD.format(
        sizes=f"Parameters: {', '.join(f'{name} {count:.2f} M' for name, count in counts.items())}.",
        table=table,
        seed=plan.seed,
        vae_steps=plan.vae.steps,
        vae_batch=plan.vae.batch,
        steps=plan.denoiser.steps,
        batch=plan.denoiser.batch,
        scenes=plan.denoiser.scenes,
        decoder_steps=plan.decoder.steps,
        few_steps=plan.few_steps,
        timing=f"Wall seconds by stage: {', '.join(f'{name} {value:.0f}' for name, value in seconds.items())}.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train with the plan of plan.py; 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m qwen_fast.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for states and the checkpoint; an old one is continued")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: cuda if there is one, else cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        device, _ = device_and_dtype(args.device, "fp32")
        train(Plan(seed=args.seed), args.out, device)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from the last state in {args.out}.", file=sys.stderr)
        return 130
    except (ImportError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
