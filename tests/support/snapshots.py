"""What a pipeline looks like, and the arguments of those that edit a picture."""

import diffusers
import PIL.Image
import torch

from qwen_fast.common.state import STATE

IMAGE = PIL.Image.effect_noise((96, 64), 90).convert("RGB")
MASK = PIL.Image.new("L", (96, 64)).point(lambda _: 255)
MASK.paste(0, (0, 0, 48, 64))

EDITING = {
    diffusers.QwenImageImg2ImgPipeline: {"image": IMAGE, "strength": 0.6},
    diffusers.QwenImageInpaintPipeline: {"image": IMAGE, "mask_image": MASK, "strength": 0.8},
}


def snapshot(pipe) -> dict:
    """All that makes a pipeline what it is, down to each module's own attributes and each parameter's storage."""
    modules = {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        "class": type(pipe),
        "attributes": {key for key in vars(pipe) if not key.startswith("_") or key == STATE},
        "components": {name: id(component) for name, component in pipe.components.items()},
        "config": dict(pipe.config),
        "classes": {(n, k): type(m) for n, c in modules.items() for k, m in c.named_modules()},
        "dicts": {(n, k): set(vars(m)) for n, c in modules.items() for k, m in c.named_modules()},
        "hooks": {
            (n, k): len(m._forward_pre_hooks) + len(m._forward_hooks) for n, c in modules.items() for k, m in c.named_modules()
        },
        "weights": {(n, k): (p.data_ptr(), p.dtype) for n, c in modules.items() for k, p in c.named_parameters()},
    }
