"""A command with a time limit that holds whatever the command does: hang, crash, ignore signals or sit in a driver."""

import contextlib
import ctypes
import functools
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .source import ROOT

KILLED_PATIENCE = 5.0  # seconds for a killed process to be gone; one that a driver holds may never be
_DUMP_PATIENCE = 1.0  # for faulthandler to write where the process was


def _as_child(parent: int) -> None:
    """In the child: it takes SIGINT also where the run-book was started in the background, and dies with the run-book."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file of a model would take longer than the stage
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no stage lives on beside the next run's
        if os.getppid() != parent:  # it died before that was set
            os._exit(1)


def start(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a command in a process group of its own, its output in `log` behind a line with the command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=functools.partial(_as_child, os.getpid()),
        )


def execute(
    command: Sequence[str],
    log: Path,
    seconds: float,
    environment: dict[str, str],
    *,
    grace: float = 5.0,
    every: float = 25.0,
    tick: Callable[[], None] = lambda: None,
) -> tuple[int | None, float]:
    """Run a command with its output in `log`.

    Args:
        seconds: it is asked to stop then.
        grace: seconds between asking and killing.
        every: seconds between two calls of `tick` while it runs.
    Returns:
        (exit code, seconds); the code is None where the time was over.
    """
    begin, process = time.monotonic(), start(command, log, environment)
    try:
        code = _wait(process, begin + seconds, every, tick)
    finally:
        stop(process, grace)
    return code, time.monotonic() - begin


def _wait(process: subprocess.Popen, deadline: float, every: float, tick: Callable[[], None]) -> int | None:
    while True:
        left = deadline - time.monotonic()
        try:
            return process.wait(max(0.0, min(left, every)))
        except subprocess.TimeoutExpired:
            if left <= every:
                return None
            tick()


def stop(process: subprocess.Popen, grace: float) -> bool:
    """End a process and its group: as Ctrl-C does, so that it writes what it has; then with a traceback; then for good.

    It never waits for longer than `grace` and a few seconds. Whether the process is gone.
    """
    for number, patience in ((signal.SIGINT, grace), (signal.SIGABRT, _DUMP_PATIENCE), (signal.SIGKILL, KILLED_PATIENCE)):
        if process.poll() is not None:
            number = signal.SIGKILL  # what it started ends with it
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        if number == signal.SIGKILL:
            break
    return process.poll() is not None
