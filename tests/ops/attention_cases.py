"""What the tests of joint attention share: packed problems, memory layouts, the bodies of the kernel, bad arguments."""

import itertools
from dataclasses import dataclass, replace

import torch

from qwen_fast_kernels.joint_attention import default_config, joint_attention_reference

HALF = [torch.bfloat16, torch.float16]
LAYOUTS = ["buffer", "head-major", "spread", "mixed", "offset"]

# Lengths of the sequences; tiles are 128 queries, blocks 32 to 128 keys.
ONE_SEQUENCE = [1, 2, 64, 65, 94, 127, 128, 160, 192, 388]
PACKED = [(130, 105), (66, 130, 132), (0, 17, 0, 191, 128)]


@dataclass
class Problem:
    """Arguments of joint_attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    spans: torch.Tensor
    max_seqlen: int
    key_mask: torch.Tensor | None = None
    scale: float | None = None

    def __iter__(self):
        return iter(vars(self).values())

    def reference(self) -> torch.Tensor:
        return joint_attention_reference(*self)

    def oracle(self) -> torch.Tensor:
        return replace(self, query=self.query.double(), key=self.key.double(), value=self.value.double()).reference()

    def rows_of(self, sequence: int) -> slice:
        return slice(*self.spans[sequence].tolist())

    def gaps(self) -> torch.Tensor:
        """Which rows belong to no sequence."""
        row = torch.arange(self.query.shape[0], device=self.query.device)
        return ((row < self.spans[:, :1]) | (row >= self.spans[:, 1:])).all(dim=0)

    def alone(self, sequence: int) -> "Problem":
        """The same sequence in a launch of its own."""
        rows = self.rows_of(sequence)
        tensors = [x[rows].clone() for x in (self.query, self.key, self.value)]
        mask = None if self.key_mask is None else self.key_mask[rows].clone()
        return Problem(*tensors, self.spans.new_tensor([[0, len(tensors[0])]]), len(tensors[0]), mask, self.scale)


def problem(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    heads: int = 1,
    dim: int = 128,
    gaps: tuple[int, ...] | None = None,
    layout: str = "buffer",
    magnitude: float = 1.0,
    **optional,
) -> Problem:
    """Random sequences of the given lengths. `gaps`: rows of no sequence, in front of each one and behind the last."""
    gaps = gaps or (0,) * (len(lengths) + 1)
    rows = sum(lengths) + sum(gaps)
    generator = torch.Generator().manual_seed(rows)
    tensors = (torch.randn(3, rows, heads, dim, generator=generator) * magnitude).to(device=device, dtype=dtype)
    tensors[2] += 0.5  # attention without a mean would hide weights that do not add up to 1
    ends = list(itertools.accumulate(gap + length for gap, length in zip(gaps, lengths, strict=False)))
    spans = [[end - length, end] for end, length in zip(ends, lengths, strict=True)]
    return Problem(*in_layout(tensors, layout), torch.tensor(spans, dtype=torch.int32, device=device), max(lengths), **optional)


def in_layout(tensors: torch.Tensor, layout: str) -> list[torch.Tensor]:
    """The three tensors of `[3, R, H, D]` in memory as the model may hold them."""
    _, rows, heads, dim = tensors.shape
    if layout == "buffer":  # one projection's output, or three in one buffer
        return list(tensors)
    if layout == "mixed":
        return [tensors[0].clone(), in_layout(tensors, "head-major")[1], in_layout(tensors, "spread")[2]]
    if layout == "head-major":
        return list(tensors.transpose(1, 2).contiguous().transpose(1, 2))
    if layout == "offset":  # not aligned to 16 bytes: out of reach of descriptors
        return [torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape) for x in tensors]
    assert layout == "spread"  # query, key and value of a token side by side
    return list(tensors.permute(1, 0, 2, 3).reshape(rows, 3, heads, dim).clone().unbind(1))


def bodies(device: torch.device) -> list[str]:
    """The ways in which the kernel can load its tiles on this device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return ["pointers"]
    return ["pointers", "descriptors", "specialised"]


