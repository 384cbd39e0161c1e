"""What the compiler makes of every operator for every architecture, without a GPU: benchmarks/results/compile_table.csv.

    python -m benchmarks.compiler.table                           every case, six architectures, this interpreter's Triton
    python -m benchmarks.compiler.table --python /path/to/python  the same with another interpreter's Triton afterwards
    python -m benchmarks.compiler.table --archs 80,90 --ops qk_norm_rope
    python -m benchmarks.compiler.table --changed                 only operators whose sources or cases have changed
    python -m benchmarks.compiler.table --check                   compiles nothing: are the committed rows those of the sources?

One row per Triton version, case, kernel and architecture. A run replaces the rows of its own version, architectures and
operators only. Needs torch and Triton, neither diffusers nor the installed package. `tiles_kept` is what
benchmarks/compiler/warp_specialised.py says of a kernel with warp specialisation: "yes" or "no".
"""

import argparse
import ast
import concurrent.futures
import csv
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..shared.source import RESULTS, ROOT
from .warp_specialised import early_releases, stale_barriers

KERNELS = ROOT / "kernels" / "qwen_fast_kernels"
TABLE = RESULTS / "compile_table.csv"
NOT_OPS = {"proof", "tuning"}
VERSIONS = ("3.6.0", "3.9.0")  # of Triton; every operator has rows of both
# Compute capability -> bytes of shared memory that one program may have.
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
ARCHS = tuple(SHARED_LIMIT)
TESTED_ARCHS = (80, 90)  # by every run of the tests
# On every architecture the first family that its tensor cores speak natively; small tiles fall back to HMMA.
TENSOR_CORES = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCMMA", 120: "HMMA"}
FAMILIES = ("HMMA", "HGMMA", "QMMA", "QGMMA", "UTCMMA")
TENSOR_MEMORY_COLUMNS = 512  # a kernel that wants more compiles to a trap
SYSTEM_SHARED = 1024  # reserved by the system from sm_90 on, counted as static
KEY = ("triton", "op", "case", "kernel", "arch")
TEXTS = ("triton", "op", "case", "kernel", "dtype", "size", "config", "tiles_kept", "source")
FIELDS = (
    *KEY, "dtype", "size", "config", "registers", "warps", "spill_stores", "spill_loads", "stack", "local",
    "static_shared", "dynamic_shared", "shared_limit", "tensor_memory", *FAMILIES, "FFMA", "UTMALDG", "UTMASTG", "LDGSTS",
    "LDG", "LDG.wide", "STG", "STG.wide", "instructions", "tiles_kept", "source",
)  # fmt: skip


# Sources --------------------------------------------------------------------------------------------------------------


def operators() -> list[str]:
    return sorted(path.stem for path in KERNELS.glob("[!_]*.py") if path.stem not in NOT_OPS)


def code(path: Path) -> str:
    """A source without docstrings, lines of comment and blank lines: what is compiled does not depend on them."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            for line in range(body[0].lineno - 1, body[0].end_lineno):
                lines[line] = ""
    return "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))


@functools.cache
def source_hash(op: str) -> str:
    """Of the operator's file and of every private module that it imports, itself or through another."""
    files, names = {}, [op]
    while names:
        name = names.pop()
        if name not in files:
            files[name] = code(KERNELS / f"{name}.py")
            names += re.findall(r"^\s*from \.(_\w+) import", files[name], flags=re.MULTILINE)
    return hashlib.sha256("\0".join(f"{name}\0{files[name]}" for name in sorted(files)).encode()).hexdigest()[:16]


# The table ------------------------------------------------------------------------------------------------------------


