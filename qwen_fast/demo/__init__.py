"""The demo: a world of coloured shapes, a judge of its pictures, and a small trained checkpoint that draws them.

The checkpoint lies in this package, in diffusers' folder layout and bf16: stock diffusers loads it. Its README.md says what
it can draw, how well, and how it was made; `python -m qwen_fast.demo.train --out FOLDER` makes it again.
"""

import hashlib
from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
CHECKSUMS = "SHA256SUMS"
LIGHTNING = "lightning"  # the checkpoint's folder with the LoRA for 4 steps
# Within what the checkpoint draws reliably. The transformer never saw these colours of these shapes on this background.
PROMPTS = (
    "a green circle on a white background",
    "a small blue cross on the left of a white background",
    "an orange triangle on a white background",
)


def checkpoint() -> Path:
    """The demo checkpoint's folder, each of its files compared with its sha256.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not the one that was committed. Both name the file and what brings it back.
    """
    verify(CHECKPOINT)
    return CHECKPOINT


def verify(folder: Path) -> None:
    """Compare the files of `folder` with the sha256 list in it; see `checkpoint` for what is raised."""
    cure = (
        f"restore it with `git checkout -- {folder}` or by installing qwen_fast again, or train another with "
        "`python -m qwen_fast.demo.train --out FOLDER` and name that with --model"
    )
    if not (folder / CHECKSUMS).is_file():
        raise FileNotFoundError(f"the demo checkpoint has no {folder / CHECKSUMS}; {cure}")
    for line in (folder / CHECKSUMS).read_text(encoding="utf-8").splitlines():
        expected, separator, name = line.partition("  ")
        if not separator or len(expected) != 64:
            raise ValueError(f"the demo checkpoint's {folder / CHECKSUMS} is damaged at {line!r}; {cure}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"the demo checkpoint lacks {folder / name}; {cure}")
        found = sha256(folder / name)
        if found != expected:
            raise ValueError(f"the demo checkpoint's {folder / name} is damaged: sha256 {found}, not {expected}; {cure}")


def write_checksums(folder: Path) -> None:
    """List the sha256 of every file below `folder`, in the form of `sha256sum`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / CHECKSUMS).write_bytes("".join(lines).encode())


def sha256(file: Path) -> str:
    """The sha256 of a file, in hex."""
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
