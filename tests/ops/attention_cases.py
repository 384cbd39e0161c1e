"""What the tests of joint attention share: packed problems, memory layouts, the bodies of the kernel, bad arguments."""

import itertools
from dataclasses import dataclass, replace

import torch

from qwen_fast_kernels.joint_attention import default_config, joint_attention_reference

HALF = [torch.bfloat16, torch.float16]
LAYOUTS = ["buffer", "head-major", "spread", "mixed", "offset"]

# (text lengths, image lengths) of the sequences; tiles are 128 queries, blocks 64 or 128 keys.
ONE_SEQUENCE = [
    ((1,), (0,)),
    ((0,), (1,)),
    ((1,), (63,)),
    ((30,), (64,)),
    ((65,), (0,)),
    ((0,), (127,)),
    ((64,), (128,)),
    ((127,), (65,)),
    ((31,), (129,)),
    ((131,), (257,)),
]
PACKED = [
    ((30, 5), (100, 100)),
    ((1, 0, 129), (65, 130, 3)),
    ((17, 64, 0), (0, 127, 128)),
]


@dataclass
class Problem:
    """Arguments of joint_attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cu_seqlens_txt: torch.Tensor
    cu_seqlens_img: torch.Tensor
    txt_rows: int
    max_seqlen_txt: int
    max_seqlen_img: int
    seqused_txt: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    scale: float | None = None

    def __iter__(self):
        return iter(vars(self).values())

    def reference(self) -> torch.Tensor:
        return joint_attention_reference(*self)

    def oracle(self) -> torch.Tensor:
        return replace(self, query=self.query.double(), key=self.key.double(), value=self.value.double()).reference()

    def rows_of(self, sequence: int) -> torch.Tensor:
        txt, img = self.cu_seqlens_txt.tolist(), self.cu_seqlens_img.tolist()
        text = range(txt[sequence], txt[sequence + 1])
        image = range(self.txt_rows + img[sequence], self.txt_rows + img[sequence + 1])
        return torch.tensor([*text, *image], dtype=torch.int64, device=self.query.device)

    def alone(self, sequence: int) -> "Problem":
        """The same sequence in a launch of its own."""
        rows = self.rows_of(sequence)
        txt, img = (torch.diff(cu)[sequence : sequence + 1] for cu in (self.cu_seqlens_txt, self.cu_seqlens_img))
        return Problem(
            *(x.index_select(0, rows) for x in (self.query, self.key, self.value)),
            *(torch.cat([length.new_zeros(1), length]) for length in (txt, img)),
            *(int(txt), int(txt), int(img)),
            None if self.seqused_txt is None else self.seqused_txt[sequence : sequence + 1].clone(),
            None if self.key_mask is None else self.key_mask.index_select(0, rows),
            self.scale,
        )


def problem(
    txt: tuple[int, ...],
    img: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    heads: int = 1,
    dim: int = 128,
    spare: tuple[int, int] = (0, 0),
    layout: str = "buffer",
    magnitude: float = 1.0,
    **optional,
) -> Problem:
    """Random packed sequences of the given lengths, with `spare` text and image rows that belong to none."""
    txt_rows, rows = sum(txt) + spare[0], sum(txt) + sum(img) + sum(spare)
    generator = torch.Generator().manual_seed(rows)
    tensors = (torch.randn(3, rows, heads, dim, generator=generator) * magnitude).to(device=device, dtype=dtype)
    tensors[2] += 0.5  # attention without a mean would hide weights that do not add up to 1
    return Problem(
        *(in_layout(tensors, layout)),
        *(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (txt, img)),
        *(txt_rows, max(txt), max(img)),
        **optional,
    )


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
    """Good arguments on the CPU: two sequences of 3 + 4 and 2 + 5 tokens."""
    int32 = torch.int32
    return {
        "query": torch.zeros(14, 2, 16),
        "key": torch.zeros(14, 2, 16),
        "value": torch.zeros(14, 2, 16),
        "cu_seqlens_txt": torch.tensor([0, 3, 5], dtype=int32),
        "cu_seqlens_img": torch.tensor([0, 4, 9], dtype=int32),
        "txt_rows": 5,
        "max_seqlen_txt": 3,
        "max_seqlen_img": 5,
        "seqused_txt": torch.tensor([3, 1], dtype=int32),
        "key_mask": torch.ones(14, dtype=torch.bool),
        "scale": 0.5,
    } | changes


def _int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


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
    "no sequence": ("cu_seqlens_txt", _int32(0), r"cu_seqlens_txt: got \(1,\)"),
    "int64 lengths": ("cu_seqlens_txt", torch.tensor([0, 3, 5]), r"cu_seqlens_txt: .*torch.int64"),
    "lengths elsewhere": ("cu_seqlens_txt", _int32(0, 3, 5).to("meta"), r"cu_seqlens_txt: on meta"),
    "other sequences": ("cu_seqlens_img", _int32(0, 9), r"cu_seqlens_img: got \(2,\)"),
    "strided lengths": ("cu_seqlens_img", torch.zeros(6, dtype=torch.int32)[::2], r"cu_seqlens_img: .*contiguous"),
    "text rows": ("txt_rows", 15, r"txt_rows: 15 is outside \[0, 14\]"),
    "negative text rows": ("txt_rows", -1, r"txt_rows: -1 is outside"),
    "negative text length": ("max_seqlen_txt", -1, r"max_seqlen_txt: -1"),
    "negative image length": ("max_seqlen_img", -2, r"max_seqlen_img: -2"),
    "used of one": ("seqused_txt", _int32(1), r"seqused_txt: got \(1,\)"),
    "fp32 used": ("seqused_txt", torch.ones(2), r"seqused_txt: .*torch.float32"),
    "integer mask": ("key_mask", torch.ones(14, dtype=torch.int32), r"key_mask: .*torch.int32"),
    "short mask": ("key_mask", torch.ones(13, dtype=torch.bool), r"key_mask: got \(13,\)"),
    "mask elsewhere": ("key_mask", torch.ones(14, dtype=torch.bool, device="meta"), r"key_mask: on meta"),
    "scale 0": ("scale", 0.0, r"scale: 0.0"),
    "negative scale": ("scale", -1.0, r"scale: -1.0"),
    "scale NaN": ("scale", float("nan"), r"scale: nan"),
    # Values, which only the CPU looks at.
    "late start": ("cu_seqlens_txt", _int32(1, 3, 5), r"cu_seqlens_txt: \[1, 3, 5\]"),
    "falling": ("cu_seqlens_img", _int32(0, 5, 4), r"cu_seqlens_img: \[0, 5, 4\]"),
    "beyond the rows": ("cu_seqlens_img", _int32(0, 4, 10), r"cu_seqlens_img: \[0, 4, 10\] does not rise from 0 to at most 9"),
    "text longer than said": ("max_seqlen_txt", 2, r"max_seqlen_txt: 2 is less than the longest sequence, 3 rows"),
    "image longer than said": ("max_seqlen_img", 4, r"max_seqlen_img: 4 is less than"),
    "more used than there is": ("seqused_txt", _int32(3, 3), r"seqused_txt: \[3, 3\]"),
    "negative used": ("seqused_txt", _int32(-1, 1), r"seqused_txt: \[-1, 1\]"),
}
