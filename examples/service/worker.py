"""One thread that draws: it takes the oldest request and all that wait with the same settings, as one batch."""

import copy
import dataclasses
import io
import logging
import queue
import threading
import time
from collections import Counter, deque
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch

import qwen_fast

logger = logging.getLogger("qwen_fast.service")
PATCH = 16
STOPPING = "the service is shutting down; try again."


class Refused(Exception):
    """A request that this service does not take, with the status for it and a sentence for the client."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait."""

    pixels: int = 2048 * 2048
    steps: int = 100
    letters: int = 4000
    waiting: int = 64
    batch: int = 4


@dataclasses.dataclass
class Job:
    """A request, its events for whoever listens, and its outcome.

    Attributes:
        compare: draw it with stock diffusers too.
        left: whoever asked has gone, and nobody wants the picture any more.
        pictures: PNGs by name: ours, and where compared stock and difference.
    """

    prompt: str
    negative_prompt: str = " "
    width: int = 1024
    height: int = 1024
    steps: int = 50
    seed: int = 0
    cfg: float = 4.0
    compare: bool = False
    left: bool = False
    events: "queue.SimpleQueue[dict[str, Any]]" = dataclasses.field(default_factory=queue.SimpleQueue)
    done: threading.Event = dataclasses.field(default_factory=threading.Event)
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)
    outcome: dict[str, Any] = dataclasses.field(default_factory=dict)
    status: int = 200

    def alike(self) -> tuple[Any, ...]:
        """What requests of one batch have in common."""
        return self.width, self.height, self.steps, self.cfg, self.compare

    def finish(self, status: int, **outcome: Any) -> None:
        self.status, self.outcome = status, outcome
        self.events.put({"event": "done" if status == 200 else "failed", **outcome})
        self.done.set()


def check(job: Job, limits: Limits) -> None:
    """Refuse what no pipeline could draw, or nobody should wait for; what is left the library checks itself.

    Raises:
        Refused: with a 4xx status.
    """
    if not job.prompt.strip():
        raise Refused(400, "`prompt` is empty; say what to draw.")
    for name in ("prompt", "negative_prompt"):
        if len(getattr(job, name)) > limits.letters:
            raise Refused(413, f"`{name}` has {len(getattr(job, name))} letters; at most {limits.letters} are taken.")
    for name in ("width", "height"):
        side = getattr(job, name)
        if side < PATCH or side % PATCH:
            raise Refused(400, f"`{name}` is {side}; one patch is {PATCH} pixels, so use a multiple of {PATCH}.")
    if job.width * job.height > limits.pixels:
        raise Refused(413, f"`width` x `height` is {job.width}x{job.height}; at most {limits.pixels} pixels are drawn here.")
    if job.steps > limits.steps:
        raise Refused(413, f"`steps` is {job.steps}; at most {limits.steps} are taken here.")
    if not 0 <= job.cfg <= 100:  # which NaN is not either
        raise Refused(400, f"`cfg` is {job.cfg}; it is a number from 0 to 100, up to 1 without guidance.")
    if not 0 <= job.seed < 2**63:
        raise Refused(400, f"`seed` is {job.seed}; it is one of 0 to 2**63 - 1.")


