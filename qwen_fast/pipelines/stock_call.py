"""diffusers' own `__call__`, but for the statements of a denoising step: those are asked of the denoiser first.

All nine Qwen-Image pipelines of diffusers share the heart of their loop: a forward for the prompt, one for the negative
prompt, guidance, `scheduler.step`; two of them ask a ControlNet first. Everything around it differs, and is stock's own
business. So the source of stock's `__call__` is read, and these statements become

    found = take_step(self, t, latents, timestep, {arguments of the first forward}, {of the second} or None, ...)
    if found is None:
        <stock's statements>
    else:
        noise_pred, latents = found.noise_pred, found.latents

The function runs in the namespace of stock's module, so that what somebody replaced there is what is called.
"""

import ast
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from ..common.rewritten import Unknown, rewritten, text
from ..common.stages import in_stage, stage
from ..denoise.loop import around_steps, behind_step, take_step
from ..denoise.step import RESIDUALS

_INJECTED = {
    "_qwen_fast_step": take_step,
    "_qwen_fast_behind": behind_step,
    "_qwen_fast_steps": around_steps,
    "_qwen_fast_stage": stage,
    "_qwen_fast_in_stage": in_stage,
}
_STEP, _BEHIND, _STEPS, _STAGE, _IN_STAGE = _INJECTED
# What a stage of the call is spent in, see common/stages.py.
_STAGED = {
    "self.encode_prompt": "text",
    "retrieve_timesteps": "schedule",
    "self.vae.decode": "vae",
    "self.image_processor.postprocess": "vae",
}
# What the forwards of ControlNet and transformer have alike.
_SHARED = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes")
_GUIDED = ("neg_noise_pred", "comb_pred", "cond_norm", "noise_norm")


