"""The search for an operator's fastest launch configuration: which ones there are, and when one replaces the default.

Nothing here touches a GPU: who compiles, who checks and who measures comes in as a function.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

GAIN = 0.02  # a configuration has to be that much faster than the default, beyond the noise, to be worth a file
SCREENING_ROUNDS, FINAL_ROUNDS = 5, 25
FINALISTS = 4

Compile = Callable[[list[dict]], list[str | None]]
Check = Callable[[dict], str | None]
Measure = Callable[[list[dict], int], list[list[float]]]


@dataclass
class Outcome:
    """What the search over one case found.

    Attributes:
        default: the operator's own configuration.
        best: the fastest one; None if nothing could be measured.
        default_us, best_us: medians, in microseconds.
        gain: part of the default's time that the best one saves, median over pairs.
        noise: spread of the same ratio between the default and itself.
        timings: median microseconds of everything that was measured, the finalists' from the final rounds.
        pruned, wrong: configurations that were not measured, with the compiler's or the check's reason.
    """

    default: dict
    best: dict | None = None
    default_us: float | None = None
    best_us: float | None = None
    gain: float = 0.0
    noise: float = 0.0
    timings: list[tuple[dict, float]] = field(default_factory=list)
    pruned: list[tuple[dict, str]] = field(default_factory=list)
    wrong: list[tuple[dict, str]] = field(default_factory=list)

    @property
    def worth_writing(self) -> bool:
        return self.best is not None and self.best != self.default and self.gain > GAIN + self.noise

    @property
    def default_is_wrong(self) -> str | None:
        return next((reason for config, reason in self.wrong if config == self.default), None)


def search(default: dict, candidates: Sequence[dict], *, compile: Compile, check: Check, measure: Measure) -> Outcome:
    """Compile everything, check what compiles, measure what is right, and measure the fastest once more beside the default.

    Args:
        compile: a reason not to launch, or None, for each configuration.
        check: why the result is wrong, or None; called before a configuration is measured for the first time.
        measure: seconds of each configuration in each of so many rounds, taken by turns.
    Returns:
        Outcome: where the default gives a wrong result nothing is measured: there is no time to compare with.
    """
    outcome = Outcome(default)
    configs = [default, *(config for config in candidates if config != default)]
    right = []
    for config, reason in zip(configs, compile(configs), strict=True):
        # A default that spills is still what everybody runs.
        if reason is not None and config != default:
            outcome.pruned.append((config, reason))
            continue
        reason = check(config)
        if reason is None:
            right.append(config)
        else:
            outcome.wrong.append((config, reason))
            if config == default:
                return outcome

    screened = [statistics.median(rounds) for rounds in measure(right, SCREENING_ROUNDS)]
    times = dict(enumerate(screened))
    fastest = sorted(range(1, len(right)), key=screened.__getitem__)[:FINALISTS]
    # The default twice: what its two series differ by is noise.
    own, again, *others = measure([default, default, *(right[index] for index in fastest)], FINAL_ROUNDS)
    outcome.noise = _noise(own, again)
    gains = {0: 0.0}
    times[0] = statistics.median(own)
    for index, rounds in zip(fastest, others, strict=True):
        times[index] = statistics.median(rounds)
        gains[index] = 1.0 - _ratio(rounds, own)
    best = max(gains, key=gains.__getitem__)
    outcome.best, outcome.gain = right[best], gains[best]
    outcome.default_us, outcome.best_us = times[0] * 1e6, times[best] * 1e6
    outcome.timings = [(right[index], seconds * 1e6) for index, seconds in sorted(times.items(), key=lambda item: item[1])]
    return outcome


def _ratio(rounds: list[float], base: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(rounds, base, strict=True))


def _noise(own: list[float], again: list[float]) -> float:
    """How far two series of the same thing lie apart, with the spread of a single pair."""
    ratios = [one / other for one, other in zip(again, own, strict=True)]
    fifths = statistics.quantiles(ratios, n=5, method="inclusive")
    return abs(1.0 - statistics.median(ratios)) + (fifths[3] - fifths[0]) / 2


# Which configurations there are --------------------------------------------------------------------------------------


def candidates(op: str, capability: int, default: dict, dims: dict) -> list[dict]:
    """Configurations to try beside `default`, each with its keys; loads by descriptors or by pointers stay as they are there.

    Args:
        op (str): a tunable operator, one of `SPACES`.
        capability (int): 90 for sm_90.
        default (dict): the operator's own choice for `dims`.
        dims (dict): what its `default_config` takes after the capability, by name.
    """
    found = [default | changes for changes in SPACES[op](capability, default, **dims)]
    return [config for index, config in enumerate(found) if config != default and config not in found[:index]]


def _row_space(capability, default, channels: int, itemsize: int) -> Iterator[dict]:
    vector = 16 // itemsize
    # The VAE's rows are narrow and a million; the transformer's are wide and thousands.
    rows = (1, 2, 4) if channels >= 1024 else (4, 8, 16, 32, 64)
    for block_rows, channels_log2, warps in itertools.product(rows, range(5, 13), (1, 2, 4, 8, 16)):
        block_channels = 1 << channels_log2
        whole = -(-channels // block_channels) * block_channels * block_rows
        full_loads = block_channels * block_rows >= 32 * warps * vector  # 16 bytes for every thread
        in_registers = whole <= 32 * warps * 8 * vector  # at most 8 vectors of a row tensor in a thread
        if full_loads and in_registers and block_channels < 2 * channels:
            yield {"BLOCK_ROWS": block_rows, "BLOCK_CHANNELS": block_channels, "num_warps": warps}


def _head_space(capability, default, heads: int, head_dim: int, itemsize: int) -> Iterator[dict]:
    for block_h, warps in itertools.product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
        vectors = block_h * head_dim * itemsize // 16
        if block_h < 2 * heads and block_h * head_dim >= 256 and vectors >= 32 * warps:
            yield {"BLOCK_H": block_h, "num_warps": warps}


def _attention_space(capability, default, head_dim: int, itemsize: int, masked: bool, aligned: bool) -> Iterator[dict]:
    tiles = ((32, 64), (32, 64), (4, 8), (2,)) if itemsize == 4 else ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    for block_m, block_n, warps, stages in itertools.product(*tiles):
        shape = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
        yield shape | {"WARP_SPECIALIZE": False}
        # What the compiler takes for specialisation: 4 warps named, 128 queries.
        if default["WARP_SPECIALIZE"] and warps == 4 and block_m == 128:
            yield shape | {"WARP_SPECIALIZE": True}


def _linear_space(
    capability, default, rows: int, n: int, k: int, itemsize: int, aligned: bool, low_rank: bool = False
) -> Iterator[dict]:
    backend = {"BACKEND": "triton"} if "BACKEND" in default else {}
    heights = (16, 32, 64) if rows <= 64 else (64, 128, 256)
    described = default["DESCRIPTORS"]
    yield backend
    for block_m, block_n, block_k, warps, stages in itertools.product(
        heights, (32, 64, 128, 256), (32, 64, 128), (4, 8), (3, 4, 5)
    ):
        accumulators = block_m * block_n // (32 * warps)  # fp32 registers of a thread
        operands = (block_m + block_n) * block_k * itemsize * stages
        few, wide = rows <= 64, block_n >= 128
        if not (8 if few else 32) <= accumulators <= 128 or operands > 224 * 1024 or few == wide:
            continue
        if block_m < 64 and described:  # HGMMA has 64 rows
            continue
        yield backend | {
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "PARTS": 4 if wide else 1,
            "num_warps": warps,
            "num_stages": stages,
        }


SPACES: dict[str, Callable[..., Iterator[dict]]] = {
    "ada_layer_norm": _row_space,
    "gated_residual": _row_space,
    "gated_residual_ada_layer_norm": _row_space,
    "qk_norm_rope": _head_space,
    "joint_attention": _attention_space,
    "linear_gelu": _linear_space,
    "linear_gated_residual": _linear_space,
    "rms_norm_silu": _row_space,
}
