"""Which implementation computes the joint attention of a block."""

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_fast_kernels import joint_attention

from ..common import proofs
from .layout import Layout

# torch's implementations by name: its own choice among them depends on an order that changes with its version.
SDPA = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


def chosen_backend(processor: object) -> AttentionBackendName | None:
    """The backend that the user chose in diffusers, on this processor or for all; None if nobody did."""
    backend = getattr(processor, "_attention_backend", None)
    if backend is None:
        active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        backend = None if active == AttentionBackendName.NATIVE else active
    return backend


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, processor: object, option: str
) -> list[torch.Tensor]:
    """Attention of every sequence of `layout` over its own rows.

    Args:
        query, key, value: `[R, heads, head_dim]`, in the order of attention.
        processor: the block's attention processor; a backend chosen there is used, as in stock.
        option: "auto", "triton" (the joint attention kernel), "cudnn", "flash" or "efficient" (torch's, by name), or
            "diffusers" (its dispatcher, whatever its backend).
    Returns:
        list[Tensor]: one `[R, heads * head_dim]`, or one of each sequence.
    """
    backend = chosen_backend(processor)
    if backend is not None or option == "diffusers":
        attention = functools.partial(_dispatched, backend=backend)
    else:
        name = option if option != "auto" else chosen(query, layout)
        if name == "triton" and _kernel_is_right(query, layout):
            out = joint_attention(query, key, value, layout.spans, max(layout.lengths), layout.key_mask)
            return [out.flatten(1)]
        attention = functools.partial(_scaled_dot_product, backend=SDPA.get(name))
    if layout.padded:
        raise ValueError("capacities of text need the joint attention kernel, which alone reads the true lengths.")
    return _each(attention, query, key, value, layout)


def _kernel_is_right(query: torch.Tensor, layout: Layout) -> bool:
    return proofs.attention_is_right(query.device, query.dtype, query.shape[-1], layout.key_mask is not None)


def chosen(query: torch.Tensor, layout: Layout) -> str:
    """What "auto" takes: on the CPU the operator, which is torch's attention there; where lengths or keys are known on the
    device only, the kernel; otherwise the fastest on this GPU."""
    if query.is_cuda and not layout.padded and layout.key_mask is None:
        tokens = min(max(2 ** round(math.log2(max(layout.lengths))), _SIZES[0]), _SIZES[1])
        return fastest(query.device, query.dtype, query.shape[1], query.shape[2], layout.sequences > 1, tokens)["fastest"]
    return "triton"


_TRIED = ("cudnn", "flash", "triton")  # of those within 3 % of the fastest the first is taken: no picture depends on noise
_SIZES = 256, 8192  # tokens of a sequence: powers of two between these are measured
_CALLS = 4  # in a row: a step calls it sixty times


@functools.cache
def fastest(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, several: bool, tokens: int) -> dict:
    """The fastest right attention of a sequence of about so many tokens, or of two in one forward.

    Measured once for a card, driver, torch and Triton, and kept beside the kernels' verdicts: what a step pays, which is the
    host's time where a call takes that longer than the device.

    Returns:
        dict: "fastest", a name; "ms" a call, by name; "refused", why the others did not run.
    Raises:
        RuntimeError: none runs, with each one's reason.
    """
    what = f"attention of {'two sequences' if several else 'a sequence'} of {tokens} tokens, {heads} x {head_dim}, {dtype}"
    kept = proofs.kept(device)
    found = kept.get(what)
    if found is None:
        try:
            found = _measured(device, dtype, heads, head_dim, (tokens, tokens - 24) if several else (tokens,))
            kept.put(what, found)
        except torch.OutOfMemoryError:  # the call itself may fit: another process measures again
            found = {"fastest": "triton", "ms": {}, "refused": {"all": "too little memory to measure"}}
    MEASURED.setdefault(device, {})[what] = found
    return found


MEASURED: dict[torch.device, dict[str, dict]] = {}  # what this process has asked for


def described() -> list[str]:
    """For `report`: a line for each kind of attention that was chosen here, with what was measured."""
    lines = []
    for device, choices in MEASURED.items():
        for what, found in choices.items():
            times = [f"{name} {ms:g} ms" for name, ms in found["ms"].items()]
            times += [f"{name} refused: {why}" for name, why in found["refused"].items()]
            lines.append(f"{what} on {device}: {found['fastest']} ({', '.join(times)})")
    return lines


def _measured(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, lengths: tuple[int, ...]) -> dict:
    generator = torch.Generator(device).manual_seed(0)
    size = (sum(lengths), heads, head_dim)
    rows = [torch.randn(size, generator=generator, device=device).to(dtype) for _ in range(3)]
    ends = list(itertools.accumulate(lengths))
    spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    on_device = torch.tensor(spans, dtype=torch.int32, device=device)

    def call(name: str) -> None:
        if name == "triton":
            joint_attention(*rows, on_device, max(lengths))
        for start, end in spans * (name in SDPA):
            _scaled_dot_product(*(one[start:end][None] for one in rows), None, SDPA[name])

    def milliseconds(name: str) -> float:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(_CALLS):
            call(name)
        torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - begin) / _CALLS

    found, refused = {}, {}
    for name in _TRIED:
        if name == "triton" and not proofs.attention_is_right(device, dtype, head_dim):
            refused[name] = "wrong on this GPU"
            continue
        try:
            call(name)  # plans and compiles
            found[name] = round(min(milliseconds(name) for _ in range(3)), 4)
        except torch.OutOfMemoryError:
            raise  # no word on what the GPU can do
        except RuntimeError as error:  # torch's word for what it has no kernel for
            refused[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not found:
        raise RuntimeError(f"no attention runs on {device} in {dtype}: {refused}")
    fastest = next(name for name in _TRIED if found.get(name, math.inf) <= 1.03 * min(found.values()))
    return {"fastest": fastest, "ms": found, "refused": refused}


def _each(attention: Callable, query, key, value, layout: Layout) -> list[torch.Tensor]:
    """`attention` of `[batch, tokens, heads, head_dim]` each, all sequences at once where they are equally long."""
    if layout.key_mask is not None or len(set(layout.lengths)) == 1:
        if len(set(layout.lengths)) != 1:
            raise ValueError("a mask of keys needs sequences of equal lengths, or the joint attention kernel.")
        batch = (layout.sequences, layout.lengths[0])
        mask = None if layout.key_mask is None else layout.key_mask.view(batch)[:, None, None]
        out = attention(*(rows.unflatten(0, batch) for rows in (query, key, value)), mask)
        return [out.flatten(0, 1).flatten(1)]
    return [attention(*(rows[own][None] for rows in (query, key, value)), None)[0].flatten(1) for own in layout.pieces]


def _dispatched(query, key, value, mask, backend: AttentionBackendName | None) -> torch.Tensor:
    return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend)


def _scaled_dot_product(query, key, value, mask, backend: SDPBackend | None) -> torch.Tensor:
    """By the backend, or by whatever torch takes where our kernel is wrong."""
    heads_first = (rows.transpose(1, 2) for rows in (query, key, value))
    with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
