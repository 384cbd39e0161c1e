"""A schedule in plain Python, as a port to another language would have it, held to golden vectors.

    qwen-fast schedule --json vectors.json --grid
    python examples/port_schedule.py vectors.json

The three places where ports go wrong are marked. Python computes in fp64, so sigmas agree to fp32's rounding, not to the bit.
"""

import argparse
import json
import math
from pathlib import Path


def sigmas_of(config: dict, steps: int, image_tokens: int) -> list[float]:
    """Sigmas from noise to picture, with a 0 behind the last."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    mu = config["base_shift"] + slope * (image_tokens - config["base_image_seq_len"])  # 1: a straight line, no ln and exp
    sigmas = [1 - i * (1 - 1 / steps) / max(1, steps - 1) for i in range(steps)]  # 2: to 1/N, not to shift_terminal
    sigmas = [math.exp(mu) / (math.exp(mu) + (1 / sigma - 1)) for sigma in sigmas]
    terminal = config["shift_terminal"]
    if terminal and steps > 1:  # 3: stretched, so that the last one is shift_terminal
        scale = (1 - sigmas[-1]) / (1 - terminal)
        sigmas = [1 - (1 - sigma) / scale for sigma in sigmas]
    return [*sigmas, 0.0]


def main(argv=None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="what `qwen-fast schedule --json vectors.json --grid` wrote")
    golden = json.loads(parser.parse_args(argv).vectors.read_text(encoding="utf-8"))
    worst = 0.0
    for vector in golden["vectors"]:
        found = sigmas_of(golden["config"], vector["num_inference_steps"], vector["image_seq_len"])
        worst = max(worst, *(abs(a - b) for a, b in zip(found, vector["sigmas"], strict=True)))
    print(f"{len(golden['vectors'])} schedules, largest difference of a sigma {worst:.1e}")
    if worst > 5e-7:
        raise SystemExit("this port is wrong")
    return worst


if __name__ == "__main__":
    main()
