"""One run of the ladder: every rung of every case checked, measured against stock in pairs, and written at once."""

import gc
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen_fast.common.stages import record, stage_table, staged

from ..shared.ceilings import Ceilings
from ..shared.machine import PROVENANCE, Sampler, machine_name, provenance
from ..shared.measure import Difference, Spread, Stopwatch, clocked, exact_latents, ratio
from ..shared.rows import RowFile
from ..shared.shapes import COMPARED_STEPS, STEPS_MEASURED, PictureCase
from ..shared.watchdog import watched
from .models import call_arguments, prompts_of
from .rung import NotMeasured, Rung
from .rungs import ENABLED
from .stock import STOCK

# fp32 against stock: the numerical contract. Below fp32, the error against fp32 as a part of stock's own.
FP32_LIMIT, ERROR_LIMIT = 2e-6, 1.25
# Below fp32 where the exact latents could not be had: dB from stock. Two right implementations in bf16 have 40 and more.
UNJUDGED_PSNR = 30.0
LOSSY_PSNR = 10.0  # dB; what lies farther from stock is another picture, not a lossy one

FIELDS = [
    *PROVENANCE,
    *Sampler("cpu").summary(),
    *("model", "dtype", "width", "height", "steps", "cfg", "batch", "text_tokens"),
    *("rung", "detail", "lossy", "status", "reason", "clock", "repeats", "measured_steps"),
    *("image_s_p20", "image_s_p50", "image_s_p80", "step_ms_p20", "step_ms_p50", "step_ms_p80", "images_per_minute"),
    *("outside_loop_s", "text_s", "stock_image_s", "stock_step_ms", "speedup_image", "speedup_step"),
    *("first_image_s", "preparation_s", "peak_gib", "resident_gib", "floor_ms", "share_of_floor"),
    *("compared_steps", "max_difference", "mean_difference", "psnr_db", "error_to_stock"),
]


@dataclass
class Timed:
    """One call: seconds per image and of a later step, both of the whole batch, and what is not steps."""

    image: float
    step: float
    outside: float


@dataclass
class Session:
    """What a run holds on to.

    Attributes:
        pipe: the stock pipeline; a rung changes it while it is entered.
        model: its name in the rows.
        plan: the rungs of each case, stock first.
        rows: where results go, one at a time.
        ceilings: of this run.
        repeats: pairs of stock and rung.
        whole: do all steps instead of `STEPS_MEASURED`.
        say: prints progress.
        results: all rows so far; a rung of a case that has one is not measured again.
        limit: seconds of a rung; one that takes longer hangs: its row says so, and the process ends (see shared/watchdog.py).
    """

    pipe: Any
    model: str
    plan: list[tuple[PictureCase, list[Rung]]]
    rows: RowFile
    ceilings: Ceilings
    repeats: int = 3
    whole: bool = False
    say: Callable[[str], None] = print
    results: list[dict[str, str]] = field(default_factory=list)
    limit: float | None = None

    def run(self) -> list[dict[str, str]]:
        """Measure the plan; a rung that fails has its error in its row, and the next one goes on."""
        before = list(self.results)
        total, number = sum(len(rungs) for _, rungs in self.plan), 0
        for index, (case, rungs) in enumerate(self.plan):
            self.say(f"{case}")
            bench, right = CaseBench(self, case), set()
            for rung in rungs:
                number += 1
                if measured_before(before, case, rung):
                    self.say(f"  [{number}/{total}] {rung.name}: measured before")
                    continue
                with watched(self.limit, lambda bench=bench, rung=rung: self._add(bench.hung(rung, self.limit))):
                    row = bench.row(rung)
                self._add(row)
                self.say(f"  [{number}/{total}] {rung.name}: {outcome(row)}")
                if row["status"] == "ok":
                    right.add(rung)
            if index == 0:
                for rung in (STOCK, ENABLED):
                    if rung in right:
                        self.say(bench.stages_told(rung))
        return self.results

    def _add(self, row: dict[str, str]) -> None:
        self.rows.add(row)
        self.results.append(row)