class _Stages(ast.NodeTransformer):
    """Calls of what is in `_STAGED` become calls inside their stage, with the function looked up where it was."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        name = _STAGED.get(text(node.func))
        if name is None:
            return node
        arguments = [ast.Constant(name), node.func, *node.args]
        return ast.copy_location(ast.Call(ast.Name(_IN_STAGE, ast.Load()), arguments, node.keywords), node)

    def visit_With(self, node: ast.With) -> ast.With:
        self.generic_visit(node)
        if text(node.items[0].context_expr).startswith("self.progress_bar("):
            node.items.insert(0, ast.withitem(ast.parse(f"{_STAGE}('denoise')", mode="eval").body))
        return node


def with_own_steps(stock: type) -> Callable[..., Any] | None:
    """`stock.__call__`, without torch.no_grad, with its steps asked of `take_step`; None where its source is not as known."""
    return _with_own_steps(inspect.unwrap(stock.__call__))


@functools.cache
def _with_own_steps(original: types.FunctionType) -> Callable[..., Any] | None:
    return rewritten(original, _rewrite, _INJECTED)


def _rewrite(function: ast.FunctionDef) -> None:
    """Put our step into the loop of a `__call__`, and its stages around what they are spent in."""
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For) and text(node.iter) == "enumerate(timesteps)"]
    if len(loops) != 1 or text(loops[0].target) != "(i, t)" or loops[0].orelse:
        raise Unknown
    body = loops[0].body
    first = next((n for n, one in enumerate(body) if _is_forward(one, "cond")), None)
    last = next((n for n, one in enumerate(body) if _is_scheduler_step(one)), None)
    if first is None or last is None or last < first:
        raise Unknown
    forwards, normalize = _read(body[first : last + 1])
    control = _control(body[first - 1], forwards[0]) if first else None
    if control is not None:
        first -= 1
        for one in forwards:
            if one.pop(RESIDUALS, None) != RESIDUALS:
                raise Unknown
    step, sources = body[first : last + 1], [_dict(one) for one in forwards]
    guided = "do_true_cfg" if len(sources) > 1 else "False"
    call = f"{_STEP}(self, t, latents, timestep, {sources[0]}, {sources[-1]} if {guided} else None, "
    call += f"true_cfg_scale if {guided} else None, {normalize}, {None if control is None else _dict(control)})"
    lines = [f"_found = {call}", "if _found is None:", "    pass", "else:", "    noise_pred = _found.noise_pred"]
    if control is not None:
        lines.append(f"    {RESIDUALS} = _found.residuals")
    if len(forwards) > 1:
        lines += ["    if do_true_cfg:", f"        {', '.join(_GUIDED)} = _found.guided"]
    lines += ["    latents_dtype = latents.dtype", "    latents = _found.latents"]
    new = ast.parse("\n".join(lines)).body
    for node in (node for one in new for node in ast.walk(one)):
        ast.copy_location(node, step[0])
    new[1].body = step
    body[first : last + 1] = new
    behind = ast.parse(f"{_BEHIND}(self, i, latents)").body[0]
    body.append(ast.copy_location(behind, body[-1]))
    loops[0].iter = ast.copy_location(ast.parse(f"enumerate({_STEPS}(timesteps))", mode="eval").body, loops[0].iter)
    _Stages().visit(function)


def _read(step: list[ast.stmt]) -> tuple[list[dict[str, str]], str]:
    """(arguments of the forward for the prompt, and of the one for the negative prompt if there is one; whether guidance is
    normalised) of statements that are known one by one; anything else among them is not."""
    rest, normalize = list(step), "True"
    forwards = [_arguments(rest.pop(0), "cond", "noise_pred")]
    if isinstance(rest[0], ast.If):
        guidance = rest.pop(0)
        if text(guidance.test) != "do_true_cfg" or guidance.orelse:
            raise Unknown
        inner = list(guidance.body)
        forwards.append(_arguments(inner.pop(0), "uncond", "neg_noise_pred"))
        if text(inner[0]) == "neg_noise_pred = neg_noise_pred[:, :latents.size(1)]":
            inner.pop(0)
        if text(inner.pop(0)) != "comb_pred = neg_noise_pred + true_cfg_scale * (noise_pred - neg_noise_pred)":
            raise Unknown
        if isinstance(inner[0], ast.If):
            choice = inner.pop(0)
            if [text(one) for one in choice.orelse] != ["noise_pred = comb_pred"] or inner:
                raise Unknown
            normalize, inner = text(choice.test), choice.body
        if [text(one) for one in inner] != [
            "cond_norm = torch.norm(noise_pred, dim=-1, keepdim=True)",
            "noise_norm = torch.norm(comb_pred, dim=-1, keepdim=True)",
            "noise_pred = comb_pred * (cond_norm / noise_norm)",
        ]:
            raise Unknown
    if [text(one) for one in rest[:-1]] != ["latents_dtype = latents.dtype"]:
        raise Unknown
    return forwards, normalize


def _arguments(node: ast.stmt, context: str, target: str) -> dict[str, str]:
    """Sources of the arguments of the forward in `with self.transformer.cache_context(context)`, but the timestep."""
    if not _is_forward(node, context):
        raise Unknown
    assign, *cut = node.body
    if [text(one) for one in cut] not in ([], [f"{target} = {target}[:, :latents.size(1)]"]):
        raise Unknown
    value = assign.value if isinstance(assign, ast.Assign) and text(assign.targets[0]) == target else None
    if not isinstance(value, ast.Subscript) or text(value.slice) != "0" or not isinstance(value.value, ast.Call):
        raise Unknown
    return _words(value.value, "self.transformer")


def _words(call: ast.Call, function: str) -> dict[str, str]:
    """Sources of the keyword arguments of a forward, but the timestep."""
    words = {keyword.arg: text(keyword.value) for keyword in call.keywords}
    if call.args or text(call.func) != function or words.pop("timestep", "") != "timestep / 1000":
        raise Unknown
    if words.pop("return_dict", "") != "False" or None in words:
        raise Unknown
    return words


def _control(node: ast.stmt, cond: dict[str, str]) -> dict[str, str] | None:
    """Sources of the arguments of the ControlNet's forward, for latents and prompt of the next one; None: stock's
    loop makes that forward, which is none or another one."""
    if not isinstance(node, ast.Assign) or text(node.targets[0]) != RESIDUALS or not isinstance(node.value, ast.Call):
        return None
    try:
        words = _words(node.value, "self.controlnet")
    except Unknown:
        return None
    known = words.keys() == {"controlnet_cond", "conditioning_scale", *_SHARED}
    return words if known and all(words[name] == cond.get(name) for name in _SHARED) else None


def _dict(words: dict[str, str]) -> str:
    return "{" + ", ".join(f"{name!r}: {source}" for name, source in words.items()) + "}"


def _is_forward(node: ast.stmt, context: str) -> bool:
    if not isinstance(node, ast.With) or len(node.items) != 1:
        return False
    return text(node.items[0].context_expr) == f"self.transformer.cache_context('{context}')"


def _is_scheduler_step(node: ast.stmt) -> bool:
    return text(node) == "latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]"
