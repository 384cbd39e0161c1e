"""joint_attention against float64, against each sequence alone, and against the attention of stock diffusers."""

import contextvars
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BAD, HALF, LAYOUTS, ONE_SEQUENCE, PACKED, Problem, bodies, config_of, packed, problem
from diffusers.models.attention_dispatch import dispatch_attention_fn

from budget import assert_bit_equal, assert_within_budget
from canaries import Canaries, between_canaries
from conftest import HAS_CUDA
from qwen_fast_kernels._flash import fits_descriptors
from qwen_fast_kernels.joint_attention import HEAD_DIMS, default_config, joint_attention, launch_joint_attention

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

launch = between_canaries(launch_joint_attention)
BODIES = bodies(torch.device("cuda" if HAS_CUDA else "cpu"))
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
@pytest.mark.parametrize(("txt", "img"), ONE_SEQUENCE, ids=str)
def test_one_sequence(implementation, txt, img, device):
    check(implementation, problem(txt, img, torch.bfloat16, device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes(implementation, dtype, device):
    check(implementation, problem((31,), (70,), dtype, device, heads=2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [dim for dim in HEAD_DIMS if dim != 128])
def test_other_head_dims(implementation, dim, dtype, device):
    check(implementation, problem((7, 12), (45, 33), dtype, device, dim=dim, heads=2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("txt", "img"), PACKED, ids=str)
def test_packed_sequences_are_what_each_is_alone(implementation, txt, img, device):
    given = problem(txt, img, torch.bfloat16, device)
    out = check(implementation, given)
    for n in range(len(txt)):
        assert_bit_equal(out[given.rows_of(n)], run(implementation, given.alone(n)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("used", "masked"), [((20, 64, 0), False), ((0, 1, 0), False), ((31, 63, 2), True)])
def test_padding_is_no_key_and_gets_zeros(implementation, used, masked, device):
    seqused = torch.tensor(used, dtype=torch.int32, device=device)
    given = problem((31, 64, 2), (5, 70, 0), torch.bfloat16, device, seqused_txt=seqused)
    padding = torch.cat([given.rows_of(n)[:length][u:] for n, (length, u) in enumerate(zip((31, 64, 2), used, strict=True))])
    given.key[padding] *= 30.0  # would take all the weight
    given.value[padding] = 3e4
    if masked:
        given.key_mask = torch.rand(given.query.shape[0], generator=torch.Generator().manual_seed(1)).to(device) < 0.5
    out = check(implementation, given)
    assert (out[padding] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_of_the_only_sequence(implementation, device):
    given = problem((31,), (40,), torch.bfloat16, device, seqused_txt=torch.tensor([20], dtype=torch.int32, device=device))
    given.key[20:31] *= 30.0
    assert (check(implementation, given)[20:31] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("holes", ["random", "all text", "all image", "first block", "everything"])
def test_masked_keys(implementation, holes, device):
    given = problem((33, 9), (150, 66), torch.bfloat16, device)
    rows = torch.arange(given.query.shape[0], device=device)
    given.key_mask = {
        "random": (rows * 7919) % 5 > 1,
        "all text": rows >= given.txt_rows,
        "all image": rows < given.txt_rows,
        "first block": (rows >= 33) & ((rows < given.txt_rows) | (rows >= given.txt_rows + 140)),
        "everything": torch.zeros_like(rows, dtype=torch.bool),
    }[holes]
    given.key[~given.key_mask] *= 30.0
    given.value[~given.key_mask] = 3e4
    out = check(implementation, given)
    if holes == "everything":
        assert (out == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(implementation, layout, device):
    given = problem((9, 21), (70, 40), torch.bfloat16, device, heads=2, layout=layout)
    aligned = fits_descriptors(given.query, given.key, given.value)
    assert aligned == (layout != "offset")
    if implementation in ("descriptors", "specialised") and not aligned:
        pytest.skip("no descriptor reaches it, so default_config gives pointers")
    plain = replace(given, **{name: getattr(given, name).contiguous() for name in ("query", "key", "value")})
    assert_bit_equal(check(implementation, given), run(implementation, plain))


@pytest.mark.triton
def test_tensors_that_descriptors_do_not_reach(device):
    given = problem((9, 21), (70, 40), torch.bfloat16, device, heads=2, layout="offset")
    config = default_config(90, 128, 2, aligned=False)
    assert_within_budget(launch(*given, config=config), given.reference(), given.oracle())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_scale(implementation, scale, device):
    check(implementation, problem((9,), (140,), torch.bfloat16, device, scale=scale))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_large_scores(implementation, dtype, device):
    """Scores in the thousands, whose exponential overflows, the largest of a row in a late block."""
    given = problem((31,), (230,), dtype, device, magnitude=12.0)
    given.key[-20:] *= 2.0
    check(implementation, given)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_scores_give_the_mean(implementation, device):
    given = problem((31,), (100,), torch.bfloat16, device)
    given.query.fill_(1.0), given.key.fill_(1.0)
    check(implementation, given)
    given.value.fill_(1.0)
    assert (run(implementation, given) == 1.0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_no_sequence_get_zeros(implementation, device):
    given = problem((9, 0, 30), (70, 1, 20), torch.bfloat16, device, spare=(150, 37))
    out = check(implementation, given)
    assert (out[39:189] == 0).all() and (out[-37:] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_stays_in_its_sequence(implementation, device):
    given = problem((9, 12), (70, 40), torch.bfloat16, device)
    alone = run(implementation, given.alone(0))
    rows = given.rows_of(1)
    given.query[rows], given.key[rows] = float("nan"), float("nan")
    # A descriptor, which the operator takes where the GPU has them, reads the rows behind a span too: value has to be finite.
    if implementation == "pointers" or (implementation == "op" and device.type == "cpu"):
        given.value[rows] = float("nan")
    out = run(implementation, given)
    assert_bit_equal(out[given.rows_of(0)], alone)
    assert out[rows].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inputs_stay_and_the_output_is_new(implementation, device):
    given = problem((9, 21), (70, 40), torch.bfloat16, device)
    inputs = [x for x in given if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in inputs]
    out = run(implementation, given)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))
    assert out.untyped_storage().data_ptr() not in [x.untyped_storage().data_ptr() for x in inputs]
    assert_bit_equal(run(implementation, given), out)


WRONG_LENGTHS = [(-9, 10**9), (10**9, 5), (-(2**31), 2**31 - 1), (40, -40), (20, 20)]


@pytest.mark.triton
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("start", "end"), WRONG_LENGTHS)
def test_wrong_lengths_touch_nothing_else(body, start, end, device):
    """Inputs between NaN: what is read outside of them shows in the output, what is written in the canaries."""
    given = problem((30,), (70,), torch.bfloat16, device)
    canaries = Canaries()
    given = replace(given, **{name: canaries.copy(getattr(given, name)) for name in ("query", "key", "value")})
    wrong = torch.tensor([start, end], dtype=torch.int32, device=device)
    for name, others in (("cu_seqlens_txt", slice(30, None)), ("cu_seqlens_img", slice(30))):
        for seqused in (None, wrong[1:]):
            changes = {name: wrong, "seqused_txt": seqused, "max_seqlen_txt": 10**6, "max_seqlen_img": 10**6}
            out = run(body, replace(given, **changes))
            # Rows before the first sequence stay unwritten.
            assert out[slice(None) if start <= 0 else others].isfinite().all()
    canaries.check()


@pytest.mark.triton
@pytest.mark.parametrize("body", BODIES)
def test_rows_beyond_the_longest_sequence_are_nan(body, device):
    given = problem((140, 3), (10, 150), torch.bfloat16, device)
    out = run(body, replace(given, max_seqlen_txt=100, max_seqlen_img=128))
    nan = out.isnan().all(dim=(1, 2)).nonzero().flatten().tolist()
    assert nan == [*range(128, 140), *range(281, 303)]  # a tile of 128 queries is always whole
    covered = torch.ones(out.shape[0], dtype=torch.bool)
    covered[nan] = False
    assert_bit_equal(out[covered], run(body, given)[covered])


@pytest.mark.triton
@pytest.mark.parametrize("body", BODIES)
def test_offsets_beyond_32_bits(body, one_far_program, monkeypatch):
    """A sequence that begins more than 2^31 elements behind the start of each tensor."""
    given = problem((0,), (200,), torch.bfloat16, torch.device("cpu"))
    rows = 2**31 // 128 + 1000
    far = [x.view(rows, 1, 128) for x in one_far_program(program=0, numel=rows * 128, dtype=torch.bfloat16, count=4)]
    for x, near in zip(far[:3], (given.query, given.key, given.value), strict=True):
        x[-200:] = near
    monkeypatch.setattr(torch, "empty", lambda *_, **__: far[3])
    cu_seqlens_img = torch.tensor([rows - 200, rows], dtype=torch.int32)
    far_problem = replace(given, query=far[0], key=far[1], value=far[2], cu_seqlens_img=cu_seqlens_img)
    out = launch_joint_attention(*far_problem, config=config_of(body, given))
    monkeypatch.undo()
    assert_bit_equal(out[-200:].clone(), run(body, given))


@pytest.mark.triton
def test_an_allocator_of_the_callers_stays(device, monkeypatch):
    triton = pytest.importorskip("triton")
    allocator = contextvars.ContextVar("allocator", default="the caller's")  # as Triton keeps it, from 3.6 on at the latest
    seen = []
    monkeypatch.setattr(triton, "set_allocator", lambda new: (seen.append(new), allocator.set(new)))
    given = problem((3,), (5,), torch.bfloat16, torch.device("cpu"))
    if HAS_CUDA:
        pytest.skip("the launch would need what is only recorded here")
    for body in BODIES:
        run(body, given)
    assert len(seen) == 1 and allocator.get() == "the caller's"
    scratch = seen[0](384, 128, None)
    assert scratch.numel() * scratch.element_size() == 384 and scratch.device == given.query.device


@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 120, 121])
@pytest.mark.parametrize("masked", [False, True])
def test_descriptors_are_for_architectures_that_have_them(capability, masked):
    for dim in HEAD_DIMS:
        config = default_config(capability, dim, 2, masked=masked)
        assert config["DESCRIPTORS"] == (90 <= capability < 120)
        assert config["WARP_SPECIALIZE"] == (capability == 90 and not masked)
        unaligned = default_config(capability, dim, 2, masked=masked, aligned=False)
        assert not unaligned["DESCRIPTORS"] and not unaligned["WARP_SPECIALIZE"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_one_sequence_on_the_cpu_is_stocks_to_the_bit_and_copies_nothing(dtype):
    given = problem((30,), (256,), dtype, torch.device("cpu"), heads=2)
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
    seqused = torch.tensor([7, 5], dtype=torch.int32, device=device)
    key_mask = torch.arange(29, device=device) % 3 > 0
    for layout in ("buffer", "mixed"):
        given = problem((7, 6), (5, 11), dtype, device, dim=32, heads=2, layout=layout)
        for optional in ({}, {"seqused_txt": seqused, "key_mask": key_mask, "scale": 0.3}):
            torch.library.opcheck(torch.ops.qwen_fast.joint_attention.default, tuple(replace(given, **optional)))
    one = problem((7,), (6,), dtype, device, dim=32, heads=2, layout="head-major")
    torch.library.opcheck(torch.ops.qwen_fast.joint_attention.default, tuple(one))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    torch.compiler.reset()
    compiled = torch.compile(joint_attention, fullgraph=True, backend=backend, dynamic=True)
    for txt, img in [((7,), (45,)), ((7, 6), (5, 45)), ((9, 2), (5, 60))]:
        given = problem(txt, img, torch.bfloat16, device, dim=32, heads=2)
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
    given = problem((30,), (4096,), dtype, device, heads=24)
    q, k, v = (x.transpose(0, 1)[None] for x in (given.query, given.key, given.value))
    reference = F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).contiguous()
    assert_within_budget(run(body, given), reference, attention_in_chunks(given))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_a_captured_graph_serves_other_lengths(masked, device):
    """One capture, replayed for prompts of other lengths; every replay bit-equal to a call."""
    given = problem((64, 40), (1024, 1024), torch.bfloat16, device, heads=24, spare=(24, 0))
    given.seqused_txt = torch.tensor([64, 40], dtype=torch.int32, device=device)
    given.key_mask = torch.ones(given.query.shape[0], dtype=torch.bool, device=device) if masked else None
    joint_attention(*given)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = joint_attention(*given)
    for lengths in ((64, 40), (30, 64), (1, 0)):
        given.cu_seqlens_txt[1:] = torch.tensor(lengths, dtype=torch.int32, device=device).cumsum(0)
        given.seqused_txt[:] = torch.tensor(lengths, dtype=torch.int32, device=device)
        for _ in range(2):
            graph.replay()
            assert_bit_equal(out, joint_attention(*given))


@pytest.mark.gpu
@pytest.mark.parametrize("body", BODIES)
def test_more_than_2_to_the_31_elements(body, device):
    given = problem((0,), (300,), torch.bfloat16, device, heads=24)
    rows = 2**31 // (24 * 128) + 1000
    far = [torch.zeros(rows, 24, 128, dtype=torch.bfloat16, device=device) for _ in range(3)]
    for x, near in zip(far, (given.query, given.key, given.value), strict=True):
        x[-300:] = near
    cu_seqlens_img = torch.tensor([0, rows - 300, rows], dtype=torch.int32, device=device)
    changes = {"cu_seqlens_txt": torch.zeros_like(cu_seqlens_img), "cu_seqlens_img": cu_seqlens_img}
    out = launch_joint_attention(
        *replace(given, query=far[0], key=far[1], value=far[2], **changes), config=config_of(body, given)
    )
    assert_bit_equal(out[-300:], run(body, given))
