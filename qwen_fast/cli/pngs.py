"""PNGs with their settings in the metadata, encoded and written beside the drawing of the next picture."""

import contextvars
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import PIL.Image

_WAITING = 2  # pictures that wait for the writer, itself included: more would only fill memory


class PngWriter:
    """Writes pictures in a second thread and prints a line for each that is finished, in order.

    The end of its `with` block waits for all of them, also after an error or an interrupt: what is drawn is kept. An
    interrupt while it waits drops those not begun; the one being written is finished.

    Attributes:
        saved (list[Path]): what is written, in order.
    """

    def __init__(self) -> None:
        self.saved: list[Path] = []
        self._pending: deque[tuple[Path, str, Future[Path]]] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="qwen_fast_png")

    def submit(self, image: "PIL.Image.Image", path: Path, text: dict[str, str], note: str, **names: bool) -> None:
        """Write `image` when its turn comes; waits where two wait already.

        Args:
            note: for the printed line.
            names: see `save_png`.
        Raises:
            OSError: a picture given before could not be written; it is named.
        """
        self._collect(_WAITING - 1)
        context = contextvars.copy_context()
        self._pending.append((path, note, self._worker.submit(context.run, _write, image, path, text, names)))

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(self, *_: object) -> None:
        from ..common.stages import stage

        try:
            with stage("png"):
                self._collect(0)
        finally:
            self._worker.shutdown(cancel_futures=True)

    def _collect(self, left: int) -> None:
        """Take what is finished, and wait until only `left` are not."""
        while self._pending and (len(self._pending) > left or self._pending[0][2].done()):
            path, note, future = self._pending.popleft()
            try:
                path = future.result()
            except Exception as error:
                kept = f"{len(self.saved)} before it {'is' if len(self.saved) == 1 else 'are'} saved"
                raise OSError(f"{path} cannot be written: {error}; {kept}.") from error
            self.saved.append(path)
            print(f"saved {path}  {note}", flush=True)


def _write(image: "PIL.Image.Image", path: Path, text: dict[str, str], names: dict[str, bool]) -> Path:
    from ..common.stages import stage

    with stage("png"):
        return save_png(image, path, text, **names)


def is_drawn(path: Path, text: dict[str, str]) -> bool:
    """Whether a PNG is whole and holds `text` in its metadata."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.text.items() >= text.items()
    except (OSError, SyntaxError, AttributeError, ValueError):
        return False


def save_png(image: "PIL.Image.Image", path: Path, text: dict[str, str], *, overwrite: bool, find_free_name: bool) -> Path:
    """Write a PNG with `text` as its metadata, whole or not at all.

    Returns:
        Path: `path`, or name-1, name-2, ... where that exists and `find_free_name`.
    Raises:
        FileExistsError: `path` exists and may neither be replaced nor renamed.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    candidate, attempt = path, 0
    while True:
        try:
            # "x" fails where the file exists, even if it appeared this moment.
            file = open(candidate, "wb" if overwrite else "xb")
            break
        except FileExistsError:
            if not find_free_name:
                raise
            attempt += 1
            candidate = path.with_name(f"{path.stem}-{attempt}{path.suffix}")
    try:
        with file:
            file.write(buffer.getbuffer())
    except BaseException:
        candidate.unlink()
        raise
    return candidate
