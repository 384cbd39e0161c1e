"""Pictures of every mode from the same noise and the same held-out prompts, kept block by block so that a cut run goes on."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import qwen_fast
import qwen_fast_kernels
from qwen_fast.demo.accuracy import held_out_requests
from qwen_fast.demo.scenes import Request
from qwen_fast.loading import check_folder
from qwen_fast.pipelines.decoding import decoded_latents
from qwen_fast.pipelines.opening import library_output, load_pipeline

from .modes import Mode, Setting

BLOCK = 64  # seeds of a block: what an interruption can cost
CALL = {"negative_prompt": " ", "true_cfg_scale": 4.0}
MANIFEST = "run.json"


@dataclass(frozen=True)
class SeededRequest:
    """A seed of noise and what its picture should show."""

    seed: int
    request: Request


@dataclass(frozen=True)
class Pictures:
    """What a mode drew.

    Attributes:
        pictures (array): `[N, H, W, 3]` uint8.
        latents (array): `[N, S_img, C]` fp32, as they go into the VAE.
    """

    pictures: np.ndarray
    latents: np.ndarray


def cases(count: int) -> list[SeededRequest]:
    """Seeds 0 to count - 1, each with a request held out of training; a larger count begins with the same ones."""
    return [SeededRequest(seed, request) for seed, request in enumerate(held_out_requests(count))]


class Model:
    """A checkpoint as stock pipelines, one per dtype, loaded when first asked for.

    Args:
        folder: a Qwen-Image checkpoint.
        device: where it draws.
    Attributes:
        sha256 (str): of all its weight files, names and contents, in hex.
    Raises:
        FileNotFoundError, ValueError: not a complete checkpoint, by name of what is missing.
    """

    def __init__(self, folder: str | Path, device: torch.device):
        check_folder(str(folder))
        self.folder, self.device = Path(folder), device
        self.sha256 = digest(self.folder, "*.safetensors")
        self._pipes: dict[torch.dtype, diffusers.QwenImagePipeline] = {}

    def pipe(self, dtype: torch.dtype) -> diffusers.QwenImagePipeline:
        """The stock pipeline in `dtype`."""
        if dtype not in self._pipes:
            with library_output(False):
                pipe = load_pipeline(str(self.folder), self.device, dtype, stock=True)
            pipe.set_progress_bar_config(disable=True)
            self._pipes[dtype] = pipe
        return self._pipes[dtype]


def digest(folder: Path, pattern: str) -> str:
    """SHA-256 in hex of the names and contents of the files below `folder` that match."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob(pattern)):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


class Store:
    """A folder of finished blocks, each written whole or not at all, of one checkpoint, one code and one machine.

    Args:
        folder: made where it is not there.
        identity (dict): what its pictures depend on beside mode, setting and seed; see `identity`.
    Raises:
        FileExistsError: a folder with other contents.
        ValueError: it holds pictures of another identity; what differs is named.
    """

    def __init__(self, folder: Path, identity: dict[str, str]):
        self.folder = folder
        manifest = folder / MANIFEST
        if not manifest.exists():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise FileExistsError(f"--out {folder} has other contents; name a new folder")
            folder.mkdir(parents=True, exist_ok=True)
            _write(manifest, lambda path: path.write_text(json.dumps(identity, indent=1), encoding="utf-8"))
            return
        try:
            held = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{manifest} is damaged ({error}); name another --out, or delete the folder") from None
        different = [name for name in {**identity, **held} if identity.get(name) != held.get(name)]
        if different:
            was = "; ".join(f"{name} {held.get(name)} there, {identity.get(name)} now" for name in different)
            raise ValueError(f"--out {folder} holds pictures of another run: {was}. Name another folder, or delete it")

    def block(self, mode: str, setting: Setting, first: int) -> Path:
        """The file of the block that begins with seed `first`."""
        return self.folder / setting.name / mode / f"{first:05d}.safetensors"

    def load(self, path: Path, seeds: list[int]) -> Pictures | None:
        """A block that holds just these seeds, or None."""
        if not path.exists():
            return None
        try:
            held = load_file(path)
        except (SafetensorError, OSError) as error:
            print(f"{path} is damaged ({error}); it is drawn again")
            return None
        return Pictures(held["pictures"], held["latents"]) if held["seeds"].tolist() == seeds else None

    def save(self, path: Path, seeds: list[int], block: Pictures) -> None:
        """Keep a block."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"seeds": np.array(seeds), "pictures": block.pictures, "latents": block.latents}
        _write(path, lambda aside: save_file(tensors, aside))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_suffix(".part")
    write(aside)
    os.replace(aside, path)


def identity(model: Model, batch: int) -> dict[str, str]:
    """What pictures depend on: the checkpoint, the code that draws, the versions and the machine's kind, the batch."""
    packages = (Path(module.__file__).parent for module in (qwen_fast, qwen_fast_kernels))
    code = "".join(digest(package, "*.py") for package in packages)
    code += "".join(digest(Path(__file__).parent, f"{name}.py") for name in ("modes", "pictures"))
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers"))
    kind = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"
    return {
        "checkpoint": model.sha256,
        "code": hashlib.sha256(code.encode()).hexdigest(),
        "versions": ", ".join(versions),
        "device": kind,
        "batch": str(batch),
    }


