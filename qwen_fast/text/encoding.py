"""Text encoding without what a picture does not need: no logits, no caches for a next token, no prompt twice.

Stock asks Qwen2_5_VLForConditionalGeneration for logits over 152,064 words and for the hidden states of every layer, and
takes the last, which is what the model below its head gives. That one is called here, with stock's token ids, mask and
positions.

Prompts padded to the same width share a forward: on the CPU each is then equal to the bit to what stock's own call gives,
whatever else is in the batch (padding to another width is not, and costs more than it saves). A GPU may pick another
product for more rows, which moves last digits.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..common.hooks import is_hooked
from ..common.own import foreign_forward, foreign_methods, foreign_on, process_reason
from ..common.placement import on_device, to_device, to_host, weights_reason
from ..common.recent import Recent
from ..common.state import State, logger
from .cache import PromptCache
from .watch import EncoderWatch

STOCK = transformers.Qwen2_5_VLForConditionalGeneration


class TokenizedPrompt(NamedTuple):
    """A tokenized prompt as it goes into the encoder: padded to the width of the list that it came in."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]


def surroundings(device: torch.device) -> tuple:
    """What the bits of an encoder's output depend on beside the encoder and its input."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return kind, autocast, (torch.__version__, transformers.__version__, torch.get_float32_matmul_precision())


class TextState:
    """What one pipeline keeps for its prompts. A copy starts with an empty cache.

    Attributes:
        cache: the prompts encoded so far.
        features: what the vision tower gave for pictures, see tower.py.
        option: "memory" or "disk" cache, None for none.
        placement: "keep", "offload" or "free": what becomes of the text encoder after encoding.
        pictures: prompts hold pictures, see pictures.py.
        alone: each prompt is padded to no other's width and encoded by itself (`batch_invariant`).
        watch: tells whether the text encoder is still the same.
        content: fingerprint of the text encoder as it was last seen; None where no prompt may be kept.
        uncached: why not, or None.
        dtype: of the text encoder as it was last seen.
        resting: the encoder was moved to host memory by us.
        freed: the encoder was dropped by us.
    """

    def __init__(self, option: str | None, cache: PromptCache, placement: str, pictures: bool = False):
        self.option, self.cache, self.placement, self.pictures = option, cache, placement, pictures
        self.features = Recent()
        self.alone = False
        self.watch = EncoderWatch(pictures)
        self.content: str | None = None
        self.uncached: str | None = None
        self.dtype: torch.dtype | None = None
        self.resting = self.freed = False
        self._checked: tuple | None = None

    def look(self, encoder: nn.Module | None) -> None:
        """Once a call: whether the weights, or what is attached to them, changed. A freed encoder cannot."""
        if encoder is None:
            return
        self.freed, self.dtype = False, encoder.dtype
        if self.option is None:
            self.content, self.uncached = None, "prompt_cache=None"
        else:
            self.content, self.uncached = self.watch.look(encoder)

    def digest(self, row: TokenizedPrompt, drop: int, device: torch.device, rows: dict[int, int] | None) -> str | None:
        """Name of a prompt: the same in every process that would compute the same bits.

        Args:
            rows: what the token embedding holds for each of the prompt's tokens, see `EncoderWatch.rows`.
        """
        if self.content is None or rows is None:
            return None
        read = [rows[token] for token in row.ids]
        alone = ("alone",) * self.alone  # one that was encoded among others may have other bits
        return hashlib.sha256(repr((self.content, row, read, drop, *surroundings(device), *alone)).encode()).hexdigest()

    def check_template(self, pipe: Any) -> None:
        """The pipeline drops the template's first tokens by a number; does this tokenizer make so many of them?"""
        template, drop = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
        if not isinstance(pipe.tokenizer, transformers.PreTrainedTokenizerBase):
            return  # a server's own, which is asked what stock asks and no more
        known = id(pipe.tokenizer), len(pipe.tokenizer), template, drop
        if self._checked == known:
            return
        found = len(pipe.tokenizer(template.split("{}")[0]).input_ids)
        if found != drop:
            message = (
                f"the tokenizer makes {found} tokens of the prompt template's prefix, but `prompt_template_encode_start_idx` "
                f"is {drop}: prompts lose their first words or carry the template's; give the tokenizer of the checkpoint"
            )
            if pipe.fast_state.options.strict:
                raise ValueError(f"{message}.")
            logger.warning("%s. diffusers does not notice, and its result is kept.", message)
        self._checked = known


