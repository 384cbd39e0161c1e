"""Pictures of the demo checkpoint in memory that was full of NaN: how many are NaN, with a CUDA graph and without.

A part of stress.py, which runs it in several processes at once.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from diffusers import QwenImagePipeline

import qwen_fast
from qwen_fast import demo
from qwen_fast.common import proofs
from qwen_fast.demo.accuracy import held_out_requests

from .counts import Found

CALL = {"cuda": (32, 20), "cpu": (1, 2)}  # pictures and steps


def poison(device: torch.device) -> None:
    """Fill memory of many sizes with NaN and free it."""
    sizes = [256, 4096, 65_536]
    if device.type == "cuda":
        sizes = [*sizes, 1000, 20_000, 100_000, 1_000_000] * 12 + [4_000_000] * 8
    for dtype in (torch.float32, torch.bfloat16):
        _freed = [torch.full((size,), float("nan"), dtype=dtype, device=device) for size in sizes]


def calls(device: torch.device, ways: dict[str, bool]) -> Iterator[Callable[[], tuple[str, str, torch.Tensor]]]:
    """Without end: calls of the demo checkpoint, (way, size, latents); one of four by the second way, by turns of size."""
    pipes, (count, steps) = {}, CALL[device.type]
    for way, cuda_graph in ways.items():
        pipe = QwenImagePipeline.from_pretrained(str(demo.checkpoint()), dtype=torch.bfloat16).to(device)
        pipe.set_progress_bar_config(disable=True)
        pipes[way] = qwen_fast.enable(pipe, cuda_graph=cuda_graph)
    prompts = [request.prompt for request in held_out_requests(count)]

    def call(way: str, width: int) -> tuple[str, str, torch.Tensor]:
        generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
        latents = pipes[way](
            prompts,
            negative_prompt=[" "] * len(prompts),
            true_cfg_scale=4.0,
            num_inference_steps=steps,
            width=width,
            height=64,
            generator=generators,
            output_type="latent",  # the pictures' NaN was there already, and the VAE's kernels take longer to compile
        ).images
        if device.type == "cuda" and ways[way] and pipes[way].fast_state.graph:
            raise RuntimeError(f"no graph was captured: {pipes[way].fast_state.graph}")
        return way, f"{width}x64", latents

    often, seldom = ways
    for width, way in itertools.cycle(itertools.product((64, 96), (often, seldom, often, often))):
        yield lambda way=way, width=width: call(way, width)


def draw(device: torch.device, ways: dict[str, bool], until: float, say: Callable[[dict], None]) -> None:
    """Pictures until this moment (of `time.time`), at least one call of each way.

    Args:
        ways: cuda_graph by name; the first one is called three times as often as the second.
        say: gets a way's counts after every call, and all of them at the end.
    """
    proofs.DEVICES = ()  # in this process: the kernels themselves are to be seen, and not what replaces a wrong one
    found, firsts = {way: Found() for way in ways}, {}
    for number, call in enumerate(calls(device, ways), start=1):
        poison(device)
        way, size, latents = call()
        found[way].add_pictures(latents, firsts.setdefault((way, size), latents.clone()))
        say({"way": way, **asdict(found[way])})
        if number >= len(ways) and (device.type != "cuda" or time.time() >= until):
            break  # the first two of `calls` are one of each way
    for way, counts in found.items():
        say({"way": way, "done": True, **asdict(counts)})
