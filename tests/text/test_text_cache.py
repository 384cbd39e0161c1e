"""What is kept of prompts, in memory and on disk, what is bounded, and where the text encoder goes after encoding."""

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys
import tempfile
import threading

import diffusers
import pytest
import torch

import qwen_fast
from benchmarks.shared import stock as reference
from benchmarks.shared.stock import draw
from qwen_fast.common import placement
from qwen_fast.text import encoding as text
from qwen_fast.text.cache import PromptCache
from support.pipelines import GUIDED
from support.small_transformer import pretend_elsewhere

CPU = torch.device("cpu")
loaded = functools.cache(reference.stock)


def stock(checkpoint):
    return copy.deepcopy(loaded(checkpoint))


@torch.no_grad()
def encode(pipe, prompt):
    return pipe.encode_prompt(prompt, device=CPU)


def encoded(tokens: int = 3) -> torch.Tensor:
    return torch.randn(tokens, 8)


def test_the_least_recently_used_goes_first():
    size = encoded().nbytes
    cache = PromptCache(max_bytes=2 * size)
    first, second, third = encoded(), encoded(), encoded()
    cache.put(("first", CPU), first)
    cache.put(("second", CPU), second)
    assert cache.get(("first", CPU)) is first and cache.nbytes == 2 * size
    cache.put(("third", CPU), third)
    assert cache.get(("second", CPU)) is None and cache.get(("first", CPU)) is first and cache.get(("third", CPU)) is third
    assert (cache.hits, cache.misses) == (3, 1)
    cache.put(("large", CPU), encoded(100))
    assert cache.get(("large", CPU)) is None and cache.nbytes <= 2 * size
    assert cache.get(("first", torch.device("meta"))) is None


def test_a_copy_starts_empty(tmp_path):
    cache = PromptCache(max_bytes=1000, folder=tmp_path)
    cache.put(("a", CPU), encoded())
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert other.nbytes == 0 and (other.max_bytes, other.folder) == (1000, tmp_path)
        other.put(("b", CPU), encoded())
    assert cache.nbytes == encoded().nbytes


def test_a_copy_of_the_pipeline_has_a_cache_of_its_own(checkpoint):
    theirs, ours = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    encode(ours, "a cat")
    twin = copy.deepcopy(ours)
    twin.text_encoder.model.language_model.norm.weight.data.mul_(2)
    assert torch.equal(encode(ours, "a cat")[0], encode(theirs, "a cat")[0])
    assert not torch.equal(encode(twin, "a cat")[0], encode(theirs, "a cat")[0])
    assert [qwen_fast.report(pipe).prompt_cache["misses"] for pipe in (ours, twin)] == [1, 1]


def test_threads_share_a_cache():
    cache, failures = PromptCache(max_bytes=5 * encoded().nbytes), []

    def work(seed):
        try:
            for n in range(300):
                name = str((n * 7 + seed) % 11)
                if cache.get((name, CPU)) is None:
                    cache.put((name, CPU), encoded())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and cache.hits + cache.misses == 1200 and cache.nbytes <= cache.max_bytes


def test_switched_off(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint), prompt_cache=None)
    for n in (1, 2):
        encode(pipe, "a cat")
        report = qwen_fast.report(pipe)
        assert report.calls["text encoder"] == n and report.prompt_cache == {"hits": 0, "misses": 0, "bytes": 0}
    assert "no prompt cache: prompt_cache=None" in str(report)
    qwen_fast.enable(pipe)
    encode(pipe, "a cat")
    qwen_fast.enable(pipe, strict=True)  # another option leaves the cache as it is
    encode(pipe, "a cat")
    assert qwen_fast.report(pipe).prompt_cache["hits"] == 1


def test_the_cache_stays_within_its_bound(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint))
    pipe.fast_state.texts.cache.max_bytes = 10_000
    expected = draw(pipe, prompt="a cat", **GUIDED)
    for prompt in ("one", "two cats", "three cats"):
        draw(pipe, prompt=prompt, **GUIDED)
        assert 0 < qwen_fast.report(pipe).prompt_cache["bytes"] <= 10_000
    assert torch.equal(draw(pipe, prompt="a cat", **GUIDED), expected)


OTHER_PROCESS = """
import sys, diffusers, torch, qwen_fast
torch.set_num_threads(1)
pipe = diffusers.QwenImagePipeline.from_pretrained(sys.argv[1])
qwen_fast.enable(pipe, prompt_cache=sys.argv[2], strict=True)
with torch.no_grad():
    embeds, _ = pipe.encode_prompt("a cat")
report = qwen_fast.report(pipe)
assert report.prompt_cache["hits"] == 1 and not report.calls, report
torch.save(embeds, sys.argv[3])
"""


