"""Where each token of a batch lies: in the token rows that the projections and norms work on, and in those of attention.

Token rows are the text rows of all sequences, then their image rows: text weights see one block of rows and image weights
another, and sequences of different lengths lie side by side without padding. Attention wants each sequence in one piece. It
gets them in pairs, `text image | image text`: the images of a pair are adjacent there too, so that one product writes both
their queries in place, and only the few text rows are moved.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import nn

ImageShapes = tuple[tuple[int, int, int], ...]  # (frames, height, width) in patches: the target, then its references


@dataclass(frozen=True)
class Layout:
    """Token rows of N sequences, and their rows in attention.

    Attributes:
        txt_lengths, img_lengths (tuple[int, ...]): token rows of each sequence.
        rope (Tensor): `[R, head_dim]` fp32, cosine and sine of each token, interleaved, in the order of token rows.
        places (Tensor): `[R]` int32, the row of each token in attention.
        spans (Tensor): `[N, 2]` int32, first row and end of each sequence in attention.
        padded (bool): the text lengths are capacities, and `spans`, which may change, leaves the padding out.
        key_mask (Tensor): `[R]` bool, False for attention rows that no query attends to; None: all are keys.
    """

    txt_lengths: tuple[int, ...]
    img_lengths: tuple[int, ...]
    rope: torch.Tensor
    places: torch.Tensor
    spans: torch.Tensor
    padded: bool = False
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

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each sequence, text and image."""
        return tuple(text + image for text, image in zip(self.txt_lengths, self.img_lengths, strict=True))

    @cached_property
    def pieces(self) -> tuple[slice, ...]:
        """Attention rows of each sequence, its padding among them."""
        return tuple(_slices(self.lengths))

    @cached_property
    def images(self) -> tuple[tuple[slice, slice], ...]:
        """Image rows, counted from the first one, and the attention rows where they lie: one entry for each pair."""
        entries = []
        for n, (own, (image, within)) in enumerate(zip(self.pieces, self.images_apart, strict=True)):
            first, end = own.start + within.start, own.start + within.stop
            if _text_first(n):
                entries.append((image, slice(first, end)))
            else:
                before = entries.pop()
                entries.append((slice(before[0].start, image.stop), slice(before[1].start, end)))
        return tuple(entries)

    @cached_property
    def images_apart(self) -> tuple[tuple[slice, slice], ...]:
        """Image rows of each sequence, counted from the first one, and where they lie within its attention rows."""
        entries = []
        for n, image in enumerate(_slices(self.img_lengths)):
            first = self.txt_lengths[n] if _text_first(n) else 0
            entries.append((image, slice(first, first + self.img_lengths[n])))
        return tuple(entries)

    def images_of(self, attended: list[torch.Tensor]) -> Iterator[tuple[slice, torch.Tensor, slice]]:
        """Image rows, counted from the first one, with the piece of `attended` that holds them and their rows there.

        Args:
            attended: one tensor of all attention rows, or one of each sequence.
        """
        whole = len(attended) == 1
        pieces = attended * len(self.images) if whole else attended
        for (own, places), piece in zip(self.images if whole else self.images_apart, pieces, strict=True):
            yield own, piece, places

    def text_of(self, attended: list[torch.Tensor]) -> torch.Tensor:
        """`[R_txt, C]`, the text rows of `attended`, see `images_of`."""
        if len(attended) == 1:
            return attended[0].index_select(0, self.text_places)
        ends = (
            slice(length) if _text_first(n) else slice(self.img_lengths[n], None) for n, length in enumerate(self.txt_lengths)
        )
        return torch.cat([piece[end] for piece, end in zip(attended, ends, strict=True)])

    @cached_property
    def text_places(self) -> torch.Tensor:
        """`[R_txt]` int64, the row of each text token in attention."""
        return self.places[: self.txt_rows].long()

    def text_start(self, sequence: int, length: int) -> int:
        """First text row of a sequence whose text has `length` tokens of its capacity: beside its image rows in attention."""
        capacity = self.txt_lengths[sequence]
        return sum(self.txt_lengths[:sequence]) + (capacity - length if _text_first(sequence) else 0)

    def spans_of(self, txt_lengths: Sequence[int]) -> torch.Tensor:
        """`spans` on the CPU where the texts are only so long, the rest of their rows being padding."""
        spans = [
            (own.start + capacity - length, own.stop) if _text_first(n) else (own.start, own.stop - capacity + length)
            for n, (own, capacity, length) in enumerate(zip(self.pieces, self.txt_lengths, txt_lengths, strict=True))
        ]
        return torch.tensor(spans, dtype=torch.int32)

    def table_rows(self, shapes: Sequence[ImageShapes], samples: int, zero_row: int | None) -> torch.Tensor | None:
        """`[R]` int32, the row of a modulation table that each token takes where it is not the step's, else -1; None: nowhere.

        Args:
            shapes: of the pictures of each sequence.
            samples: 1, or B where each sample has a row of its own.
            zero_row: first row of timestep 0, for reference pictures, or None.
        """
        if samples == 1 and zero_row is None:
            return None
        # A sample has the same row in each of several predictions.
        per_sample = [n % samples if samples > 1 else -1 for n in range(self.sequences)]
        text = [own for own, length in zip(per_sample, self.txt_lengths, strict=True) for _ in range(length)]
        image = []
        for own, entry in zip(per_sample, shapes, strict=True):
            zero = samples + own if samples > 1 else zero_row
            for i, shape in enumerate(entry):
                image += [zero if i > 0 and zero_row is not None else own] * math.prod(shape)
        return torch.tensor(text + image, dtype=torch.int32, device=self.rope.device)

    def with_key_mask(self, text_mask: torch.Tensor | None) -> "Layout":
        """This layout with the text rows of `text_mask` `[N, S_txt]` as its only text keys. No host synchronisation."""
        if text_mask is None:
            return self
        mask = torch.ones(self.rows, dtype=torch.bool, device=text_mask.device)
        mask[self.text_places] = text_mask.bool().flatten()
        return replace(self, key_mask=mask)