def configure(pipe: Any, state: State) -> None:
    """Follow the two options that are about prompts; the cache stays where its option does."""
    prompt_cache, placement = state.options.prompt_cache, state.options.text_encoder_mode
    option, folder = prompt_cache, None
    if prompt_cache not in ("memory", None):
        option, folder = "disk", prompt_cache
    texts = state.texts
    if texts is None or (texts.option, texts.cache.folder) != (option, folder):
        cache = PromptCache(folder=folder) if option is not None else PromptCache(max_bytes=0)
        fresh = TextState(option, cache, placement, pictures=hasattr(pipe, "processor"))
        if texts is not None:
            fresh.resting, fresh.freed, fresh.content, fresh.dtype = texts.resting, texts.freed, texts.content, texts.dtype
            fresh.watch = texts.watch
        state.texts = fresh
    state.texts.placement, state.texts.alone = placement, state.options.batch_invariant
    if placement != "offload":
        bring_back(pipe, state)


@contextlib.contextmanager
def prompts_of_call(pipe: Any, arguments: dict[str, Any], *, apart: bool = False) -> Iterator[None]:
    """Inside, `pipe` encodes the prompt and the negative prompt of a call together when the first of them is asked for.

    Args:
        arguments: of `pipe.__call__`, by name.
        apart: each prompt will be asked for alone, padded to no other.
    """
    prompts = [arguments["prompt"]]
    if arguments["true_cfg_scale"] > 1:
        prompts.append(arguments["negative_prompt"])
    waiting = [[prompt] if isinstance(prompt, str) else list(prompt) for prompt in prompts if prompt is not None]
    if apart:
        waiting = [[prompt] for own in waiting for prompt in own]
    token = _CALL.set(_Call(pipe, waiting))
    try:
        yield
    finally:
        _CALL.reset(token)


class _Call:
    """A call's prompts: those to be encoded, and those that are."""

    def __init__(self, pipe: Any, waiting: list[list[str]]):
        self.pipe, self.waiting = pipe, waiting
        self.encoded: dict[tuple[str, ...], list[torch.Tensor]] = {}


_CALL: ContextVar[_Call | None] = ContextVar("qwen_fast_texts", default=None)


def stock_reason(pipe: Any) -> str | None:
    """Why stock's own code encodes, or None."""
    if torch.is_grad_enabled():
        return "gradients are asked for while encoding (use torch.no_grad or torch.inference_mode)"
    reason = process_reason()
    if reason is not None:
        return reason
    names = ("_get_qwen_prompt_embeds", "_extract_masked_hidden")
    found = foreign_methods(pipe.STANDS_FOR, names) + foreign_on(pipe, names[1:])
    encoder = pipe.text_encoder
    if type(encoder) is not STOCK and not (encoder is None and pipe.fast_state.texts.freed):
        return f"text_encoder is a {type(encoder).__name__}, not a {STOCK.__name__}"
    if encoder is not None:
        for kind in (STOCK, type(encoder.model), nn.Linear):  # the last is that of the head, which is not called here
            found += foreign_methods(kind, ("__call__", "forward"))
        found += [name for part in (encoder, encoder.model, encoder.lm_head) for name in foreign_forward(part)]
        if encoder.lm_head._forward_hooks or encoder.lm_head._forward_pre_hooks:
            found.append("a hook on its lm_head")  # which a picture does not need
    return f"{', '.join(found)}: not diffusers' or transformers' own" if found else None