def test_another_process_finds_it_on_disk(checkpoint, tmp_path):
    folder = tmp_path / "prompts"
    pipe = qwen_fast.enable(reference.stock(checkpoint), prompt_cache=folder)
    expected, _ = encode(pipe, "a cat")
    (file,) = folder.iterdir()
    assert len(file.stem) == 64 and b"cat" not in file.read_bytes()
    command = [sys.executable, "-c", OTHER_PROCESS, checkpoint, folder, tmp_path / "embeds.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(tmp_path / "embeds.pt"), expected) and list(folder.iterdir()) == [file]


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a flipped bit": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x55" + path.read_bytes()[-8:]),
    "something else": lambda path: path.write_text("no prompt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_replaced(checkpoint, tmp_path, caplog, damage):
    expected, _ = encode(qwen_fast.enable(stock(checkpoint), prompt_cache=tmp_path), "a cat")
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    DAMAGES[damage](file)
    assert file.read_bytes() != whole
    pipe = qwen_fast.enable(stock(checkpoint), prompt_cache=tmp_path)
    assert torch.equal(encode(pipe, "a cat")[0], expected)
    assert qwen_fast.report(pipe).prompt_cache["misses"] == 1 and str(file) in caplog.text and "damaged" in caplog.text
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == whole


def test_a_folder_that_cannot_be_written(checkpoint, tmp_path, caplog, monkeypatch):
    pipe = stock(checkpoint)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="`prompt_cache` is .*file"):
        qwen_fast.enable(pipe, prompt_cache=tmp_path / "file" / "prompts")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"`prompt_cache` is {tmp_path}"):
        patch.setattr(tempfile, "TemporaryFile", lambda dir: (_ for _ in ()).throw(PermissionError("Permission denied")))
        qwen_fast.QwenImagePipeline(**pipe.components, prompt_cache=tmp_path)
    assert type(pipe) is diffusers.QwenImagePipeline
    expected, _ = encode(pipe, "a cat")
    qwen_fast.enable(pipe, prompt_cache=tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert torch.equal(encode(pipe, "a cat")[0], expected)
    assert str(tmp_path / "gone") in caplog.text and qwen_fast.report(pipe).prompt_cache["bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_cache": ""}, "`prompt_cache` is ''; use 'memory', None or a folder"),
        ({"prompt_cache": True}, "`prompt_cache` is True"),
        ({"text_encoder_mode": "cpu"}, "`text_encoder_mode` is 'cpu'; use one of 'keep', 'offload', 'free'"),
        ({"text_encoder_mode": "free", "prompt_cache": None}, "`text_encoder_mode` is 'free' and `prompt_cache` is None"),
    ],
)
def test_unknown_values_of_options(checkpoint, options, message):
    pipe = stock(checkpoint)
    with pytest.raises(ValueError, match=message):
        qwen_fast.enable(pipe, **options)
    assert type(pipe) is diffusers.QwenImagePipeline


def test_a_freed_encoder_leaves_what_is_known(checkpoint, tmp_path, caplog):
    pipe = qwen_fast.enable(stock(checkpoint), text_encoder_mode="free")
    encoder = pipe.text_encoder
    expected = draw(pipe, prompt="a cat", **GUIDED)
    assert pipe.text_encoder is None and qwen_fast.report(pipe).calls["text encoder"] == 2
    assert torch.equal(draw(pipe, prompt="a cat", **GUIDED), expected)
    with pytest.raises(RuntimeError, match="the prompt 'a dog' is not in the prompt cache"):
        draw(pipe, prompt="a dog", **GUIDED)
    with pytest.raises(ValueError, match="set `pipe.text_encoder` again"):
        pipe.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    pipe.text_encoder = encoder
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.QwenImagePipeline.from_pretrained(tmp_path / "saved")
    assert type(again.text_encoder) is text.STOCK
    draw(pipe, prompt="a dog", **GUIDED)
    assert pipe.text_encoder is None
    qwen_fast.disable(pipe)
    assert "dropped the text encoder" in caplog.text and type(pipe) is diffusers.QwenImagePipeline


def test_a_failed_call_frees_nothing(checkpoint, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint), text_encoder_mode="free")
    with monkeypatch.context() as patch:
        patch.setattr(text, "_hidden_states", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode(pipe, "a cat")
    assert pipe.text_encoder is not None
    encode(pipe, "a cat")
    assert pipe.text_encoder is None


def test_an_encoder_whose_prompts_are_not_kept_stays(checkpoint, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint), text_encoder_mode="free")
    with monkeypatch.context() as patch:
        home = sys.modules[text.STOCK.__module__]
        patch.setattr(home, "rotate_half", lambda x: x)
        encode(pipe, "a cat")
        assert pipe.text_encoder is not None and "rotate_half was replaced" in str(qwen_fast.report(pipe))
    encode(pipe, "a cat")
    assert pipe.text_encoder is None


def test_what_an_encoder_s_module_imports_of_python_s_own_is_no_replacement(checkpoint, monkeypatch):
    # transformers 5.17 has `dataclass` there: every prompt was encoded anew
    pipe = qwen_fast.enable(stock(checkpoint))
    monkeypatch.setattr(sys.modules[text.STOCK.__module__], "dataclass", dataclasses.dataclass, raising=False)
    encode(pipe, "a cat")
    assert pipe.fast_state.texts.uncached is None


