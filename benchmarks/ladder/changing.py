"""Pictures each of another size and another prompt: what is made anew for a shape, in seconds of a picture.

A repeated call finds everything there: layouts, rotary and modulation tables, graphs, compiled kernels, chosen algorithms. Who
draws another size each time pays for them each time. So a way (a rung) draws one picture that does not count, then
pictures of sizes and prompt lengths that it has not seen, and the last of them once more. Stock gets the same, and the latents
are compared with stock's. Without the VAE, and without encoding prompts.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..shared.machine import PROVENANCE, Sampler, machine_name, provenance
from ..shared.measure import Difference, Spread, Stopwatch, clocked, ratio
from ..shared.rows import RowFile
from ..shared.shapes import STEPS_MEASURED, PictureCase
from ..shared.watchdog import watched
from .models import call_arguments
from .rung import NotMeasured, Rung
from .rungs import ENABLED, STEPS
from .session import FP32_LIMIT, UNJUDGED_PSNR, shortened
from .stock import STOCK

FIELDS = [
    *PROVENANCE,
    *Sampler("cpu").summary(),
    *("model", "dtype", "width", "height", "steps", "cfg", "text_tokens", "rung", "lossy", "status", "reason", "clock"),
    *("sizes", "measured_steps", "first_s", "new_s_p20", "new_s_p50", "new_s_p80", "repeated_s", "new_to_repeated"),
    *("stock_new_s", "speedup_new", "speedup_repeated", "max_difference", "psnr_db"),
]
# As enabled with a graph where "auto" takes one, and without: a graph of a new size has to be captured first.
RUNGS = (STOCK, ENABLED, STEPS[-1])
# Width, height and prompt as parts of the case's: about as many tokens each, but no two as many, since the schedule and with it
# the modulation table depend on their number. The first one does not count.
_PARTS = ((1.0, 1.0, 1.0), (9 / 8, 7 / 8, 0.75), (5 / 4, 3 / 4, 0.3), (13 / 16, 19 / 16, 0.5))


def varied(case: PictureCase) -> list[PictureCase]:
    """The case, and others of about as many tokens: no size and no prompt length twice.

    Raises:
        ValueError: it is too small for that.
    """

    def pixels(size: float) -> int:
        return max(16, round(size / 16) * 16)

    cases = [
        replace(case, width=pixels(case.width * w), height=pixels(case.height * h), text=max(1, round(case.text * text)))
        for w, h, text in _PARTS
    ]
    if len({(one.width, one.height) for one in cases}) < len(cases) or len({one.text for one in cases}) < len(cases):
        raise ValueError(f"{case}: too small for {len(cases)} sizes and prompts; 128x128 and 8 tokens are enough.")
    return cases


@dataclass
class Drawn:
    """What a way took: seconds of the first picture, of each new one, and of the last one again; latents of the new ones."""

    first: float
    new: list[float]
    repeated: float
    latents: list[torch.Tensor]


@dataclass
class Changing:
    """Every case by every rung, a row each.

    Attributes:
        pipe, model: the stock pipeline, and its name in the rows.
        cases: each stands for its variations.
        rungs: stock first.
        rows: where results go, one at a time.
        before: rows that are not measured again.
        limit: seconds of a row; one that takes longer hangs (see shared/watchdog.py).
        say: prints progress.
    """

    pipe: Any
    model: str
    cases: list[PictureCase]
    rungs: list[Rung]
    rows: RowFile
    before: list[dict[str, str]]
    limit: float | None = None
    say: Callable[[str], None] = print

    def run(self) -> list[dict[str, str]]:
        """The rows; one that fails has its error, and the next one goes on."""
        results = list(self.before)
        for case in self.cases:
            self.say(f"{case}, a new size and prompt each call")
            missing = [rung for rung in self.rungs if not self._measured_before(case, rung)]
            stock: Drawn | None = None
            # Stock's latents and seconds are of this process, so that it is drawn again wherever something else is.
            for rung in [STOCK, *(rung for rung in missing if rung is not STOCK)] if missing else []:
                hung = self._begun(case, rung) | {"reason": f"no end within {self.limit or 0:g} s"}
                with watched(self.limit, lambda hung=hung: self.rows.add(hung)):
                    row, drawn = self._row(case, rung, stock)
                stock = drawn if rung is STOCK else stock
                if rung in missing:
                    self.rows.add(row)
                    results.append(row)
                    self.say(f"  {rung.name}: {told(row)}")
        return results

    def _measured_before(self, case: PictureCase, rung: Rung) -> bool:
        wanted = {name: str(value) for name, value in self._named(case, rung).items()}
        return any(wanted.items() <= row.items() for row in self.before)

    @staticmethod
    def _named(case: PictureCase, rung: Rung) -> dict:
        return {
            **{"width": case.width, "height": case.height, "steps": case.steps, "cfg": case.cfg},
            **{"text_tokens": case.text, "rung": rung.name},
        }

    def _begun(self, case: PictureCase, rung: Rung) -> dict[str, str]:
        """A row that says nothing yet. It asks nothing of the device."""
        device, dtype = self.pipe.device, str(self.pipe.transformer.dtype).removeprefix("torch.")
        row = provenance("cpu") | {"machine": machine_name(device)} | {"model": self.model, "dtype": dtype}
        row |= self._named(case, rung) | {"lossy": rung.lossy, "clock": Stopwatch(device).kind, "status": "failed"}
        return {name: str(value) for name, value in row.items()}

    def _row(self, case: PictureCase, rung: Rung, stock: Drawn | None) -> tuple[dict[str, str], Drawn | None]:
        row, drawn, device = self._begun(case, rung), None, self.pipe.device
        with Sampler(device) as sampler:
            try:
                drawn = self._drawn(case, rung)
                row |= self._figures(case, drawn) | self._beside(drawn, stock)
            except NotMeasured as reason:
                row |= {"status": "not measured", "reason": shortened(str(reason))}
            except Exception as error:  # out of memory, what a compiler raises: the other rows are worth having
                row["reason"] = shortened(f"{type(error).__name__}: {error}")
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        return row | provenance(device) | sampler.summary(), drawn

    @torch.no_grad()
    def _drawn(self, case: PictureCase, rung: Rung) -> Drawn:
        cases = varied(case)
        arguments = [call_arguments(self.pipe, one) for one in cases]  # before the clocks: embeddings and noise are given
        with rung.enter(self.pipe, case):
            drawn = [self._call(one, given) for one, given in zip(cases, arguments, strict=True)]
            repeated, _ = self._call(cases[-1], arguments[-1])
            state = getattr(self.pipe, "fast_state", None)
            if state is not None and state.graph is None:  # that call captured; the next one replays
                repeated, _ = self._call(cases[-1], arguments[-1])
        (first, _), *new = drawn
        return Drawn(first, [seconds for seconds, _ in new], repeated, [latents for _, latents in new])

    def _call(self, case: PictureCase, arguments: dict) -> tuple[float, torch.Tensor]:
        """Seconds of all steps, of which the later ones take what those did that were done; and the latents after these."""
        steps = min(case.steps, STEPS_MEASURED)
        with clocked(self.pipe, steps) as clock, Stopwatch(self.pipe.device) as watch:
            latents = self.pipe(**arguments, output_type="latent").images
        each = clock.steps
        if len(each) != steps:
            raise RuntimeError(f"{len(each)} steps were seen where {steps} were asked for")
        return watch.seconds + Spread.of(each[1:] or each).p50 * (case.steps - steps), latents.clone()

    def _figures(self, case: PictureCase, drawn: Drawn) -> dict[str, str]:
        new = Spread.of(drawn.new)
        found = {part: f"{getattr(new, part.removeprefix('new_s_')):.5g}" for part in ("new_s_p20", "new_s_p50", "new_s_p80")}
        found |= {"first_s": f"{drawn.first:.5g}", "repeated_s": f"{drawn.repeated:.5g}"}
        # Of the size that was drawn twice: another size takes another time.
        found |= {"new_to_repeated": f"{drawn.new[-1] / drawn.repeated:.4f}", "status": "ok"}
        found["sizes"] = " ".join(f"{one.width}x{one.height}:{one.text}" for one in varied(case)[1:])
        return found | {"measured_steps": str(min(case.steps, STEPS_MEASURED))}

    def _beside(self, drawn: Drawn, stock: Drawn | None) -> dict[str, str]:
        """How far the latents lie from stock's and, where they are right, how many times as fast they came."""
        if stock is None:
            return {}
        differences = [Difference.between(*pair) for pair in zip(drawn.latents, stock.latents, strict=True)]
        largest, psnr = max(one.largest for one in differences), min(one.psnr for one in differences)
        found = {"max_difference": f"{largest:.3g}", "psnr_db": f"{psnr:.2f}"}
        exact = self.pipe.transformer.dtype == torch.float32
        if not all(latents.isfinite().all() for latents in drawn.latents):
            return found | {"status": "wrong result", "reason": "latents are not finite"}
        if not (largest <= FP32_LIMIT if exact else psnr >= UNJUDGED_PSNR):
            return found | {"status": "wrong result", "reason": f"{psnr:.1f} dB, at most {largest:.2g}, from stock"}
        found |= {"stock_new_s": f"{Spread.of(stock.new).p50:.5g}", "speedup_new": f"{ratio(stock.new, drawn.new):.4f}"}
        return found | {"speedup_repeated": f"{stock.repeated / drawn.repeated:.4f}"}


def told(row: dict[str, str]) -> str:
    """A row in a few words."""
    if not row.get("new_s_p50"):
        return f"{row['status']}: {row['reason']}"
    text = f"{row['new_s_p50']} s a picture, {float(row['new_to_repeated']):.3f} x the same size again"
    if row.get("speedup_new"):
        text += f", {float(row['speedup_new']):.3f}x stock (again: {float(row['speedup_repeated']):.3f}x)"
    return text if row["status"] == "ok" else f"{text}; {row['status']}: {row['reason']}"
