"""What a LoRA costs a step: none, fused into the weights, beside the fused path, and as layers that are called.

    python -m benchmarks.parts.lora [--repeats N] [--append benchmarks/results/lora.csv]

CPU time of one thread, the smallest of N, of a model of 4 layers 512 wide at 256x256 with guidance; rank 32 on all layers of
attention and of the MLPs.
"""

import argparse
import tempfile
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers.utils import logging
from peft import LoraConfig

import qwen_fast
from qwen_fast.testing import build_checkpoint
from qwen_fast.transformer import linear

from ..shared.machine import provenance
from ..shared.measure import interleaved
from ..shared.rows import RowFile

RANK, STEPS = 32, 2
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2"]
CALL = {"prompt": "a red circle", "negative_prompt": "blurry", "true_cfg_scale": 4.0, "height": 256, "width": 256}
CALL |= {"num_inference_steps": STEPS, "output_type": "latent"}
WAYS = ("none", "fused", "beside", "called")
FIELDS = "date commit dirty machine torch diffusers transformers rank repeats way step_ms".split()


def pipeline(model: Path, way: str) -> diffusers.QwenImagePipeline:
    """An enabled pipeline whose transformer has a LoRA in one of `WAYS`, drawn once."""
    pipe = diffusers.QwenImagePipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if way != "none":
        torch.manual_seed(0)
        config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
        pipe.transformer.add_adapter(config, adapter_name="a")
    if way == "fused":
        pipe.transformer.fuse_lora()
        pipe.transformer.unload_lora()
    qwen_fast.enable(pipe)
    # How layers are computed is found out before the first step, and stays so.
    plain = mock.patch.object(linear, "_adapters", lambda module: None)
    with plain if way == "called" else mock.patch.object(linear, "_adapters", linear._adapters):
        pipe(**CALL)
    return pipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--append", type=Path, help="CSV file that gets one row for each way")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        build_checkpoint(Path(folder, "model"), num_layers=4, attention_head_dim=64, num_attention_heads=8)
        pipes = {way: pipeline(Path(folder, "model"), way) for way in WAYS}
        ways = {way: (lambda pipe=pipe: pipe(**CALL)) for way, pipe in pipes.items()}
        seconds = {way: min(found) for way, found in interleaved(ways, options.repeats, torch.device("cpu")).items()}
    rows = RowFile(options.append, FIELDS) if options.append else None
    for way in WAYS:
        found = f"{1e3 * seconds[way] / STEPS:.1f}"
        print(f"{way:7s} {found} ms a step")
        if rows:
            row = {name: value for name, value in provenance().items() if name in FIELDS}
            rows.add(row | {"rank": RANK, "repeats": options.repeats, "way": way, "step_ms": found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
