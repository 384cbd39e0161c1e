"""What this machine can do at best, sustained for seconds: copies, matrix products and attention at the model's own shapes.

    python -m benchmarks.shared.ceilings [--device cuda] [--seconds 2]

From these comes the floor of a step, and every row's distance to it. Inputs are random (zeros run faster than the truth)
and rotate through buffers larger than the caches.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_fast.common.hardware import unsupported_reason
from qwen_fast_kernels import joint_attention

from .measure import Difference, Stopwatch
from .shapes import QWEN_IMAGE, SHAPES, PictureCase, Shape

_ROTATED = 3  # sets of buffers; one of a block's weights in bf16 is 226 MB, four times an H200's L2
_PROBE_SECONDS = 0.1  # how long each attention runs to find the fastest
_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Ceilings:
    """Sustained rates of one device.

    Attributes:
        device: its name.
        dtype: of the copies, the attention and the model's own products, such as "bfloat16".
        copy_bytes_per_s: bytes read plus bytes written.
        matmul_flops_per_s: by dtype, over the six products of a block's image stream.
        attention_flops_per_s: of the fastest exact implementation.
        attention_backend: its name; "qwen_fast" is the joint attention operator.
        attention_tried: FLOP/s of each that ran, in a short probe; why the others did not.
        seconds: for which each was sustained.
        clock: what the seconds are.
        refused: why products in a dtype did not run, by its name.
    """

    device: str
    dtype: str
    copy_bytes_per_s: float
    matmul_flops_per_s: dict[str, float]
    attention_flops_per_s: float
    attention_backend: str
    attention_tried: dict[str, float | str]
    seconds: float
    clock: str
    refused: dict[str, str] = field(default_factory=dict)

    def floor_seconds(self, case: PictureCase, dtype: str | None = None) -> float:
        """The least that one step of `case` takes here, with products in `dtype` (default: the model's own).

        A product takes the longer of its FLOPs and its bytes; see `Case.work` for what counts.
        """
        rate, size = self.matmul_flops_per_s[dtype or self.dtype], getattr(torch, dtype or self.dtype).itemsize
        out_size = getattr(torch, self.dtype).itemsize
        work = case.work()
        seconds = work.attention_flops / self.attention_flops_per_s
        for m, k, n, count in work.products:
            moved = (m * k + k * n) * size + m * n * out_size
            seconds += count * max(2.0 * m * k * n / rate, moved / self.copy_bytes_per_s)
        return seconds

    def rows(self) -> Iterator[dict[str, str]]:
        """One row for each rate: what, rate and its unit."""
        yield {"what": "copy", "detail": self.dtype, "rate": f"{self.copy_bytes_per_s:.4g}", "unit": "B/s"}
        for dtype, rate in self.matmul_flops_per_s.items():
            yield {"what": "matrix product", "detail": dtype, "rate": f"{rate:.4g}", "unit": "FLOP/s"}
        detail = f"{self.dtype}, {self.attention_backend}"
        yield {"what": "attention", "detail": detail, "rate": f"{self.attention_flops_per_s:.4g}", "unit": "FLOP/s"}


@torch.no_grad()
def measure_ceilings(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    seconds: float = 2.0,
    shape: Shape = QWEN_IMAGE,
    tokens: int = 4096 + 128,
    copy_bytes: int | None = None,
    own: bool = True,
) -> Ceilings:
    """Measure them.

    Args:
        device, dtype: of the model.
        seconds: how long each rate is sustained; at least one round is done.
        shape: of the model.
        tokens: rows of the products and length of the attention; 1024x1024 with 128 tokens of text by default.
        copy_bytes: size of a copied buffer; default 1 GiB on a GPU, 64 MiB on a CPU.
        own: our attention is a candidate; not where it was found to be wrong.
    Raises:
        RuntimeError: no attention runs, or the device is out of memory.
    """
    device = torch.device(device)
    if copy_bytes is None:
        copy_bytes = 2**30 if device.type == "cuda" else 2**26
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float32).to(dtype)

    copied, _ = sustained(_copies(copy_bytes, normal, dtype), seconds, device)
    products, flops = _products(shape, tokens, normal, dtype)
    rates, refused = {name_of(dtype): sustained(products, seconds, device)[0] * flops}, {}
    del products
    for eight_bit in eight_bit_dtypes(device):
        try:
            products, flops = _products(shape, tokens, normal, eight_bit)
            rates[name_of(eight_bit)] = sustained(products, seconds, device)[0] * flops
            del products
        except RuntimeError as error:  # a build of torch without them, or widths that they do not take
            refused[name_of(eight_bit)] = str(error).strip().splitlines()[0]

    fastest, calls, tried = _fastest_attention(shape, tokens, normal, device, dtype, min(seconds, _PROBE_SECONDS), own)
    attended, clock = sustained(calls, seconds, device)
    return Ceilings(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        dtype=name_of(dtype),
        copy_bytes_per_s=2 * copy_bytes * copied,
        matmul_flops_per_s=rates,
        attention_flops_per_s=attended * _attention_flops(shape, tokens),
        attention_backend=fastest,
        attention_tried=tried,
        seconds=seconds,
        clock=clock,
        refused=refused,
    )


def kept_ceilings(path: Path | None, device: torch.device | str, dtype: torch.dtype, **how: Any) -> Ceilings:
    """Those that another process of a run measured and left in a file, or measured now, and left there.

    Args:
        path: of the file; None keeps nothing. A file of another device or dtype, or none of ours, is written anew.
        how: for `measure_ceilings`.
    """
    known = known_ceilings(path, device, dtype)
    if known is not None:
        return known
    found = measure_ceilings(device, dtype, **how, own=not (path and _attention_is_wrong(path.with_name("environment.json"))))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")
    return found


def known_ceilings(path: Path | None, device: torch.device | str, dtype: torch.dtype) -> Ceilings | None:
    """Those that lie in the file, of this device and dtype."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        known = Ceilings(**json.loads(path.read_text()))
    except (AttributeError, OSError, TypeError, ValueError):
        return None  # no file is named, there is none, or it is cut off
    return known if (known.device, known.dtype) == (name, name_of(dtype)) else None


def _attention_is_wrong(environment: Path) -> bool:
    """Whether the run-book's first stage found no right way to launch it."""
    return environment.exists() and json.loads(environment.read_text()).get("way", "") is None


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sustained(calls: list[Callable[[], object]], seconds: float, device: torch.device) -> tuple[float, str]:
    """Calls per second while they are made by turns for `seconds`, and what those seconds are."""
    turns, watch = itertools.cycle(calls), Stopwatch(device)
    for call in calls:
        call()
    done, spent, batch = 0, 0.0, len(calls)
    while spent < seconds or not done:
        with watch:
            for _ in range(batch):
                next(turns)()
        done, spent = done + batch, spent + watch.seconds
        # Long batches: the device is never idle while the host looks at the clock, beyond a part in a hundred.
        batch = max(len(calls), round(done / max(spent, 1e-6) * seconds / 4))
    return done / spent, watch.kind


def eight_bit_dtypes(device: torch.device) -> list[torch.dtype]:
    """Those whose products this GPU computes natively."""
    fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return [torch.float8_e4m3fn] if fp8 else []


def _copies(size: int, normal, dtype: torch.dtype) -> list[Callable[[], object]]:
    """There and back between two buffers."""
    one, other = (normal(size // dtype.itemsize) for _ in range(2))
    return [lambda: one.copy_(other), lambda: other.copy_(one)]


def _products(shape: Shape, tokens: int, normal, dtype: torch.dtype) -> tuple[list[Callable[[], object]], float]:
    """One call for each product of a block's image stream and set of buffers; FLOPs of a call on average."""
    width, calls, flops = shape.width, [], 0.0
    sizes = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
    rows = {wide: [normal(tokens, wide) for _ in range(_ROTATED)] for wide in {k for k, _ in sizes}}
    for turn in range(_ROTATED):
        for k, n in sizes:
            weight, x = normal(n, k) / k**0.5, rows[k][turn]
            flops += 2.0 * tokens * k * n
            if dtype.itemsize == 1:
                calls.append(_scaled_product(x, weight, dtype))
            else:
                calls.append(lambda x=x, weight=weight: F.linear(x, weight))
    return calls, flops / len(calls)


def _scaled_product(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Row-wise scaled product in 8 bits, out in the dtype of `x`; its operands are ready.

    With the tensor cores' own accumulation, which Hopper keeps in fewer bits than fp32: a ceiling is what is fastest.
    """

    def quantised(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = rows.float().abs().amax(-1, keepdim=True) / torch.finfo(dtype).max
        return (rows / scale).to(dtype), scale

    (x8, scale_x), (w8, scale_w) = quantised(x), quantised(weight)
    options = {"out_dtype": x.dtype, "use_fast_accum": True}
    return lambda: torch._scaled_mm(x8, w8.t(), scale_a=scale_x, scale_b=scale_w.t(), **options)


def _attention_flops(shape: Shape, tokens: int) -> float:
    return 4.0 * tokens * tokens * shape.heads * shape.head_dim


def _fastest_attention(shape: Shape, tokens: int, normal, device, dtype, seconds: float, own: bool):
    """Its name, its calls, and what each did in a short probe. One that gives another result than the rest is no candidate."""
    inputs = [[normal(tokens, shape.heads, shape.head_dim) for _ in range(3)] for _ in range(_ROTATED)]

    def through(backend: SDPBackend, rows: list[torch.Tensor]) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*(row[None].transpose(1, 2) for row in rows))[0].transpose(0, 1)

    spans = torch.tensor([[0, tokens]], dtype=torch.int32, device=device)

    def ours(rows: list[torch.Tensor]) -> torch.Tensor:
        return joint_attention(*rows, spans, tokens)

    ways: dict[str, Callable[[list[torch.Tensor]], torch.Tensor]] = {
        name: (lambda rows, backend=backend: through(backend, rows)) for name, backend in _BACKENDS.items()
    }
    if own and device.type == "cuda" and unsupported_reason(device) is None:
        ways["qwen_fast"] = ours
    tried: dict[str, float | str] = {}
    expected, candidates = None, {}
    for name, way in ways.items():
        try:
            result = way(inputs[0])
        except Exception as error:  # torch's refusals, and whatever a compiler raises
            tried[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        if not result.isfinite().all():
            tried[name] = "the result is not finite"
            continue
        expected = result if expected is None else expected
        apart = Difference.between(result, expected).largest
        if not apart <= 8 * torch.finfo(dtype).eps:
            tried[name] = f"differs from {next(iter(candidates))} by {apart:.2g} of the largest value"
            continue
        calls = [lambda way=way, rows=rows: way(rows) for rows in inputs]
        candidates[name] = calls
        tried[name] = sustained(calls, seconds, device)[0] * _attention_flops(shape, tokens)
    if not candidates:
        raise RuntimeError(f"no attention runs on {device} in {dtype}: {tried}")
    fastest = max(candidates, key=lambda name: tried[name])
    return fastest, candidates[fastest], tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    torch.set_num_threads(1)
    shape, tokens = (QWEN_IMAGE, 4096 + 128) if on_gpu else (SHAPES["middle"], 256 + 16)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    ceilings = measure_ceilings(options.device, dtype, seconds=options.seconds, shape=shape, tokens=tokens)
    print(f"{ceilings.device}, sustained for {ceilings.seconds:g} s each ({ceilings.clock})")
    for row in ceilings.rows():
        print(f"  {row['what']:15s} {row['detail']:20s} {float(row['rate']) / 1e12:9.4f} T{row['unit']}")
    for name, reason in ceilings.refused.items():
        print(f"  matrix product in {name}: {reason}")
    for name, outcome in ceilings.attention_tried.items():
        shown = outcome if isinstance(outcome, str) else f"{outcome / 1e12:.4f} TFLOP/s"
        print(f"  attention tried: {name}: {shown}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
