"""A tokenizer of Qwen2's kind with a small vocabulary, made offline."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
from transformers import Qwen2Tokenizer

# What Qwen2Tokenizer registers, in its order; the ids follow the byte-pair vocabulary.
_SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


# Where Qwen2 cuts a text before the byte-pair merges.
_PRETOKENIZE_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_tokenizer(folder: Path, texts: Iterable[str] = ()) -> int:
    """Write a byte-level BPE in the files of the real repository, which transformers 4 and 5 both read.

    Its merges are learnt from the prompt template and `texts`, until every word of them is one token; other words fall
    apart into bytes. The pipeline drops the first 34 tokens unseen, so this is checked with the tokenizer as loaded.
    Returns the number of entries without the special tokens.
    """
    stock = diffusers.QwenImagePipeline(None, None, None, None, None)
    template, expected = stock.prompt_template_encode, stock.prompt_template_encode_start_idx
    corpus = template.replace("{}", "")
    for token in _SPECIAL_TOKENS:
        corpus = corpus.replace(token, "")
    pre_tokenizers = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([corpus, *texts], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    folder.mkdir(exist_ok=True)
    _write_json(folder / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    _write_text(folder / "merges.txt", ["#version: 0.2", *merges])
    settings = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(len(model["vocab"]) + index): {"content": token, **settings} for index, token in enumerate(_SPECIAL_TOKENS)
            },
            "additional_special_tokens": list(_SPECIAL_TOKENS[1:]),
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 131072,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    loaded = Qwen2Tokenizer.from_pretrained(folder)
    prefix = template.split("{}")[0]
    found = len(loaded(prefix).input_ids)
    if found != expected:
        raise RuntimeError(
            f"the tokenizer in {folder} cuts the prompt template's prefix into {found} tokens where the pipeline drops "
            f"{expected}, so prompts would be cut or polluted: this transformers reads the tokenizer in another way"
        )
    return len(model["vocab"])


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, [json.dumps(content, indent=2, ensure_ascii=False)])


def _write_text(path: Path, lines: Iterable[str]) -> None:
    # Neither the locale's encoding nor its line ends: the bytes are the same everywhere.
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