def read_table(path: Path = TABLE) -> list[dict]:
    """Rows with their numbers as integers."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{name: text if name in TEXTS else int(text) for name, text in row.items()} for row in rows]


def write_table(rows: Iterable[dict], path: Path = TABLE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", newline="", encoding="utf-8", dir=path.parent, delete=False) as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: [row[name] for name in KEY]))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def merged(old: list[dict], new: list[dict], archs: list[int], ops: list[str]) -> list[dict]:
    """The new rows in place of the old ones of their Triton version, architectures and operators."""
    versions = {row["triton"] for row in new}
    replaced = [row["triton"] in versions and row["arch"] in archs and row["op"] in ops for row in old]
    known = operators()
    return [row for row, gone in zip(old, replaced, strict=True) if not gone and row["op"] in known] + new


def stale(rows: list[dict]) -> list[str]:
    """Operators with a row that another source was compiled to."""
    known = set(operators())
    return sorted({row["op"] for row in rows if row["op"] not in known or row["source"] != source_hash(row["op"])})


def missing(rows: list[dict]) -> list[str]:
    """Cases without a row for some version and architecture, and rows without a case."""
    sys.path.append(str(KERNELS.parent))  # for a checkout that is not installed
    from ..operators.cases import CASES

    there = {(row["op"], row["case"], row["arch"], row["triton"]) for row in rows}
    wanted = {(case.op, case.name, arch, version) for case in CASES for arch in ARCHS for version in VERSIONS}
    return [f"{op}: {case}, sm_{arch}, Triton {version}" for op, case, arch, version in sorted(there ^ wanted, key=str)]


def faults(row: dict) -> list[str]:
    """What a kernel that is shipped must not do."""
    found = []
    if row["stack"] or row["local"] or row["spill_stores"] or row["spill_loads"]:
        found.append(f"spills ({row['stack']} bytes of stack, {row['spill_stores']} stores, {row['spill_loads']} loads)")
    shared = row["dynamic_shared"] + max(0, row["static_shared"] - SYSTEM_SHARED)
    if shared > row["shared_limit"]:
        found.append(f"{shared} bytes of shared memory of {row['shared_limit']}")
    if row["tensor_memory"] > TENSOR_MEMORY_COLUMNS:
        found.append(f"{row['tensor_memory']} columns of tensor memory of {TENSOR_MEMORY_COLUMNS}")
    if row["tiles_kept"] == "no":
        found.append("a tile may be overwritten before the product that reads it")
    if row["instructions"] <= 20:
        found.append(f"an empty kernel ({row['instructions']} instructions)")
    return found


# The process that compiles --------------------------------------------------------------------------------------------


def compile_cases(arch: int, cases: list, *, ir: bool = False) -> Iterator[dict]:
    """One result per case: its rows, or the error; with `ir` also PTX and Triton's IRs of its kernels."""
    import triton

    from ..operators.cases import Maker
    from .offline import compile_only

    inspected: dict[bytes, dict] = {}
    with compile_only(arch) as log:
        for case in cases:
            begin = time.monotonic()
            log.clear()
            result = {"op": case.op, "case": case.name, "arch": arch}
            try:
                arguments = case.arguments(Maker("cuda", fake=True))
                config = case.config(arch, arguments)
                case.launch(arguments, config)
                rows = []
                for index, one in enumerate(log):
                    cubin = one.kernel.asm["cubin"]
                    if cubin not in inspected:
                        inspected[cubin] = machine_code(one)
                    rows.append(
                        result
                        | {"triton": triton.__version__, "kernel": f"{index} {one.name}", "source": source_hash(case.op)}
                        | {"dtype": str(case.dtype).removeprefix("torch."), "size": sizes(arguments)}
                        | {"config": json.dumps(config), "shared_limit": SHARED_LIMIT[arch]}
                        | inspected[cubin]
                    )
                result["rows"] = rows
                if ir:
                    result |= {
                        "ptx": [one.ptx for one in log],
                        "ttir": [one.ttir for one in log],
                        "ttgir": [one.ttgir for one in log],
                    }
            except Exception as error:
                while error.__cause__:  # what went wrong inside a helper function
                    error = error.__cause__
                result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
            yield result | {"seconds": round(time.monotonic() - begin, 2)}


def sizes(arguments: tuple) -> str:
    """The shapes of the matrices among the arguments, each once; what else there is where there are none."""
    shapes = ["x".join(map(str, a.shape)) for a in arguments if getattr(a, "ndim", 0) > 1]
    return " ".join(dict.fromkeys(shapes)) or str(arguments[0])


def machine_code(compiled) -> dict:
    found, metadata = compiled.inspect(), compiled.kernel.metadata
    opcodes, sass = found["opcodes"], found["sass"]
    early = early_releases(compiled.ttgir)
    kept = None if early is None else not early and stale_barriers(compiled.ptx) == 0
    return {
        "registers": found["registers"],
        "warps": metadata.num_warps,
        "spill_stores": opcodes["STL"],
        "spill_loads": opcodes["LDL"],
        "stack": found["stack"],
        "local": found["local"],
        "static_shared": found["shared"],
        "dynamic_shared": metadata.shared,
        "tensor_memory": getattr(metadata, "tmem_size", None) or 0,
        "UTCMMA": sum(count for name, count in opcodes.items() if re.fullmatch(r"UTC\w*MMA", name)),
        **{name: opcodes[name] for name in FAMILIES if name != "UTCMMA"},
        **{name: opcodes[name] for name in ("FFMA", "UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG")},
        **{f"{name}.wide": len(re.findall(rf"\b{name}\.[\w.]*\b(?:128|256)\b", sass)) for name in ("LDG", "STG")},
        "instructions": opcodes.total(),
        "tiles_kept": {None: "", True: "yes", False: "no"}[kept],
    }


def worker(options: argparse.Namespace) -> None:
    from ..operators.cases import CASES

    index, shares = map(int, options.share.split("/"))
    cases = [case for case in CASES if case.op in options.ops and (case.default or not options.default)]
    for result in compile_cases(options.worker, cases[index::shares], ir=options.ir):
        print(json.dumps(result), flush=True)


