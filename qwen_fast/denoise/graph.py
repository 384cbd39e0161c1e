"""A whole denoising step as one CUDA graph: forward, CFG, Euler update, step index.

Everything that changes from step to step or from prompt to prompt lies in buffers of fixed addresses: latents, sigmas,
step index, text rows, their rotary rows and true lengths. Prompts are put into buckets of lengths, so that a new prompt
re-uses the graph. What a graph bakes in (sizes, weights' addresses, adapters, guidance scale) is its key.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..common.hooks import is_hooked
from ..common.proofs import attention_is_right
from ..transformer.attention import chosen_backend
from ..transformer.call import ATTACHED, Call, Packed, accelerated
from ..transformer.layout import build_layout, check_image_shapes
from ..transformer.modulation import FromTable, weights_signature
from ..transformer.modulation_weights import host_bytes
from .denoiser import Forwards, Task, sampler_step

DEVICES = ("cuda",)
_BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024)  # text tokens; longer prompts in steps of 512
_KEPT = 2  # graphs of one model; each keeps the activations of a step
# "auto", image tokens of all predictions of a step: at 512x512 with guidance (2048) a graph gains a fifth and more on an
# H100, where the host is slower than the device; at 1024x1024 it loses 3 %, because cuDNN's attention is out of its reach.
_FEW_TOKENS = 3072
# On an H100 steps in a graph gave NaN now and then (benchmarks/results/LOG.md, 2026-11-26). The attention kernel that is most
# probably to blame is out of use; until a GPU has shown that nothing else is, "auto" takes no graph. The run-book's stage
# "stress" (benchmarks/attention/stress.py) can show it.
AUTO = False


def bucket(length: int) -> int:
    """Rows that a text of `length` tokens gets."""
    return next((size for size in _BUCKETS if size >= length), -(-length // 512) * 512)


def reason_against(pipe: Any, forwards: Forwards, callback: Any) -> str | None:
    """Why the steps of this call are not captured, or None."""
    option, _task = pipe.fast_state.options.cuda_graph, forwards.task
    if option is False:
        return "cuda_graph=False"
    if forwards.step_index.device.type not in DEVICES:
        return f"the device is {forwards.step_index.device}"
    if option == "auto" and not AUTO:
        return "auto: not before a GPU has shown that the NaN of first light is gone; cuda_graph=True captures"
    if callback is not None:
        return "a callback may change anything between two steps"
    if forwards.packs is None:
        return "hooks, caches, compiled blocks or custom attention processors"
    if len(forwards.packs) > 1:
        return "memory is too short for one forward of both predictions"
    if any(map(is_hooked, pipe.transformer.modules())):
        return "a hook on the transformer or a layer, such as offloading or casting"
    if any(chosen_backend(block.attn.processor) is not None for block in pipe.transformer.transformer_blocks):
        return "an attention backend chosen in diffusers"
    attn = pipe.transformer.transformer_blocks[0].attn
    if pipe.fast_state.options.attention not in ("auto", "triton"):
        return f"attention={pipe.fast_state.options.attention!r} cannot read true prompt lengths on the device"
    if not attention_is_right(forwards.step_index.device, forwards.timesteps.dtype, attn.inner_dim // attn.heads):
        return "the attention kernel is wrong on this GPU"
    if forwards.call.conditions is None and host_bytes(pipe.transformer):
        return "the modulation weights stay on the host for another pipeline"
    if option == "auto":
        tokens = forwards.packs[0].layout.img_rows
        if tokens > _FEW_TOKENS:
            return f"auto: {tokens} image tokens a step are not limited by launches"
    return None


def capture(step: Callable[[], None], rewind: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph; calling what is returned replays it.

    Runs `step` three times before the capture, each after `rewind`: a schedule may be a single step long, and an index
    beyond its end is a device-side assertion.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            rewind()
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Only this thread's calls can spoil the capture: another may be decoding the picture before.
    captured = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    with torch.cuda.device(device), captured:
        step()
    return graph.replay


class CapturedStep:
    """Static buffers of one shape of call, and the graph over them.

    Args:
        forwards: of the call that is captured; its sizes and options are taken over.
        latents: `[B, S_img, C]`, for shape and dtype.
    """

    def __init__(self, pipe: Any, call: Call, forwards: Forwards, latents: torch.Tensor):
        pack, task, device = forwards.packs[0], forwards.task, latents.device
        model, state = pipe.transformer, call.state
        shapes = check_image_shapes(task.img_shapes, forwards.batch) * pack.copies
        self.capacities = tuple(bucket(length) for length in pack.layout.txt_lengths)
        self.latents, self.sigmas = torch.empty_like(latents), torch.empty_like(task.schedule.sigmas)
        self.step_index = torch.zeros(1, dtype=torch.int32, device=device)
        layout = replace(build_layout(model.pos_embed, shapes, self.capacities, device), padded=True)
        text = torch.zeros(layout.txt_rows, model.inner_dim, dtype=forwards.timesteps.dtype, device=device)
        self.pack = Packed(layout, pack.embeds.new_empty(0), pack.copies, text)
        conditions = None
        if call.conditions is not None:
            tables = model.__dict__[ATTACHED].tables
            conditions = FromTable(model, tables, forwards.timesteps, self.step_index)
        self.load(model, latents, task, pack)

        model_dtype, true_cfg_scale = forwards.timesteps.dtype, task.true_cfg_scale

        counting = copy.copy(state)
        counting.calls = Counter()

        def step() -> None:
            with accelerated(model, counting) as own:
                own.conditions = conditions
                predictions = forwards.on(own, self.step_index, [self.pack]).predict(self.latents.to(model_dtype))
            latents = sampler_step(counting, self.latents, predictions, self.sigmas, self.step_index, true_cfg_scale)
            self.latents.copy_(latents)
            self.step_index.add_(1)

        step()  # compiles, computes the table, and shows what one step counts
        self.calls = Counter(counting.calls)
        self._replay = capture(step, self.step_index.zero_, device)
        # A replay reads these by address, and caches elsewhere may forget them.
        self._read = forwards.timesteps, None if conditions is None else conditions.table

    def load(self, model: torch.nn.Module, latents: torch.Tensor, task: Task, pack: Packed) -> None:
        """Put another call's latents, schedule and prompts into the buffers; step 0 comes next."""
        layout, own = self.pack.layout, pack.layout
        self.latents.copy_(latents)
        self.sigmas.copy_(task.schedule.sigmas)
        self.step_index.zero_()
        if pack.text is None:
            pack.text = model.text_rows(pack)
        self.pack.text.zero_()
        layout.spans.copy_(layout.spans_of(own.txt_lengths))
        start = 0
        for n, length in enumerate(own.txt_lengths):
            place = layout.text_start(n, length)
            self.pack.text[place : place + length] = pack.text[start : start + length]
            layout.rope[place : place + length] = own.rope[start : start + length]
            start += length

    def run(self, state: Any) -> torch.Tensor:
        """One step; the latents after it, in the static buffer."""
        self._replay()
        state.calls.update(self.calls)
        return self.latents


