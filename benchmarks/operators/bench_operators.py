"""Every operator against its reference, torch.compile of that reference, and stock diffusers' own code for the same job.

    pytest benchmarks/operators/bench_operators.py --benchmark-only [-k "linear_gelu and not compiled"]

Before anything is timed its result is compared with the float64 reference; a wrong one fails and shows no time. On a GPU
times are the device's, without the launch, on buffers that its L2 cache does not hold.
"""

import ast
import functools
import inspect
import math
import textwrap
from collections.abc import Callable, Sequence
from types import CodeType

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageRMS_norm
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock, apply_rotary_emb_qwen

from qwen_fast.schedule.configs import QWEN_IMAGE_SCHEDULER_CONFIG
from qwen_fast_kernels._triton import capability

from ..shared.budget import assert_within_budget, in_float64, relative_errors, results
from .cases import CASES, Maker, OperatorCase
from .suite import Run, clock, sets
from .work import Piece

# Stock ----------------------------------------------------------------------------------------------------------------


@functools.cache
def stock_lines(function: Callable, *wanted: tuple[str, str]) -> CodeType:
    """The lines of a diffusers function that assign to a name and mention another, in order: for code that is no function.

    Its results are in the namespace that the code is run in.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    lines = []
    for target, mentioned in wanted:
        found = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            and any(isinstance(name, ast.Name) and name.id == target for name in node.targets)
            and any(isinstance(name, ast.Name) and name.id == mentioned for name in ast.walk(node.value))
        ]
        if not found:
            pytest.skip(f"this diffusers has no line that assigns {target} from {mentioned} in {function.__qualname__}")
        lines.append(found[0])
    return compile(ast.Module(lines, type_ignores=[]), f"<{function.__qualname__}>", "exec")


def execute(code: CodeType, **names) -> dict:
    exec(code, names)
    return names


def parameter(tensor: torch.Tensor | None) -> torch.nn.Parameter | None:
    return None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)


def block(heads: int, head_dim: int) -> QwenImageTransformerBlock:
    """Without weights; whoever needs one sets it."""
    with torch.device("meta"):
        return QwenImageTransformerBlock(dim=heads * head_dim, num_attention_heads=heads, attention_head_dim=head_dim)


def streams(txt_rows: int, *tensors: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(text, image) of each, with stock's batch dimension."""
    return [(tensor[None, :txt_rows], tensor[None, txt_rows:]) for tensor in tensors]


