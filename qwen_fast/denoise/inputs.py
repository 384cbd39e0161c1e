"""What a step was prepared for: as long as the next one brings the same, nothing is prepared anew."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..transformer.adapters import NAMES, SampleAdapters
from ..transformer.layout import RotaryKey
from .step import RESIDUALS, Step

if TYPE_CHECKING:
    from .denoiser import Denoiser

_NAMES = ("guidance", "additional_t_cond")


@dataclass(frozen=True, eq=False)
class Inputs:
    """What prompts, packs, graphs and tables of a step depend on.

    Attributes:
        tensors: compared by identity, and by their versions.
        plain: compared by value.
        survey: of the model, compared by identity.
    """

    tensors: list[torch.Tensor | None]
    versions: list[Any]
    plain: tuple
    survey: Any

    @classmethod
    def of(cls, denoiser: "Denoiser", step: Step) -> "Inputs":
        """Those of a step; behind code of the user's also what it may have written into."""
        tensors = [tensor for prompt in step.prompts for tensor in prompt] + [step.shared(name) for name in _NAMES]
        model, kwargs = denoiser.model, step.shared("attention_kwargs") or {}
        before = denoiser.inputs
        if denoiser.attached and (denoiser.dirty or before is None):
            weights = [*model.txt_in.parameters(), *model.txt_norm.parameters()]
            rotary = (
                RotaryKey(model.pos_embed) if isinstance(getattr(model.pos_embed, "pos_freqs", None), torch.Tensor) else None
            )
        else:
            weights, rotary = ([], None) if before is None else (before.tensors[len(tensors) :], before.plain[0])
        tensors += weights
        hidden, others = step.shared("hidden_states"), frozenset(kwargs) - {"scale", NAMES}
        plain = (rotary, kwargs.get("scale", 1.0), others, step.true_cfg_scale, step.normalize, denoiser.own_step is None)
        plain += (step.shared("img_shapes"), tuple(hidden.shape), tuple(step.latents.shape), hidden.dtype, step.is_shared)
        plain += (step.control is None, step.shared(RESIDUALS) is None, denoiser.row is None)
        plain += (torch.is_autocast_enabled(hidden.device.type), denoiser.call.compiler, SampleAdapters.of(kwargs))
        return cls(tensors, [version_of(one, denoiser.dirty) for one in tensors], plain, denoiser.call.survey)

    def same(self, before: "Inputs") -> bool:
        """Whether nothing has changed since `before`."""
        if self.survey is not before.survey or len(self.tensors) != len(before.tensors) or self.plain != before.plain:
            return False
        if any(one is not other for one, other in zip(self.tensors, before.tensors, strict=True)):
            return False
        # 0: of inference mode, and nothing of the user's has run.
        return all(one == other or one == 0 for one, other in zip(self.versions, before.versions, strict=True))


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor as it was: where nobody counts who writes to it, with its values."""

    tensor: torch.Tensor | None
    version: Any
    values: torch.Tensor | None

    @classmethod
    def of(cls, tensor: torch.Tensor | None) -> "Held":
        counted = tensor is None or not tensor.is_inference()
        return cls(tensor, version_of(tensor), None if counted else tensor.clone())

    def same(self, tensor: torch.Tensor | None, dirty: bool) -> bool:
        """Whether it is this one and unchanged; of a tensor of inference mode the host asks, behind code of the user's."""
        if tensor is not self.tensor or version_of(tensor) != self.version:
            return False
        return self.values is None or not dirty or torch.equal(tensor, self.values)


def version_of(tensor: torch.Tensor | None, dirty: bool = False) -> Any:
    """Another one where a tensor was written to; in inference mode no writes count, and a `dirty` tensor is taken for new."""
    if tensor is None:
        return None
    if tensor.is_inference():
        return object() if dirty else 0
    return tensor._version