def in_process(python: str, arch: int, arguments: list[str], seen: Callable[[dict], None]) -> None:
    """Compile for one architecture in a process of its own, which does not interpret; `seen` gets every result."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    environment.setdefault("OMP_NUM_THREADS", "1")
    command = [python, "-m", "benchmarks.compiler.table", "--worker", str(arch), *arguments]
    # Where the compiler fails it writes whole modules there: kept out of the way, shown when the process dies.
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            for line in process.stdout:
                if line.startswith("{"):
                    seen(json.loads(line))
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"the compiler for sm_{arch} ended with {process.returncode}: {errors.read()[-2000:]}")


@functools.cache
def compiled_for_tests(arch: int, folder: Path) -> list[dict]:
    """Results of the default cases; `folder` is a process's temporary one, and all processes of a test run compile once."""
    from filelock import FileLock

    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    answer = folder / f"compiled_sm_{arch}.json"
    with FileLock(f"{answer}.lock"):
        if not answer.exists():
            results = []
            in_process(sys.executable, arch, ["--default", "--ir"], results.append)
            answer.write_text(json.dumps(results), encoding="utf-8")
    return json.loads(answer.read_text(encoding="utf-8"))


# The command ----------------------------------------------------------------------------------------------------------


def run(python: str, archs: list[int], ops: list[str], jobs: int) -> list[str]:
    """Compile, replace the rows, and return what failed."""
    begin, lock, results = time.monotonic(), threading.Lock(), []

    def seen(result: dict) -> None:
        with lock:
            results.append(result)
            rows = result.get("rows", [])
            found = [text for row in rows for text in faults(row)] or [f"{row['registers']} registers" for row in rows]
            text = result.get("error", ", ".join(found))
            elapsed = time.monotonic() - begin
            print(
                f"{elapsed:6.0f} s  sm_{result['arch']:<3} {result['op']}: {result['case']}  {result['seconds']} s  {text}",
                flush=True,
            )

    shares = max(1, jobs // len(archs))
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        # The slowest compilers first.
        parts = [(arch, f"{index}/{shares}") for arch in sorted(archs, reverse=True) for index in range(shares)]
        futures = [
            pool.submit(in_process, python, arch, ["--ops", ",".join(ops), "--share", share], seen) for arch, share in parts
        ]
        failed = [str(future.exception()) for future in futures if future.exception()]
    rows = [row for result in results for row in result.get("rows", [])]
    write_table(merged(read_table(), rows, archs, ops))
    failed += [f"{r['op']}: {r['case']}, sm_{r['arch']}: {r['error']}" for r in results if "error" in r]
    failed += [f"{r['op']}: {r['case']}, sm_{r['arch']}: {text}" for r in rows for text in faults(r)]
    print(f"Triton {', '.join({row['triton'] for row in rows})}: {len(rows)} rows in {time.monotonic() - begin:.0f} s")
    return failed


def names(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return list(map(int, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", type=numbers, default=list(ARCHS), help="compute capabilities, comma-separated")
    parser.add_argument("--ops", type=names, default=operators(), help="operators, comma-separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at once")
    parser.add_argument("--python", action="append", default=[], help="also compile with this interpreter's Triton")
    parser.add_argument("--changed", action="store_true", help="only operators whose sources or cases have changed")
    parser.add_argument("--check", action="store_true", help="compile nothing, compare the sources' hashes")
    for internal in ("--worker", "--share", "--default", "--ir"):
        kind = {"--worker": {"type": int}, "--share": {"default": "0/1"}}.get(internal, {"action": "store_true"})
        parser.add_argument(internal, help=argparse.SUPPRESS, **kind)
    options = parser.parse_args()
    if unknown := set(options.ops) - set(operators()):
        parser.error(f"--ops: {', '.join(sorted(unknown))} is none of {', '.join(operators())}")
    if unknown := set(options.archs) - set(ARCHS):
        parser.error(f"--archs: {unknown} is none of {ARCHS}")
    if options.worker:
        worker(options)
        return 0
    if options.changed:
        rows = read_table()
        options.ops = sorted({*stale(rows), *(text.partition(":")[0] for text in missing(rows))} & set(options.ops))
        if not options.ops:
            options.check = True
    if options.check:
        rows = read_table()
        failed = [f"{op}: other sources than the table's" for op in stale(rows)] + missing(rows)
        failed += [f"{r['op']}: {r['case']}, sm_{r['arch']}, Triton {r['triton']}: {text}" for r in rows for text in faults(r)]
    else:
        failed = [
            text
            for python in [sys.executable, *options.python]
            for text in run(python, options.archs, options.ops, options.jobs)
        ]
    print("\n".join(failed) or "nothing is red")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