def of_step(table: torch.Tensor, step_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(text, image) row of a modulation table, `[1, C]` each."""
    return table[step_index.item(), -1][None], table[step_index.item(), 0][None]


def joined(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return torch.cat([text[0], image[0]])


def modulation(shift, scale, gate, step_index) -> list[torch.Tensor]:
    """(text, image) of what `_modulate` takes apart again."""
    return [torch.cat(parts, dim=-1) for parts in zip(*(of_step(t, step_index) for t in (shift, scale, gate)), strict=True)]


def stock_flow_match_schedule(steps, sigmas, shift, *_) -> tuple[Run, Callable]:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE_SCHEDULER_CONFIG)

    def run():
        # As QwenImagePipeline and its retrieve_timesteps do.
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=math.log(shift), device=sigmas.device)
        return scheduler.sigmas, scheduler.timesteps

    return run, lambda result: result


def scheduler_at(sigmas: torch.Tensor) -> FlowMatchEulerDiscreteScheduler:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(QWEN_IMAGE_SCHEDULER_CONFIG)
    scheduler.sigmas, scheduler.timesteps = sigmas, 1000 * sigmas[:-1]
    scheduler.set_begin_index(0)
    return scheduler


def stock_euler_step(latents, velocity, sigmas, _step_index) -> tuple[Run, Callable]:
    scheduler = scheduler_at(sigmas)

    def run():
        scheduler._step_index = 0
        return scheduler.step(velocity, scheduler.timesteps[0], latents, return_dict=False)[0]

    return run, lambda result: result


def guided_step(scheduler: FlowMatchEulerDiscreteScheduler) -> Callable:
    """What stock's loop does behind its model: CFG, norm rescale and `scheduler.step`, from names to the next latents."""
    combined = [("comb_pred", "noise_pred"), ("cond_norm", "noise_pred"), ("noise_norm", "comb_pred")]
    code = stock_lines(QwenImagePipeline.__call__, *combined, ("noise_pred", "comb_pred"), ("latents", "noise_pred"))
    pipe = QwenImagePipeline(scheduler, None, None, None, None)

    def step(latents, cond, uncond, timestep, scale):
        names = {"noise_pred": cond, "neg_noise_pred": uncond, "latents": latents, "true_cfg_scale": scale}
        return execute(code, self=pipe, t=timestep, torch=torch, **names)["latents"]

    return step


def stock_cfg_euler_step(latents, cond, uncond, sigmas, _step_index, scale) -> tuple[Run, Callable]:
    scheduler, scale = scheduler_at(sigmas), scale.item()
    step = guided_step(scheduler)

    def run():
        scheduler._step_index = 0
        return step(latents, cond, uncond, scheduler.timesteps[0], scale)

    return run, lambda result: result


def stock_ada_layer_norm(x, shift, scale, step_index, txt_rows, *_) -> tuple[Run, Callable]:
    stock, ((text, image),) = block(1, x.shape[1]), streams(txt_rows, x)
    text_mod, image_mod = modulation(shift, scale, shift, step_index)

    def run():
        return stock._modulate(stock.txt_norm1(text), text_mod)[0], stock._modulate(stock.img_norm1(image), image_mod)[0]

    return run, lambda result: joined(*result)


def gated(which: str, residual, gate, step_index, txt_rows) -> Callable:
    """Stock's gated residual behind a block's attention ("1") or MLP ("2"): (text, image) branches to (text, image)."""
    code = stock_lines(
        QwenImageTransformerBlock.forward,
        ("encoder_hidden_states", f"txt_gate{which}"),
        ("hidden_states", f"img_gate{which}"),
    )
    output = {"1": "attn_output", "2": "mlp_output"}[which]
    ((text, image),) = streams(txt_rows, residual)
    text_gate, image_gate = (row[:, None] for row in of_step(gate, step_index))

    def run(text_branch, image_branch):
        gates = {f"img_gate{which}": image_gate, f"txt_gate{which}": text_gate}
        branches = {f"img_{output}": image_branch, f"txt_{output}": text_branch}
        names = execute(code, hidden_states=image, encoder_hidden_states=text, **gates, **branches)
        return names["encoder_hidden_states"], names["hidden_states"]

    return run


def stock_gated_residual(residual, branch, gate, step_index, txt_rows, *_) -> tuple[Run, Callable]:
    (branches,), run = streams(txt_rows, branch), gated("1", residual, gate, step_index, txt_rows)
    return lambda: run(*branches), lambda result: joined(*result)


def stock_gated_residual_ada_layer_norm(residual, branch, gate, shift, scale, step_index, txt_rows, *_) -> tuple[Run, Callable]:
    add_gated, _ = stock_gated_residual(residual, branch, gate, step_index, txt_rows)
    stock = block(1, residual.shape[1])
    text_mod, image_mod = modulation(shift, scale, shift, step_index)

    def run():
        text, image = add_gated()
        normed = stock._modulate(stock.txt_norm2(text), text_mod)[0], stock._modulate(stock.img_norm2(image), image_mod)[0]
        return text, image, *normed

    return run, lambda result: (joined(*result[:2]), joined(*result[2:]))


def stock_qk_norm_rope(
    query, key, norm_q, norm_k, norm_added_q, norm_added_k, rope, txt_rows, eps, value, text, places
) -> tuple[Run, Callable]:
    """With stock's concatenations of text and image, which put the text rows before the attention."""
    attention = block(*query.shape[1:]).attn
    norms = {"norm_q": norm_q, "norm_k": norm_k, "norm_added_q": norm_added_q, "norm_added_k": norm_added_k}
    for name, weight in norms.items():
        getattr(attention, name).weight = parameter(weight)
    order = places.long()
    texts, images = text.unsqueeze(1), [rows[order[txt_rows:]][None] for rows in (query, key, value)]
    frequencies = torch.view_as_complex(rope.unflatten(-1, (-1, 2)))
    txt_freqs, img_freqs = frequencies[:txt_rows], frequencies[txt_rows:]

    def run():
        txt_query = apply_rotary_emb_qwen(attention.norm_added_q(texts[0]), txt_freqs, use_real=False)
        txt_key = apply_rotary_emb_qwen(attention.norm_added_k(texts[1]), txt_freqs, use_real=False)
        img_query = apply_rotary_emb_qwen(attention.norm_q(images[0]), img_freqs, use_real=False)
        img_key = apply_rotary_emb_qwen(attention.norm_k(images[1]), img_freqs, use_real=False)
        pairs = (txt_query, img_query), (txt_key, img_key), (texts[2], images[2])
        return tuple(torch.cat(pair, dim=1) for pair in pairs)

    return run, lambda result: tuple(torch.empty_like(rows[0]).index_copy_(0, order, rows[0]) for rows in result)


def stock_joint_attention(query, key, value, *_) -> tuple[Run, Callable]:
    def run():
        return dispatch_attention_fn(query[None], key[None], value[None], dropout_p=0.0, is_causal=False)

    return run, lambda result: result[0]


def stock_linear_gelu(x, weight, bias) -> tuple[Run, Callable]:
    gelu = block(1, x.shape[1]).img_mlp.net[0]
    gelu.proj.weight, gelu.proj.bias = parameter(weight), parameter(bias)
    return lambda: gelu(x[None]), lambda result: result[0]


def stock_linear_gated_residual(x, weight, bias, residual, gate, step_index, txt_rows, *_) -> tuple[Run, Callable]:
    linear = block(1, residual.shape[1]).img_mlp.net[2]
    linear.weight, linear.bias = parameter(weight), parameter(bias)
    ((text, image),), run = streams(txt_rows, x), gated("2", residual, gate, step_index, txt_rows)
    return lambda: run(linear(text), linear(image)), lambda result: joined(*result)


def stock_rms_norm_silu(x, gamma, x_bias, residual, silu) -> tuple[Run, Callable]:
    norm = QwenImageRMS_norm(x.shape[1], images=False)
    norm.gamma = parameter(gamma.view(-1, 1, 1, 1))
    picture, before = (None if rows is None else rows.T[None, :, None, None].contiguous() for rows in (x, residual))

    def run():
        branch = picture if x_bias is None else picture + x_bias.view(-1, 1, 1, 1)
        normed = norm(branch if before is None else branch + before)
        return torch.nn.functional.silu(normed) if silu else normed

    return run, lambda result: result[0, :, 0, 0].T


# Measurements ---------------------------------------------------------------------------------------------------------


def variants() -> list:
    """(case, variant). Stock takes one sequence; "kernel" is Triton's where the operator may choose another library."""
    return [
        # Stock computes the schedule on the host, whose work a device's clock does not see.
        pytest.param(case, variant, id=f"{case.op}-{case.name}-{variant}", marks=clock(host=case.op == "flow_match_schedule"))
        for case in CASES
        if case.measured
        for variant in ("op", "kernel", "reference", "compiled", "stock")
        if variant != "stock" or len(case.size.img) == 1 or case.op.endswith("euler_step")
        if variant != "stock" or "ranks" not in case.variant  # PEFT computes what is given here as `low`
        if variant != "kernel" or case.op.startswith("linear")
    ]


@functools.cache
def compiled(reference: Callable) -> Callable:
    """Compiled once for all cases of an operator."""
    return torch.compile(reference)


def subject(case: OperatorCase, variant: str, arguments: tuple) -> tuple[Run, Callable]:
    """What is timed, and what makes its result comparable."""
    if variant == "stock":
        return globals()[f"stock_{case.op}"](*arguments)
    if variant == "kernel":
        config = case.config(capability(arguments[0].device), arguments)
        return lambda: case.launch(arguments, config), lambda result: result
    if variant == "op":
        function = case.operator()
    else:
        function = getattr(case.module(), f"{case.op}_reference")
        function = compiled(function) if variant == "compiled" else function
    return functools.partial(function, *arguments), lambda result: result


def checked(actual: Sequence, reference: Sequence, oracle: Sequence) -> dict[str, float]:
    """The largest relative errors over the tensors; AssertionError if one exceeds its budget."""
    found = []
    for ours, same, exact in zip(actual, reference, oracle, strict=True):
        assert_within_budget(ours, same, exact)
        found.append(relative_errors(ours, exact))
    return {name: max(one[name] for one in found) for name in found[0]}


@pytest.mark.parametrize(("case", "variant"), variants())
@torch.no_grad()
def test_speed(benchmark, measure, case, variant, device):
    if variant == "kernel" and device.type == "cpu":
        pytest.skip("Triton's kernel needs a CUDA device")
    case = case if device.type == "cuda" else case.small()
    arguments = case.arguments(Maker(device))
    piece = Piece(case.op, *case.traffic(arguments))
    run, comparable = subject(case, variant, arguments)
    others = [case.arguments(Maker(device, seed=seed)) for seed in range(1, sets(device, piece.bytes))]

    def check(result: object) -> dict[str, float]:
        fresh = case.arguments(Maker(device))
        wide = in_float64(fresh)  # before the reference changes what it may
        reference = results(case.op, case.reference(*fresh), fresh)
        oracle = results(case.op, case.reference(*wide), fresh)
        return checked(results(case.op, comparable(result), arguments), reference, [exact.double() for exact in oracle])

    benchmark.group = f"{case} {device.type}"
    shapes = [list(argument.shape) for argument in arguments if isinstance(argument, torch.Tensor)]
    info = {"variant": variant, "size": str(case.size), "shapes": shapes}
    measure([run, *(subject(case, variant, other)[0] for other in others)], check, [piece], dtype=case.dtype, **info)
