"""What a LoRA costs a step: stock without and with one; ours with none, fused into the weights, beside them, as called layers.

    python -m benchmarks.parts.lora [--device cuda] [--repeats N] [--append benchmarks/results/lora.csv]

Rank 32 on all layers of attention and of the MLPs, random weights: on a GPU of Qwen-Image's own size, on the CPU of 4 layers
512 wide. Milliseconds of a step, the median of later steps of all turns; of one thread's time on the CPU.
"""

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers.utils import logging
from peft import LoraConfig

import qwen_fast
from qwen_fast.transformer import linear
from qwen_fast.transformer.call import ATTACHED

from ..ladder.models import call_arguments, random_pipeline
from ..shared.machine import provenance, query
from ..shared.measure import Spread, clocked
from ..shared.rows import RowFile
from ..shared.shapes import SHAPES, PictureCase

RANK, MEASURED = 32, 5
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2"]
# "none" before the first adapter, whose layers PEFT leaves in the model when it is deleted.
WAYS = ("stock", "none", "stock with LoRA", "fused", "beside", "called")
FIELDS = (
    "date commit dirty machine torch diffusers transformers dtype width height steps cfg rank repeats way step_ms graph".split()
)


@contextlib.contextmanager
def entered(pipe: Any, way: str) -> Iterator[None]:
    """The stock pipeline as one of `WAYS` runs it; as it was, behind."""
    model = pipe.transformer
    with contextlib.ExitStack() as stack:
        if way not in ("stock", "none"):
            torch.manual_seed(0)
            config = LoraConfig(r=RANK, target_modules=TARGETS, init_lora_weights=False)
            with torch.device(model.device):  # PEFT draws 200 M values, on a GPU at once
                model.add_adapter(config, adapter_name="a")
            stack.callback(model.delete_adapters, "a")
        if way == "fused":
            model.fuse_lora()
            stack.callback(model.unfuse_lora)
        if way == "called":
            stack.enter_context(mock.patch.object(linear, "_adapters", lambda module: None))
        if not way.startswith("stock"):
            qwen_fast.enable(pipe, modulation="device")
            stack.callback(qwen_fast.disable, pipe)
        yield


def step_seconds(pipe: Any, arguments: dict, steps: int) -> tuple[list[float], str]:
    """Of the later steps of a call, behind two that warm up and capture; why there was no graph, or how many were captured and
    kept: more than one of each would be a key that changes from call to call."""
    for measured in (2, 2, steps):
        with clocked(pipe, measured) as clock:
            pipe(**arguments, output_type="latent")
    state = getattr(pipe, "fast_state", None)
    if state is None:
        return clock.steps[1:], ""
    kept = len(pipe.transformer.__dict__[ATTACHED].graphs)
    return clock.steps[1:], state.graph or f"{state.calls['graph captures']} captures, {kept} kept"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--append", type=Path, help="CSV file that gets one row for each way")
    options = parser.parse_args()
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if options.device.type == "cuda":
        cases, dtype = [PictureCase(512, 512, 8, False), PictureCase()], torch.bfloat16
    else:
        cases, dtype = [PictureCase(256, 256, 20, True, 1, 16, SHAPES["middle"])], torch.float32
    pipe = random_pipeline(cases[0].shape, options.device, dtype)
    rows = RowFile(options.append, FIELDS) if options.append else None
    for case in cases:
        print(case, flush=True)
        measure(pipe, case, options.repeats, rows)
    return 0


def measure(pipe: Any, case: PictureCase, repeats: int, rows: RowFile | None) -> None:
    """Every way by turns, in alternating order; a row for each."""
    arguments, steps = call_arguments(pipe, case), min(MEASURED, case.steps)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    graphs: dict[str, str] = {}
    for repeat in range(repeats):
        for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
            with entered(pipe, way):
                found, graphs[way] = step_seconds(pipe, arguments, steps)
                seconds[way] += found
                told = " ".join(f"{1e3 * one:.1f}" for one in found)
                if pipe.device.type == "cuda":
                    told += f", MHz and degrees {query(('clocks.sm', 'temperature.gpu'), pipe.device)}"
                print(f"  {way}: {told}", flush=True)
    common = {name: value for name, value in provenance(pipe.device).items() if name in FIELDS}
    common |= {"dtype": str(pipe.transformer.dtype).removeprefix("torch."), "width": case.width, "height": case.height}
    common |= {"steps": case.steps, "cfg": case.cfg, "rank": RANK, "repeats": repeats}
    for way in WAYS:
        found = f"{1e3 * Spread.of(seconds[way]).p50:.5g}"
        print(f"{way:15s} {found} ms a step, {graphs[way] or 'stock'}", flush=True)
        if rows:
            rows.add(common | {"way": way, "step_ms": found, "graph": graphs[way]})


if __name__ == "__main__":
    raise SystemExit(main())
