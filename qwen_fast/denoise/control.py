"""The ControlNet of a call: its residuals of each step, for the prompt alone as in stock, which all predictions get."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..transformer import controlnet
from ..transformer.layout import Layout, build_layout, check_image_shapes
from ..transformer.modulation import FromLayers, FromTable, ModulationSource, TableCache
from ..transformer.survey import Survey, survey
from .inputs import Held
from .packing import are_rows, rows_of
from .step import RESIDUALS, Step

if TYPE_CHECKING:
    from .denoiser import Denoiser


class Control:
    """Adds the ControlNet's residuals to the steps of a call: fused where all of it is stock's own, else from its own forward.

    Args:
        asked: a callback reads the residuals: they are there where their scale is 0 too.
    """

    def __init__(self, asked: bool):
        self._asked, self._tables = asked, TableCache()
        self._net: torch.nn.Module | None = None
        self._found: Survey | None = None
        self._why: str | None = None  # it is called
        self._dirty = True  # code of the user's has run
        self.forget()

    def forget(self) -> None:
        """Prepare anew: the step is not as the one before."""
        self._text: torch.Tensor | None = None
        self._layout: Layout | None = None
        self._table: FromTable | None = None
        self._pictures: dict[int, tuple[Held, torch.Tensor]] = {}

    def look(self, denoiser: "Denoiser") -> None:
        """Read what of the ControlNet is stock's own: before the first step, and after code of the user's has run."""
        whole, self._dirty = denoiser.pipe.controlnet, True
        before, self._net, self._found = (self._net, self._found), None, None
        self._why = controlnet.whole_reason(whole)
        if self._why is None:
            self._net = controlnet.net_of(whole)
            self._found = survey(self._net, before[1] if before[0] is self._net else None)
            self._why = controlnet.stock_reason(self._net, self._found)
        if self._why is not None:
            denoiser.state.fall_back(self._why)
        if before != (self._net, self._found):
            self.forget()

    def added(self, denoiser: "Denoiser", step: Step) -> Step:
        """`step` with the residuals among the arguments of its forwards; None there: nothing is added."""
        hidden, timestep = denoiser.given(step)
        timestep, pictures = timestep / 1000, step.control["controlnet_cond"]
        if denoiser.state.options.precise_sampler:  # some pipelines give them in the latents' dtype
            one = isinstance(pictures, torch.Tensor)
            pictures = pictures.to(hidden.dtype) if one else [picture.to(hidden.dtype) for picture in pictures]
        given = step.control | {"hidden_states": hidden, "controlnet_cond": pictures}
        misfit = None if self._why is not None else _misfit(step, given)
        if misfit is not None:
            denoiser.state.fall_back(misfit)
        if self._why is not None or misfit is not None:
            found = denoiser.pipe.controlnet(**given, timestep=timestep, return_dict=False)
        else:
            found = self._fused(denoiser, step, given, timestep[:1])
            self._dirty = False
        return replace(step, forwards=tuple(forward | {RESIDUALS: found} for forward in step.forwards))

    def _fused(
        self, denoiser: "Denoiser", step: Step, given: dict[str, Any], timestep: torch.Tensor
    ) -> list[torch.Tensor] | None:
        net, hidden = self._net, given["hidden_states"]
        if self._text is None:
            shapes = check_image_shapes(step.shapes, len(hidden))
            embeds, positions = rows_of(*step.prompts[0], len(hidden))
            self._layout = build_layout(net.pos_embed, shapes, positions, hidden.device)
            self._text = net.txt_in(net.txt_norm(embeds))
            if denoiser.row is not None and denoiser.state.options.modulation != "layers":
                self._table = FromTable(net, self._tables, denoiser.timesteps, denoiser.places[1:])
        several = []
        for place, (picture, scale) in enumerate(_pictures(given)):
            if isinstance(scale, float | int) and scale == 0 and not self._asked and denoiser.packs is not None:
                continue  # as beyond control_guidance_start and _end: nothing is left of finite residuals
            control, source = self._embedded(place, picture), self._source(hidden, timestep)
            of_call = self._text, self._layout, source, denoiser.state.options.attention
            several.append(controlnet.residuals(net, self._found, hidden, control, scale, *of_call))
            denoiser.state.calls["controlnet"] += 1
        return controlnet.summed(several)

    def _source(self, hidden: torch.Tensor, timestep: torch.Tensor) -> ModulationSource:
        if self._table is not None:
            self._table.begin(timestep)
            return self._table
        return FromLayers(self._net, self._found.order, timestep, hidden, None)

    def _embedded(self, place: int, picture: torch.Tensor) -> torch.Tensor:
        """Of the latents of a control picture, which are the same at each step."""
        held, rows = self._pictures.get(place, (None, None))
        if held is None or not held.same(picture, self._dirty):
            rows = controlnet.embedded(self._found, picture)
            self._pictures[place] = Held.of(picture), rows
        return rows


def _pictures(given: dict[str, Any]) -> list[tuple[torch.Tensor, float]]:
    """Latents `[B, S_img, C_control]` of the control pictures, each with the scale of its residuals."""
    pictures, scales = given["controlnet_cond"], given["conditioning_scale"]
    return [(pictures, scales)] if isinstance(pictures, torch.Tensor) else list(zip(pictures, scales, strict=False))


def _misfit(step: Step, given: dict[str, Any]) -> str | None:
    """What the ControlNet's own forward has to refuse or make fit, or None."""
    hidden = given["hidden_states"]
    if torch.is_autocast_enabled(hidden.device.type):
        return "autocast around the ControlNet"
    for picture, _ in _pictures(given):
        if picture.shape[:2] != hidden.shape[:2] or picture.dtype != hidden.dtype:
            found, latents = (f"{tuple(one.shape)} {one.dtype}" for one in (picture, hidden))
            return f"a control picture of {found} for latents of {latents}"
    return None if are_rows(step.prompts[:1], step.shapes, hidden) else "prompts that do not fit to the ControlNet's latents"
