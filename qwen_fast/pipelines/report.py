"""What an accelerated pipeline did: the counters it keeps while it runs, and the report a user reads."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from ..common.state import STATE, State
from ..transformer.call import ATTACHED
from ..transformer.controlnet import fused_net, stock_reason
from ..transformer.survey import survey

TRANSFORMER = diffusers.QwenImageTransformer2DModel


@dataclass(frozen=True)
class Report:
    """What qwen_fast does for a pipeline. `str()` of it is for people.

    Attributes:
        pipeline (str): class of the pipeline, VAE or transformer.
        enabled (bool): whether it is accelerated.
        replaced (list[str]): what runs on qwen_fast.
        calls (dict[str, int]): fast calls so far, by operator.
        fallbacks (dict[str, int]): calls left to stock diffusers, by reason.
        variant (dict[str, int]): where `batch_invariant` is on and was not kept, by reason.
        lossy (list[str]): lossy modes that are on.
        memory (dict[str, int]): bytes of each component's parameters and buffers, which of them stay in host memory, and
            what qwen_fast adds.
        prompt_cache (dict[str, int]): hits and misses so far, and bytes in memory.
        kernels (dict[str, str]): those that did not prove themselves on this GPU and that torch's operators replace, and why.
    """

    pipeline: str
    enabled: bool
    replaced: list[str]
    calls: dict[str, int]
    fallbacks: dict[str, int]
    variant: dict[str, int]
    lossy: list[str]
    memory: dict[str, int]
    prompt_cache: dict[str, int]
    kernels: dict[str, str]

    def __str__(self) -> str:
        if not self.enabled:
            call = "enable_vae(vae)" if self.pipeline.startswith("Autoencoder") else "enable(pipe)"
            whose = " of its pipeline" if self.pipeline.startswith("QwenImageTransformer") else ""
            return f"qwen_fast: {self.pipeline} is not accelerated; `qwen_fast.{call}`{whose} does it."
        fast, slow = sum(self.calls.values()), sum(self.fallbacks.values())
        lines = [f"qwen_fast: {self.pipeline} is accelerated; {fast} fast calls, {slow} on stock diffusers"]
        lines += [f"  replaced:  {part}" for part in self.replaced]
        lines += [f"  calls:     {count:6d} x {name}" for name, count in sorted(self.calls.items())]
        lines += [f"  fallback:  {count:6d} x {reason}" for reason, count in self.fallbacks.items()]
        lines += [f"  batch_invariant: not kept: {count} x {reason}" for reason, count in self.variant.items()]
        lines += [f"  by torch:  {kernel} is wrong here: {reason}" for kernel, reason in self.kernels.items()]
        lines += [f"  lossy:     {', '.join(self.lossy) or 'nothing'}"]
        sizes = {name: f"{size / 2**20:.1f}" for name, size in self.memory.items()}
        lines += [f"  memory:    {size:>10s} MiB {name}" for name, size in sizes.items() if size != "0.0"]
        return "\n".join(lines)


def report(pipe: Any) -> Report:
    """What is replaced in `pipe`, what fell back to stock diffusers and why, the calls so far, and the memory.

    Args:
        pipe: any diffusers pipeline, or a VAE or transformer alone, enabled or not.
    Returns:
        Report: a snapshot; later calls do not change it.
    """
    from ..transformer import attention
    from ..transformer.compiled import without_compiler
    from ..vae import pictures as vae  # which need the state from here
    from . import modular

    pipe = without_compiler(pipe)
    if isinstance(pipe, TRANSFORMER):
        return _of_transformer(pipe)
    state = getattr(pipe, "__dict__", {}).get(STATE)
    alone = isinstance(pipe, torch.nn.Module)  # a VAE
    components = {"vae": pipe} if alone else getattr(pipe, "components", {})
    memory = {name: _bytes(module) for name, module in components.items() if isinstance(module, torch.nn.Module)}
    replaced = []
    if state is not None and not alone:
        precision = "fp32 latents" if state.options.precise_sampler else "stock's roundings"
        replaced = ["schedule (on the device, once per call)", f"guidance and Euler step ({precision})"]
        if state.transformer is not None:
            modulation = f"layers, since {state.no_table}" if state.no_table else state.options.modulation
            memory |= state.transformer.fast_memory()
            if modulation == "auto":
                resting = memory["modulation weights that stay on the host"]
                modulation = f"auto: weights {'in host memory' if resting else 'where the model is'}"
            replaced.append(f"transformer (fused blocks, modulation {modulation}, attention {state.options.attention})")
            if state.options.attention == "auto":
                replaced += attention.described()
            net = fused_net(pipe)
            if net is not None and stock_reason(net, survey(net)) is None:
                replaced.append("ControlNet (fused blocks)")
            if state.calls["compiled block"]:
                left = f"; the last call's not: {state.uncompiled}" if state.uncompiled else ""
                replaced.append(f"blocks behind their attention (torch.compile{left})")
            graphs = f"no CUDA graph: {state.graph}" if state.graph else f"CUDA graph {state.options.cuda_graph}"
            replaced.append(f"steps ({graphs})")
        if isinstance(pipe, modular.AcceleratedModularPipeline):
            replaced.append(modular.described(pipe))
        if state.texts is not None:
            replaced.append(f"text encoding (no logits; {_prompts(state.texts)}; text encoder: {state.texts.placement})")
            memory["prompt cache"] = state.texts.cache.nbytes
        if state.texts is not None and state.texts.pictures:
            memory["vision features"] = state.texts.features.nbytes
        if state.pictures is not None:
            memory["encoded pictures"] = state.pictures.nbytes
        if state.options.batch_invariant:
            replaced.append("batches (batch_invariant: each picture by itself)")
        if state.options.check_nan:
            replaced.append(f"check for NaN after each step (last call: {state.nan_note or 'none yet'})")
    verdicts = state.verdicts if state is not None else {}
    wrong = {problem: verdict for problem, verdict in verdicts.items() if not verdict.right}
    if verdicts:
        replaced.append(f"kernels ({len(verdicts) - len(wrong)} of {len(verdicts)} proved right on this GPU)")
    if state is not None and state.vae is not None:
        replaced.append(f"VAE ({vae.description(state.vae, state)})")
    return Report(
        pipeline=type(pipe).__name__,
        enabled=state is not None,
        replaced=replaced,
        calls=dict(state.calls) if state else {},
        fallbacks=dict(state.fallbacks) if state else {},
        variant=dict(state.variant) if state else {},
        lossy=[],
        memory=memory,
        prompt_cache=_counted(state),
        kernels={str(problem): verdict.reason for problem, verdict in wrong.items()},
    )


def _of_transformer(model: torch.nn.Module) -> Report:
    """Of a transformer alone: one that was built as ours, or one that enabled pipelines use, with what they all counted."""
    attachment = model.__dict__.get(ATTACHED)
    memory, states, replaced = {"transformer": _bytes(model)}, [], []
    if attachment is not None:
        states = [attachment.own] if attachment.own is not None else list(attachment.users)
        whose = "every forward without gradients" if attachment.own is not None else f"the calls of {len(states)} pipelines"
        replaced = [f"transformer (fused blocks, in {whose})"]
        memory |= model.fast_memory()
    calls, fallbacks, variant = Counter(), Counter(), Counter()
    for state in states:
        calls += Counter({name: count for name, count in state.calls.items() if name.endswith("transformer")})
        fallbacks += state.fallbacks
        variant += state.variant
    verdicts = {problem: verdict for state in states for problem, verdict in state.verdicts.items()}
    return Report(
        pipeline=type(model).__name__,
        enabled=attachment is not None,
        replaced=replaced,
        calls=dict(calls),
        fallbacks=dict(fallbacks),
        variant=dict(variant),
        lossy=[],
        memory=memory,
        prompt_cache={},
        kernels={str(problem): verdict.reason for problem, verdict in verdicts.items() if not verdict.right},
    )


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def _counted(state: State | None) -> dict[str, int]:
    if state is None or state.texts is None:
        return {}
    cache = state.texts.cache
    return {"hits": cache.hits, "misses": cache.misses, "bytes": cache.nbytes}


def _prompts(texts: Any) -> str:
    if texts.uncached is not None:
        return f"no prompt cache: {texts.uncached}"
    return f"prompt cache: {texts.cache.hits} hits, {texts.cache.misses} misses"
