"""Every implementation of attention at the model's shapes: relative RMS error against float64, time, TFLOP/s.

    python -m benchmarks.attention_speed --out DIR [--device cuda]

Ours in several configurations, torch's by name, torch's for sequences of different lengths in one call. A row each goes to
attention.csv as soon as it is measured. What fails is a row with its reason. The kernel with specialised warps comes last: if
it hangs, the rest is there.
"""

import argparse
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from qwen_fast.attention import SDPA, _scaled_dot_product
from qwen_fast_kernels.joint_attention import default_config, joint_attention_reference, launch_joint_attention

from .machine import PROVENANCE, Sampler, provenance
from .rows import Rows

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
HEADS, DIM, LAUNCHES = 24, 128, 20
_POINTERS = {"DESCRIPTORS": False, "WARP_SPECIALIZE": False, "BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
CONFIGS = {
    "pointers 128x64": _POINTERS,
    "descriptors 128x64": _POINTERS | {"DESCRIPTORS": True},
    "descriptors 128x128": _POINTERS | {"DESCRIPTORS": True, "BLOCK_N": 128, "num_stages": 2},
    "specialised 128x64": _POINTERS | {"DESCRIPTORS": True, "WARP_SPECIALIZE": True, "num_warps": 4},
    "specialised 128x128": _POINTERS
    | {"DESCRIPTORS": True, "WARP_SPECIALIZE": True, "BLOCK_N": 128, "num_warps": 4, "num_stages": 2},
}
Rows3 = list[torch.Tensor]


def ways(lengths: tuple[int, ...], device: torch.device) -> dict[str, Callable[[Rows3], torch.Tensor]]:
    """Each takes query, key and value `[R, H, D]` and gives `[R, H, D]`, or a list of the sequences' own."""
    ends = list(itertools.accumulate(lengths))
    spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    on_device = torch.tensor(spans, dtype=torch.int32, device=device)
    starts = torch.tensor([0, *ends], dtype=torch.int32, device=device)

    def apart(rows: Rows3, backend) -> list[torch.Tensor]:
        return [_scaled_dot_product(*(one[own][None] for one in rows), None, backend)[0] for own in itertools.starmap(slice, spans)]

    def varlen(rows: Rows3) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(*rows, starts, starts, max(lengths), max(lengths))
        return out[0] if isinstance(out, tuple) else out

    found = {name: (lambda rows, backend=backend: apart(rows, backend)) for name, backend in SDPA.items()}
    found["varlen_attn"] = varlen
    for name, config in CONFIGS.items():
        found[name] = lambda rows, config=config: launch_joint_attention(*rows, on_device, max(lengths), config=config)
    if device.type != "cuda":
        config = default_config(80, 32, 4)
        return {"flash": found["flash"], "pointers": lambda rows: launch_joint_attention(*rows, on_device, max(lengths), config=config)}
    return found


def joined(result) -> torch.Tensor:
    return torch.cat(result) if isinstance(result, list) else result


def error_of(result: torch.Tensor, rows: Rows3, lengths: tuple[int, ...]) -> float:
    """Relative RMS of the first and the last head against float64, sequence by sequence, at most 512 queries of each."""
    squared = scale = 0.0
    for end, length in zip(itertools.accumulate(lengths), lengths, strict=True):
        own = slice(end - length, end)
        queries = torch.linspace(0, length - 1, min(512, length), device=result.device).long() + own.start
        for head in (0, rows[0].shape[1] - 1):
            q, k, v = rows[0][queries, head].double(), rows[1][own, head].double(), rows[2][own, head].double()
            exact = ((q @ k.T) * q.shape[1] ** -0.5).softmax(-1) @ v
            squared += (result[queries, head].double() - exact).square().sum().item()
            scale += exact.square().sum().item()
    return (squared / scale) ** 0.5


def milliseconds(runs: list[Callable[[], object]], device: torch.device, seconds: float) -> list[float]:
    """Of a call each, by turns: the device sleeps while the host puts a round into its queue, so that no gap counts."""
    if device.type != "cuda":
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


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default=",".join(list(LENGTHS)[:1]), help="separated by ';', or all")
    parser.add_argument("--seconds", type=float, default=0.1)
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    cases = LENGTHS if options.cases == "all" else {name: LENGTHS[name] for name in options.cases.split(";")}
    options.out.mkdir(parents=True, exist_ok=True)
    rows, place = Rows(options.out / "attention.csv", FIELDS), provenance(device)
    with Sampler(device) as sampler:
        names = list(ways((1,), device))
        for way in names:
            for case, lengths in cases.items():
                if not cuda:
                    lengths = tuple(8 + length % 50 for length in lengths)
                generator = torch.Generator(device).manual_seed(sum(lengths))
                size = (3, sum(lengths), HEADS if cuda else 2, DIM if cuda else 32)
                dtype = torch.bfloat16 if cuda else torch.float32
                sets = [list(torch.randn(size, generator=generator, device=device).to(dtype)) for _ in range(2)]
                call = ways(lengths, device)[way]
                row = place | {"case": case, "lengths": " ".join(map(str, lengths)), "way": way, "status": "failed"}
                try:
                    first = joined(call(sets[0])).clone()
                    error = error_of(first, sets[0], lengths)
                    equal = sum(torch.equal(joined(call(sets[0])), first) for _ in range(LAUNCHES - 1)) + 1
                    times = milliseconds([lambda own=own: call(own) for own in sets], device, options.seconds)
                    p50 = statistics.median(times)
                    flops = 4.0 * size[2] * size[3] * sum(length**2 for length in lengths)
                    right = error <= 5e-3 and equal == LAUNCHES
                    row |= {"status": "ok" if right else "wrong result", "rms_error": f"{error:.3e}", "equal_launches": equal}
                    row |= {"rounds": len(times), "ms_p50": f"{p50:.5g}", "ms_p20": f"{min(times):.5g}", "ms_p80": f"{max(times):.5g}"}
                    row["tflop_per_s"] = f"{flops / max(p50, 1e-9) / 1e9:.5g}"
                except Exception as failure:  # torch's refusals, and whatever a compiler raises
                    row["reason"] = " ".join(f"{type(failure).__name__}: {failure}".split())[:200]
                rows.add({name: str(value) for name, value in row.items()})
                shown = ("status", "rms_error", "equal_launches", "ms_p50", "tflop_per_s", "reason")
                print(f"{case:22s} {way:22s}", *(row.get(name, "") for name in shown), flush=True)
                if cuda:
                    torch.cuda.empty_cache()
    print(sampler.summary())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
