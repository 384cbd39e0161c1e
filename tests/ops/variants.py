"""How often each kernel is compiled for prompts and pictures of many sizes; run as a process that does not interpret.

Prints {operator, case and configuration: number of variants} as JSON. Nothing is compiled: Triton is asked for its keys.
"""

import json
import random
from collections import defaultdict
from dataclasses import replace

import torch
import triton

from benchmarks.compiler.offline import compile_only
from benchmarks.operators.cases import CASES, Maker, Size
from qwen_fast_kernels import _arguments

PROMPTS = 200
SAMPLER = ("flow_match_schedule", "euler_step", "cfg_euler_step")
NAMES = ("bf16", "packed", "Qwen-Image")
OPS = sorted({case.op for case in CASES} - {"joint_attention"})


def random_size(draw: random.Random) -> Size:
    """One to three prompts of any length, and a square picture of a multiple of 32 pixels for each."""
    sequences = draw.randint(1, 3)
    return Size(tuple(draw.randint(1, 300) for _ in range(sequences)), (draw.randint(1, 64) ** 2,) * sequences)


class Anywhere(Maker):
    """Index tensors begin anywhere: the table rows of the image tokens begin behind those of a prompt."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__("cuda", fake=True)
        self.draw = draw

    def values(self, values: list, dtype=torch.int32) -> torch.Tensor:
        offset = self.draw.randrange(16) if dtype == torch.int32 else 0
        return super().values(values + [0] * offset, dtype).narrow(0, offset, len(values))


def main() -> None:
    draw, seen, keys = random.Random(0), [], defaultdict(set)

    def note(*, key, **_) -> bool:
        seen.append(key)
        return True  # compile nothing

    triton.knobs.runtime.jit_cache_hook = note
    with compile_only(90):
        for case in [case for case in CASES if case.op in OPS and case.name in NAMES]:
            for _ in range(PROMPTS):
                steps = {"steps": draw.randint(32, 63)} if case.op in SAMPLER else {}
                _arguments.STEPS = draw.randint(1, 50)  # rows of a modulation table
                size = random_size(draw)
                if case.op == "rms_norm_silu":  # pixels
                    size = replace(case.size, img=(draw.randint(1, 1 << 20),))
                one = replace(case, size=size, variant=case.variant | steps)
                arguments = one.arguments(Anywhere(draw))
                config = one.config(90, arguments)
                one.launch(arguments, config)
                keys[case.op, case.name, json.dumps(config)].update(seen)
                seen.clear()
    print(json.dumps({" ".join(name): len(found) for name, found in keys.items()}))


if __name__ == "__main__":
    main()
