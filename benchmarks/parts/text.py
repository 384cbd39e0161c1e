"""Encoding a prompt and a negative prompt, stock against ours, on this machine, interleaved, on the same weights.

    python -m benchmarks.parts.text [--layers 4 28] [--width 1024] [--repeats N] [--append benchmarks/results/text.csv]

A text encoder with the vocabulary of Qwen2.5-VL (152,064 words) and random weights; how many layers it has decides what the
logits weigh, so a row says it (Qwen-Image: 28, 3584 wide). Tokens are those between the template's 34 and its last 5.
"encode" is both prompts without a cache; "hit" and "two hits" are one and both of them known, with the check of the encoder's
weights, and no ratio. CPU time of one thread; on CUDA wall time around a synchronisation. On the CPU a difference of a single
bit ends the run without a ratio.
"""

import argparse
import contextlib
import datetime
import itertools
import platform
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import qwen_fast
from qwen_fast.testing import build_checkpoint, initialize
from qwen_fast.text.encoding import prompts_of_call

from ..shared.rows import append
from ..shared.source import git

VOCABULARY = 152_064
FIELDS = "date commit dirty machine torch transformers dtype layers width tokens negative_tokens what repeats".split()
FIELDS += "stock_p50 fast_p50 fast_p20 ratio_p50 max_difference".split()


def encoder(layers: int, width: int) -> Qwen2_5_VLForConditionalGeneration:
    """Heads of 128, an eighth of them for keys, an MLP 5.29 times as wide, as in Qwen2.5-VL-7B; no vision to speak of."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": int(width * 18944 / 3584) // 128 * 128,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 128,
        "num_key_value_heads": max(1, width // 896),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width}
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    initialize(model, "text_encoder", 0)
    return model


def prompt_of(pipe: diffusers.QwenImagePipeline, tokens: int, word: str) -> str:
    """A prompt of so many tokens between the template's 34 and its last 5."""
    prompt = word
    while len(pipe.tokenizer(prompt).input_ids) < tokens:
        prompt += "a" if len(prompt) % 6 else " "
    assert len(pipe.tokenizer(prompt).input_ids) == tokens
    return prompt


class Pair:
    """Stock and ours on one text encoder, for a prompt and a negative prompt."""

    def __init__(self, folder: Path, device: torch.device):
        self.device = device
        self.stock = diffusers.QwenImagePipeline.from_pretrained(build_checkpoint(folder)).to(device)
        self.fast = qwen_fast.enable(diffusers.QwenImagePipeline(**self.stock.components))

    def run(self, pipe: diffusers.QwenImagePipeline, prompts: tuple[str, ...]) -> tuple[list[torch.Tensor], float]:
        """Embeddings of a prompt, or of it and a negative one, as a call of the pipeline asks for them, and seconds."""
        cuda = self.device.type == "cuda"
        clock = time.perf_counter if cuda else time.thread_time
        torch.cuda.synchronize() if cuda else None
        begin = clock()
        arguments = {"prompt": prompts[0], "negative_prompt": prompts[-1], "true_cfg_scale": float(len(prompts))}
        with prompts_of_call(pipe, arguments) if pipe is self.fast else contextlib.nullcontext():
            embeds = [pipe.encode_prompt(prompt, device=self.device)[0] for prompt in prompts]
        torch.cuda.synchronize() if cuda else None
        return embeds, clock() - begin

    def measure(self, prompts: tuple[str, str], repeats: int) -> tuple[dict[str, list[float]], dict[str, list[torch.Tensor]]]:
        """Seconds and embeddings of "stock", "encode", "hit" and "two hits"; the first round, which warms up, is left out."""
        seconds, embeds = {"stock": [], "encode": [], "hit": [], "two hits": []}, {}
        qwen_fast.enable(self.fast, prompt_cache=None)
        for repeat in range(repeats + 1):
            runs = [("stock", self.stock), ("encode", self.fast)]
            for name, pipe in runs if repeat % 2 else runs[::-1]:
                embeds[name], spent = self.run(pipe, prompts)
                seconds[name].append(spent)
        qwen_fast.enable(self.fast, prompt_cache="memory")
        self.run(self.fast, prompts)
        for _ in range(10 * repeats + 1):
            for name, known in (("hit", prompts[:1]), ("two hits", prompts)):
                embeds[name], spent = self.run(self.fast, known)
                seconds[name].append(spent)
        return {name: values[1:] for name, values in seconds.items()}, embeds


@torch.no_grad()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--negative-tokens", type=int, nargs="+", default=[30, 1])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--append", type=Path, help="CSV file that gets two rows a case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device, rows = torch.device(options.device), []
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, 1 thread"
    with tempfile.TemporaryDirectory() as folder:
        pair = Pair(Path(folder, "checkpoint"), device)
        for layers, dtype in itertools.product(options.layers, options.dtypes):
            model = encoder(layers, options.width).to(device, getattr(torch, dtype))
            pair.stock.text_encoder = pair.fast.text_encoder = model
            for negative_tokens in options.negative_tokens:
                prompts = prompt_of(pair.stock, options.tokens, "a"), prompt_of(pair.stock, negative_tokens, "b")
                seconds, embeds = pair.measure(prompts, options.repeats)
                for what in ("encode", "hit", "two hits"):
                    both = zip(embeds[what], embeds["stock"], strict=what != "hit")
                    difference = max((ours.float() - theirs.float()).abs().max().item() for ours, theirs in both)
                    if difference and device.type == "cpu":
                        print(f"{what}: differs by {difference:g}; no times are given")
                        return 1
                    fast_p50, fast_p20 = statistics.median(seconds[what]), statistics.quantiles(seconds[what], n=5)[0]
                    stock_p50 = statistics.median(seconds["stock"]) if what == "encode" else None
                    compared = (
                        "" if stock_p50 is None else f" stock {stock_p50 * 1e3:.1f} ms, ratio {stock_p50 / fast_p50:.2f},"
                    )
                    print(
                        f"{what}, {layers} layers {options.width} wide, {dtype}, {options.tokens} + {negative_tokens} tokens:"
                        f"{compared} ours {fast_p50 * 1e3:.3f} ms (p20 {fast_p20 * 1e3:.3f}), at most {difference:g} apart",
                        flush=True,
                    )
                    rows.append(
                        [
                            datetime.date.today(), git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain")),
                            machine, torch.__version__, transformers.__version__, dtype, layers, options.width,
                            options.tokens, negative_tokens, what, len(seconds[what]),
                            "" if stock_p50 is None else f"{stock_p50:.5f}", f"{fast_p50:.6f}", f"{fast_p20:.6f}",
                            "" if stock_p50 is None else f"{stock_p50 / fast_p50:.3f}", f"{difference:.3g}",
                        ]
                    )  # fmt: skip
    if options.append:
        append(options.append, FIELDS, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
