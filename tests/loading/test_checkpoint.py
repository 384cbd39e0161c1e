"""check_folder: whole folders pass, and each way to break one is named together with the file and a cure."""

import json
import shutil
import struct
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_fast.common.family import FAMILY
from qwen_fast.loading import check_folder
from qwen_fast.testing import build_checkpoint

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
INDEX = TRANSFORMER + ".index.json"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return build_checkpoint(tmp_path / "sharded", max_shard_size="200KB")


def rewrite(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut(file: Path, length: int) -> None:
    file.write_bytes(file.read_bytes()[:length])


def with_header(file: Path, header: bytes, data: bytes = b"") -> None:
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)


def one_tensor(shape: list[int], end: int) -> bytes:
    return json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


def as_variant(folder: Path) -> None:
    """Rename all weights to the fp16 variant, as save_pretrained(variant="fp16") calls them."""
    for file in [*folder.rglob("*.safetensors"), *folder.rglob("*.safetensors.index.json")]:
        before_shard, *shard = file.name.split("-0000", 1)
        if file.suffix == ".json":
            file.rename(file.with_suffix(".fp16.json"))
        elif shard:
            file.rename(file.with_name(f"{before_shard}.fp16-0000{shard[0]}"))
        else:
            file.rename(file.with_suffix(".fp16.safetensors"))
    for file in folder.rglob("*.index.fp16.json"):
        weight_map = json.loads(file.read_text())["weight_map"]
        renamed = {name: shard.replace("-0000", ".fp16-0000", 1) for name, shard in weight_map.items()}
        rewrite(file, weight_map=renamed)


def test_whole_folders_pass(checkpoint: Path, sharded: Path):
    check_folder(checkpoint)
    check_folder(str(checkpoint), variant="fp16")  # from_pretrained takes the plain weights then
    check_folder(sharded)


@pytest.mark.parametrize("shards", [False, True])
def test_variants(folder: Path, sharded: Path, shards: bool):
    folder = sharded if shards else folder
    as_variant(folder)
    check_folder(folder, variant="fp16")
    # The stock loader agrees about the names.
    diffusers.QwenImagePipeline.from_pretrained(folder, variant="fp16")
    with pytest.raises(FileNotFoundError, match="pass variant='fp16'"):
        check_folder(folder)
    cut(next(folder.glob("transformer/*.safetensors")), 5000)
    with pytest.raises(ValueError, match="truncated"):
        check_folder(folder, variant="fp16")


def test_other_formats_and_parts_left_out_pass(folder: Path):
    (folder / TRANSFORMER).rename((folder / TRANSFORMER).with_suffix(".bin"))
    check_folder(folder)
    rewrite(folder / "model_index.json", vae=[None, None], is_distilled=False)
    shutil.rmtree(folder / "vae")
    check_folder(folder)
    shutil.rmtree(folder / "transformer")
    check_folder(folder, skip={"transformer": "as a keyword of from_pretrained"})


def test_tokenizer_of_transformers_5(folder: Path):
    (folder / "tokenizer" / "vocab.json").unlink()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    check_folder(folder)


def test_the_loader_prefers_what_is_checked(folder: Path, sharded: Path):
    """With a single file and an index there, transformers opens the single file and diffusers the index."""
    for name in (TRANSFORMER, TEXT):
        shutil.copy(folder / name, sharded / name)
    check_folder(sharded)
    for shard in sharded.glob("text_encoder/model-0*.safetensors"):
        shard.unlink()
    cut(sharded / TRANSFORMER, 0)
    check_folder(sharded)
    diffusers.QwenImagePipeline.from_pretrained(sharded)


@pytest.mark.parametrize("name", FAMILY)
def test_the_whole_family_is_known(folder: Path, name: str):
    assert hasattr(diffusers, name)
    rewrite(folder / "model_index.json", _class_name=name)
    check_folder(folder)


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    check_folder("Qwen/Qwen-Image", hub_ids=True)
    for name in ("Qwen/Qwen-Image", "./Qwen-Image", "/models/Qwen-Image", "models/Qwen/Qwen-Image", "Qwen-Image/"):
        with pytest.raises(FileNotFoundError, match=f"{name.strip('./')}.* no such folder"):
            check_folder(name, hub_ids=name != "Qwen/Qwen-Image")


