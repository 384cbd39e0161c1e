"""Encoded prompts, kept: what the text encoder gives for a prompt.

A prompt is known by its token ids, the width it was padded to and the weights' content. The ids stand for text, template,
tokenizer and its limit of length; `max_sequence_length` cuts what is kept here only afterwards.
"""

from pathlib import Path

import torch

from ..common.files import read_checked, write_whole
from ..common.options import writable_folder
from ..common.recent import Recent


class PromptCache(Recent):
    """Prompts `[S_txt, C_txt]` in the text encoder's dtype, without template and padding, by digest and device; also on disk
    where a folder is given.

    Args:
        max_bytes: in memory. 30 tokens of Qwen-Image take 0.4 MB in bf16.
        folder: keep them there too, one file each, named by its digest. Files are never removed.
    Raises:
        ValueError: a folder that cannot be made or written, named as `prompt_cache`.
    """

    def __init__(self, *, max_bytes: int = 2**26, folder: Path | str | None = None):
        super().__init__(max_bytes)
        self.folder = writable_folder("prompt_cache", folder)

    def put(self, key: tuple[str, torch.device], embeds: torch.Tensor) -> None:
        """Keep `embeds`, unless they alone are larger than `max_bytes`; in the folder in any case."""
        super().put(key, embeds)
        if self.folder is not None:
            write_whole({"embeds": embeds}, {}, self._path(key), "prompt cache")

    def _find(self, key: tuple[str, torch.device]) -> torch.Tensor | None:
        found = super()._find(key)
        if found is None and self.folder is not None:
            read = read_checked(self._path(key), ("embeds",))
            if read is not None:
                found = read[0]["embeds"].to(key[1])
                super().put(key, found)
        return found

    def _path(self, key: tuple[str, torch.device]) -> Path:
        return self.folder / f"{key[0]}.safetensors"
