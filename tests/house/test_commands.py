"""Every command that is documented, and every module that is one, answers --help, wherever it is started, without the tests."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
SOURCES = sorted(path for folder in ("benchmarks", "qwen_fast", "kernels") for path in (ROOT / folder).rglob("*.py"))
CHILDREN = {"qwen_fast_kernels.proof"}  # a process that only ours start, with problems on its stdin
# Torch and diffusers are imported once; each command is a fork of its own behind that.
FORKS = """
import io, json, os, runpy, sys
import torch, triton
from diffusers import QwenImagePipeline

def answer(words):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        code, sys.argv = 1, [*words, "--help"]
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text

for words in json.loads(sys.argv[1]):
    print(json.dumps([words, *answer(words)]), flush=True)
"""


def documented() -> str:
    """All pages, and the docstrings of all modules."""
    docstrings = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "" for path in SOURCES)
    return "\n".join([*(path.read_text(encoding="utf-8") for path in TEXTS), *docstrings])


def modules_with_a_main() -> set[str]:
    found = set()
    for path in SOURCES:
        if path.name == "__main__.py" or '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            parts = path.relative_to(ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT).with_suffix("").parts
            found.add(".".join(parts).removesuffix(".__main__"))
    return found


@pytest.mark.slow
def test_every_command_answers_help(tmp_path):
    text = documented()
    modules = set(re.findall(r"python3? -m ((?:qwen_fast|benchmarks)[\w.]*\w)", text)) | modules_with_a_main()
    commands = set(re.findall(r"qwen-fast (\w+)", text))
    assert {"benchmarks.quality", "benchmarks.runbook", "qwen_fast.demo"} <= modules and {"bench", "generate"} <= commands
    words = [[module] for module in sorted(modules - CHILDREN)] + [["qwen_fast.cli", command] for command in sorted(commands)]
    # Two processes, for two cores; from a folder of nobody's, with the packages on the path and not the tests.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", FORKS, json.dumps(words[part::2])],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(2)
    ]
    answers = [json.loads(line) for process in started for line in process.communicate()[0].splitlines()]
    assert len(answers) == len(words)
    for command, code, said in answers:
        assert code == 0 and "usage:" in said, f"{' '.join(command)}: {said}"
    assert not list(tmp_path.iterdir()), "asking for help left something behind"


def test_the_run_book_starts_where_nothing_is_installed():
    """-S: without site-packages. Its first stage tells what is missing."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for module in ("benchmarks.runbook", "benchmarks.runbook.smoke"):
        command = [sys.executable, "-S", "-m", module, "--help"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


@pytest.mark.parametrize("path", [*TEXTS, *SOURCES], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_are_named_are_there(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])(?:benchmarks|docs|examples|kernels|qwen_fast|tests)/[\w/]+\.(?:py|md|png)\b", text))
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
