"""Each picture of a batch as it would be alone, for `batch_invariant`.

The bits of a matrix product depend on how many rows it has, since libraries choose their kernels by shape; those of attention
and of a sum likewise. So with that option on, a picture goes by itself, in memory of its own, through everything that would
compute with several pictures: then there is nothing that its neighbours could change. Its prompt and its negative prompt share
a forward, which is the same one whether it is alone or not. What cannot be kept apart is named, see `State.not_invariant`.
"""

from typing import TYPE_CHECKING

import torch

from . import graph
from .step import RESIDUALS, Step

if TYPE_CHECKING:
    from .denoiser import Denoiser


def keeps_apart(denoiser: "Denoiser", step: Step, rows: bool) -> bool:
    """Whether each picture of a step is computed by itself. What `batch_invariant` then cannot hold is noted.

    Args:
        rows: our own forward takes the predictions, see `takes_rows`.
    """
    state = denoiser.state
    if not state.options.batch_invariant:
        return False
    reason = None
    if step.control is not None or step.shared(RESIDUALS) is not None:
        reason = "the ControlNet computes the whole batch at once"
    elif not rows:
        reason = "the transformer is called as in stock, with the whole batch: for hooks, caches, autocast or attention_kwargs"
    elif denoiser.source is None and denoiser.wants_table and step.shared("additional_t_cond") is not None:
        reason = "the conditions of the pictures differ, and there is no one table of modulations for them"
    if reason is not None:
        state.not_invariant(reason)
        return False
    if denoiser.own_step is not None:  # its predictions are kept apart all the same: most schedulers compute by elements
        state.not_invariant(f"the scheduler takes the steps with the whole batch: {denoiser.own_step}")
    return True


class InTurn:
    """The graphs of a batch whose pictures are computed one after the other, in the place of one `StepGraph`.

    Pictures whose texts get the same rows share a graph, whose inputs are put back before each of its turns: four copies on
    the device.

    Args:
        denoiser: of the call, with a pack of each picture.
        step: the first one.
    """

    def __init__(self, denoiser: "Denoiser", step: Step):
        self._graphs: dict[tuple, graph.StepGraph] = {}
        self._turns: list[tuple[graph.StepGraph, list[torch.Tensor]]] = []
        try:
            for n, pack in enumerate(denoiser.packs):
                own, rows = step.of(n), (graph.capacities(pack), pack.shapes)
                if rows in self._graphs:
                    self._graphs[rows].load(denoiser, own, pack)
                else:
                    self._graphs[rows] = graph.take(denoiser, own, pack)
                taken = self._graphs[rows]
                self._turns.append((taken, [buffer.clone() for buffer in taken.inputs()]))
        except BaseException:
            self.release()
            raise

    def run(self, index: int, row: int | None, latents: torch.Tensor) -> torch.Tensor:
        """One step of each picture, see `StepGraph.run`."""
        found = []
        for (taken, inputs), own in zip(self._turns, latents.split(1), strict=True):
            for buffer, values in zip(taken.inputs(), inputs, strict=True):
                buffer.copy_(values)
            found.append(taken.run(index, row, own))
        return torch.cat(found)

    def release(self) -> None:
        """The call is over."""
        for taken in self._graphs.values():
            taken.release()