def draw(
    model: Model, name: str, mode: Mode, setting: Setting, todo: list[SeededRequest], batch: int, store: Store
) -> Pictures:
    """All pictures of a mode, from `store` where they are, else drawn and kept; progress goes to stdout.

    Args:
        batch: most pictures in a call, unless the mode says.
    """
    blocks = [todo[first : first + BLOCK] for first in range(0, len(todo), BLOCK)]
    done, begin, drawn, kept = [], time.perf_counter(), 0, 0
    for block in blocks:
        seeds, path = [case.seed for case in block], store.block(name, setting, block[0].seed)
        found = store.load(path, seeds)
        if found is None:
            pipe = model.pipe(mode.dtype)
            with mode.prepare(pipe, setting):
                found = _draw_block(pipe, mode, setting, block, mode.batch or batch)
            store.save(path, seeds, found)
            drawn += len(block)
        else:
            kept += len(block)
        done.append(found)
        pace = (time.perf_counter() - begin) / max(drawn, 1)
        left = len(todo) - drawn - kept
        speed = f"{pace:.2f} s each, {left * pace:.0f} s left" if drawn else "kept from before"
        print(f"{setting.name} {name}: {drawn + kept}/{len(todo)} pictures, {speed}", flush=True)
    return Pictures(*(np.concatenate([getattr(block, part) for block in done]) for part in ("pictures", "latents")))


def _draw_block(pipe: Any, mode: Mode, setting: Setting, block: list[SeededRequest], batch: int) -> Pictures:
    """Prompts of the same number of tokens go together: stock pads others, and padding is no business of a mode."""

    def tokens(index: int) -> int:
        return len(pipe.tokenizer(block[index].request.prompt).input_ids)

    pictures, latents = [None] * len(block), [None] * len(block)
    for _, group in groupby(sorted(range(len(block)), key=tokens), key=tokens):
        group = list(group)
        for first in range(0, len(group), batch):
            some = group[first : first + batch]
            for index, picture, latent in zip(some, *_call(pipe, mode, setting, [block[i] for i in some]), strict=True):
                pictures[index], latents[index] = picture, latent
    return Pictures(np.stack(pictures), np.stack(latents))


def _call(pipe: Any, mode: Mode, setting: Setting, some: list[SeededRequest]) -> tuple[list[np.ndarray], np.ndarray]:
    noise = torch.cat([initial_noise(pipe, setting, case.seed) for case in some])
    arguments = {**CALL, "num_inference_steps": setting.steps, **mode.call}
    if arguments["negative_prompt"] is not None:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(some)
    latents = pipe(
        [case.request.prompt for case in some],
        height=setting.height,
        width=setting.width,
        latents=noise,
        **arguments | {"output_type": "latent"},
    ).images
    return [np.asarray(image) for image in decoded(pipe, latents, setting)], latents.float().cpu().numpy()


def initial_noise(pipe: Any, setting: Setting, seed: int) -> torch.Tensor:
    """`[1, S_img, C]` on the CPU: what a call with this seed starts from in fp32; other dtypes round it."""
    channels = pipe.transformer.config.in_channels // 4
    generator = torch.Generator().manual_seed(seed)
    return pipe.prepare_latents(1, channels, setting.height, setting.width, torch.float32, torch.device("cpu"), generator)


@torch.no_grad()
def decoded(pipe: Any, latents: torch.Tensor, setting: Setting) -> list:
    """The pictures of packed latents `[B, S_img, C]`, as a call of `pipe`, ours or diffusers', would decode them."""
    images = pipe._images() if qwen_fast.report(pipe).enabled else contextlib.nullcontext()
    with images:
        return decoded_latents(pipe, latents, setting.height, setting.width, "pil")