def captured_step(pipe: Any, call: Call, forwards: Forwards, latents: torch.Tensor) -> CapturedStep:
    """The graph for this call, loaded with it: one of those kept, or a new one."""
    task, pack, model = forwards.task, forwards.packs[0], pipe.transformer
    graphs = model.__dict__[ATTACHED].graphs
    key = (
        tuple(latents.shape),
        latents.dtype,
        forwards.timesteps.dtype,
        latents.device,
        tuple(map(bucket, pack.layout.txt_lengths)),
        str(task.img_shapes),
        tuple(task.host_timesteps.tolist()),
        task.true_cfg_scale,
        (call.state.options.attention, call.state.options.modulation),
        _weights(model),
    )
    step = graphs.get(key)
    if step is None:
        with torch.inference_mode(False), torch.no_grad():  # buffers that calls in either mode may write
            step = graphs[key] = CapturedStep(pipe, call, forwards, latents)
        call.state.calls["graph captures"] += 1
        while len(graphs) > _KEPT:
            graphs.popitem(last=False)
    graphs.move_to_end(key)
    step.load(model, latents, task, pack)
    return step


def _weights(model: torch.nn.Module) -> tuple:
    """What a graph bakes in of the model: addresses, kinds of layers, adapters and their scales, table contents."""
    adapters = tuple(
        (tuple(module.active_adapters), tuple(sorted(module.scaling.items())), module.disable_adapters, module.merged)
        for module in model.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "scaling")
    )
    addresses = tuple(parameter.data_ptr() for parameter in model.parameters())
    kinds = tuple(type(module) for module in model.modules())
    return addresses, kinds, adapters, weights_signature(model).content
