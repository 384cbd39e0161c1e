"""A whole denoising step over buffers of its own, and as a CUDA graph: forward, guidance, Euler update.

A graph repeats its work on the same addresses. So everything that differs from step to step, from prompt to prompt and from
schedule to schedule lies in buffers: latents, two neighbouring sigmas, timestep, guidance scale, one row of the modulation
table, text rows with their rotary rows and true lengths. What is baked in is the key: sizes, weights, adapters, options.
"""

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..common.fingerprint import plain_tensors
from ..common.hardware import capture_stream, indexed
from ..common.proofs import attention_is_right
from ..common.stages import stage
from ..common.state import logger
from ..transformer.adapters import FromEach
from ..transformer.attention import chosen_backend
from ..transformer.call import ATTACHED, Call, PromptBatch
from ..transformer.compiled import graph_reason
from ..transformer.layout import build_layout
from ..transformer.modulation import FromRow, FromTable
from ..transformer.modulation_weights import host_bytes
from .step import RESIDUALS, Step, combined, sampler_step, without_references

if TYPE_CHECKING:
    from .denoiser import Denoiser

DEVICES = ("cuda",)
# Text rows of a sequence. Prompts of many lengths share a graph, and its first steps cost no more than a few rows; negative
# prompts differ less, and need not be padded as far. Longer texts in steps of 512.
_PROMPT_CAPACITIES = (128, 256, 512, 768, 1024)
_NEGATIVE_CAPACITIES = (16, 32, 64, *_PROMPT_CAPACITIES)
_PLAIN = (torch.nn.Parameter, torch.Tensor)
_BY_VALUE = (float, bool, str)
_KEPT = 4  # graphs of one model; each keeps the activations of a step
# "auto", image tokens of all predictions of a step: at 512x512 with guidance (2048) a graph gains a fifth and more on an
# H100, where the host is slower than the device; at 1024x1024 it loses 3 %, because cuDNN's attention is out of its reach.
_FEW_TOKENS = 3072
_CAPTURING = threading.Lock()  # graphs of two threads must not meet on the stream that captures
_SYNCHRONISING = ("Linear8bitLt",)  # layers that wait for the device, which no capture can hold


