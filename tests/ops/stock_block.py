"""Stock diffusers' transformer block as an oracle: its own code around recorded attention."""

from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock


class _Answers(torch.nn.Module):
    """A layer of stock's block that keeps what it was asked and gives the answer it was made with."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, *asked, **named):
        self.asked = asked or (named["hidden_states"], named["encoder_hidden_states"])
        return self.answer


@dataclass
class StockBlock:
    """What stock's own transformer block makes of `txt_rows` text and then the image tokens of 2 samples, all joint.

    The MLPs answer zero, so the block gives the residual stream after attention, clipped as stock clips it.
    """

    hidden: torch.Tensor
    attended: torch.Tensor
    table: torch.Tensor
    index: torch.Tensor | None = None

    SAMPLES, S_TXT, S_IMG = 2, 5, 8

    @classmethod
    def random(cls, dtype: torch.dtype, device: torch.device, zero_cond_t: bool, magnitude: float = 1.0) -> "StockBlock":
        generator = torch.Generator().manual_seed(0)
        rows, channels = cls.SAMPLES * (cls.S_TXT + cls.S_IMG), 64
        hidden, attended = (torch.randn(rows, channels, generator=generator) * magnitude for _ in range(2))
        table = torch.randn(2 * cls.SAMPLES if zero_cond_t else cls.SAMPLES, 2, 6, channels, generator=generator)
        index = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 0]]) if zero_cond_t else None
        made = (value.to(device, dtype) for value in (hidden, attended, table))
        return cls(*made, None if index is None else index.to(device))

    @property
    def txt_rows(self) -> int:
        return self.SAMPLES * self.S_TXT

    def arguments(self) -> dict:
        samples = torch.arange(self.SAMPLES)
        image = samples.repeat_interleave(self.S_IMG).to(self.hidden.device)
        if self.index is not None:
            image += self.SAMPLES * self.index.flatten()  # stock keeps the rows of timestep 0 behind those of the step
        text = samples.repeat_interleave(self.S_TXT).to(self.hidden.device)
        token_rows = torch.cat([text, image]).to(torch.int32)
        step_index = torch.zeros(1, dtype=torch.int32, device=self.hidden.device)
        return {"step_index": step_index, "txt_rows": self.txt_rows, "token_rows": token_rows}

    def modulation(self, *places: int) -> tuple[torch.Tensor, ...]:
        """Tables by their place in stock's shift1, scale1, gate1, shift2, scale2, gate2."""
        return tuple(self.table[:, :, place] for place in places)

    def double(self) -> "StockBlock":
        return StockBlock(self.hidden.double(), self.attended.double(), self.table.double(), self.index)

    def run(self) -> dict[str, torch.Tensor]:
        channels = self.hidden.shape[1]
        block = QwenImageTransformerBlock(channels, 1, channels, zero_cond_t=self.index is not None)
        (txt, img), (txt_attended, img_attended) = self._streams(self.hidden), self._streams(self.attended)
        block.img_mod, block.txt_mod = _Answers(self.table[:, 0].flatten(1)), _Answers(self.table[: self.SAMPLES, 1].flatten(1))
        block.attn = _Answers((img_attended, txt_attended))
        block.img_mlp, block.txt_mlp = _Answers(torch.zeros_like(img)), _Answers(torch.zeros_like(txt))
        temb = torch.zeros(len(self.table), channels)
        txt_out, img_out = block(img, txt, None, temb, modulate_index=self.index)
        return {
            "normed1": self._joint(*reversed(block.attn.asked)),
            "y": self._joint(txt_out, img_out),
            "normed2": self._joint(*block.txt_mlp.asked, *block.img_mlp.asked),
        }

    def _streams(self, joint: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return joint[: self.txt_rows].unflatten(0, (self.SAMPLES, -1)), joint[self.txt_rows :].unflatten(0, (self.SAMPLES, -1))

    @staticmethod
    def _joint(txt: torch.Tensor, img: torch.Tensor) -> torch.Tensor:
        return torch.cat([txt.flatten(0, 1), img.flatten(0, 1)])