def prompt_embeds(
    pipe: Any, prompts: list[str], device: torch.device, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What stock's `_get_qwen_prompt_embeds` returns: `[B, S_txt, C_txt]`, zeros after a prompt's end, and its mask."""
    call = _CALL.get()
    if call is not None and call.pipe is not pipe:
        call = None
    encoded = None if call is None else call.encoded.get(tuple(prompts))
    if encoded is None:
        lists = [prompts] + [other for other in ([] if call is None else call.waiting) if other != prompts]
        results = _encode(pipe, lists, torch.empty(0, device=device).device)
        encoded = results[0]
        if call is not None:
            call.encoded.update(zip(map(tuple, lists), results, strict=True))
    embeds = pad_sequence(encoded, batch_first=True)  # a copy, which is the caller's
    lengths = [one.shape[0] for one in encoded]
    mask = torch.tensor([[1] * length + [0] * (embeds.shape[1] - length) for length in lengths], device=embeds.device)
    return embeds.to(dtype=dtype or pipe.fast_state.texts.dtype, device=device), mask


def rest(pipe: Any) -> None:
    """After encoding: the encoder to host memory or away, as the option says, where nothing else places its weights."""
    texts, encoder = pipe.fast_state.texts, pipe.text_encoder
    if encoder is None or texts.placement == "keep" or (texts.placement == "offload" and encoder.device.type == "cpu"):
        return
    reason = "hooks on it" if is_hooked(encoder) else weights_reason(encoder)
    if texts.placement == "free" and texts.content is None:  # dropped, it would leave nothing behind
        reason = reason or f"its prompts are not kept ({texts.uncached})"
    if texts.placement == "free" and texts.pictures:
        reason = reason or "diffusers' code reads its dtype for each prompt"
    if reason is not None:
        logger.info("the text encoder stays where it is: %s.", reason)
    elif texts.placement == "offload":
        to_host(encoder)
        texts.resting = True
    else:
        texts.watch.keep_rows(encoder)
        object.__setattr__(pipe, "text_encoder", None)  # the configuration still names it, for one that is put back
        texts.freed = True


def bring_back(pipe: Any, state: State) -> None:
    """An encoder that rests in host memory goes where the transformer is."""
    if state.texts.resting and pipe.text_encoder is not None:
        to_device(pipe.text_encoder, pipe.transformer.device)
    state.texts.resting = False


def _encode(pipe: Any, lists: list[list[str]], device: torch.device) -> list[list[torch.Tensor]]:
    """Lists of prompts, each padded for itself as stock would; what is not in the cache in one forward for each width."""
    texts = pipe.fast_state.texts
    texts.check_template(pipe)
    texts.look(pipe.text_encoder)
    drop = pipe.prompt_template_encode_start_idx
    rows = [_tokenized(pipe, prompts) for prompts in lists]
    tokens = None
    if texts.content is not None:
        tokens = texts.watch.rows(pipe.text_encoder, (token for own in rows for row in own for token in row.ids))
    encoded: dict[TokenizedPrompt, torch.Tensor] = {}
    missing: dict[Any, dict[TokenizedPrompt, str | None]] = {}  # by width, or each alone
    for row in dict.fromkeys(row for own in rows for row in own):
        digest = texts.digest(row, drop, device, tokens)
        found = None if digest is None else texts.cache.get((digest, device))
        if found is None:
            missing.setdefault(row if texts.alone else len(row.ids), {})[row] = digest
        else:
            encoded[row] = found
    if missing and pipe.text_encoder is None:
        unknown = [text for own, prompts in zip(rows, lists, strict=True) for row, text in zip(own, prompts, strict=True)
                   if row not in encoded]  # fmt: skip
        raise RuntimeError(
            f"text_encoder_mode='free' has dropped the text encoder, and the prompt {unknown[0]!r} is not in the prompt cache; "
            "set `pipe.text_encoder` to one again, or use text_encoder_mode='offload'."
        )
    for group in missing.values():
        for (row, digest), hidden in zip(group.items(), _hidden_states(pipe, list(group), device), strict=True):
            if not all(row.mask):
                hidden = hidden[torch.tensor(row.mask, dtype=torch.bool, device=hidden.device)]
            encoded[row] = hidden[drop:].clone()  # no view: the template's rows can go
            if digest is not None:
                texts.cache.put((digest, device), encoded[row])
    rest(pipe)
    return [[encoded[row] for row in own] for own in rows]


def _tokenized(pipe: Any, prompts: list[str]) -> list[TokenizedPrompt]:
    if pipe.fast_state.texts.alone and len(prompts) > 1:
        return [row for prompt in prompts for row in _tokenized(pipe, [prompt])]
    drop = pipe.prompt_template_encode_start_idx
    tokens = pipe.tokenizer(
        [pipe.prompt_template_encode.format(prompt) for prompt in prompts],
        max_length=pipe.tokenizer_max_length + drop,
        padding=True,
        truncation=True,
        return_tensors="pt",
    )
    both = zip(tokens.input_ids.tolist(), tokens.attention_mask.tolist(), strict=True)
    return [TokenizedPrompt(tuple(ids), tuple(mask)) for ids, mask in both]


def _hidden_states(pipe: Any, rows: list[TokenizedPrompt], device: torch.device) -> torch.Tensor:
    """`[B, S, C_txt]` after the final norm, for rows of one width."""
    state, encoder = pipe.fast_state, pipe.text_encoder
    ids = torch.tensor([row.ids for row in rows], device=device)
    # Without a mask where nothing is masked: what transformers finds out itself, but by reading it from the device.
    mask = None if all(map(all, (row.mask for row in rows))) else torch.tensor([row.mask for row in rows], device=device)
    if is_hooked(encoder):
        # What is attached to the whole encoder has to run; of its head, one token's logits.
        state.calls["text encoder as a whole, for its hooks"] += 1
        outputs = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        return outputs.hidden_states[-1]
    state.calls["text encoder"] += 1
    model = on_device(encoder.model, device, skip="visual.")
    return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
