"""Every implementation of attention at the model's shapes: relative RMS error against float64, time, TFLOP/s.

    python -m benchmarks.attention.speed --out DIR [--device cuda] [--cases "1024x1024;512x512"] [--seconds 0.1]

Ours in several configurations, torch's by name, torch's for sequences of different lengths in one call. A row each goes to
attention.csv as soon as it is measured, and what fails is a row with its reason. The kernel with specialised warps comes last:
if it hangs, the rest is there. On a CPU the shapes are small and nothing is timed. Exit code: 0, wrong rows too; they say so.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qwen_fast.transformer.attention import SDPA, _scaled_dot_product
from qwen_fast_kernels.joint_attention import joint_attention, launch_joint_attention

from ..shared.budget import LAUNCHES, LIMIT
from ..shared.machine import PROVENANCE, Sampler, provenance
from ..shared.measure import Spread
from ..shared.rows import RowFile

FIELDS = [*PROVENANCE, *("case", "lengths", "way", "status", "reason", "rms_error", "equal_launches", "rounds")]
FIELDS += ["ms_p20", "ms_p50", "ms_p80", "tflop_per_s"]
LENGTHS = {  # rows of each sequence
    "1024x1024, CFG": (4096 + 30, 4096 + 6),
    "1024x1024": (4096 + 30,),
    "512x512, CFG": (1024 + 30, 1024 + 6),
    "512x512": (1024 + 30,),
    "edit 1024x1024, CFG": (8192 + 230, 8192 + 205),
    "2048x2048": (16384 + 30,),
    "four prompts, CFG": tuple(4096 + n for n in (30, 6, 77, 6, 120, 6, 15, 6)),
}
HEADS, DIM, SMALL_HEADS, SMALL_DIM = 24, 128, 2, 32
_POINTERS = {"DESCRIPTORS": False, "WARP_SPECIALIZE": False, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
_DESCRIPTORS = _POINTERS | {"DESCRIPTORS": True}
_SPECIALISED = _DESCRIPTORS | {"WARP_SPECIALIZE": True, "num_warps": 4}
CONFIGS = {
    "pointers 128x64": _POINTERS,
    "descriptors 128x64": _DESCRIPTORS,
    "descriptors 128x128": _DESCRIPTORS | {"BLOCK_N": 128, "num_stages": 2},
    "specialised 128x64": _SPECIALISED,  # three stages: NaN on an H100 with Triton 3.6; a row says whether that still is so
    "specialised 128x128": _SPECIALISED | {"BLOCK_N": 128, "num_stages": 2},
}
_QUERIES = 512  # of each sequence, that are compared with float64
Way = Callable[[Sequence[torch.Tensor]], torch.Tensor]


def ways(lengths: tuple[int, ...], device: torch.device) -> dict[str, Way]:
    """Each takes query, key and value `[R, H, D]` of sequences of those lengths and gives `[R, H, D]`, or one a sequence."""
    starts = [0, *itertools.accumulate(lengths)]
    spans = list(itertools.pairwise(starts))
    spans_there, starts_there = (torch.tensor(each, dtype=torch.int32, device=device) for each in (spans, starts))

    def apart(rows, backend):
        """A call a sequence."""
        sequences = ([one[begin:end][None] for one in rows] for begin, end in spans)
        return [_scaled_dot_product(*sequence, None, backend)[0] for sequence in sequences]

    def varlen(rows):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(*rows, starts_there, starts_there, max(lengths), max(lengths))
        return out[0] if isinstance(out, tuple) else out

    def ours(rows, config):
        return launch_joint_attention(*rows, spans_there, max(lengths), config=config)

    if device.type != "cuda":
        found = {"flash": functools.partial(apart, backend=SDPA["flash"])}
        return found | {"operator": lambda rows: joint_attention(*rows, spans_there, max(lengths))}
    found = {name: functools.partial(apart, backend=backend) for name, backend in SDPA.items()}
    found["varlen_attn"] = varlen
    return found | {name: functools.partial(ours, config=config) for name, config in CONFIGS.items()}


def joined(result: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(result) if isinstance(result, list) else result


def error_of(result: torch.Tensor, rows: Sequence[torch.Tensor], lengths: tuple[int, ...]) -> float:
    """Relative RMS error of the first and the last head against float64, of at most `_QUERIES` queries of each sequence."""
    squared = scale = 0.0
    for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        queries = torch.linspace(begin, end - 1, min(_QUERIES, end - begin), device=result.device, dtype=torch.float64).long()
        for head in (0, rows[0].shape[1] - 1):
            query, key, value = (
                one[own, head].double() for one, own in zip(rows, (queries, *[slice(begin, end)] * 2), strict=True)
            )
            exact = ((query @ key.T) * query.shape[1] ** -0.5).softmax(-1) @ value
            squared += (result[queries, head].double() - exact).square().sum().item()
            scale += exact.square().sum().item()
    return (squared / scale) ** 0.5


def milliseconds(runs: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Of a call each, by turns: the device sleeps while the host puts a round into its queue, so that no gap counts.

    Args:
        runs: the same on buffers of their own.
        seconds: for which it is measured, at least three rounds.
    Returns:
        list[float]: one of each round; without a CUDA device a single 0, after a call of each.
    """
    if device.type != "cuda":
        for run in runs:
            run()
        return [0.0]

    def round_of(calls: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)
        begin.record()
        for turn in range(calls):
            runs[turn % len(runs)]()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / calls

    round_of(len(runs))
    calls = len(runs) * max(1, min(10, round(5.0 / len(runs) / max(round_of(len(runs)), 1e-3))))
    found: list[float] = []
    while sum(found) * calls < 1e3 * seconds or len(found) < 3:
        found.append(round_of(calls))
    return found


