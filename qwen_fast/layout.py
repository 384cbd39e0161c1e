"""Where each token of a batch lies: one row axis for all sequences, their text rows first, then their image rows.

Every projection then writes one contiguous slice of a joint buffer, text weights see text rows only, and sequences of
different lengths lie side by side without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

ImageShapes = tuple[tuple[int, int, int], ...]  # (frames, height, width) in patches: the target, then its references


@dataclass(frozen=True)
class Layout:
    """Token rows of N sequences.

    Attributes:
        txt_lengths, img_lengths (tuple[int, ...]): rows of each sequence.
        cu_seqlens_txt, cu_seqlens_img (Tensor): `[N + 1]` int32, where each sequence's text and image rows start.
        rope (Tensor): `[R, head_dim]` fp32, cosine and sine of each token, interleaved.
        seqused_txt (Tensor): `[N]` int32, true text lengths where the rows are padded to a bucket; None: all are used.
        key_mask (Tensor): `[R]` bool, False for rows that no query attends to; None: all are keys.
    """

    txt_lengths: tuple[int, ...]
    img_lengths: tuple[int, ...]
    cu_seqlens_txt: torch.Tensor
    cu_seqlens_img: torch.Tensor
    rope: torch.Tensor
    seqused_txt: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None

    @cached_property
    def txt_rows(self) -> int:
        """Text rows of all sequences; where the image rows start."""
        return sum(self.txt_lengths)

    @cached_property
    def img_rows(self) -> int:
        """Image rows of all sequences."""
        return sum(self.img_lengths)

    @property
    def rows(self) -> int:
        """R."""
        return self.txt_rows + self.img_rows

    @property
    def sequences(self) -> int:
        """N."""
        return len(self.txt_lengths)

    @property
    def uniform(self) -> bool:
        """All sequences have the same lengths: the rows are a batch `[N, S_txt]` and a batch `[N, S_img]`."""
        return len(set(self.txt_lengths)) == len(set(self.img_lengths)) == 1

    @property
    def contiguous(self) -> bool:
        """One sequence of which every row is a key: plain attention over all rows."""
        return self.sequences == 1 and self.seqused_txt is None and self.key_mask is None

    def with_key_mask(self, text_mask: torch.Tensor | None) -> "Layout":
        """This layout with the text rows of `text_mask` `[N, S_txt]` as its only text keys. No host synchronisation."""
        if text_mask is None:
            return self
        image = torch.ones(self.img_rows, dtype=torch.bool, device=text_mask.device)
        return replace(self, key_mask=torch.cat([text_mask.bool().flatten(), image]))


def check_image_shapes(img_shapes: Sequence, sequences: int) -> tuple[ImageShapes, ...]:
    """`img_shapes` as stock takes them, one entry per sequence.

    Args:
        img_shapes: a list per sample of (frames, height, width), or of one such tuple in place of a list; a single entry,
            or fewer than `sequences` by a whole factor, stands for several samples.
    Raises:
        ValueError: a number of entries that does not fit, or a shape that is not three positive integers.
    """
    if not img_shapes:
        raise ValueError(f"`img_shapes` is {img_shapes!r}; one list of (frames, height, width) for each sample is needed.")
    entries = []
    for entry in img_shapes:
        shapes = (entry,) if isinstance(entry[0], int) else tuple(entry)
        for shape in shapes:
            if len(shape) != 3 or any(not isinstance(size, int) or size < 1 for size in shape):
                raise ValueError(f"`img_shapes` holds {shape!r}; three positive integers (frames, height, width) are needed.")
        entries.append(tuple(tuple(shape) for shape in shapes))
    if sequences % len(entries):
        raise ValueError(f"`img_shapes` has {len(entries)} entries for {sequences} samples; one for all or one for each.")
    per_entry = sequences // len(entries)
    return tuple(entry for entry in entries for _ in range(per_entry))


def build_layout(
    pos_embed: nn.Module,
    img_shapes: Sequence[ImageShapes],
    text_positions: Sequence[int | tuple[int, ...]],
    device: torch.device,
    *,
    seqused_txt: torch.Tensor | None = None,
) -> Layout:
    """The rows of `len(text_positions)` sequences, with their rotary table.

    Args:
        pos_embed: the transformer's own rotary module.
        img_shapes: per sequence.
        text_positions: per sequence its number of text tokens, or their positions in the prompt where a mask with holes
            took some out.
        device: where the tables are put.
        seqused_txt: `[N]` int32 on `device`, where the text rows given are buckets of which only so many are used.
    Raises:
        ValueError: more text tokens than the rotary table has positions.
    """
    lengths, text, image = [], [], []
    tables: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
    for shapes, positions in zip(img_shapes, text_positions, strict=True):
        holes = isinstance(positions, tuple)
        length = max(positions, default=-1) + 1 if holes else positions
        if (shapes, length) not in tables:
            tables[shapes, length] = pos_embed([list(shapes)], max_txt_seq_len=length, device=device)
        image_freqs, text_freqs = tables[shapes, length]
        if text_freqs.shape[0] < length:
            raise ValueError(
                f"the prompt has {length} tokens, but beside a picture of {shapes[0]} patches the rotary table has "
                f"{text_freqs.shape[0]} text positions; shorten the prompt or the picture."
            )
        text.append(text_freqs[torch.tensor(positions, dtype=torch.long, device=device)] if holes else text_freqs)
        image.append(image_freqs)
        lengths.append((text[-1].shape[0], image_freqs.shape[0]))
    text_lengths, image_lengths = zip(*lengths, strict=True)
    # Complex numbers lie in memory as (cosine, sine).
    rope = torch.view_as_real(torch.cat([*text, *image])).flatten(-2).float().contiguous()

    def starts(values: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(values)], dtype=torch.int32, device=device)

    return Layout(
        txt_lengths=text_lengths,
        img_lengths=image_lengths,
        cu_seqlens_txt=starts(text_lengths),
        cu_seqlens_img=starts(image_lengths),
        rope=rope,
        seqused_txt=seqused_txt,
    )
