"""Compile many launch configurations at once, in processes of their own, before any of them touches the GPU.

What spills or does not fit is known before it is launched, and Triton finds the rest in its cache on the disk.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from ..compiler.offline import compile_only
from ..compiler.table import SHARED_LIMIT, faults, machine_code
from ..operators.cases import Maker, OperatorCase
from .cases import CASES

_WORKER = "from qwen_fast.cli.benchmarks import benchmarks; benchmarks('tuning.precompile').worker()"


def compile_one(case: OperatorCase, config: dict, log: list, shared_limit: int) -> str | None:
    """Why a configuration is not worth a launch, or None. `log` is that of the `compile_only` around it."""
    log.clear()
    try:
        case.launch(case.arguments(Maker("cuda", fake=True)), config)
        found = [text for one in log for text in faults(machine_code(one) | {"shared_limit": shared_limit})]
    except Exception as error:
        while error.__cause__:  # what went wrong inside a helper function
            error = error.__cause__
        return f"{type(error).__name__}: {' '.join(str(error).split())[-200:]}"
    return ", ".join(found) or None


def worker() -> None:
    """Compile the share that stdin names; a line of JSON each."""
    share = json.load(sys.stdin)
    cases = {str(case): case for case in CASES}
    with compile_only(share["capability"]) as log:
        for name, config in share["items"]:
            print(json.dumps([compile_one(cases[name], config, log, share["shared_limit"])]), flush=True)


def answers(command: list[str], share: dict, environment: dict) -> Iterator[str | None]:
    """The worker's answer to each item; the item that kills the compiler gets that as its answer, and the rest go on."""
    items = share["items"]
    while items:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        with process:
            try:
                process.stdin.write(json.dumps(share | {"items": items}))
                process.stdin.close()
                count = 0
                for line in process.stdout:
                    if line.startswith("["):
                        count += 1
                        yield json.loads(line)[0]
            except BaseException:
                process.kill()
                raise
        if count < len(items):
            yield f"the compiler ended with {process.returncode}"
            count += 1
        items = items[count:]


def precompile(
    wanted: list[tuple[OperatorCase, dict]], capability: int, shared_limit: int | None = None, jobs: int | None = None
) -> list[str | None]:
    """Compile each case with its configuration for a GPU; a reason not to launch it, or None, for each.

    Args:
        shared_limit: bytes of shared memory that one program may have; by default those of the known architecture.
        jobs: processes at once; by default as many as there are cores.
    """
    if not wanted:
        return []
    if shared_limit is None:
        shared_limit = SHARED_LIMIT[max((known for known in SHARED_LIMIT if known <= capability), default=80)]
    jobs = min(jobs or os.cpu_count() or 1, len(wanted))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    shares = [
        {
            "capability": capability,
            "shared_limit": shared_limit,
            "items": [(str(case), config) for case, config in wanted[index::jobs]],
        }
        for index in range(jobs)
    ]
    begin = time.monotonic()
    reasons: list[str | None] = [None] * len(wanted)
    with ThreadPoolExecutor(jobs) as pool:
        command = [sys.executable, "-c", _WORKER]
        for index, found in enumerate(pool.map(lambda share: list(answers(command, share, environment)), shares)):
            reasons[index::jobs] = found
    pruned = sum(reason is not None for reason in reasons)
    print(f"{len(wanted)} configurations compiled in {time.monotonic() - begin:.0f} s, {pruned} of them pruned", flush=True)
    return reasons