def measured_before(rows: list[dict[str, str]], case: PictureCase, rung: Rung) -> bool:
    wanted = {name: str(value) for name, value in CaseBench.named(case, rung).items()}
    return any(wanted.items() <= row.items() for row in rows)


def shortened(text: str) -> str:
    """On one line, and not longer than a row of the table stands."""
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def outcome(row: dict[str, str]) -> str:
    """A row in a few words."""
    if not row.get("step_ms_p50"):
        return f"{row['status']}: {row['reason']}"
    text = f"{float(row['image_s_p50']):.4g} s an image, {float(row['step_ms_p50']):.4g} ms a step"
    if row["status"] != "ok":
        return f"{text}; {row['status']}: {row['reason']}"
    return text + (f", {float(row['speedup_image']):.3f}x" if row.get("speedup_image") else "")


class CaseBench:
    """Inputs of one case, stock's latents, and the measurement of a rung."""

    def __init__(self, session: Session, case: PictureCase):
        self.session, self.case, self.pipe = session, case, session.pipe
        self.device, self.dtype = self.pipe.device, self.pipe.transformer.dtype
        self.clock, self.machine = Stopwatch(self.device).kind, machine_name(self.device)
        self.arguments: dict | None = None
        self.expected: torch.Tensor | None = None
        self.exact: torch.Tensor | None = None
        self.unjudged: str | None = None

    def row(self, rung: Rung) -> dict[str, str]:
        """The row of `rung`, whatever comes; only an interruption gets through."""
        row = self._begun(rung)
        error = None
        with Sampler(self.device) as sampler:
            try:
                self._prepare()
                self._measure(rung, row)
            except NotMeasured as reason:
                row |= {"status": "not measured", "reason": shortened(str(reason))}
            except Exception as caught:  # out of memory, a peer's fault: that row fails, the others are worth having
                error = shortened(f"{type(caught).__name__}: {caught}")
        if error is not None:  # out here, where the traceback no longer holds the tensors of the call
            row |= {"status": "failed", "reason": error}
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return provenance(self.device) | sampler.summary() | {name: str(value) for name, value in row.items()}

    @staticmethod
    def named(case: PictureCase, rung: Rung) -> dict:
        """The columns that tell the rows of a table apart."""
        return {
            **{"width": case.width, "height": case.height, "steps": case.steps, "cfg": case.cfg},
            **{"batch": case.batch, "text_tokens": case.text, "rung": rung.name},
        }

    def _begun(self, rung: Rung) -> dict:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.session.model, "dtype": dtype, "lossy": rung.lossy, "clock": self.clock} | self.named(
            self.case, rung
        )

    def hung(self, rung: Rung, seconds: float) -> dict[str, str]:
        """The row of a rung that did not end. It asks nothing of the device."""
        row = self._begun(rung) | {"status": "failed", "reason": f"no end within {seconds:g} s"}
        return provenance("cpu") | {"machine": self.machine} | {name: str(value) for name, value in row.items()}

    def _prepare(self) -> None:
        if self.expected is not None:
            return
        self.arguments = call_arguments(self.pipe, self.case)
        self.expected = self._latents()
        if self.dtype != torch.float32:
            try:
                self.exact = exact_latents(self.pipe, self.arguments, self._compared_steps)
            except Exception as error:  # out of memory: the rows are judged more coarsely, and say so
                self.unjudged = shortened(f"{type(error).__name__}: {error}")
                self.session.say(f"  no exact latents to compare with: {self.unjudged}")

    @property
    def _compared_steps(self) -> int:
        return min(COMPARED_STEPS, self.case.steps)

    @torch.no_grad()
    def _latents(self) -> torch.Tensor:
        with clocked(self.pipe, self._compared_steps):
            return self.pipe(**self.arguments, output_type="latent").images

    def _measure(self, rung: Rung, row: dict) -> None:
        case, cuda = self.case, self.device.type == "cuda"
        steps = case.steps if self.session.whole or not rung.steady else min(case.steps, STEPS_MEASURED)
        begin = time.perf_counter()
        with rung.enter(self.pipe, case) as detail:
            row["detail"] = detail
            if cuda:  # what a rung takes off the device on entering is not in its peak
                torch.cuda.reset_peak_memory_stats(self.device)
            first = self._call(steps)
            first_image = time.perf_counter() - begin + first.step * (case.steps - steps)
            if cuda:
                row["peak_gib"] = f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.2f}"
                row["resident_gib"] = f"{torch.cuda.memory_allocated(self.device) / 2**30:.2f}"
            latents = self._latents()
        right = self._compare(rung, latents, row)
        del latents

        ours, stocks = [], []
        for _ in range(self.session.repeats if rung.steady else 1):
            if rung is not STOCK:
                with STOCK.enter(self.pipe, case):
                    stocks.append(self._call(steps if rung.steady else min(case.steps, STEPS_MEASURED)))
            with rung.enter(self.pipe, case):
                if rung is not STOCK:
                    self._call(1)  # tables and caches of this entrance
                    state = getattr(self.pipe, "fast_state", None)
                    if state is not None and state.graph is None:
                        self._call(2)  # a second call captures, behind a step that warms up
                ours.append(self._call(steps))
        text = self._text_seconds(rung)
        self._figures(row, ours, text, steps)
        row["first_image_s"] = f"{first_image:.5g}"
        row["preparation_s"] = f"{max(0.0, first_image - Spread.of([one.image for one in ours]).p50):.5g}"
        if right and rung is not STOCK:
            image, step = ([getattr(one, name) for one in stocks] for name in ("image", "step"))
            row["stock_image_s"] = f"{(Spread.of(image).p50 + text[0]) / case.batch:.5g}"
            row["stock_step_ms"] = f"{Spread.of(step).p50 * 1e3:.5g}"
            whole = [[value + text[n] for value in values] for n, values in enumerate((image, [one.image for one in ours]))]
            row["speedup_image"] = f"{ratio(*whole):.4f}"
            row["speedup_step"] = f"{ratio(step, [one.step for one in ours]):.4f}"

    @torch.no_grad()
    def _call(self, steps: int) -> Timed:
        """A call that does `steps` steps of the case's; for the seconds of an image the rest take what the later ones did."""
        with clocked(self.pipe, steps) as clock, Stopwatch(self.device) as watch:
            self.pipe(**self.arguments, output_type="pt")
        each = clock.steps
        if len(each) != steps:
            raise RuntimeError(f"{len(each)} steps were seen where {steps} were asked for")
        later = Spread.of(each[1:] or each).p50
        return Timed(watch.seconds + later * (self.case.steps - steps), later, watch.seconds - sum(each))

    def stages_told(self, rung: Rung) -> str:
        """`stages`, or why it could not be told: the rows are there and are worth more."""
        try:
            with watched(self.session.limit, lambda: self.session.say(f"{rung.name}: its stages hung")):
                return self.stages(rung)
        except Exception as error:
            return shortened(f"{rung.name}, no stages: {type(error).__name__}: {error}")

    @torch.no_grad()
    def stages(self, rung: Rung) -> str:
        """Where the wall seconds of a picture go, of a call of its own: recording waits for the device after each stage."""
        steps = self.case.steps if self.session.whole else min(self.case.steps, STEPS_MEASURED)
        arguments = dict(self.arguments)
        if self.pipe.text_encoder is not None:
            arguments = {name: value for name, value in arguments.items() if "prompt" not in name}
            arguments |= zip(("prompt", "negative_prompt"), prompts_of(self.pipe, self.case), strict=False)
        with rung.enter(self.pipe, self.case):
            self._call(1)
            with clocked(self.pipe, steps), staged(self.pipe) if rung is STOCK else nullcontext(), record() as recorder:
                self.pipe(**arguments, output_type="pt")
        return f"{rung.name}, stages of a call of {steps} steps:\n{stage_table(recorder, recorder.wall)}"

    @torch.no_grad()
    def _text_seconds(self, rung: Rung) -> tuple[float, float]:
        """Seconds that the prompts of a batch take in stock and in the rung; 0 where the embeddings are random."""
        if self.pipe.text_encoder is None:
            return 0.0, 0.0
        prompts = prompts_of(self.pipe, self.case)
        others = [[f"{text}." for text in texts] for texts in prompts]  # warm up, and leave no cache of these prompts
        seconds = []
        for entered in (nullcontext(), rung.enter(self.pipe, self.case)):
            with entered:
                watch = Stopwatch(self.device)
                for each in (others, prompts):
                    with watch:
                        for texts in each:
                            self.pipe.encode_prompt(prompt=texts, device=self.device)
                seconds.append(watch.seconds)
        return seconds[0], seconds[1]

    def _compare(self, rung: Rung, latents: torch.Tensor, row: dict) -> bool:
        """Write how far the latents lie from stock's; whether they are right."""
        difference = Difference.between(latents, self.expected)
        row |= {
            "compared_steps": self._compared_steps,
            "max_difference": f"{difference.largest:.3g}",
            "mean_difference": f"{difference.mean:.3g}",
            "psnr_db": f"{difference.psnr:.2f}",
        }
        reason = None
        if not latents.isfinite().all():
            reason = "latents are not finite"
        elif rung.lossy:
            if not difference.psnr >= LOSSY_PSNR:
                reason = f"{difference.psnr:.1f} dB from stock, at least {LOSSY_PSNR:g} are asked of a lossy mode"
        elif self.unjudged is not None:
            row["detail"] = f"{row.get('detail', '')} not compared with fp32: {self.unjudged}".strip()
            if not difference.psnr >= UNJUDGED_PSNR:
                reason = f"{difference.psnr:.1f} dB from stock, at least {UNJUDGED_PSNR:g} are asked; {self.unjudged}"
        elif self.exact is None:
            if not difference.largest <= FP32_LIMIT:
                reason = f"latents differ from stock's by {difference.largest:.2g}, more than {FP32_LIMIT:g}, of the largest"
        else:
            ours, theirs = ((one.double() - self.exact.double()).square().mean().sqrt() for one in (latents, self.expected))
            error = (ours / theirs).item() if theirs > 0 else math.inf if ours > 0 else 1.0
            row["error_to_stock"] = f"{error:.3f}"
            if not error <= ERROR_LIMIT:
                reason = f"the error against fp32 is {error:.2f} x stock's, more than {ERROR_LIMIT:g}"
        row |= {"status": "ok" if reason is None else "wrong result", "reason": reason or ""}
        return reason is None

    def _figures(self, row: dict, ours: list[Timed], text: tuple[float, float], steps: int) -> None:
        batch = self.case.batch
        image, step = Spread.of([(one.image + text[1]) / batch for one in ours]), Spread.of([one.step for one in ours])
        for part in ("p20", "p50", "p80"):
            row[f"image_s_{part}"] = f"{getattr(image, part):.5g}"
            row[f"step_ms_{part}"] = f"{getattr(step, part) * 1e3:.5g}"
        floor = self.session.ceilings.floor_seconds(self.case)
        row |= {
            "repeats": len(ours),
            "measured_steps": steps,
            "images_per_minute": f"{60 / image.p50:.4g}",
            "outside_loop_s": f"{Spread.of([one.outside for one in ours]).p50:.5g}",
            "text_s": f"{text[1]:.5g}" if self.pipe.text_encoder is not None else "",
            "floor_ms": f"{floor * 1e3:.5g}",
            "share_of_floor": f"{floor / step.p50:.4f}",
        }