class Worker:
    """Draws with one enabled pipeline, on one thread, whatever happens to a request.

    Args:
        pipe: an enabled QwenImagePipeline.
    """

    def __init__(self, pipe: Any, limits: Limits | None = None):
        self.limits, self.counts, self.seconds = limits or Limits(), Counter(), 0.0
        self._pipe = pipe
        # The same modules; a scheduler of its own, since a call leaves its state there.
        parts = pipe.components | {"scheduler": copy.deepcopy(pipe.components["scheduler"])}
        self._stock = diffusers.QwenImagePipeline(**parts)
        for one in (self._pipe, self._stock):
            one.set_progress_bar_config(disable=True)
        self._waiting: deque[Job] = deque()
        self._changed, self._stopping = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="qwen_fast_service", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take no more; the batch at hand is finished, and then those that wait are told."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Close, and wait until all are told."""
        self.close()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    def submit(self, job: Job) -> None:
        """Queue a request.

        Raises:
            Refused: bad (4xx), or there are too many (503).
        """
        check(job, self.limits)
        with self._changed:
            if self._stopping:
                raise Refused(503, STOPPING)
            if len(self._waiting) >= self.limits.waiting:
                self.counts["refused, too many wait"] += 1
                raise Refused(503, f"{len(self._waiting)} requests are waiting; try again later.")
            self._waiting.append(job)
            self._changed.notify()

    def metrics(self) -> str:
        """Counters in Prometheus' text format."""
        report = qwen_fast.report(self._pipe)
        lines = [f"qwen_fast_waiting {len(self._waiting)}", f"qwen_fast_drawing_seconds_total {self.seconds:.3f}"]
        lines += [f'qwen_fast_requests_total{{outcome="{name}"}} {count}' for name, count in sorted(self.counts.items())]
        lines += [f"qwen_fast_prompt_cache_{name} {value}" for name, value in report.prompt_cache.items()]
        lines += [f"qwen_fast_stock_calls_total {sum(report.fallbacks.values())}"]
        return "\n".join(lines) + "\n"

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    for job in self._waiting:
                        job.finish(503, error=STOPPING)
                    return
                batch = self._next_batch()
            try:
                self._draw(batch)
            except Exception:  # whatever it is, the next request is served
                logger.exception("a batch could not be finished")
                for job in batch:
                    if not job.done.is_set():
                        job.finish(500, error="the service failed to answer; its log says why.")

    def _next_batch(self) -> list[Job]:
        first = self._waiting[0]
        batch = [job for job in self._waiting if job.alike() == first.alike()][: self.limits.batch]
        taken = {id(job) for job in batch}
        self._waiting = deque(job for job in self._waiting if id(job) not in taken)
        return batch

    def _wanted(self, batch: list[Job]) -> list[Job]:
        """Those whose clients have not left; the others end here."""
        for job in batch:
            if job.left:
                self.counts["given up"] += 1
                job.finish(499, error="the client has left.")
        return [job for job in batch if not job.done.is_set()]

    def _draw(self, batch: list[Job]) -> None:
        batch = self._wanted(batch)
        if not batch:
            return
        begin = time.perf_counter()
        try:
            pictures = self._call(self._pipe, batch)
        except Exception as error:
            if len(batch) > 1:  # one of them may be at fault, and the others are not
                for job in batch:
                    self._draw([job])
                return
            bad = isinstance(error, (ValueError, TypeError))
            self.counts["refused by the library" if bad else "failed"] += 1
            if not bad:
                logger.exception("a picture could not be drawn")
            batch[0].finish(400 if bad else 500, error=str(error) or type(error).__name__)
            return
        seconds = time.perf_counter() - begin
        stock = {}
        if batch[0].compare:
            begin = time.perf_counter()
            stock = {"pictures": self._call(self._stock, batch, told="stock")}
            stock["seconds"] = (time.perf_counter() - begin) / len(batch)
        if all(job.left for job in batch):  # the last steps were left out
            self._wanted(batch)
            return
        self.seconds += seconds
        self.counts["batches"] += 1
        for number, (job, picture) in enumerate(zip(batch, pictures, strict=True)):
            outcome = {"seconds": round(seconds / len(batch), 3), "batch": len(batch)}
            job.pictures["ours"] = png(picture)
            if stock:
                other = stock["pictures"][number]
                apart = np.abs(np.asarray(picture, int) - np.asarray(other, int))
                job.pictures |= {"stock": png(other), "difference": png(np.clip(16 * apart, 0, 255).astype(np.uint8))}
                outcome |= {"stock_seconds": round(stock["seconds"], 3), "largest_difference": int(apart.max())}
            self.counts["drawn"] += 1
            job.finish(200, **outcome)

    def _call(self, pipe: Any, batch: list[Job], told: str = "ours") -> list[PIL.Image.Image]:
        first = batch[0]

        def progress(_: Any, step: int, timestep: Any, tensors: dict) -> dict:
            for job in batch:
                job.events.put({"event": "progress", "who": told, "step": step + 1, "steps": first.steps})
            pipe._interrupt = all(job.left for job in batch)  # diffusers' own way to leave out the steps that follow
            return {}

        return pipe(
            prompt=[job.prompt for job in batch],
            negative_prompt=[job.negative_prompt for job in batch] if first.cfg > 1 else None,
            true_cfg_scale=first.cfg,
            width=first.width,
            height=first.height,
            num_inference_steps=first.steps,
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            callback_on_step_end=progress,
            callback_on_step_end_tensor_inputs=[],
        ).images


def png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    (PIL.Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(buffer, format="PNG")
    return buffer.getvalue()
