"""Which implementation computes the joint attention of a block."""

import functools
import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qwen_fast_kernels import joint_attention

from .layout import Layout
from .reporting import logger

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
        if layout.padded:
            raise ValueError("capacities of text need the joint attention kernel, not a backend of diffusers.")
        return _each(functools.partial(_dispatched, backend=backend), query, key, value, layout)
    name = option if option != "auto" else chosen(query, layout)
    if name in SDPA and not layout.padded:
        return _each(functools.partial(_scaled_dot_product, backend=SDPA[name]), query, key, value, layout)
    out = joint_attention(query, key, value, layout.spans, max(layout.lengths), layout.key_mask)
    return [out.flatten(1)]


def chosen(query: torch.Tensor, layout: Layout) -> str:
    """What "auto" takes: on the CPU the operator, which is torch's attention there; where lengths or keys are known on the
    device only, the kernel; otherwise the fastest on this GPU."""
    if query.is_cuda and not layout.padded and layout.key_mask is None:
        return fastest(query.device, query.dtype, query.shape[1], query.shape[2], layout.sequences > 1)
    return "triton"


_TRIED = ("cudnn", "flash", "triton")  # of those within 3 % of the fastest the first is taken: no picture depends on noise


@functools.cache
def fastest(device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, several: bool) -> str:
    """The fastest right attention of one sequence, or of several in one forward, measured once at a size of its own.

    Raises:
        RuntimeError: none runs, with each one's reason.
    """
    lengths = (4096 + 30, 4096 + 7) if several else (4096 + 30,)
    generator = torch.Generator(device).manual_seed(0)
    size = (sum(lengths), heads, head_dim)
    rows = [torch.randn(size, generator=generator, device=device, dtype=torch.float32).to(dtype) for _ in range(3)]
    ends = list(itertools.accumulate(lengths))
    spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    on_device = torch.tensor(spans, dtype=torch.int32, device=device)

    def call(name: str) -> None:
        if name == "triton":
            joint_attention(*rows, on_device, max(lengths))
        for start, end in spans * (name in SDPA):
            _scaled_dot_product(*(one[start:end][None] for one in rows), None, SDPA[name])

    seconds, refused = {}, {}
    for name in _TRIED:
        if name == "triton" and not kernel_is_right(device, dtype, head_dim):
            refused[name] = "wrong on this GPU"
            continue
        try:
            call(name)
            times = []
            for _ in range(3):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call(name)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
            seconds[name] = min(times)
        except RuntimeError as error:  # torch's word for what it has no kernel for
            refused[name] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if not seconds:
        raise RuntimeError(f"no attention runs on {device} in {dtype}: {refused}")
    return next(name for name in _TRIED if seconds.get(name, math.inf) <= 1.03 * min(seconds.values()))


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


def _scaled_dot_product(query, key, value, mask, backend: SDPBackend) -> torch.Tensor:
    heads_first = (rows.transpose(1, 2) for rows in (query, key, value))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)


@functools.cache
def kernel_is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the attention kernel computes rightly on this GPU, tried once per process.

    Triton 3.6 assembles sm_90 code with ptxas 12.8, which is reported to miscompile matrix products with operands in
    registers, and every flash attention has them. A wrong kernel is not used, and the log says so.
    """
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = torch.randn(3, 1837, 2, head_dim, generator=generator, device=device).to(dtype)
    spans = torch.tensor([[0, 537], [537, 1837]], dtype=torch.int32, device=device)
    first = joint_attention(query, key, value, spans, 1300)
    for start, end in spans.tolist():
        q, k, v = (rows[start:end].float().transpose(0, 1) for rows in (query, key, value))
        expected = (((q @ k.mT) * head_dim**-0.5).softmax(-1) @ v).transpose(0, 1)
        wrong = (first[start:end].float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        if not wrong <= 5e-3:  # a right one is off by 2e-3 in bf16; NaN is wrong too
            logger.warning("the attention kernel is off by %.2g on %s in %s; torch's is used.", wrong, device, dtype)
            return False
    for _ in range(19):
        if not torch.equal(joint_attention(query, key, value, spans, 1300), first):
            logger.warning("the attention kernel's result moves on %s in %s; torch's is used.", device, dtype)
            return False
    return True
