"""A few-step LoRA beside the fused transformer: 4 steps without guidance, with the schedule that the LoRA was made for.

    python examples/lora.py [--model Qwen/Qwen-Image --lora FOLDER --weight-name Qwen-Image-Lightning-4steps.safetensors]

Needs peft: pip install 'qwen-fast[lora]'. The demo checkpoint brings a LoRA of its own.
"""

import argparse
import time

import torch

import qwen_fast
from qwen_fast import demo
from qwen_fast.schedule.configs import LIGHTNING_SCHEDULER_CONFIG

CALL = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "width": 64, "height": 64}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.CHECKPOINT), help="a folder or hub id (default: the demo's)")
    parser.add_argument("--lora", default=str(demo.CHECKPOINT / demo.LIGHTNING), help="folder or hub id (default: the demo's)")
    parser.add_argument("--weight-name", default="pytorch_lora_weights.safetensors", help="file in it (default: %(default)s)")
    parser.add_argument("--prompt", default="two green squares on a white background")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--fuse", action="store_true", help="add it to the weights: nothing is computed beside them then")
    parser.add_argument("--out", default="picture.png")
    options = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = qwen_fast.QwenImagePipeline.from_pretrained(options.model, dtype=dtype, device=device)
    pipe.scheduler = type(pipe.scheduler).from_config(LIGHTNING_SCHEDULER_CONFIG)
    pipe.load_lora_weights(options.lora, adapter_name="few-steps", weight_name=options.weight_name)
    pipe.set_adapters("few-steps", options.scale)
    if options.fuse:
        pipe.fuse_lora(adapter_names=["few-steps"])
    begin = time.perf_counter()
    image = pipe(options.prompt, generator=torch.Generator().manual_seed(0), **CALL).images[0]
    print(f"{time.perf_counter() - begin:.2f} s")
    image.save(options.out)
    print(qwen_fast.report(pipe))
    return image


if __name__ == "__main__":
    main()
