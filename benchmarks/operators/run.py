"""Every operator at the model's real shapes: right, the same in every launch, and how near to what this machine can do.

    python -m benchmarks.operators.run --out DIR [--ceilings FILE] [--device cuda] [--limit 25]

One process and no test runner. Rows go to operators_of_the_model.csv one by one: the relative errors against float64 (of
attention in two heads), whether 20 launches agree to the bit, the median time on buffers that the L2 cache does not hold, GB/s,
TFLOP/s and the share of the ceiling. What fails is a row with its error. What does not end is a row too; the process then ends
with code 7 and goes on behind it when it is begun again.

bench_operators.py compares with torch.compile and stock. Exit code: 0 all right, 1 something is wrong or failed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from qwen_fast_kernels._triton import capability

from ..shared.budget import IN_PLACE, LAUNCHES, LIMIT, in_float64, over_budget, relative_errors, results
from ..shared.ceilings import Ceilings, kept_ceilings
from ..shared.machine import PROVENANCE, Sampler, provenance
from ..shared.rows import RowFile, of_this_state
from ..shared.shapes import NEGATIVE_TOKENS, SHAPES
from ..shared.watchdog import watched
from .cases import BF16, FP32, PIXELS, Maker, OperatorCase, Size
from .suite import DEVICE_CLOCK, sets
from .work import Piece, floor_seconds

ROUNDS = 30
SAMPLED_HEADS = 2
CHANGED = IN_PLACE | {"rms_norm_silu": (3,)}  # arguments that an operator writes to
FIELDS = [
    *PROVENANCE,
    *("op", "case", "size", "dtype", "way", "status", "reason", "max_error", "rms_error", "equal_launches", "rounds"),
    *("seconds_p20", "seconds_p50", "seconds_p80", "bytes", "flops", "gb_per_s", "tflop_per_s", "share_of_ceiling", "ceiling"),
    *("first_call_seconds", "config"),
]
_TEXT = (30, NEGATIVE_TOKENS)
_SIZES = {
    "1024x1024, CFG": Size(_TEXT, (4096, 4096)),
    "1024x1024": Size(_TEXT[:1], (4096,)),
    "512x512, CFG": Size(_TEXT, (1024, 1024)),
    "512x512": Size(_TEXT[:1], (1024,)),
}
# Operator, what tells its cases apart, keywords of the case.
_OF_TOKENS = (
    ("joint_attention", "", {}),
    ("linear_gelu", "", {}),
    ("linear_gelu", "LoRA of rank 32", {"ranks": 32}),
    ("linear_gated_residual", "MLP", {}),
    ("linear_gated_residual", "attention", {"expansion": 1}),
    ("qk_norm_rope", "", {"layout": "rows"}),
    ("gated_residual_ada_layer_norm", "", {}),
    ("ada_layer_norm", "", {}),
    ("gated_residual", "", {}),
)
_DECODER = ((PIXELS, 96), (PIXELS // 4, 192), (PIXELS // 16, 384))  # pixels and channels of the VAE's decoder at 1024x1024


def model_cases() -> list[OperatorCase]:
    """What a picture runs, in bf16, the largest share of its time first."""
    cases = []
    for place, size in _SIZES.items():
        for op, kind, variant in _OF_TOKENS:
            cases.append(OperatorCase(op, ", ".join(filter(None, (place, kind))), BF16, size, variant))
        predictions = len(size.img)
        op = "cfg_euler_step" if predictions > 1 else "euler_step"
        cases.append(OperatorCase(op, place, BF16, Size((), size.img[:1])))
        if place == "1024x1024, CFG":
            cases += [
                OperatorCase(
                    "rms_norm_silu", f"{pixels} pixels, {channels} channels", BF16, Size((), (pixels,), 1, channels), variant
                )
                for pixels, channels in _DECODER
                for variant in ({"bias": True, "residual": True},)
            ]
    return [*cases, OperatorCase("flow_match_schedule", "50 steps", FP32, variant={"steps": 50})]


def ways(case: OperatorCase, device: torch.device) -> list[str]:
    """The operator; Triton's kernel by itself too where the operator may choose another library."""
    kernel = case.op.startswith("linear") and device.type == "cuda" and case.name.startswith("1024x1024, CFG")
    return ["operator", "kernel"] if kernel else ["operator"]