def config_of(body: str, problem: Problem) -> dict:
    """A configuration of default_config that has this body, whichever architecture it is meant for."""
    dims = problem.query.shape[2], problem.query.element_size()
    masked = problem.key_mask is not None
    config = default_config({"pointers": 80, "descriptors": 100, "specialised": 90}[body], *dims, masked=masked)
    assert config["DESCRIPTORS"] == (body != "pointers") or dims[1] == 4
    return config


def packed(**changes) -> dict:
    """Good arguments on the CPU: sequences of 7 and 6 rows, and one row of none."""
    return {
        "query": torch.zeros(14, 2, 16),
        "key": torch.zeros(14, 2, 16),
        "value": torch.zeros(14, 2, 16),
        "spans": _spans((0, 7), (8, 14)),
        "max_seqlen": 7,
        "key_mask": torch.ones(14, dtype=torch.bool),
        "scale": 0.5,
    } | changes


def _spans(*spans: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(spans, dtype=torch.int32)


# case -> argument, value, message
BAD = {
    "rank": ("query", torch.zeros(14, 32), r"query: shape \(14, 32\)"),
    "no rows": ("query", torch.zeros(0, 2, 16), r"query: shape \(0, 2, 16\)"),
    "integers": ("query", torch.zeros(14, 2, 16, dtype=torch.int32), r"query: dtype torch.int32"),
    "strided channels": ("query", torch.zeros(14, 16, 2).mT, r"query: stride 2 within a head"),
    "key of another shape": ("key", torch.zeros(13, 2, 16), r"key: \(13, 2, 16\) torch.float32 differs"),
    "key of another dtype": ("key", torch.zeros(14, 2, 16).half(), r"key: .*torch.float16 differs"),
    "fewer value heads": ("value", torch.zeros(14, 1, 16), r"value: \(14, 1, 16\)"),
    "value elsewhere": ("value", torch.zeros(14, 2, 16, device="meta"), r"value: on meta"),
    "no sequence": ("spans", torch.zeros(0, 2, dtype=torch.int32), r"spans: got \(0, 2\)"),
    "cumulated lengths": ("spans", torch.tensor([0, 7, 14], dtype=torch.int32), r"spans: got \(3,\)"),
    "starts only": ("spans", torch.zeros(2, 1, dtype=torch.int32), r"spans: got \(2, 1\)"),
    "int64 spans": ("spans", _spans((0, 7), (8, 14)).long(), r"spans: .*torch.int64"),
    "strided spans": ("spans", torch.zeros(2, 4, dtype=torch.int32)[:, ::2], r"spans: .*contiguous"),
    "spans elsewhere": ("spans", _spans((0, 7), (8, 14)).to("meta"), r"spans: on meta"),
    "negative length": ("max_seqlen", -1, r"max_seqlen: -1"),
    "integer mask": ("key_mask", torch.ones(14, dtype=torch.int32), r"key_mask: .*torch.int32"),
    "short mask": ("key_mask", torch.ones(13, dtype=torch.bool), r"key_mask: got \(13,\)"),
    "strided mask": ("key_mask", torch.ones(28, dtype=torch.bool)[::2], r"key_mask: .*contiguous"),
    "mask elsewhere": ("key_mask", torch.ones(14, dtype=torch.bool, device="meta"), r"key_mask: on meta"),
    "scale 0": ("scale", 0.0, r"scale: 0.0"),
    "negative scale": ("scale", -1.0, r"scale: -1.0"),
    "scale NaN": ("scale", float("nan"), r"scale: nan"),
    "endless scale": ("scale", float("inf"), r"scale: inf"),
    # Values, which only the CPU looks at.
    "before the rows": ("spans", _spans((-1, 7), (8, 14)), r"spans: \[\[-1, 7\], \[8, 14\]\] do not ascend within the 14 rows"),
    "beyond the rows": ("spans", _spans((0, 7), (8, 15)), r"spans: .* do not ascend within the 14 rows"),
    "overlapping": ("spans", _spans((0, 7), (6, 14)), r"spans: .* do not ascend"),
    "end before start": ("spans", _spans((7, 0), (8, 14)), r"spans: .* do not ascend"),
    "descending": ("spans", _spans((8, 14), (0, 7)), r"spans: .* do not ascend"),
    "longer than said": ("max_seqlen", 6, r"max_seqlen: 6 is less than the longest sequence, 7 rows"),
}
