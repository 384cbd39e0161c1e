"""A process of its own that answers questions one after the other, each within a time limit, JSON line by JSON line."""

import contextlib
import ctypes
import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

_SIGN = "qwen_fast answer: "  # in front of answers; what libraries print has none


class NoChild(Exception):
    """No child process can be used; says why."""


class Ended(Exception):
    """The child ended, or was ended, with a question unanswered; says how."""


def command(module: str) -> list[str]:
    """How a child is started that calls `serve()` of `module`: this interpreter, with this process's path for modules.

    Raises:
        NoChild: this process is not run by an interpreter that could be started again. A frozen program or one that embeds
            Python would start itself.
    """
    if getattr(sys, "frozen", False) or not Path(sys.executable or "").name.lower().startswith(("python", "pypy")):
        raise NoChild(f"{sys.executable or 'an unknown executable'} is no Python interpreter")
    start = f"import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from {module} import serve; serve()"
    return [sys.executable, "-c", start, json.dumps([path for path in sys.path if isinstance(path, str)])]


class Child:
    """A running child.

    Args:
        arguments: its command.
        seconds: until its first answer, which it gives unasked.
    Attributes:
        about: that answer.
    Raises:
        NoChild: it could not be started, ended, or did not answer in time.
    """

    def __init__(self, arguments: list[str], seconds: float):
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        try:
            self._process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                errors="replace",
                start_new_session=True,  # an interrupt from the keyboard is for this process to deal with
            )
        except OSError as error:
            raise NoChild(f"none could be started ({error})") from error
        self._answers: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            self.about = self._answer(seconds)
        except Ended as error:
            raise NoChild(f"one that was started gave no answer: {error}") from error
        except BaseException:
            self.stop()
            raise

    def ask(self, question: str, seconds: float) -> dict[str, Any]:
        """Its answer to a question of one line.

        Raises:
            Ended: the child is gone.
        """
        with contextlib.suppress(OSError):  # of a child that is gone, which `_answer` explains
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        return self._answer(seconds)

    def stop(self) -> None:
        """End it; one that its driver does not let go is left behind."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            self.stop()
            raise Ended(f"it took more than {seconds:g} s") from None
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
            self.stop()
            raise Ended(self._last_words())
        return answer

    def _listen(self) -> None:
        with self._process.stdout:
            for line in self._process.stdout:
                if line.startswith(_SIGN):
                    self._answers.put(json.loads(line.removeprefix(_SIGN)))
        self._answers.put(None)

    def _last_words(self) -> str:
        """How it ended, and the last that it said."""
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        code = self._process.returncode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"its process ended with {how}" + (f": {said[-1][:300]}" if said else "")


def end_with_parent() -> None:
    """In the child: end when the process that started it does, even in the middle of a kernel (Linux; elsewhere at EOF)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def answer(value: dict[str, Any]) -> None:
    """In the child: give an answer."""
    print(_SIGN + json.dumps(value), flush=True)