def fields_of(times: list[float], flops: float) -> dict[str, str]:
    """The columns of a time; TFLOP/s only where one was measured."""
    spread = Spread.of(times)
    found = {f"ms_{part}": f"{getattr(spread, part):.5g}" for part in ("p20", "p50", "p80")}
    return found | {"rounds": str(len(times))} | ({"tflop_per_s": f"{flops / spread.p50 / 1e9:.5g}"} if spread.p50 else {})


def reason_of(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def measured(case: str, lengths: tuple[int, ...], way: str, device: torch.device, seconds: float) -> dict[str, str]:
    """The columns of a way at a shape, whatever comes."""
    cuda = device.type == "cuda"
    size = (3, sum(lengths), HEADS if cuda else SMALL_HEADS, DIM if cuda else SMALL_DIM)
    row = {"case": case, "lengths": " ".join(map(str, lengths)), "way": way, "status": "failed"}
    try:
        generator = torch.Generator(device).manual_seed(sum(lengths))
        dtype = torch.bfloat16 if cuda else torch.float32
        sets = [torch.randn(size, generator=generator, device=device).to(dtype).unbind() for _ in range(2)]
        call = ways(lengths, device)[way]
        first = joined(call(sets[0])).clone()
        error = error_of(first, sets[0], lengths)
        equal = 1 + sum(torch.equal(joined(call(sets[0])), first) for _ in range(LAUNCHES - 1))
        row |= {"rms_error": f"{error:.3e}", "equal_launches": str(equal)}
        row["status"] = "ok" if error <= LIMIT and equal == LAUNCHES else "wrong result"
        flops = 4.0 * size[2] * size[3] * sum(length**2 for length in lengths)
        return row | fields_of(milliseconds([functools.partial(call, own) for own in sets], device, seconds), flops)
    except Exception as error:  # torch's refusals, and whatever a compiler raises
        return row | {"status": "failed", "reason": reason_of(error)}


def measure(out: Path, device: torch.device, cases: Sequence[str], seconds: float) -> list[dict[str, str]]:
    """Every way at every case; the rows, which are in attention.csv of `out` too."""
    rows, place, found = RowFile(out / "attention.csv", FIELDS), provenance(device), []
    for way, case in itertools.product(ways((1,), device), cases):
        lengths = LENGTHS[case] if device.type == "cuda" else tuple(8 + length % 50 for length in LENGTHS[case])
        found.append({name: str(value) for name, value in place.items()} | measured(case, lengths, way, device, seconds))
        rows.add(found[-1])
        shown = ("status", "rms_error", "equal_launches", "ms_p50", "tflop_per_s", "reason")
        print(f"{case:22s} {way:22s}", *(found[-1].get(name, "") for name in shown), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of attention.csv")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default=next(iter(LENGTHS)), help=f"all, or some separated by ';', of: {'; '.join(LENGTHS)}")
    parser.add_argument("--seconds", type=float, default=0.1, help="for which each is timed")
    options = parser.parse_args(argv)
    cases = list(LENGTHS) if options.cases == "all" else options.cases.split(";")
    if unknown := [case for case in cases if case not in LENGTHS]:
        parser.error(f"--cases: {'; '.join(unknown)} is none of {'; '.join(LENGTHS)}")
    device = torch.device(options.device)
    with Sampler(device) as sampler:
        measure(options.out, device, cases, options.seconds)
    print(" ".join(f"{name} {value}" for name, value in sampler.summary().items() if value))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
