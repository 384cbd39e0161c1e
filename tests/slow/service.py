"""examples/service as a person starts it: a process of its own on a free port, with the demo checkpoint."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Service:
    """The process and its address; `start` waits until it answers."""

    def __init__(self, log: Path):
        self.log, self.port = log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        # Without Triton's interpreter, which the tests around us have asked for.
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, "examples/service/app.py", "--port", str(self.port)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.1)
        self.kill()
        raise AssertionError(f"the service did not start:\n{self.log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def count(self, outcome: str) -> int:
        """How many requests came to this end, by its metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next((int(line.split()[-1]) for line in lines if f'outcome="{outcome}"' in line), 0)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Service]:
    service = Service(folder / "service.log")
    service.start()
    try:
        yield service
    finally:
        service.kill()
