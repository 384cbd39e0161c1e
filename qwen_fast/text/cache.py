"""Encoded prompts, kept: what the text encoder gives for a prompt, and what the transformer makes of it before its blocks.

A prompt is known by its token ids, the width it was padded to and the weights' content. The ids stand for text, template,
tokenizer and its limit of length; `max_sequence_length` cuts what is kept here only afterwards.
"""

import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ..common.files import read_checked, write_whole
from ..common.options import writable_folder


class Encoded:
    """One prompt.

    Attributes:
        embeds (Tensor): `[S_txt, C_txt]` in the text encoder's dtype, without the template's prefix and without padding.
    """

    def __init__(self, embeds: torch.Tensor):
        self.embeds = embeds

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept of it."""
        return self.embeds.nbytes


class PromptCache:
    """The prompts used last, by digest and device; also on disk where a folder is given. A copy starts empty.

    Args:
        max_bytes: of the prompts kept, the least recently used goes first. 30 tokens of Qwen-Image take 0.4 MB in bf16.
        folder: keep them there too, one file each, named by its digest. Files are never removed.
    Attributes:
        hits, misses: prompts found and not found so far; one read from the folder is a hit.
    Raises:
        ValueError: a folder that cannot be made or written, named as `prompt_cache`.
    """

    def __init__(self, *, max_bytes: int = 2**26, folder: Path | str | None = None):
        self.max_bytes = max_bytes
        self.folder = writable_folder("prompt_cache", folder)
        self.hits = self.misses = 0
        self._prompts: OrderedDict[tuple[str, torch.device], Encoded] = OrderedDict()
        self._lock = threading.Lock()  # two threads may draw with one pipeline

    @property
    def nbytes(self) -> int:
        """Bytes of the prompts in memory."""
        with self._lock:
            return self._nbytes()

    def get(self, digest: str, device: torch.device) -> Encoded | None:
        """What is kept under `digest` on `device`, counted as a hit or a miss."""
        with self._lock:
            prompt = self._prompts.get((digest, device))
            if prompt is not None:
                self._prompts.move_to_end((digest, device))
        if prompt is None and self.folder is not None:
            found = read_checked(self._path(digest), ("embeds",))
            if found is not None:
                prompt = Encoded(found[0]["embeds"].to(device))
                self._keep(digest, device, prompt)
        with self._lock:
            self.hits += prompt is not None
            self.misses += prompt is None
        return prompt

    def put(self, digest: str, device: torch.device, prompt: Encoded) -> None:
        """Keep `prompt`, unless it alone is larger than `max_bytes`; in the folder in any case."""
        self._keep(digest, device, prompt)
        if self.folder is not None:
            write_whole({"embeds": prompt.embeds}, {}, self._path(digest), "prompt cache")

    def _trim(self) -> None:
        """Down to `max_bytes` again."""
        with self._lock:
            while self._prompts and self._nbytes() > self.max_bytes:
                self._prompts.popitem(last=False)

    def leave(self, device: torch.device) -> None:
        """Forget what is in memory on other devices than `device`."""
        with self._lock:
            for key in [key for key in self._prompts if key[1] != device]:
                del self._prompts[key]

    def _keep(self, digest: str, device: torch.device, prompt: Encoded) -> None:
        with self._lock:
            self._prompts[digest, device] = prompt
        self._trim()

    def _nbytes(self) -> int:
        return sum(prompt.nbytes for prompt in self._prompts.values())

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in vars(self).items() if name != "_lock"}
        return kept | {"_prompts": OrderedDict(), "hits": 0, "misses": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())