def capacity(length: int, negative: bool = False) -> int:
    """Rows that a text of `length` tokens gets: of a prompt, or of a negative one."""
    sizes = _NEGATIVE_CAPACITIES if negative else _PROMPT_CAPACITIES
    return next((size for size in sizes if size >= length), -(-length // 512) * 512)


def reason_against(denoiser: "Denoiser", step: Step) -> str | None:
    """Why the steps of this call do not go through a `StepGraph`, or None."""
    state, model, found = denoiser.state, denoiser.model, denoiser.call.survey
    if state.options.cuda_graph is False:
        return "cuda_graph=False"
    if denoiser.device.type not in DEVICES:
        return f"the device is {denoiser.device}"
    if denoiser.packs is None:
        return "hooks, caches or custom attention processors"
    if denoiser.row is None:
        return "a timestep that the scheduler does not have"
    if step.control is not None or step.shared(RESIDUALS) is not None:
        return "a ControlNet, which a graph has not in it"
    if denoiser.source is None and step.shared("additional_t_cond") is not None:
        return "modulations with a condition of each sample's own"
    if len(denoiser.packs) > 1 and not denoiser.apart:
        return "memory is too short for one forward of both predictions"
    if (compiled := graph_reason(found.compilers_of(denoiser.call.compiler))) is not None:
        return compiled
    if found.touched:
        return "a hook on the transformer or a layer, such as offloading or casting"
    if any(type(module).__name__ in _SYNCHRONISING for module in found.modules):
        return "layers that wait for the device"
    if any(chosen_backend(block.attn.processor) is not None for block in model.transformer_blocks):
        return "an attention backend chosen in diffusers"
    if state.options.attention not in ("auto", "triton"):
        return f"attention={state.options.attention!r} cannot read true prompt lengths on the device"
    attn = model.transformer_blocks[0].attn
    if not attention_is_right(denoiser.device, denoiser.dtype, attn.inner_dim // attn.heads):
        return "the attention kernel is wrong on this GPU"
    if denoiser.source is None and host_bytes(model):
        return "the modulation weights stay on the host"
    if state.options.cuda_graph == "auto" and denoiser.packs[0].layout.img_rows > _FEW_TOKENS:
        return f"auto: {denoiser.packs[0].layout.img_rows} image tokens a step are not limited by launches"
    return None


def take(denoiser: "Denoiser", step: Step, pack: PromptBatch) -> "StepGraph":
    """The graph for `pack` of this call, held by it until `release` and loaded with its inputs.

    Where another thread holds the one that is kept, this call gets one of its own, which is never captured: the same kernels
    on buffers of the same sizes.
    """
    model, key = denoiser.model, _key(denoiser, step, pack)
    kept = model.__dict__[ATTACHED]
    with kept.lock:
        graph = kept.graphs.get(key)
        if graph is not None and graph.lock.acquire(blocking=False):
            kept.graphs.move_to_end(key)
        else:
            fresh = StepGraph(denoiser, step, pack)
            fresh.lock.acquire()
            if graph is None:
                kept.graphs[key] = fresh
                while len(kept.graphs) > _KEPT:
                    kept.graphs.popitem(last=False)
            else:
                fresh.captures = False
            graph = fresh
    try:
        graph.load(denoiser, step, pack)
    except BaseException:
        graph.release()
        raise
    return graph


class StepGraph:
    """One denoising step for one shape of call.

    The first call of a shape computes its steps on these buffers. The second warms up on the stream that captures, with its
    first step, captures the next one and replays it from there on, as do all later calls. All of them run the same kernels
    on the same buffers, so a call gives the same bits whichever it is.

    Args:
        denoiser: of the call; its sizes and options are taken over.
        step: the first one, for shapes and dtypes.
        pack: both predictions of it.
    """

    def __init__(self, denoiser: "Denoiser", step: Step, pack: PromptBatch):
        self.lock, self.captures = threading.Lock(), True
        self._model, self._device, self._dtype = denoiser.model, denoiser.device, denoiser.dtype
        self._calls, self._is_warm = 0, False
        self._home = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        self._replay: Callable[[], None] | None = None
        self._done: torch.cuda.Event | None = None
        with torch.inference_mode(False), torch.no_grad():  # buffers that calls in either mode may write
            self._allocate(denoiser, step, pack)
        counting = copy.copy(denoiser.state)
        counting.calls = Counter()
        self._counting, self._counts = counting, Counter()
        self._call = Call(self._model, counting, self._source, denoiser.call.survey, compiler=denoiser.call.compiler)

    def _allocate(self, denoiser: "Denoiser", step: Step, pack: PromptBatch) -> None:
        model, device = denoiser.model, denoiser.device
        dtype = torch.float32 if denoiser.state.options.precise_sampler else step.latents.dtype
        self.latents = torch.empty_like(step.latents, dtype=dtype)
        # What the forward reads: the latents, behind them what does not change.
        self.hidden = torch.empty_like(step.shared("hidden_states"), dtype=self._dtype)
        self._normalize = step.normalize
        self.sigmas = torch.empty(2, dtype=torch.float32, device=device)
        self.step_index = torch.zeros(1, dtype=torch.int32, device=device)
        self.timestep = torch.empty(1, dtype=self._dtype, device=device)
        self.guidance = None if denoiser.guidance is None else torch.empty_like(denoiser.guidance)
        layout = build_layout(model.pos_embed, pack.shapes, capacities(pack), device)
        text = torch.zeros(layout.txt_rows, model.inner_dim, dtype=self._dtype, device=device)
        self.prompts = replace(pack, layout=replace(layout, padded=True), embeds=pack.embeds.new_empty(0), text=text)
        self._source: FromRow | None = None
        self._rows: FromTable | FromEach | None = None
        if denoiser.source is not None:
            denoiser.source.begin(denoiser.timesteps[:1])
            self._source = denoiser.source.buffer()

    def load(self, denoiser: "Denoiser", step: Step, pack: PromptBatch) -> None:
        """Put a call's references, guidance and prompts into the buffers."""
        if self._done is not None:  # another stream may still be at the call before
            torch.cuda.current_stream(self._device).wait_event(self._done)
        self._calls += self not in denoiser.loaded  # another prompt in the same call is none
        denoiser.loaded.add(self)
        self._denoiser = denoiser
        self._call.survey = denoiser.call.survey
        self.hidden.copy_(step.shared("hidden_states"))
        if self.guidance is not None:
            self.guidance.copy_(denoiser.guidance)
        layout = self.prompts.layout
        if pack.text is None:
            pack.text = self._model.text_rows(pack)
        self.prompts.text.zero_()
        layout.spans.copy_(layout.spans_of(pack.layout.txt_lengths))
        start = 0
        for n, length in enumerate(pack.layout.txt_lengths):
            place = layout.text_start(n, length)
            self.prompts.text[place : place + length] = pack.text[start : start + length]
            layout.rope[place : place + length] = pack.layout.rope[start : start + length]
            start += length
        layout.rope[layout.txt_rows :] = pack.layout.rope[start:]  # of the images: their table may have been replaced
        source = denoiser.source
        if source is not None:
            source.begin(denoiser.timesteps[:1])
            self._rows = source

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """The buffers that differ from picture to picture, but for the latents."""
        return self.hidden, self.prompts.text, self.prompts.layout.spans, self.prompts.layout.rope

    def run(self, index: int, row: int | None, latents: torch.Tensor) -> torch.Tensor:
        """One step.

        Args:
            index, row: of the sigma that the step begins with, and of the timestep.
            latents: `[B, S_img, C]`, those of the step before, or what a callback made of them.
        Returns:
            Tensor: the next latents, the caller's own.
        """
        self.latents.copy_(latents)
        self.sigmas.copy_(self._denoiser.pipe.scheduler.sigmas[index : index + 2])
        self.timestep.copy_(self._denoiser.timesteps[row : row + 1])
        if self._rows is not None:
            self._rows.copy_row(self._source, row)
        if self._replay is not None:
            self._replay()
        elif not self.captures or self._calls < 2 or not _CAPTURING.acquire(blocking=False):
            self._counted()
        else:
            try:
                self._warm_up_or_capture()
            finally:
                _CAPTURING.release()
        self._denoiser.state.calls.update(self._counts)
        self._denoiser.state.uncompiled = self._counting.uncompiled
        return self.latents.clone()

    def release(self) -> None:
        """The call is over: the next one may write into the buffers, behind its work."""
        if self._device.type == "cuda":
            self._done = torch.cuda.current_stream(self._device).record_event()
        self._denoiser = self._rows = None
        self.lock.release()

    def __del__(self):
        if self._done is not None:  # the buffers go back to the stream that they came from, behind the last replay
            self._home.wait_event(self._done)

    def _compute(self) -> None:
        rows, copies = self.latents.shape[1], self.prompts.copies
        self.hidden[:, :rows].copy_(self.latents)
        output = self._model.predict(self._call, self.hidden, self.timestep, self.prompts)
        predictions, guidance = tuple(without_references(output, copies, rows)), self.guidance
        if guidance is not None and not self._normalize:
            predictions, guidance = (combined(*predictions, guidance),), None
        self.latents.copy_(sampler_step(self._counting, self.latents, predictions, self.sigmas, self.step_index, guidance))

    def _counted(self) -> None:
        self._counting.calls.clear()
        self._compute()
        self._counts = Counter(self._counting.calls)

    def _warm_up_or_capture(self) -> None:
        """The step, on the stream that captures; from the second time on as a graph."""
        if not self._is_warm:
            with _beside(self._device), torch.inference_mode(False), torch.no_grad():  # as in the capture: compiled for it too
                self._counted()
            self._is_warm = True
            return
        state = self._denoiser.state
        try:
            with stage("capture"), torch.inference_mode(False), torch.no_grad():
                self._replay = capture(self._compute, self._device)
        except Exception as error:
            self.captures = False
            state.calls["graph captures that failed"] += 1
            logger.warning("the step could not be captured in a CUDA graph, and runs without: %s", error)
            self._counted()
            return
        state.calls["graph captures"] += 1
        self._replay()


@contextlib.contextmanager
def _beside(device: torch.device):
    """Inside, work goes to the stream that captures, behind the current one's; that one waits for it."""
    if device.type != "cuda":
        yield
        return
    current, side = torch.cuda.current_stream(device), capture_stream(indexed(device))
    side.wait_stream(current)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        current.wait_stream(side)


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph; calling what is returned replays it. Nothing is computed meanwhile.

    Whatever happens, the current stream is again what it was: `torch.cuda.graph` leaves its own behind when the end of a
    capture raises. The graph has memory and a cuBLAS workspace of its own: one that it shared with the stream could be freed
    by whoever clears them all, as Inductor does, and two graphs replayed side by side would write into the same one.
    """
    # The one wait of a capture: memory that finished work has used can serve the graph.
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), _beside(device):
        _clear_workspaces()
        # Only this thread's calls can spoil the capture: another may be decoding the picture before.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            with contextlib.suppress(Exception):
                _end(graph, device)
            raise
        finally:
            _clear_workspaces()  # into the graph's memory, which nobody else gets
        _end(graph, device)
    return graph.replay


def _end(graph: "torch.cuda.CUDAGraph", device: torch.device) -> None:
    """The end of a capture; where it raises, PyTorch's allocator is told that nothing is captured any more."""
    try:
        graph.capture_end()
    except BaseException:
        for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
            with contextlib.suppress(Exception):  # private ones, which versions of PyTorch may lack
                getattr(torch._C, name)(indexed(device).index, graph.pool())
        raise


def _clear_workspaces() -> None:
    """Let every stream's next product take a new workspace."""
    if hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
        torch._C._cuda_clearCublasWorkspaces()


def capacities(pack: PromptBatch) -> tuple[int, ...]:
    """Text rows of each sequence: the prompts', then the negative ones'."""
    lengths = pack.layout.txt_lengths
    return tuple(capacity(length, negative=n >= len(lengths) // pack.copies) for n, length in enumerate(lengths))


def _key(denoiser: "Denoiser", step: Step, pack: PromptBatch) -> tuple[Any, ...]:
    """All that a graph bakes in."""
    found, state, device = denoiser.call.survey, denoiser.state, denoiser.device.type
    addresses = tuple(
        tensor.data_ptr()
        if type(tensor) in _PLAIN and tensor.layout is torch.strided
        else tuple(plain.data_ptr() for plain in plain_tensors(tensor))
        for module in found.modules
        for held in ("_parameters", "_buffers")
        for tensor in module.__dict__[held].values()
        if tensor is not None
    )
    matmul = torch.backends.cuda.matmul
    products = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    products += str(matmul.allow_bf16_reduced_precision_reduction), str(matmul.allow_fp16_reduced_precision_reduction)
    return (
        (tuple(step.latents.shape), tuple(step.shared("hidden_states").shape)),
        (denoiser.dtype, state.options.precise_sampler),
        denoiser.device,
        (capacities(pack), pack.shapes),
        (denoiser.guidance is None, step.normalize),
        (state.options.attention, denoiser.source is None),
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        products,
        tuple(map(type, found.modules)),
        _constants(found.modules),
        (found.adapters, denoiser.lora_scale, denoiser.adapters),
        addresses,
        (tuple(found.compilers.values()), denoiser.call.compiler),
    )


def _constants(modules: Iterable[torch.nn.Module]) -> tuple[Any, ...]:
    """What kernels get by value: the eps of a norm, the share of a dropout and whether it is on, the form of a GELU."""
    return tuple(value for module in modules for value in module.__dict__.values() if type(value) in _BY_VALUE)
