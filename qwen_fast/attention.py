"""Which implementation computes the joint attention of a block."""

import functools

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from qwen_fast_kernels import joint_attention

from . import proofs
from .layout import Layout


def chosen_backend(processor: object) -> AttentionBackendName | None:
    """The backend that the user chose in diffusers, on this processor or for all; None if nobody did."""
    backend = getattr(processor, "_attention_backend", None)
    if backend is None:
        active, _ = attention_dispatch._AttentionBackendRegistry.get_active_backend()
        backend = None if active == AttentionBackendName.NATIVE else active
    return backend


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: Layout, processor: object, option: str):
    """Attention of every sequence of `layout` over its own rows.

    Args:
        query, key, value: `[R, heads, head_dim]`, text rows first.
        processor: the block's attention processor; a backend chosen there is used, as in stock.
        option: "auto", "triton" or "diffusers" (its dispatcher, whatever its backend).
    Returns:
        Tensor: `[R, heads, head_dim]`.
    """
    backend = chosen_backend(processor)
    if backend is None and option != "diffusers" and _kernel_serves(query, layout, option):
        return joint_attention(
            query,
            key,
            value,
            layout.cu_seqlens_txt,
            layout.cu_seqlens_img,
            layout.txt_rows,
            max(layout.txt_lengths),
            max(layout.img_lengths),
            seqused_txt=layout.seqused_txt,
            key_mask=layout.key_mask,
        )
    return _dispatch(query, key, value, layout, backend)


def _kernel_serves(query: torch.Tensor, layout: Layout, option: str) -> bool:
    """On the CPU the operator is torch's own attention. On CUDA "auto" leaves plain attention to torch's, until a
    measured row says that ours is faster, and takes ours where torch's would need padding or a mask. A kernel that did not
    prove itself is taken by neither."""
    if query.device.type not in proofs.DEVICES:
        return True
    if option != "triton" and layout.contiguous:
        return False
    flags = layout.seqused_txt is not None, layout.key_mask is not None
    return proofs.attention_is_right(query.device, query.dtype, query.shape[-1], *flags)


def _dispatch(query, key, value, layout: Layout, backend: AttentionBackendName | None) -> torch.Tensor:
    """Through diffusers' dispatcher, in its `[batch, tokens, heads, head_dim]` layout."""
    attend_batch = functools.partial(dispatch_attention_fn, backend=backend)
    if layout.contiguous:
        return attend_batch(query[None], key[None], value[None])[0]
    if layout.seqused_txt is not None:
        raise ValueError("bucketed text lengths need the joint attention operator, not a backend of diffusers.")
    split = layout.txt_rows
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if layout.uniform and layout.key_mask is not None:
        batch = layout.sequences

        def joined(rows):
            return torch.cat([rows[:split].unflatten(0, (batch, -1)), rows[split:].unflatten(0, (batch, -1))], dim=1)

        mask = joined(layout.key_mask)[:, None, None]
        attended = attend_batch(joined(query), joined(key), joined(value), attn_mask=mask)
        out[:split] = attended[:, : split // batch].flatten(0, 1)
        out[split:] = attended[:, split // batch :].flatten(0, 1)
        return out
    text, image = 0, split
    for txt_length, img_length in zip(layout.txt_lengths, layout.img_lengths, strict=True):
        spans = slice(text, text + txt_length), slice(image, image + img_length)
        joint = [torch.cat([rows[span] for span in spans])[None] for rows in (query, key, value)]
        attended = attend_batch(*joint)[0]
        out[spans[0]], out[spans[1]] = attended[:txt_length], attended[txt_length:]
        text, image = spans[0].stop, spans[1].stop
    return out
