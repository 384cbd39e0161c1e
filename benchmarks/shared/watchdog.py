"""What a process does about a kernel that never ends: nothing can be taken back on that device, so it says so and goes.

Whoever started it begins it again, and it goes on behind what hung.
"""

import contextlib
import faulthandler
import os
import threading
from collections.abc import Callable, Iterator

GO_ON = 7  # exit code of a stage that gave up at something that hung, and goes on behind it when it is begun again


@contextlib.contextmanager
def watched(seconds: float | None, give_up: Callable[[], None]) -> Iterator[None]:
    """Give what runs inside `seconds`; then `give_up` writes down what hung, and the process ends with `GO_ON`.

    A wait for the device lets other threads run. None: no limit.
    """
    if seconds is None:
        yield
        return

    def end() -> None:
        try:
            faulthandler.dump_traceback(all_threads=True)
            give_up()
        finally:
            os._exit(GO_ON)  # an orderly exit would wait for the device

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # no thread of ours is left when the process ends
