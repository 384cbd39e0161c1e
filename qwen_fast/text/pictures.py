"""Prompts that are encoded together with pictures: diffusers' own code, whose call of the text encoder the cache answers.

How a prompt and its pictures become tokens and patches differs from pipeline to pipeline, and stays stock's business. What
comes out of that is what the encoder gets, and by that its output is known: token ids, mask, patches and their grid.
"""

import ast
import functools
import hashlib
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..common.rewritten import Unknown, rewritten, text
from .encoding import bring_back, surroundings
from .tower import kept_tower

_GIVEN = {"input_ids", "attention_mask", "pixel_values", "image_grid_thw", "output_hidden_states"}
_NAME = "_qwen_fast_encoder"


class Outputs(NamedTuple):
    """What stock reads of the encoder's output."""

    hidden_states: tuple[torch.Tensor, ...]


def with_kept_outputs(stock: type) -> Callable[..., Any] | None:
    """`stock._get_qwen_prompt_embeds`, which asks `encoded`; None where its source is not as known."""
    return _with_kept_outputs(inspect.unwrap(stock._get_qwen_prompt_embeds))


@functools.cache
def _with_kept_outputs(original: types.FunctionType) -> Callable[..., Any] | None:
    return rewritten(original, _rewrite, {_NAME: encoded})


def _rewrite(function: ast.FunctionDef) -> None:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and text(node.func) == "self.text_encoder"]
    if len(calls) != 1 or calls[0].args or not {keyword.arg for keyword in calls[0].keywords} <= _GIVEN:
        raise Unknown
    assigned = [node.targets[0] for node in ast.walk(function) if isinstance(node, ast.Assign) and node.value is calls[0]]
    if len(assigned) != 1 or not isinstance(assigned[0], ast.Name):
        raise Unknown
    name = assigned[0].id
    uses = [text(node) for node in ast.walk(function) if isinstance(node, ast.Attribute) and text(node.value) == name]
    if uses != [f"{name}.hidden_states"]:
        raise Unknown
    calls[0].func = ast.copy_location(ast.Name(_NAME, ast.Load()), calls[0].func)
    calls[0].args = [ast.copy_location(ast.Name("self", ast.Load()), calls[0].func)]


def encoded(pipe: Any, **given: Any) -> Any:
    """What `pipe.text_encoder(**given)` gives of its last hidden states `[B, S, C_txt]`, computed once."""
    texts, encoder = pipe.fast_state.texts, pipe.text_encoder
    if texts.alone and len(given["input_ids"]) > 1:
        return _each_alone(pipe, given)
    texts.look(encoder)
    name, device = None, given["input_ids"].device
    if texts.content is not None:
        name = _digest(texts, encoder, given)
    found = None if name is None else texts.cache.get((name, device))
    if found is not None:
        return Outputs((found.clone(),))
    bring_back(pipe, pipe.fast_state)
    with kept_tower(encoder, pipe.fast_state):
        outputs = encoder(**given)
    pipe.fast_state.calls["text encoder with pictures"] += 1
    if name is not None:
        texts.cache.put((name, device), outputs.hidden_states[-1].clone())
    return outputs


def _each_alone(pipe: Any, given: dict[str, Any]) -> Outputs:
    """Each prompt with its pictures as it would be alone; the rows of padding, which stock leaves out, are zeros."""
    ids, mask, grid = given["input_ids"], given["attention_mask"].bool(), given["image_grid_thw"]
    pictures = grid.split(len(grid) // len(ids))  # as many of each prompt
    patches = given["pixel_values"].split([int(own.prod(dim=1).sum()) for own in pictures])
    found = []
    for row, kept, own, pixels in zip(ids, mask, pictures, patches, strict=True):
        alone = {"input_ids": row[kept][None], "attention_mask": torch.ones_like(row[kept])[None]}
        alone |= {"image_grid_thw": own.clone(), "pixel_values": pixels.clone()}
        hidden = encoded(pipe, **given | alone).hidden_states[-1][0]
        found.append(hidden.new_zeros(len(row), hidden.shape[-1]))
        found[-1][kept] = hidden
    return Outputs((torch.stack(found),))


def _digest(texts: Any, encoder: Any, given: dict[str, Any]) -> str | None:
    ids, device = given["input_ids"].tolist(), given["input_ids"].device
    rows = texts.watch.rows(encoder, (token for own in ids for token in own))
    if rows is None:
        return None
    told = hashlib.sha256(repr((texts.content, ids, sorted(rows.items()), surroundings(device))).encode())
    for name in ("attention_mask", "image_grid_thw", "pixel_values"):
        tensor = given.get(name)
        if tensor is not None:
            told.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return told.hexdigest()
