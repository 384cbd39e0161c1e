"""Rows of a modulation table: which row a token takes, in a kernel, in a reference, and what a caller may pass.

A table view is `[T, streams, C]`: T conditions (steps of a schedule, or samples of a batch), one or two streams (image,
text), C channels. Token rows are joint: the text rows of all sequences first, then the image rows.
"""

import torch

from ._triton import tl, triton

# Arguments that change from prompt to prompt. Triton compiles a kernel again for every integer that is 1 or a multiple of 16
# and for every pointer that is aligned, a second each in mid-use; of these it is told not to. No address along the channels
# depends on them, so that loads stay as wide.
VARYING = ("step_index_ptr", "token_rows_ptr", "rows", "txt_rows", "conditions")


@triton.jit
def table_row(row, step_index_ptr, token_rows_ptr, HAS_TOKEN_ROWS: tl.constexpr):
    """int64 table row of each token in `row`: its own entry of `token_rows` if that is not negative, else the step index."""
    step = tl.load(step_index_ptr).to(tl.int64)
    if HAS_TOKEN_ROWS:
        own = tl.load(token_rows_ptr + row).to(tl.int64)
        step = tl.where(own >= 0, own, step)
    return step


def table_strides(table: torch.Tensor) -> tuple[int, int]:
    """From one row of a table to the next, and from its image stream to its text stream, which may be the same."""
    row, stream, _ = table.stride()
    return row, (table.shape[1] - 1) * stream


def rows_of(table: torch.Tensor, step_index: torch.Tensor, txt_rows: int, token_rows: torch.Tensor | None, rows: int):
    """`table` `[T, streams, C]` as what each of `rows` tokens takes: two tensors (text, image) that broadcast to
    `[txt_rows, C]` and `[rows - txt_rows, C]`."""
    image, text = table[:, 0], table[:, -1]
    if token_rows is None:
        return text.index_select(0, step_index), image.index_select(0, step_index)
    index = torch.where(token_rows >= 0, token_rows, step_index)
    return text.index_select(0, index[:txt_rows]), image.index_select(0, index[txt_rows:])


def check_modulation(
    rows: int,
    channels: int,
    tables: dict[str, torch.Tensor],
    step_index: torch.Tensor,
    txt_rows: int,
    token_rows: torch.Tensor | None,
    device: torch.device,
) -> None:
    """Raise a ValueError that names the argument that does not fit `[rows, channels]` tokens on `device`."""
    if not 0 <= txt_rows <= rows:
        raise ValueError(f"txt_rows: {txt_rows} is outside [0, {rows}], the number of token rows.")
    conditions = None
    for name, table in tables.items():
        shape = table.shape
        if len(shape) != 3 or shape[1] not in (1, 2) or shape[2] != channels or shape[0] < 1:
            raise ValueError(f"{name}: shape {tuple(shape)}; [T, 1 or 2 streams, {channels} channels] is needed.")
        if not table.is_floating_point():
            raise ValueError(f"{name}: dtype {table.dtype} is not a floating-point type.")
        if channels > 1 and table.stride()[2] != 1:
            raise ValueError(f"{name}: stride {table.stride(2)} between channels; they have to be adjacent.")
        conditions = shape[0] if conditions is None else conditions
        if shape[0] != conditions:
            raise ValueError(f"{name}: {shape[0]} table rows, but another table has {conditions}.")
        if table.device != device:
            raise ValueError(f"{name}: on {table.device}, but the tokens are on {device}; move it there first.")
    if step_index.shape != (1,) or step_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"step_index: got {tuple(step_index.shape)} {step_index.dtype}; int32 or int64 [1] is needed.")
    if step_index.device != device:
        raise ValueError(f"step_index: on {step_index.device}, but the tokens are on {device}; move it there first.")
    if token_rows is not None:
        if token_rows.shape != (rows,) or token_rows.dtype != torch.int32 or not token_rows.is_contiguous():
            raise ValueError(
                f"token_rows: got {tuple(token_rows.shape)} {token_rows.dtype}; a contiguous int32 [{rows}] is needed."
            )
        if token_rows.device != device:
            raise ValueError(f"token_rows: on {token_rows.device}, but the tokens are on {device}; move it there first.")


def check_indices(conditions: int, step_index: torch.Tensor, token_rows: torch.Tensor | None) -> None:
    """On the CPU, where reading them costs nothing: a ValueError for table rows that do not exist."""
    if token_rows is None or bool((token_rows < 0).any()):
        if not 0 <= int(step_index) < conditions:
            raise ValueError(f"step_index: {int(step_index)} is outside the table of {conditions} rows.")
    if token_rows is not None and bool((token_rows >= conditions).any()):
        raise ValueError(f"token_rows: {int(token_rows.max())} is outside the table of {conditions} rows.")
