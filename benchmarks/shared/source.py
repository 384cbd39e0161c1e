"""Which sources a figure was measured with: the commit and a hash of the files, also where they arrive without their history.

Imports nothing but the standard library.
"""

import functools
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parents[1] / "results"  # of the benchmarks, whatever they are installed as
CARRIED = ROOT / "wheels"  # what goes with the sources to a machine without their history
_FOLDERS = ("kernels", "qwen_fast", "benchmarks", "tests")
_STAMP = "commit.txt"


def git(*arguments: str, root: Path = ROOT) -> str:
    """Output of a git command in this repository, empty where there is none: an installation may lie in another's."""
    if not (root / "kernels" / "qwen_fast_kernels").is_dir():
        return ""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def sources_hash(root: Path = ROOT) -> str:
    """Of every Python file of the kernels, the driver, the benchmarks and the tests; their names count too."""
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def stamp(folder: Path = CARRIED, root: Path = ROOT) -> str:
    """Write into `folder` which commit the sources are of, and their hash, by which a stamp that went stale is known.

    Returns:
        str: what was written: commit, "clean" or "dirty", hash.
    Raises:
        ValueError: there is no history here.
    """
    commit = git("rev-parse", "--short", "HEAD", root=root)
    if not commit:
        raise ValueError(f"{root}: no git history there; a stamp is made where the sources have theirs.")
    text = f"{commit} {'dirty' if git('status', '--porcelain', root=root) else 'clean'} {sources_hash(root)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _STAMP).write_text(text + "\n")
    return text


def commit_of(root: Path = ROOT, carried: Path = CARRIED) -> tuple[str, str]:
    """(commit, whether the sources differ from it: "True", "False" or "unknown"); ("", "unknown") where nothing tells.

    A stamp of just these sources before git's word: where they were carried to, git may know of an older state only.
    """
    path = carried / _STAMP
    words = path.read_text().split() if path.exists() else []
    if len(words) == 3 and words[1:] == ["clean", sources_hash(root)]:
        return words[0], "False"
    if commit := git("rev-parse", "--short", "HEAD", root=root):
        return commit, str(bool(git("status", "--porcelain", root=root)))
    return (words[0], "True") if len(words) == 3 else ("", "unknown")


@functools.cache
def source_key(root: Path = ROOT, carried: Path = CARRIED) -> tuple[str, str]:
    """("commit hash" of the sources as rows carry it, whether they differ from the commit); read once a process."""
    commit, dirty = commit_of(root, carried)
    return f"{commit or 'no commit'} {sources_hash(root)}", dirty
