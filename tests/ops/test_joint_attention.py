"""joint_attention against float64, against each sequence alone, and against the attention of stock diffusers."""

import contextvars
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BAD, HALF, LAYOUTS, ONE_SEQUENCE, PACKED, Problem, bodies, config_of, packed, problem
from diffusers.models.attention_dispatch import dispatch_attention_fn

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels.joint_attention import (
    HEAD_DIMS,
    SPECIALISES,
    default_config,
    fits_descriptors,
    joint_attention,
    launch_joint_attention,
)
from support.canaries import Canaries, between_canaries

ROOT = Path(__file__).resolve().parents[2]
attention = sys.modules["qwen_fast_kernels.joint_attention"]  # the package's attribute of this name is the operator
pytestmark = pytest.mark.usefixtures("nan_filled_empties")

launch = between_canaries(launch_joint_attention)
BODIES = bodies(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
IMPLEMENTATIONS = [pytest.param(body, marks=pytest.mark.triton) for body in BODIES] + ["op"]


def run(implementation: str, given: Problem) -> torch.Tensor:
    if implementation == "op":
        return joint_attention(*given)
    return launch(*given, config=config_of(implementation, given))


def check(implementation: str, given: Problem) -> torch.Tensor:
    out = run(implementation, given)
    assert out.is_contiguous()
    assert_within_budget(out, given.reference(), given.oracle())
    return out


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("length", ONE_SEQUENCE)
def test_one_sequence(implementation, length, device):
    check(implementation, problem((length,), torch.bfloat16, device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(implementation, dtype, device):
    check(implementation, problem((101,), dtype, device, heads=2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [dim for dim in HEAD_DIMS if dim != 128])
def test_other_head_dims(implementation, dim, dtype, device):
    check(implementation, problem((52, 45), dtype, device, dim=dim, heads=2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", PACKED, ids=str)
def test_packed_sequences_are_what_each_is_alone(implementation, lengths, device):
    given = problem(lengths, torch.bfloat16, device)
    out = check(implementation, given)
    for n in [n for n, length in enumerate(lengths) if length]:
        assert_bit_equal(out[given.rows_of(n)], run(implementation, given.alone(n)))


# Rows in front of, between and behind the sequences: of a padded prompt, of whole tiles, of none at all.
GAPS = [
    ((31, 64, 72), (0, 11, 1, 2)),
    ((36, 65), (150, 37, 300)),
    ((0, 1, 0), (0, 31, 63, 2)),
    ((101,), (20, 0)),
    ((70,), (0, 9)),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("lengths", "gaps"), GAPS, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_gaps_are_no_keys_and_get_zeros(implementation, lengths, gaps, masked, device):
    given = problem(lengths, torch.bfloat16, device, gaps=gaps)
    gap = given.gaps()
    assert int(gap.sum()) == sum(gaps)
    for name in ("query", "key", "value"):
        getattr(given, name)[gap] = float("nan")
    if masked:
        given.key_mask = torch.rand(len(gap), generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    out = check(implementation, given)
    assert (out[gap] == 0).all()
    for n in [n for n, length in enumerate(lengths) if length]:
        assert_bit_equal(out[given.rows_of(n)], run(implementation, given.alone(n)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_sequence_has_a_row(implementation, device):
    given = problem((0, 0), torch.bfloat16, device, gaps=(5, 0, 70))
    assert (check(implementation, given) == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("holes", ["random", "first rows", "last rows", "first block", "all of one", "everything"])
def test_masked_keys(implementation, holes, device):
    given = problem((183, 75), torch.bfloat16, device)
    rows = torch.arange(given.query.shape[0], device=device)
    given.key_mask = {
        "random": (rows * 7919) % 5 > 1,
        "first rows": ~((rows < 33) | ((rows >= 183) & (rows < 192))),
        "last rows": (rows < 33) | ((rows >= 183) & (rows < 192)),
        "first block": (rows >= 140) & (rows != 200),
        "all of one": rows >= 183,
        "everything": torch.zeros_like(rows, dtype=torch.bool),
    }[holes]
    given.key[~given.key_mask] *= 30.0  # would take all the weight
    given.value[~given.key_mask] = 3e4
    out = check(implementation, given)
    if holes == "everything":
        assert (out == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, device):
    given = problem((79, 61), torch.bfloat16, device, heads=2, gaps=(0, 3, 0), layout=layout)
    aligned = fits_descriptors(given.query, given.key, given.value)
    assert aligned == (layout != "offset")
    if implementation in ("descriptors", "specialised") and not aligned:
        pytest.skip("no descriptor reaches it, so default_config gives pointers")
    plain = replace(given, **{name: getattr(given, name).contiguous() for name in ("query", "key", "value")})
    assert_bit_equal(check(implementation, given), run(implementation, plain))


@pytest.mark.triton
def test_tensors_that_descriptors_do_not_reach(device):
    given = problem((79, 61), torch.bfloat16, device, heads=2, layout="offset")
    config = default_config(90, 128, 2, aligned=False)
    assert_within_budget(launch(*given, config=config), given.reference(), given.oracle())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_scale(implementation, scale, device):
    check(implementation, problem((149,), torch.bfloat16, device, scale=scale))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_scores(implementation, dtype, device):
    """Scores in the thousands, whose exponential overflows, the largest of a row in a late block."""
    given = problem((261,), dtype, device, magnitude=12.0)
    given.key[-20:] *= 2.0
    check(implementation, given)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_scores_give_the_mean(implementation, device):
    given = problem((131,), torch.bfloat16, device)
    given.query.fill_(1.0), given.key.fill_(1.0)
    check(implementation, given)
    given.value.fill_(1.0)
    assert (run(implementation, given) == 1.0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_stays_in_its_sequence(implementation, dtype, device):
    """The last tile of a sequence reaches into the next one, the first of the next begins behind it: neither shows."""
    given = problem((79, 52, 30), dtype, device)
    alone = [run(implementation, given.alone(n)) for n in (0, 2)]
    rows = given.rows_of(1)
    for bad in (float("nan"), float("inf")):
        given.query[rows], given.key[rows], given.value[rows] = bad, bad, bad
        out = run(implementation, given)
        assert_bit_equal(out[given.rows_of(0)], alone[0])
        assert_bit_equal(out[given.rows_of(2)], alone[1])
        assert out[rows].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_stay_and_the_output_is_new(implementation, device):
    given = problem((79, 61), torch.bfloat16, device)
    inputs = [x for x in given if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in inputs]
    out = run(implementation, given)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
    assert out.untyped_storage().data_ptr() not in [x.untyped_storage().data_ptr() for x in inputs]
    assert_bit_equal(run(implementation, given), out)


FAR = 2**31 - 1
WRONG_SPANS = [
    *([(-9, 10**9)], [(10**9, 5)], [(-FAR - 1, FAR)], [(40, -40)], [(20, 20)], [(FAR, FAR)], [(60, 10**6)]),
    *([(30, 70), (10, 90)], [(50, 60), (-5, 20)], [(0, 100), (10**9, -(10**9)), (99, 101)], [(90, 95), (FAR, FAR), (3, 2)]),
]


@pytest.mark.triton
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("spans", WRONG_SPANS, ids=str)
def test_wrong_spans_touch_nothing_else(body, spans, device):
    """Inputs between NaN: what is read outside of them shows in the output, what is written in the canaries."""
    given = problem((100,), torch.bfloat16, device)
    canaries = Canaries()
    given = replace(given, **{name: canaries.copy(getattr(given, name)) for name in ("query", "key", "value")})
    given.spans = torch.tensor(spans, dtype=torch.int32, device=device)
    assert run(body, replace(given, max_seqlen=10**6)).isfinite().all()
    canaries.check()


@pytest.mark.triton
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("longest", [0, 100, 128])
def test_rows_beyond_the_longest_sequence_are_nan(body, longest, device):
    given = problem((150, 153), torch.bfloat16, device, gaps=(3, 0, 20))
    out = run(body, replace(given, max_seqlen=longest))
    nan = out.isnan().all(dim=(1, 2)).nonzero().flatten().tolist()
    assert nan == [*range(131, 153), *range(281, 306)]  # a tile of 128 queries is always whole
    covered = torch.ones(out.shape[0], dtype=torch.bool)
    covered[nan] = False
    assert_bit_equal(out[covered], run(body, given)[covered])


@pytest.mark.triton
@pytest.mark.parametrize("body", BODIES)
def test_offsets_beyond_32_bits(body, one_far_program, monkeypatch):
    """A sequence that begins more than 2^31 elements behind the start of each tensor, and gaps beside it."""
    given = problem((200,), torch.bfloat16, torch.device("cpu"))
    rows = 2**31 // 128 + 1000
    far = [x.view(rows, 1, 128) for x in one_far_program(program=0, numel=rows * 128, dtype=torch.bfloat16, count=4)]
    own = slice(rows - 220, rows - 20)
    for x, near in zip(far[:3], (given.query, given.key, given.value), strict=True):
        x[own] = near
    far[3][own.start - 32 :] = float("nan")
    monkeypatch.setattr(torch, "empty", lambda *_, **__: far[3])
    # Of the gap in front only the last rows, or gigabytes of zeros would be written.
    fill = attention._fill
    monkeypatch.setattr(
        attention,
        "_fill",
        lambda out, row, first, end, *rest: fill(out, row, attention.tl.maximum(first, end - 32), end, *rest),
    )
    far_problem = replace(given, query=far[0], key=far[1], value=far[2], spans=torch.tensor([[own.start, own.stop]]).int())
    out = launch_joint_attention(*far_problem, config=config_of(body, given))
    monkeypatch.undo()
    assert_bit_equal(out[own].clone(), run(body, given))
    assert (out[own.start - 32 : own.start] == 0).all() and (out[own.stop :] == 0).all()


@pytest.mark.triton
def test_an_allocator_of_the_callers_stays(device, monkeypatch):
    triton = pytest.importorskip("triton")
    allocator = contextvars.ContextVar("allocator", default="the caller's")  # as Triton keeps it, from 3.6 on at the latest
    seen = []
    monkeypatch.setattr(triton, "set_allocator", lambda new: (seen.append(new), allocator.set(new)))
    given = problem((8,), torch.bfloat16, torch.device("cpu"))
    if torch.cuda.is_available():
        pytest.skip("the launch would need what is only recorded here")
    for body in BODIES:
        run(body, given)
    assert len(seen) == len(BODIES) - 1 and allocator.get() == "the caller's"
    scratch = seen[0](384, 128, None)
    assert scratch.numel() * scratch.element_size() == 384 and scratch.device == given.query.device


# Compiles in a process of its own, since this one interprets. Prompts of 1 to 200 tokens, two sequences, padded or not.
PROMPTS = """
import random, torch
from benchmarks.operators.cases import Maker
from benchmarks.compiler.offline import compile_only
from qwen_fast_kernels.joint_attention import default_config, launch_joint_attention
random.seed(0)
for arch in (80, 90):
    with compile_only(arch) as log:
        make, config = Maker("cuda", fake=True), default_config(arch, 128, 2)
        for _ in range(200):
            text = random.randint(1, 200), random.randint(1, 200)
            qkv = [make.normal(4096 * 2 + sum(text), 24, 128, dtype=torch.bfloat16) for _ in range(3)]
            launch_joint_attention(*qkv, make.values([[0, 1], [1, 2]]), 4096 + max(text), config=config)
    print(len(log), len({one.kernel.hash for one in log}))
"""


@pytest.mark.triton
def test_prompts_of_200_lengths_share_one_compiled_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run([sys.executable, "-c", PROMPTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["200", "1", "200", "1"]


@pytest.mark.parametrize(("capability", "masked"), itertools.product([75, 80, 86, 89, 90, 100, 120, 121], [False, True]))
def test_descriptors_are_for_architectures_that_have_them(capability, masked):
    for dim in HEAD_DIMS:
        config, unaligned = (default_config(capability, dim, 2, masked=masked, aligned=aligned) for aligned in (True, False))
        assert config["DESCRIPTORS"] == (90 <= capability < 120)
        assert config["WARP_SPECIALIZE"] == (capability == 90 and not masked and SPECIALISES)
        assert not unaligned["DESCRIPTORS"] and not unaligned["WARP_SPECIALIZE"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_sequence_on_the_cpu_is_stocks_to_the_bit_and_copies_nothing(dtype):
    given = problem((286,), dtype, torch.device("cpu"), heads=2)
    text, image = (
        [x[rows].unsqueeze(0) for x in (given.query, given.key, given.value)] for rows in (slice(30), slice(30, None))
    )
    stock = dispatch_attention_fn(*(torch.cat(pair, dim=1) for pair in zip(text, image, strict=True)))
    with mock.patch.object(torch, "cat", side_effect=AssertionError("a copy")):
        assert_bit_equal(joint_attention(*given), stock.squeeze(0))


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    joint_attention(**packed())
    with pytest.raises(ValueError, match=message):
        joint_attention(**packed(**{argument: value}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype, device):
    key_mask = torch.arange(32, device=device) % 3 > 0
    for layout in ("buffer", "mixed"):
        given = problem((12, 17), dtype, device, dim=32, heads=2, gaps=(0, 2, 1), layout=layout)
        for optional in ({}, {"key_mask": key_mask, "scale": 0.3}):
            torch.library.opcheck(torch.ops.qwen_fast.joint_attention.default, tuple(replace(given, **optional)))
    one = problem((13,), dtype, device, dim=32, heads=2, layout="head-major")
    torch.library.opcheck(torch.ops.qwen_fast.joint_attention.default, tuple(one))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    torch.compiler.reset()
    compiled = torch.compile(joint_attention, fullgraph=True, backend=backend, dynamic=True)
    for lengths, gaps in [((52,), (0, 0)), ((12, 51), (0, 0, 0)), ((14, 62), (0, 3, 1))]:
        given = problem(lengths, torch.bfloat16, device, dim=32, heads=2, gaps=gaps)
        assert_bit_equal(compiled(*given), joint_attention(*given))


def attention_in_chunks(given: Problem) -> torch.Tensor:
    """One sequence in float64, a head at a time."""
    q, k, v = (x.transpose(0, 1) for x in (given.query, given.key, given.value))
    heads = [F.scaled_dot_product_attention(*(x[h][None].double() for x in (q, k, v))) for h in range(q.shape[0])]
    return torch.cat(heads).transpose(0, 1).contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_models_size(body, dtype, device):
    given = problem((4126,), dtype, device, heads=24)
    q, k, v = (x.transpose(0, 1)[None] for x in (given.query, given.key, given.value))
    reference = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).contiguous()
    out = run(body, given)
    assert_within_budget(out, reference, attention_in_chunks(given))
    for _ in range(20):  # a tile that is overwritten while it is read gives other numbers each time
        assert_bit_equal(run(body, given), out)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_captured_graph_serves_other_lengths(masked, device):
    """One capture, replayed for prompts of other lengths; every replay bit-equal to a call."""
    given = problem((1088, 1064), torch.bfloat16, device, heads=24, gaps=(0, 0, 24))
    given.key_mask = torch.ones(given.query.shape[0], dtype=torch.bool, device=device) if masked else None
    joint_attention(*given)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = joint_attention(*given)
    for spans in ([[0, 1088], [1088, 2152]], [[0, 1054], [1088, 2176]], [[34, 1088], [1151, 2176]], [[5, 6], [6, 6]]):
        given.spans.copy_(torch.tensor(spans, dtype=torch.int32))
        for _ in range(2):
            graph.replay()
            assert_bit_equal(out, joint_attention(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("body", BODIES)
def test_more_than_2_to_the_31_elements(body, device):
    given = problem((300,), torch.bfloat16, device, heads=24)
    rows = 2**31 // (24 * 128) + 1000
    far = [torch.zeros(rows, 24, 128, dtype=torch.bfloat16, device=device) for _ in range(3)]
    for x, near in zip(far, (given.query, given.key, given.value), strict=True):
        x[-300:] = near
    far_problem = replace(given, query=far[0], key=far[1], value=far[2], spans=given.spans + (rows - 300))
    out = launch_joint_attention(*far_problem, config=config_of(body, given))
    assert_bit_equal(out[-300:], run(body, given))
    assert (out[:-300] == 0).all()