def _text_first(sequence: int) -> bool:
    """Whether a sequence is the first of its pair, its text in front of its image."""
    return sequence % 2 == 0


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    """Adjacent slices of these lengths, from 0 on."""
    ends = list(accumulate(lengths))
    return (slice(end - length, end) for end, length in zip(ends, lengths, strict=True))


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


def check_samples(
    hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, mask: torch.Tensor | None, img_shapes: Sequence
) -> tuple[ImageShapes, ...]:
    """`check_image_shapes` for hidden states `[B, S_img, C_in]`, to which embeddings and mask have to fit too.

    Raises:
        ValueError: what does not fit, by name.
    """
    batch = hidden_states.shape[0]
    shapes = check_image_shapes(img_shapes, batch)
    tokens = {sum(math.prod(shape) for shape in entry) for entry in shapes}
    if tokens != {hidden_states.shape[1]}:
        raise ValueError(
            f"`img_shapes` {img_shapes} are {sorted(tokens)} tokens a sample, but `hidden_states` has {hidden_states.shape[1]}."
        )
    if encoder_hidden_states.shape[0] not in (1, batch):
        raise ValueError(
            f"`encoder_hidden_states` holds {encoder_hidden_states.shape[0]} prompts for {batch} samples; one for all, or one "
            "for each."
        )
    if mask is not None and mask.shape != encoder_hidden_states.shape[:2]:
        raise ValueError(
            f"`encoder_hidden_states_mask` shape {tuple(mask.shape)} must match {tuple(encoder_hidden_states.shape[:2])} of "
            "the embeddings."
        )
    return shapes


def build_layout(
    pos_embed: nn.Module,
    img_shapes: Sequence[ImageShapes],
    text_positions: Sequence[int | tuple[int, ...]],
    device: torch.device,
) -> Layout:
    """The rows of `len(text_positions)` sequences, with their rotary table.

    Args:
        pos_embed: the transformer's own rotary module.
        img_shapes: per sequence.
        text_positions: per sequence its number of text tokens, or their positions in the prompt where a mask with holes
            took some out.
        device: where the tables are put.
    Raises:
        ValueError: more text tokens than the rotary table has positions.
    """
    frequencies = []
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
        own = text_freqs[torch.tensor(positions, dtype=torch.long, device=device)] if holes else text_freqs
        frequencies.append((own, image_freqs))
    return lay_out(frequencies)


def lay_out(frequencies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Layout:
    """The rows of sequences whose rotary tables are known: complex `[S_txt, head_dim / 2]` and `[S_img, head_dim / 2]` each."""
    text, image = zip(*frequencies, strict=True)
    lengths = [(own.shape[0], other.shape[0]) for own, other in frequencies]
    text_lengths, image_lengths = zip(*lengths, strict=True)
    # Complex numbers lie in memory as (cosine, sine).
    rope = torch.view_as_real(torch.cat([*text, *image])).flatten(-2).float().contiguous()

    places_txt, places_img = [], []
    for n, own in enumerate(_slices([sum(pair) for pair in lengths])):
        rows, (txt_length, img_length) = torch.arange(own.start, own.stop), lengths[n]
        front, back = rows.split((txt_length, img_length) if _text_first(n) else (img_length, txt_length))
        places_txt.append(front if _text_first(n) else back)
        places_img.append(back if _text_first(n) else front)
    layout = Layout(
        txt_lengths=text_lengths,
        img_lengths=image_lengths,
        rope=rope,
        places=torch.cat([*places_txt, *places_img]).to(rope.device, torch.int32),
        spans=rope.new_empty(0),
    )
    return replace(layout, spans=layout.spans_of(text_lengths).to(rope.device))


class RotaryKey:
    """What a rotary table is made of, compared by identity and held, so that no other object takes its place."""

    def __init__(self, module: nn.Module):
        tables = (module.pos_freqs, module.neg_freqs)
        versions = tuple(0 if table.is_inference() else table._version for table in tables)
        self.held = (module, *tables)
        self.key = (*map(id, self.held), versions, module.theta, tuple(module.axes_dim), module.scale_rope)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RotaryKey) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)