BROKEN = {
    # name: (what is done to the folder, what the message says after the folder's name)
    "no index": (lambda f: (f / "model_index.json").unlink(), "has no model_index.json; give a checkpoint"),
    "empty index": (lambda f: cut(f / "model_index.json", 0), "model_index.json is empty"),
    "invalid index": (lambda f: cut(f / "model_index.json", 30), "model_index.json is not valid JSON .*line 2"),
    "list index": (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json holds no JSON object"),
    "other family": (
        lambda f: rewrite(f / "model_index.json", _class_name="FluxPipeline"),
        "_class_name is 'FluxPipeline', no pipeline of the Qwen-Image family.*QwenImagePipeline",
    ),
    "Qwen-Image-2.1": (
        lambda f: rewrite(f / "model_index.json", _class_name="QwenImage21Pipeline"),
        "_class_name is 'QwenImage21Pipeline', no pipeline of the Qwen-Image family",
    ),
    "no component": (lambda f: shutil.rmtree(f / "vae"), r"vae is missing \(AutoencoderKLQwenImage"),
    "no config": (lambda f: (f / "transformer/config.json").unlink(), "transformer/config.json is missing"),
    "no scheduler config": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "scheduler_config.json is mis"),
    "no vocabulary": (lambda f: (f / "tokenizer/vocab.json").unlink(), "neither tokenizer.json nor vocab.json"),
    "no merges": (lambda f: (f / "tokenizer/merges.txt").unlink(), "tokenizer/merges.txt is missing"),
    "empty merges": (lambda f: cut(f / "tokenizer/merges.txt", 0), "tokenizer/merges.txt is empty"),
    "no processor config": (
        lambda f: [rewrite(f / "model_index.json", processor=["transformers", "Qwen2VLProcessor"]), (f / "processor").mkdir()],
        "processor has no preprocessor_config.json or processor_config.json",
    ),
    "no weights": (lambda f: (f / TRANSFORMER).unlink(), r"transformer has no weights \(\*.safetensors, \*.bin\)"),
    "misnamed weights": (
        lambda f: (f / TRANSFORMER).rename(f / "transformer/model.safetensors"),
        "weights only as model.safetensors; the loader looks for diffusion_pytorch_model.safetensors",
    ),
    "dangling link": (
        lambda f: [(f / TEXT).unlink(), (f / TEXT).symlink_to(f / "gone")],
        f"{TEXT} is a link to a file that is missing",
    ),
    "empty weights": (lambda f: cut(f / TEXT, 0), f"{TEXT} is empty"),
    "cut in the length": (lambda f: cut(f / TEXT, 6), rf"{TEXT} is truncated or no safetensors file \(6 bytes"),
    "cut in the header": (lambda f: cut(f / TEXT, 500), f"{TEXT} is truncated or no safetensors file"),
    "cut in the data": (lambda f: cut(f / TEXT, 282_000), f"{TEXT} is truncated: 282,000 bytes where.*282,832"),
    "longer than its header says": (
        lambda f: (f / TEXT).write_bytes((f / TEXT).read_bytes() + b"x"),
        f"{TEXT} is corrupt: 282,833 bytes",
    ),
    "a web page": (lambda f: (f / TEXT).write_text("<html>" * 100), f"{TEXT} is truncated or no safetensors file"),
    "a Git LFS pointer": (
        lambda f: (f / TEXT).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "is a Git LFS pointer.*git lfs pull",
    ),
    "header no JSON": (lambda f: with_header(f / TEXT, b"{" * 99), f"{TEXT} is corrupt, its header is not valid"),
    "header a list": (lambda f: with_header(f / TEXT, b"[1]"), f"{TEXT} is corrupt, its header is not valid"),
    "header without offsets": (lambda f: with_header(f / TEXT, b'{"x": {}}'), "corrupt, its header is not valid"),
    "shape against offsets": (lambda f: with_header(f / TEXT, one_tensor([3], 8), b"8 bytes!"), rf"{TEXT} is corrupt \("),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folder(folder: Path, name: str):
    damage, message = BROKEN[name]
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        check_folder(folder)
    assert str(folder) in str(caught.value)


def test_not_a_folder(folder: Path):
    with pytest.raises(ValueError, match="is a file; give the folder"):
        check_folder(folder / "model_index.json")
    with pytest.raises(FileNotFoundError, match=f"one component of a checkpoint; give its parent, {folder}$"):
        check_folder(folder / "transformer")


def test_broken_shards(sharded: Path):
    shards = sorted((sharded / "transformer").glob("*-of-*.safetensors"))
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    tensors = load_file(shards[1])
    lost = sorted(tensors)[0]
    save_file({name: value for name, value in tensors.items() if name != lost}, shards[1])
    with pytest.raises(ValueError, match=f"{shards[1].name}: it lacks {lost}, which .*index.json places there"):
        check_folder(sharded)
    cut(shards[1], shards[1].stat().st_size - 1)
    with pytest.raises(ValueError, match=f"{shards[1].name} is truncated"):
        check_folder(sharded)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[1].name} is missing, .*index.json names it"):
        check_folder(sharded)
    for broken in ({}, [], dict.fromkeys(weight_map, 1)):
        rewrite(sharded / INDEX, weight_map=broken)
        with pytest.raises(ValueError, match="index.json: it has no weight_map"):
            check_folder(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="has shards .* but no .*index.json"):
        check_folder(sharded)


def test_only_headers_are_read(folder: Path):
    """A sparse file of 40 GB: reading it would take far longer than the suite may."""
    size = 40 * 2**30
    with_header(folder / TRANSFORMER, one_tensor([size // 4], size))
    with (folder / TRANSFORMER).open("r+b") as file:
        file.truncate(file.seek(0, 2) + size)
    check_folder(folder)


def test_tensors_stay_unread_in_another_dtype(folder: Path):
    """bf16 and fp8 files, as quantised checkpoints hold them, need no support by numpy."""
    save_file({"x": torch.zeros(4, dtype=torch.bfloat16), "y": torch.zeros(4, dtype=torch.float8_e4m3fn)}, folder / TEXT)
    check_folder(folder)