def pretend_on_device(monkeypatch, encoder) -> list[str]:
    """As if the encoder had come on a GPU; lists where it is told to go."""
    told = []
    monkeypatch.setattr(text, "to_host", lambda module: told.append("host"))
    monkeypatch.setattr(text, "to_device", lambda module, device: told.append(device.type))
    monkeypatch.setattr(
        type(encoder), "device", property(lambda self: torch.device("cpu" if told[-1:] == ["host"] else "cuda"))
    )
    return told


def test_an_encoder_rests_in_host_memory_between_prompts(checkpoint, monkeypatch):
    pipe = stock(checkpoint)
    expected = encode(pipe, "a cat")
    qwen_fast.enable(pipe, text_encoder_mode="offload")
    weights = {name: (id(p), p.data_ptr()) for name, p in pipe.text_encoder.named_parameters()}
    told = pretend_on_device(monkeypatch, pipe.text_encoder)
    assert torch.equal(encode(pipe, "a cat")[0], expected[0]) and told == ["host"]
    assert pipe.device == pipe.transformer.device
    called = pretend_elsewhere(monkeypatch)
    monkeypatch.setattr(
        placement,
        "functional_call",
        lambda module, copies, *rest: called.append((module, copies)) or module(*rest[0], **rest[1]),
    )
    encode(pipe, "a cat")
    assert not called  # known: nothing travels
    encode(pipe, "a dog")
    ((module, copies),) = called
    assert module is pipe.text_encoder.model and copies and not any(name.startswith("visual.") for name in copies)
    assert told == ["host"]
    qwen_fast.enable(pipe, text_encoder_mode="offload", strict=True)
    assert told == ["host"]
    qwen_fast.disable(pipe)
    assert told == ["host", "cpu"]  # where the transformer is
    assert weights == {name: (id(p), p.data_ptr()) for name, p in pipe.text_encoder.named_parameters()}


def test_moving_the_pipeline_leaves_a_resting_encoder_at_rest(checkpoint, monkeypatch):
    pipe = qwen_fast.enable(stock(checkpoint), text_encoder_mode="offload")
    told = pretend_on_device(monkeypatch, pipe.text_encoder)
    encode(pipe, "a cat")
    told.append("cuda")  # as `.to` does
    pipe.to("cpu")
    assert told == ["host", "cuda", "host"]


@pytest.mark.parametrize("placement", ["offload", "free"])
def test_what_others_place_is_left_alone(checkpoint, monkeypatch, placement):
    pipe = qwen_fast.enable(stock(checkpoint), text_encoder_mode=placement)
    told = pretend_on_device(monkeypatch, pipe.text_encoder)
    pipe.text_encoder.register_forward_hook(lambda *_: None)
    encode(pipe, "a cat")
    assert not told and pipe.text_encoder is not None


def test_weights_copied_for_a_call_give_the_same(checkpoint, monkeypatch):
    pipe = stock(checkpoint)
    expected = encode(pipe, ["a cat", "two cats on a chair"])
    qwen_fast.enable(pipe)
    tensors = placement.tensors_of
    monkeypatch.setattr(placement, "is_elsewhere", lambda module, device: True)
    monkeypatch.setattr(placement, "tensors_of", lambda module: {n: t.clone() for n, t in tensors(module).items()})
    assert torch.equal(encode(pipe, ["a cat", "two cats on a chair"])[0], expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["keep", "offload", "free"])
def test_on_a_gpu(checkpoint, placement):
    pipe = stock(checkpoint).to("cuda")
    expected = draw(pipe, prompt="a cat", generator=torch.Generator("cuda").manual_seed(0), **GUIDED)
    qwen_fast.enable(pipe, text_encoder_mode=placement)
    for _ in range(2):
        actual = draw(pipe, prompt="a cat", generator=torch.Generator("cuda").manual_seed(0), **GUIDED)
        assert actual.is_cuda and (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    if placement == "offload":
        assert all(p.is_pinned() for p in pipe.text_encoder.parameters()) and pipe.device.type == "cuda"
        draw(pipe, prompt="a dog", generator=torch.Generator("cuda").manual_seed(0), **GUIDED)
        pipe.to("cuda")
        assert all(p.device.type == "cpu" for p in pipe.text_encoder.parameters())
        qwen_fast.disable(pipe)
        assert all(p.is_cuda for p in pipe.text_encoder.parameters())
    assert (pipe.text_encoder is None) == (placement == "free")


@pytest.mark.gpu
def test_on_a_gpu_the_memory_of_a_resting_encoder_is_free(checkpoint):
    pipe = stock(checkpoint).to("cuda")
    size = sum(p.nbytes for p in pipe.text_encoder.parameters())
    qwen_fast.enable(pipe, text_encoder_mode="offload")
    before = torch.cuda.memory_allocated()
    encode(pipe, "a cat")
    assert torch.cuda.memory_allocated() <= before - size // 2
