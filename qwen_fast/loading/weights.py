"""A checkpoint's weights from its mapped files straight to a device, one tensor at a time.

diffusers and transformers map safetensors files and hand out views of them, as long as the dtype is the file's; asked for
another, they first build the whole model in it in host memory. So here they load in the file's own dtype, and each tensor
is cast where it arrives. Modulation weights that rest in host memory never leave it.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from packaging.version import Version
from torch import nn

from ..common.hardware import check_device, free_bytes
from ..common.stages import stage
from .checkpoint import Headers, check_folder

# Loader arguments that say where weights go or what they become, as `device` does.
_OTHER_PLACES = ("device_map", "max_memory", "offload_folder", "offload_state_dict", "quantization_config")
_DOWNLOAD = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "variant", "use_safetensors")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def load(
    from_pretrained: Callable[..., Any],
    path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    modulation_may_rest: bool = False,
    **kwargs: Any,
) -> Any:
    """A pipeline on `device`, its weights as `from_pretrained(path, dtype=dtype).to(device)` would leave them, bit for bit.

    Host memory holds one cast tensor at a time beside the mapped files, whose pages the system may drop; and what stays
    there.

    Args:
        from_pretrained: of a pipeline's class. A pipeline of ours is asked where its modulation weights rest before they go.
        path: a checkpoint's folder or hub id.
        device: where the models go.
        dtype: of all models; None: fp32, as diffusers has it.
        modulation_may_rest: whether it may leave them on the host, so that too little memory for them is no reason to refuse.
        kwargs: for `from_pretrained`. Components given there stay as and where they are.
    Returns:
        The pipeline. Loading is the stage "load".
    Raises:
        FileNotFoundError, ValueError: an incomplete or damaged checkpoint (see `check_folder`), a device that is not
            there, another dtype, arguments that place weights elsewhere; before anything is read.
        RuntimeError: the device has less free memory than the weights need there; before anything is read.
    """
    device = torch.device(device)
    check_device(device)
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in _DTYPES:
        raise ValueError(
            f"`dtype` is {dtype!r}; with `device` it is one of {', '.join(map(str, _DTYPES))}, for all components."
        )
    others = [name for name in _OTHER_PLACES if kwargs.get(name) is not None]
    if others:
        raise ValueError(f"`{others[0]}` is given beside `device`, which also says where weights go; leave one of them out.")
    with stage("load"):
        if not Path(path).exists():
            check_folder(path, hub_ids=True)
            path = diffusers.DiffusionPipeline.download(path, **{name: kwargs[name] for name in _DOWNLOAD if name in kwargs})
        headers = check_folder(path, variant=kwargs.get("variant"), skip=kwargs)
        check_memory(headers, device, dtype, modulation_may_rest)
        # A dtype that the files do not have in common, or that belongs to quantised weights, is left to the loader.
        stored = {name: _stored_dtype(Path(path, name), header) or dtype for name, header in headers.items()}
        argument = "torch_dtype" if Version(diffusers.__version__) < Version("0.40") else "dtype"
        pipe = from_pretrained(path, **{argument: {**stored, "default": dtype}}, **kwargs)
        if hasattr(pipe, "about_to_move"):
            pipe.about_to_move(device, dtype)
        for name in headers:
            place(getattr(pipe, name), device, dtype)
    return pipe


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a module's tensors to `device` one by one, and cast there those that a checkpoint holds.

    Floating-point buffers that are computed rather than stored, such as rotary frequencies, keep their dtype, as they do
    when a loader casts. Quantised modules are moved as they are. Modules kept on the host stay there.
    """
    if getattr(module, "hf_quantizer", None) is not None:
        module.to(device)
        return
    stored = module.state_dict(keep_vars=True)
    computed = {id(buffer) for name, buffer in module.named_buffers() if name not in stored}

    def arrive(tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(device)
        return moved.to(dtype) if tensor.is_floating_point() and id(tensor) not in computed else moved

    module._apply(arrive)


def check_memory(headers: Mapping[str, Headers], device: torch.device, dtype: torch.dtype, modulation_may_rest: bool) -> None:
    """Raise a RuntimeError with what each component needs where the weights do not fit into a GPU's free memory."""
    needed = {name: device_bytes(header, dtype, modulation_may_rest) for name, header in headers.items()}
    free = free_bytes(device, enough=sum(needed.values()))
    if free is None:
        return
    if sum(needed.values()) > free:
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in needed.items())
        raise RuntimeError(
            f"`device` is {device}, which has {free / 2**30:.2f} GiB free; the weights need {sum(needed.values()) / 2**30:.2f} "
            f"GiB there in {dtype} ({parts}), and pictures some more. Free memory there, or load without `device` and call "
            "enable_model_cpu_offload() on the pipeline."
        )


def device_bytes(header: Headers, dtype: torch.dtype, modulation_may_rest: bool) -> int:
    """Bytes of a model's weights on the device, cast to `dtype`, from its files' headers."""
    total = 0
    for name, entry in header.items():
        if modulation_may_rest and (".img_mod." in name or ".txt_mod." in name):
            continue
        begin, end = entry["data_offsets"]
        total += math.prod(entry["shape"]) * dtype.itemsize if entry["dtype"] in _FLOATS else end - begin
    return total


def _stored_dtype(folder: Path, header: Headers) -> torch.dtype | None:
    """The narrowest dtype that holds all floating-point weights as they are stored; None where that says nothing."""
    kinds = {entry["dtype"] for entry in header.values()}
    if not kinds & _FLOATS.keys() or any(kind.startswith("F8") for kind in kinds):
        return None
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        return None
    return functools.reduce(torch.promote_types, (_FLOATS[kind] for kind in kinds & _FLOATS.keys()))
