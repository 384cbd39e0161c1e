"""What a picture costs the host beside its forwards: milliseconds of a model with the real number of layers, each 32 wide.

    python -m benchmarks.parts.call_time [--repeats N] [--append benchmarks/results/call_time.csv]

CPU time of one thread, the smallest of N. The layers are narrow, so that what is left is the host's own work: a call without
its steps, one step, and what a callback adds to a step that does nothing but look at the latents. A step's time on a CPU holds
the operators' own code there; on a GPU launches take its place.
"""

import argparse
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers.utils import logging

import qwen_fast
from qwen_fast.testing import build_checkpoint

from ..shared.machine import provenance
from ..shared.measure import interleaved
from ..shared.rows import RowFile

LAYERS, FEW, MANY = 60, 2, 6
CALL = {"prompt": "a red circle", "negative_prompt": "blurry", "true_cfg_scale": 4.0, "height": 32, "width": 32}
FIELDS = "date commit dirty machine torch diffusers transformers layers repeats who call_ms step_ms callback_ms".split()


def look(pipe, step, timestep, tensors) -> dict:
    """A callback that shows progress."""
    return {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--append", type=Path, help="CSV file that gets one row each for stock and qwen_fast")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    ways = {}
    with tempfile.TemporaryDirectory() as folder:
        build_checkpoint(Path(folder, "model"), num_layers=LAYERS, attention_head_dim=32, num_attention_heads=1)
        for who in ("stock", "qwen_fast"):
            pipe = diffusers.QwenImagePipeline.from_pretrained(Path(folder, "model"))
            pipe.set_progress_bar_config(disable=True)
            if who == "qwen_fast":
                qwen_fast.enable(pipe)
            for name, (steps, callback) in {"few": (FEW, None), "many": (MANY, None), "watched": (MANY, look)}.items():
                arguments = CALL | {"num_inference_steps": steps, "callback_on_step_end": callback, "output_type": "latent"}
                ways[who, name] = lambda pipe=pipe, arguments=arguments: pipe(**arguments)
        for way in ways.values():
            way()
        seconds = {key: min(values) for key, values in interleaved(ways, options.repeats, torch.device("cpu")).items()}
    rows = RowFile(options.append, FIELDS) if options.append else None
    for who in ("stock", "qwen_fast"):
        few, many, watched = (seconds[who, name] for name in ("few", "many", "watched"))
        step = (many - few) / (MANY - FEW)
        found = {"call_ms": few - FEW * step, "step_ms": step, "callback_ms": (watched - many) / MANY}
        found = {name: f"{1e3 * value:.2f}" for name, value in found.items()}
        print(f"{who:9s} call {found['call_ms']} ms, step {found['step_ms']} ms, callback {found['callback_ms']} ms")
        if rows:
            row = {name: value for name, value in provenance().items() if name in FIELDS}
            rows.add(row | {"layers": LAYERS, "repeats": options.repeats, "who": who} | found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
