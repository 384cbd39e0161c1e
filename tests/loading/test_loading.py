"""Loading onto a device: bit-equal to stock, cast as tensors arrive, modulation weights never sent, bad input named first."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import qwen_fast
from benchmarks.shared.stock import draw
from qwen_fast.common.stages import record
from qwen_fast.loading import check_folder
from qwen_fast.loading import checkpoint as checkpoints
from qwen_fast.loading import weights as loading
from qwen_fast.pipelines import text_to_image
from qwen_fast.testing import build_checkpoint
from support.memory import memory_taken
from support.pipelines import GUIDED

MODELS = ("transformer", "vae", "text_encoder")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIFFUSERS_ARGUMENT = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory) -> Path:
    """As Qwen/Qwen-Image is stored: bf16, in shards."""
    path = tmp_path_factory.mktemp("checkpoint") / "bf16"
    return build_checkpoint(path, dtype=torch.bfloat16, max_shard_size="200KB")


@pytest.fixture(scope="module")
def mixed(in_bf16, tmp_path_factory) -> Path:
    """Norm weights in fp32 beside bf16: they must not be rounded on their way to fp32."""
    path = tmp_path_factory.mktemp("checkpoint") / "mixed"
    build_checkpoint(path, dtype=torch.bfloat16)
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {name: t.float() * (1 + 2**-12) if "norm" in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return path


def tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, also those that no file holds."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def stock(path: Path, dtype: torch.dtype):
    return diffusers.QwenImagePipeline.from_pretrained(path, **{DIFFUSERS_ARGUMENT: dtype})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", ["fp32", "bf16", "mixed"])
def test_every_tensor_is_the_one_that_stock_loads(checkpoint, in_bf16, mixed, stored, dtype):
    path = {"fp32": checkpoint, "bf16": in_bf16, "mixed": mixed}[stored]
    with record() as recorder:
        pipe = qwen_fast.QwenImagePipeline.from_pretrained(path, device="cpu", dtype=dtype)
    assert list(recorder.seconds()) == ["load"]
    expected = stock(path, dtype)
    for name in MODELS:
        ours, theirs = tensors(getattr(pipe, name)), tensors(getattr(expected, name))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            other = theirs[key]
            assert tensor.dtype == other.dtype and tensor.device == other.device, (name, key)
            assert tensor.requires_grad == other.requires_grad and tensor.stride() == other.stride()
            assert torch.equal(tensor, other), (name, key)
        assert not getattr(pipe, name).training
    rotary = [b for name, b in pipe.text_encoder.named_buffers() if name.endswith("inv_freq")]
    assert rotary and all(buffer.dtype == torch.float32 for buffer in rotary)


def test_a_loaded_pipeline_draws_and_saves_as_any_other(in_bf16, tmp_path):
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(in_bf16, device="cpu", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    again = qwen_fast.enable(stock(in_bf16, torch.float32))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe, prompt="a cat", **GUIDED), draw(again, prompt="a cat", **GUIDED))
    pipe.save_pretrained(tmp_path)
    saved = diffusers.QwenImagePipeline.from_pretrained(tmp_path)
    for name in MODELS:
        ours, theirs = getattr(pipe, name).parameters(), getattr(saved, name).parameters()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("modulation", ["host", "layers"])
def test_modulation_weights_that_rest_on_the_host_never_reach_the_device(checkpoint, modulation):
    """On "meta", where a tensor that arrived cannot come back."""
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, device="meta", dtype=torch.bfloat16, modulation=modulation)
    stayed = {name for name, tensor in tensors(pipe.transformer).items() if tensor.device.type == "cpu"}
    modulations = {name for name, _ in pipe.transformer.named_parameters() if ".img_mod." in name or ".txt_mod." in name}
    assert stayed == (modulations if modulation == "host" else set())
    for name in stayed:
        expected = stock(checkpoint, torch.bfloat16).transformer.get_parameter(name)
        assert torch.equal(pipe.transformer.get_parameter(name), expected)
    elsewhere = [*tensors(pipe.vae).values(), *tensors(pipe.text_encoder).values()]
    assert all(tensor.is_meta for tensor in elsewhere)
    headers = check_folder(checkpoint)
    for name, header in headers.items():
        sent = [t for t in dict(getattr(pipe, name).named_parameters()).values() if t.is_meta]
        on_host = modulation == "host" and name == "transformer"
        assert loading.device_bytes(header, torch.bfloat16, on_host) == sum(t.nbytes for t in sent)


@pytest.mark.parametrize("stored", ["fp32", "bf16", "mixed"])
def test_the_libraries_are_asked_for_the_files_own_dtype(checkpoint, in_bf16, mixed, stored, monkeypatch):
    """Only so are the weights views of the mapped files; a cast by the loader is a copy of the model in host memory."""
    path = {"fp32": checkpoint, "bf16": in_bf16, "mixed": mixed}[stored]
    asked = []
    original = diffusers.QwenImagePipeline.from_pretrained.__func__

    def spy(cls, path, **kwargs):
        asked.append(kwargs[DIFFUSERS_ARGUMENT])
        return original(cls, path, **kwargs)

    monkeypatch.setattr(diffusers.QwenImagePipeline, "from_pretrained", classmethod(spy))
    qwen_fast.QwenImagePipeline.from_pretrained(path, device="cpu", dtype=torch.float16)
    own = torch.float32 if stored == "fp32" else torch.bfloat16
    transformer = torch.float32 if stored == "mixed" else own
    assert asked == [{"transformer": transformer, "vae": own, "text_encoder": own, "default": torch.float16}]


def test_tensors_are_cast_one_at_a_time_where_they_arrive(in_bf16):
    """No tensor is converted on the host, and none waits for another."""
    model = stock(in_bf16, torch.bfloat16).transformer
    log = []

    class Log(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default:
                log.append((args[0].device.type, kwargs.get("dtype")))
            return function(*args, **(kwargs or {}))

    with Log():
        loading.place(model, torch.device("meta"), torch.float32)
    assert log == [("cpu", torch.bfloat16), ("meta", torch.float32)] * len(tensors(model))


def test_components_of_the_caller_stay_as_they_are(checkpoint):
    vae = diffusers.AutoencoderKLQwenImage.from_pretrained(checkpoint, subfolder="vae")
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(
        checkpoint, vae=vae, text_encoder=None, tokenizer=None, device="meta", dtype=torch.bfloat16
    )
    assert pipe.vae is vae and pipe.text_encoder is None
    assert {p.dtype for p in vae.parameters()} == {torch.float32} and {p.device.type for p in vae.parameters()} == {"cpu"}


def test_a_variant_and_the_default_dtype(checkpoint, tmp_path):
    stock(checkpoint, torch.float16).save_pretrained(tmp_path, variant="fp16")
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(tmp_path, variant="fp16", device="cpu")
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    expected = stock(checkpoint, torch.float16).transformer.float()
    assert all(torch.equal(a, b) for a, b in zip(pipe.transformer.parameters(), expected.parameters(), strict=True))


def test_a_hub_id_is_downloaded_and_loaded_from_its_folder(in_bf16, monkeypatch):
    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs))
        return str(in_bf16)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(
        "Qwen/Qwen-Image", revision="main", local_files_only=True, device="cpu", dtype=torch.bfloat16
    )
    assert asked == [("Qwen/Qwen-Image", {"revision": "main", "local_files_only": True})]
    assert pipe.transformer.dtype == torch.bfloat16


def test_quantised_weights_are_left_to_the_loader(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bitsandbytes"}}')
    header = {"w": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}}
    codes = {"c": {"dtype": "U8", "shape": [7], "data_offsets": [0, 7]}}
    assert loading._stored_dtype(tmp_path, header) is None
    (tmp_path / "config.json").write_text("{}")
    assert loading._stored_dtype(tmp_path, header | codes) is torch.bfloat16
    assert loading._stored_dtype(tmp_path, codes) is None and loading._stored_dtype(tmp_path, {}) is None
    fp8 = {"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    assert loading._stored_dtype(tmp_path, header | fp8) is None
    assert loading.device_bytes(header | codes, torch.float32, False) == 16 + 7

    model = stock(checkpoint, torch.float32).vae
    model.hf_quantizer = object()
    loading.place(model, torch.device("meta"), torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float32)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dtype": torch.int8}, ValueError, "`dtype` is torch.int8; with `device` it is one of torch.bfloat16"),
        ({"dtype": {"vae": torch.float32}}, ValueError, "`dtype` is .*for all components"),
        ({"dtype": "fp8"}, ValueError, "`dtype` is 'fp8'"),
        ({"device_map": "balanced"}, ValueError, "`device_map` is given beside `device`"),
        ({"quantization_config": object()}, ValueError, "`quantization_config` is given beside `device`"),
        ({"device": "cuda"}, ValueError, "`device` is cuda, but PyTorch .* sees no CUDA GPU"),
        ({"modulation": "tables"}, ValueError, "`modulation` is 'tables'"),
        (
            {"modulations": "host"},
            TypeError,
            "unknown option `modulations`; did you mean `modulation`",
        ),
        ({"device": None, "vae_option": "image"}, TypeError, "unknown option `vae_option`; did you mean"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_read(checkpoint, arguments, error, message, monkeypatch):
    read = []
    monkeypatch.setattr(diffusers.QwenImagePipeline, "from_pretrained", classmethod(lambda *_, **__: read.append(1)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, **{"device": "cpu", **arguments})
    assert not read


@pytest.mark.parametrize("modulation", ["host", "layers"])
def test_too_little_memory_is_said_before_anything_is_read(checkpoint, modulation, monkeypatch):
    read = []
    monkeypatch.setattr(diffusers.QwenImagePipeline, "from_pretrained", classmethod(lambda *_, **__: read.append(1)))
    headers = check_folder(checkpoint)
    on_host = modulation == "host"
    needed = sum(loading.device_bytes(header, torch.bfloat16, on_host) for header in headers.values())
    monkeypatch.setattr(loading, "free_bytes", lambda device, **_: needed - 1)
    arguments = {"device": "cpu", "dtype": torch.bfloat16, "modulation": modulation}
    with pytest.raises(
        RuntimeError, match=r"`device` is cpu, which has .* GiB free; the weights need .*\(.*transformer"
    ) as info:
        qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, **arguments)
    assert "enable_model_cpu_offload" in str(info.value) and not read
    monkeypatch.setattr(loading, "free_bytes", lambda device, **_: needed)
    loading.check_memory(headers, torch.device("cpu"), torch.bfloat16, on_host)


def test_a_damaged_folder_is_refused_before_loading(in_bf16, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(in_bf16, tmp_path / "copy"))
    shard = sorted(copy.glob("transformer/*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{shard.name} is truncated"):
        qwen_fast.QwenImagePipeline.from_pretrained(copy, device="cpu")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        qwen_fast.QwenImagePipeline.from_pretrained(copy, device="cpu")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        qwen_fast.QwenImagePipeline.from_pretrained("./nowhere", device="cpu")


def test_check_folder_gives_the_headers_of_the_weights(in_bf16):
    headers = check_folder(in_bf16, skip={"vae"})
    assert headers.keys() == {"transformer", "text_encoder"}
    expected = {name: list(t.shape) for name, t in stock(in_bf16, torch.bfloat16).transformer.state_dict().items()}
    assert {name: entry["shape"] for name, entry in headers["transformer"].items()} == expected
    assert {entry["dtype"] for entry in headers["transformer"].values()} == {"BF16"}
    assert checkpoints.check_folder("Qwen/Qwen-Image", hub_ids=True) == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_on_a_gpu_every_tensor_is_the_one_that_stock_loads(in_bf16, dtype):
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(in_bf16, device="cuda", dtype=dtype)
    expected = qwen_fast.enable(stock(in_bf16, dtype)).to("cuda")
    for name in MODELS:
        ours, theirs = tensors(getattr(pipe, name)), tensors(getattr(expected, name))
        assert all(ours[key].device == theirs[key].device and torch.equal(ours[key], theirs[key]) for key in ours)
    with memory_taken(but=2**20), pytest.raises(RuntimeError, match="GiB free; the weights need"):
        qwen_fast.QwenImagePipeline.from_pretrained(in_bf16, device="cuda", dtype=dtype)


@pytest.mark.parametrize(("version", "name"), [("0.38.0", "torch_dtype"), ("0.39.2", "torch_dtype"), ("0.42.1", "dtype")])
def test_the_dtype_has_the_name_that_diffusers_knows(checkpoint, version, name, monkeypatch):
    """Before 0.40 `dtype` was passed over, and the weights came in fp32."""
    asked = {}
    monkeypatch.setattr(diffusers, "__version__", version)
    monkeypatch.setattr(text_to_image, "_known_to_diffusers", lambda: {name})
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", classmethod(lambda cls, path, **given: asked.update(given))
    )
    qwen_fast.QwenImagePipeline.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert asked == {name: torch.bfloat16}