def runner(case: OperatorCase, way: str, arguments: tuple) -> Callable[[], object]:
    if way == "kernel":
        config = case.config(capability(arguments[0].device), arguments)
        return lambda: case.launch(arguments, config)
    operator = case.operator()
    return lambda: operator(*arguments)


# One row --------------------------------------------------------------------------------------------------------------


class Restored:
    """Arguments of which an operator that works in place gets its own back before every launch."""

    def __init__(self, case: OperatorCase, arguments: tuple):
        self._own = [arguments[n] for n in CHANGED.get(case.op, ()) if arguments[n] is not None]
        self._before = [tensor.clone() for tensor in self._own]

    def __call__(self) -> None:
        for tensor, before in zip(self._own, self._before, strict=True):
            tensor.copy_(before)


def judged(case: OperatorCase, arguments: tuple, actual: Sequence[torch.Tensor]) -> tuple[str | None, dict[str, float]]:
    """(why the result is wrong or None, its relative errors), against float64 and the budget of the dtype."""
    wide = in_float64(arguments)
    if case.op == "joint_attention":  # every score of two heads is 1 GB in float64
        heads = torch.linspace(0, case.size.heads - 1, SAMPLED_HEADS).long().to(arguments[0].device)
        actual = [actual[0][:, heads]]
        arguments, wide = ((*(each[:, heads] for each in given[:3]), *given[3:]) for given in (arguments, wide))
    own = [a.clone() if n in CHANGED.get(case.op, ()) else a for n, a in enumerate(arguments)]
    exact = [one.double() for one in results(case.op, case.reference(*wide), tuple(wide))]
    same = results(case.op, case.reference(*own), tuple(own))
    reason, found = None, {"max_error": 0.0, "rms_error": 0.0}
    for ours, reference, oracle in zip(actual, same, exact, strict=True):
        reason = reason or over_budget(ours, reference, oracle)
        found = {name: max(found[name], error) for name, error in relative_errors(ours, oracle).items()}
    if reason is None and not found["rms_error"] <= LIMIT:  # the budget of a dtype is wide where the error is of few elements
        reason = f"relative RMS error {found['rms_error']:.2e}, more than {LIMIT:g}"
    return reason, found


def equal_launches(case: OperatorCase, arguments: tuple, run: Callable[[], object], restore: Restored) -> int:
    """How many launches, one behind the other, gave the first one's result to the bit."""
    first: list[torch.Tensor] = []
    for launch in range(LAUNCHES):
        restore()
        found = results(case.op, run(), arguments)
        if not first:
            first = [tensor.clone() for tensor in found]
        elif not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, first, strict=True)):
            return launch
    return LAUNCHES


def timed(runs: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Seconds of a launch each, by turns through the sets of buffers: the device's own on a GPU, without the host's part."""
    clock = DEVICE_CLOCK if device.type == "cuda" else time.perf_counter
    for run in runs:
        run()
    found = []
    for turn in range(rounds):
        begin = clock()
        runs[turn % len(runs)]()
        found.append(clock() - begin)
    return found


@torch.no_grad()
def measured(case: OperatorCase, way: str, device: torch.device, ceilings: Ceilings, row: dict) -> None:
    """Fill the row of a case; it has what was found where something fails."""
    arguments = case.arguments(Maker(device))
    if way == "kernel":
        row["config"] = str(case.config(capability(device), arguments))
    restore, run = Restored(case, arguments), runner(case, way, arguments)
    begin = time.perf_counter()
    actual = [tensor.clone() for tensor in results(case.op, run(), arguments)]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    row["first_call_seconds"] = f"{time.perf_counter() - begin:.3g}"
    restore()
    reason, found = judged(case, arguments, actual)
    row |= {name: f"{error:.3e}" for name, error in found.items()}
    del actual
    if reason is None:
        row["equal_launches"] = equal_launches(case, arguments, run, restore)
        if row["equal_launches"] < LAUNCHES:
            reason = f"launch {row['equal_launches'] + 1} differs from the first"
    row |= {"status": "wrong result" if reason else "ok", "reason": reason or ""}
    piece = Piece(case.op, *case.traffic(arguments))
    more = [case.arguments(Maker(device, seed=seed)) for seed in range(1, sets(device, piece.bytes))]
    seconds = timed([run, *(runner(case, way, each) for each in more)], device, ROUNDS if device.type == "cuda" else 3)
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    p50, floor = statistics.median(seconds), floor_seconds([piece], ceilings)
    row |= {"seconds_p20": f"{p20:.6g}", "seconds_p50": f"{p50:.6g}", "seconds_p80": f"{p80:.6g}", "rounds": len(seconds)}
    row |= {"bytes": piece.bytes, "flops": piece.flops, "ceiling": max(floor, key=floor.get)}
    row |= {"gb_per_s": f"{piece.bytes / p50 / 1e9:.5g}", "tflop_per_s": f"{piece.flops / p50 / 1e12:.5g}"}
    row["share_of_ceiling"] = f"{sum(floor.values()) / p50:.4f}"


def told(row: dict) -> str:
    """A row on a line."""
    text = f"{row['op']:30s} {row['case']:34s} {row['way']:8s} {row['status']:12s}"
    if row.get("seconds_p50"):
        text += (
            f" {float(row['seconds_p50']) * 1e6:9.1f} us {float(row['gb_per_s']):7.0f} GB/s {float(row['tflop_per_s']):7.2f}"
        )
        text += f" TFLOP/s {float(row['share_of_ceiling']):6.1%} of {row['ceiling']:9s} rms {row.get('rms_error', '')}"
    return f"{text} {row['reason']}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of operators_of_the_model.csv; what it has is not measured again"
    )
    parser.add_argument("--ceilings", type=Path, help="file of this machine's ceilings, measured before; or left there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for which each ceiling is sustained")
    parser.add_argument("--limit", type=float, default=25.0, help="seconds of a case, behind which it counts as hanging")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    cases, dtype, how = model_cases(), BF16, {"seconds": options.seconds}
    if device.type != "cuda":
        small = (replace(case.small(), name=case.name, dtype=FP32) for case in cases)
        cases, dtype = list(small), FP32
        how |= {"shape": SHAPES["middle"], "tokens": 272}
    rows = RowFile(options.out / "operators_of_the_model.csv", FIELDS)
    before = of_this_state(rows.path, device)
    ceilings = kept_ceilings(options.ceilings, device, dtype, **how)
    for name, rate in ceilings.attention_tried.items():
        print(f"torch's attention, {name}: {rate if isinstance(rate, str) else f'{rate / 1e12:.1f} TFLOP/s'}", flush=True)
    for row in ceilings.rows():
        print(f"ceiling, {row['what']}, {row['detail']}: {float(row['rate']) / 1e12:.4g} T{row['unit']}", flush=True)
    place, faults = provenance(device), sum(row["status"] != "ok" for row in before)
    done = {(row["op"], row["case"], row["way"]) for row in before}
    with Sampler(device) as sampler:
        for case in cases:
            for way in ways(case, device):
                if (case.op, case.name, way) not in done:
                    row = row_of(case, way, device, ceilings, rows, place, options.limit)
                    faults += row["status"] != "ok"
    print(" ".join(f"{name} {value}" for name, value in sampler.summary().items() if value))
    print(f"{faults} of {len(of_this_state(rows.path, device))} rows are not right; they are in {rows.path}")
    return int(faults > 0)


def row_of(
    case: OperatorCase, way: str, device: torch.device, ceilings: Ceilings, rows: RowFile, place: dict, limit: float
) -> dict:
    """Measure a case and write its row, whatever comes."""
    row = place | {"op": case.op, "case": case.name, "size": str(case.size), "way": way}
    row |= {"dtype": str(case.dtype).removeprefix("torch."), "status": "failed", "reason": ""}
    hung = row | {"reason": f"no end within {limit:g} s"}
    with watched(limit, lambda: (rows.add(hung), print(told(hung), flush=True))):
        try:
            measured(case, way, device, ceilings, row)
        except Exception as error:  # torch's refusals, out of memory, and whatever a compiler raises
            row |= {"status": "failed", "reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rows.add(row)
    print(told(row), flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
