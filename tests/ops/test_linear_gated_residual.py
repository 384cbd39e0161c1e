"""linear_gated_residual against float64 and against the modules of stock diffusers."""

import functools

import pytest
import torch
from diffusers.models.attention import FeedForward
from linear_cases import (
    BAD_LINEAR,
    DESCRIPTORS,
    DTYPES,
    MODEL,
    ODD_SHAPES,
    POINTERS,
    SHAPES,
    any_strides,
    by_descriptors,
    implementations,
    in_rows,
    layer,
    reads_only,
)

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from qwen_fast_kernels._matmul import dimensions
from qwen_fast_kernels.linear_gated_residual import (
    _linear_gated_residual_kernel,
    default_config,
    launch_linear_gated_residual,
    linear_gated_residual,
    linear_gated_residual_reference,
)
from qwen_fast_kernels.linear_gelu import linear_gelu
from support.canaries import Canaries

pytestmark = pytest.mark.usefixtures("nan_filled_empties")

IMPLEMENTATIONS = implementations(launch_linear_gated_residual, linear_gated_residual)
ANY_STRIDES = any_strides(launch_linear_gated_residual, linear_gated_residual)
LAUNCHES = [implementation for implementation in IMPLEMENTATIONS if implementation.id != "op"]

CONDITIONS, STEP = 5, 2
TOKEN_ROWS = {
    "the step's": lambda rows: None,
    "all their own": lambda rows: torch.arange(rows) * 3 % CONDITIONS,
    "some their own": lambda rows: torch.where(torch.arange(rows) % 3 == 1, -1, torch.arange(rows) % CONDITIONS),
}


def made(*args, **kwargs) -> dict:
    """Arguments by name; the gate is a part of one wide table `[T, streams, 6 N]`, and no two rows of it are near."""
    return dict(_made(*args, **kwargs))


@functools.cache
def _made(
    shape: tuple,
    dtype: torch.dtype,
    device: torch.device,
    txt_rows: int = 0,
    token_rows: str = "the step's",
    streams: int = 2,
    gate_dtype: torch.dtype | None = None,
    clip: bool = False,
) -> dict:
    rows, k, n = shape
    generator = torch.Generator().manual_seed(rows + 7 * k + 31 * n + 1)
    x, weight, bias = layer(shape, dtype, device)
    residual = torch.randn(rows, n, generator=generator).to(device=device, dtype=dtype)
    table = torch.randn(CONDITIONS, streams, 6 * n, generator=generator).to(device=device, dtype=gate_dtype or dtype)
    own = TOKEN_ROWS[token_rows](rows)
    return {
        "x": x,
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "gate": table[:, :, 2 * n : 3 * n],
        "step_index": torch.tensor([STEP], dtype=torch.int32, device=device),
        "txt_rows": txt_rows,
        "token_rows": None if own is None else own.to(device=device, dtype=torch.int32),
        "clip": clip,
    }


def assert_right(actual: torch.Tensor, inputs: dict) -> None:
    names = ("x", "weight", "bias", "residual", "gate")
    doubles = {name: None if inputs[name] is None else inputs[name].double() for name in names}
    oracle = linear_gated_residual_reference(**inputs | doubles)
    assert actual.is_contiguous()
    assert_within_budget(actual, linear_gated_residual_reference(**inputs), oracle)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, MODEL], ids=str)
def test_error_against_float64_is_within_budget(run, dtype, shape, device):
    inputs = made(shape, dtype, device, shape[0] // 2)
    assert_right(run(**inputs), inputs)


@pytest.mark.parametrize("run", ANY_STRIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_odd_sizes(run, dtype, shape, device):
    inputs = made(shape, dtype, device, 1, "some their own")
    assert_right(run(**inputs), inputs)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("token_rows", TOKEN_ROWS)
@pytest.mark.parametrize("txt_rows", [0, 5, 33, 64, 70])
def test_every_token_takes_the_gate_of_its_stream_and_condition(run, token_rows, txt_rows, device):
    inputs = made((70, 32, 40), torch.float32, device, txt_rows, token_rows)
    assert_right(run(**inputs), inputs)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("token_rows", TOKEN_ROWS)
def test_one_stream_and_a_gate_of_another_dtype(run, token_rows, device):
    """One stream serves text and image; an fp32 table is not rounded to the tokens' dtype on the way in."""
    inputs = made((33, 32, 40), torch.bfloat16, device, 7, token_rows, streams=1, gate_dtype=torch.float32)
    assert_right(run(**inputs), inputs)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_the_step_index_may_be_int64(run, device):
    inputs = made((33, 32, 40), torch.bfloat16, device, 7)
    expected = run(**inputs)
    assert_bit_equal(run(**inputs | {"step_index": inputs["step_index"].long()}), expected)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_without_a_bias(run, device):
    inputs = made((33, 64, 40), torch.bfloat16, device, 7) | {"bias": None}
    assert_right(run(**inputs), inputs)


def stock_sum(feed_forward: FeedForward, x: torch.Tensor, residual: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """As in QwenImageTransformerBlock.forward: `hidden_states + img_gate2 * img_mlp_output`."""
    return residual + gate * feed_forward(x)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_that_of_stock_diffusers(run, dtype, device):
    """The whole FeedForward of a block and the gated sum behind it, with linear_gelu before."""
    channels, rows = 32, 40
    torch.manual_seed(0)
    stock = FeedForward(dim=channels, dim_out=channels, activation_fn="gelu-approximate").to(device).requires_grad_(False)
    stock.to(dtype)
    first, second = stock.net[0].proj, stock.net[2]
    inputs = made((rows, channels, channels), dtype, device, 0)
    x, residual, gate = inputs["x"], inputs["residual"], inputs["gate"][STEP, 0]
    hidden = linear_gelu(x, first.weight, first.bias)
    actual = run(**inputs | {"x": hidden, "weight": second.weight, "bias": second.bias})
    in_dtype = stock_sum(stock, x, residual, gate)
    oracle = stock_sum(stock.double(), x.double(), residual.double(), gate.double())
    assert_within_budget(actual, in_dtype, oracle)


@pytest.mark.parametrize("run", ANY_STRIDES)
@pytest.mark.parametrize("padding", [(3, 5), (0, 1)], ids=str)
def test_rows_of_any_stride_and_alignment(run, padding, device):
    """What lies between the rows is NaN: the tails of K and N must not reach it."""
    inputs = made((33, 40, 35), torch.bfloat16, device, 7, "some their own")
    views = {name: in_rows(inputs[name], *padding) for name in ("x", "weight", "residual")}
    expected = run(**inputs)
    assert_bit_equal(run(**inputs | views), expected)
    assert_right(expected, inputs)


@pytest.mark.triton
def test_descriptors_of_strided_rows(device):
    launch = by_descriptors(launch_linear_gated_residual)
    inputs = made((33, 48, 35), torch.bfloat16, device, 7)
    views = {name: in_rows(inputs[name], 8, 8) for name in ("x", "weight", "residual")}
    assert dimensions(views["x"], views["weight"])[-1]
    assert_bit_equal(launch(**inputs | views), launch(**inputs))


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_values(run, dtype, device):
    largest = {torch.float16: 2e4, torch.bfloat16: 1e30, torch.float32: 1e30}[dtype]
    x, weight, bias = layer((33, 64, 40), dtype, device, largest)
    inputs = made((33, 64, 40), dtype, device, 7) | {"x": x, "weight": weight, "bias": bias}
    if dtype == torch.float16:  # the CPU's linear layer rounds: only what it can hold
        inputs |= {"x": x / 4, "bias": bias / 4}
    assert_right(run(**inputs), inputs)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_clip_is_stocks_and_keeps_nan(run, device):
    """In fp16 sums beyond 65504 stay finite, infinities become finite, and NaN stays."""
    inputs = made((33, 64, 40), torch.float16, device, 7, clip=True)
    residual = inputs["residual"] * 3e4
    residual[0, 0], residual[1, 1], residual[2, 2] = float("nan"), float("inf"), -float("inf")
    inputs |= {"residual": residual, "bias": inputs["bias"] * 1e4}
    actual, free = run(**inputs), run(**inputs | {"clip": False})
    assert free.isinf().sum() > 20 and actual[0, 0].isnan() and actual.isnan().sum() == 1
    assert_bit_equal(actual, free.clip(-65504, 65504))
    assert_right(actual, inputs)


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_clip_leaves_nan_and_the_rest_in_other_dtypes(run, device):
    inputs = made((33, 64, 40), torch.float32, device, 7, clip=True)
    residual = inputs["residual"].clone()
    residual[0, 0], residual[1, 1], residual[2, 2] = float("nan"), 7e4, -1e38
    actual = run(**inputs | {"residual": residual})
    assert actual[0, 0].isnan() and actual[1, 1] == 65504 and actual[2, 2] == -65504
    expected = run(**inputs)
    rest = torch.ones_like(actual, dtype=torch.bool)
    rest[0, 0] = rest[1, 1] = rest[2, 2] = False
    assert_bit_equal(actual[rest], expected[rest])


@pytest.mark.triton
@pytest.mark.parametrize("run", LAUNCHES)
@pytest.mark.parametrize("step", [-3, -1, CONDITIONS, CONDITIONS + 2])
def test_a_step_index_outside_the_table_gives_nan(run, step, device):
    inputs = made((33, 32, 40), torch.bfloat16, device, 7)
    room = torch.ones(CONDITIONS + 8, 2, 40, dtype=torch.bfloat16, device=device)  # ordinary numbers around the table
    inputs |= {"gate": room[4:-4], "step_index": torch.tensor([step], dtype=torch.int32, device=device)}
    assert run(**inputs).isnan().all()


@pytest.mark.triton
@pytest.mark.parametrize("run", LAUNCHES)
@pytest.mark.parametrize("step", [STEP, -1, CONDITIONS])
def test_a_token_row_outside_the_table_gives_nan(run, step, device):
    inputs = made((33, 32, 40), torch.bfloat16, device, 7, "some their own")
    room = torch.ones(CONDITIONS + 8, 2, 40, dtype=torch.bfloat16, device=device)
    own = inputs["token_rows"].clone()
    own[6], own[32] = CONDITIONS, CONDITIONS + 3
    inputs |= {"gate": room[4:-4], "token_rows": own}
    inputs["step_index"] = torch.tensor([step], dtype=torch.int32, device=device)
    outside = (own >= CONDITIONS) | ((own < 0) & (step != STEP))
    actual = run(**inputs)
    assert actual[outside].isnan().all() and actual[~outside].isfinite().all()


@pytest.mark.parametrize("step", [-1, CONDITIONS])
def test_the_op_on_the_cpu_refuses_rows_outside_the_table(step):
    inputs = made((4, 16, 8), torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"step_index: {step} "):
        linear_gated_residual(**inputs | {"step_index": torch.tensor([step])})
    own = torch.tensor([0, 1, CONDITIONS, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=f"token_rows: {CONDITIONS} "):
        linear_gated_residual(**inputs | {"token_rows": own})


@pytest.mark.parametrize("run", IMPLEMENTATIONS)
def test_inputs_stay_and_the_output_is_new(run, device):
    inputs = made((33, 64, 40), torch.bfloat16, device, 7, "some their own")
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    out = run(**inputs)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert out.untyped_storage().data_ptr() not in [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert_bit_equal(run(**inputs), out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks into the interpreter")
@pytest.mark.parametrize("run", LAUNCHES)
@pytest.mark.parametrize("token_rows", TOKEN_ROWS)
@pytest.mark.parametrize("step", [STEP, -1, CONDITIONS])
def test_no_load_leaves_the_inputs(run, token_rows, step, device):
    """Also those loads whose numbers nobody would see: of rows and columns behind the last, of conditions that are none."""
    inputs = made((33, 48, 72), torch.bfloat16, device, 7, token_rows)
    inputs |= {"gate": inputs["gate"].contiguous(), "step_index": torch.tensor([step], dtype=torch.int32, device=device)}
    with reads_only(*(value for value in inputs.values() if isinstance(value, torch.Tensor))):
        run(**inputs)


@pytest.mark.parametrize("run", LAUNCHES)
@pytest.mark.parametrize("token_rows", TOKEN_ROWS)
@pytest.mark.parametrize("shape", [(33, 48, 72), (1, 16, 1)], ids=str)
def test_nothing_outside_the_buffers_is_read(run, token_rows, shape, device):
    """Inputs between NaN: what is read outside them shows in the output."""
    inputs = made(shape, torch.bfloat16, device, 1, token_rows)
    canaries = Canaries()
    copies = {name: canaries.copy(inputs[name]) for name in ("x", "weight", "bias", "residual", "gate")}
    assert_bit_equal(run(**inputs | copies), run(**inputs))
    canaries.check()


@pytest.mark.triton
@pytest.mark.parametrize("token_rows", TOKEN_ROWS)
@pytest.mark.parametrize("rows, arch", [(135, 90), (70, 80), (13, 80), (13, 90)])
def test_the_default_configurations_are_right(rows, arch, token_rows, device):
    config = default_config(arch, 4096 if rows > 128 else rows, 3072, 12288, 2)
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] * 10 < arch:
        pytest.skip(f"a configuration of sm_{arch}")
    inputs = made((rows, 64, config["BLOCK_N"] + 5), torch.bfloat16, device, rows // 2, token_rows)
    assert_right(launch_linear_gated_residual(**inputs, config=config), inputs)


@pytest.mark.triton
def test_offsets_beyond_32_bits(one_far_program, device):
    """The last tiles of matrices whose elements lie more than 2^31 elements behind their start."""
    rows, k, n = 2**27 + 50, 16, 16
    config = POINTERS | {"BLOCK_N": 16, "BLOCK_K": 16, "PARTS": 1}
    near = made((50, k, n), torch.bfloat16, device, 20)
    expected = launch_linear_gated_residual(**near, config=config)
    out, x, residual = one_far_program(program=2**27 // config["BLOCK_M"], numel=rows * k, dtype=torch.bfloat16, count=3)
    x[2**31 :], residual[2**31 :] = near["x"].flatten(), near["residual"].flatten()
    gate = near["gate"]
    _linear_gated_residual_kernel[(1,)](
        out, x, near["weight"], k, k, rows, n, k, near["bias"], residual, n, gate, gate.stride(0), gate.stride(1), CONDITIONS,
        near["step_index"], None, 2**27 + 20, HAS_BIAS=True, HAS_TOKEN_ROWS=False, CLIP=False, EVEN_K=True, **config,
    )  # fmt: skip
    assert_bit_equal(out[2**31 :].view(50, n), expected)


GOOD = {
    "x": torch.zeros(4, 16),
    "weight": torch.zeros(8, 16),
    "bias": torch.zeros(8),
    "residual": torch.zeros(4, 8),
    "gate": torch.zeros(3, 2, 8),
    "step_index": torch.zeros(1, dtype=torch.int32),
}
BAD = BAD_LINEAR | {
    "residual of other rows": ("residual", torch.zeros(5, 8), r"residual: shape \(5, 8\)"),
    "residual that would broadcast": ("residual", torch.zeros(1, 8), r"residual: shape \(1, 8\)"),
    "transposed residual": ("residual", torch.zeros(8, 4).t(), r"residual: stride 4"),
    "fp64 residual": ("residual", torch.zeros(4, 8, dtype=torch.float64), r"residual: dtype torch.float64"),
    "residual elsewhere": ("residual", torch.zeros(4, 8, device="meta"), r"residual: on meta"),
    "flat gate": ("gate", torch.zeros(3, 8), r"gate: shape \(3, 8\)"),
    "three streams": ("gate", torch.zeros(3, 3, 8), r"gate: shape \(3, 3, 8\)"),
    "gate of other channels": ("gate", torch.zeros(3, 2, 7), r"gate: shape \(3, 2, 7\)"),
    "integer gate": ("gate", torch.zeros(3, 2, 8, dtype=torch.int32), r"gate: dtype torch.int32"),
    "gate elsewhere": ("gate", torch.zeros(3, 2, 8, device="meta"), r"gate: on meta"),
    "scalar index": ("step_index", torch.tensor(0), r"step_index: got \(\)"),
    "too many text rows": ("txt_rows", 5, r"txt_rows: 5 "),
    "negative text rows": ("txt_rows", -1, r"txt_rows: -1 "),
    "short token_rows": ("token_rows", torch.zeros(3, dtype=torch.int32), r"token_rows: got \(3,\)"),
    "int64 token_rows": ("token_rows", torch.zeros(4, dtype=torch.int64), r"token_rows: .*torch.int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    argument, value, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        linear_gated_residual(**GOOD | {argument: value})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(dtype, device):
    op = torch.ops.qwen_fast.linear_gated_residual.default
    inputs = made((13, 24, 7), dtype, device, 5, "some their own")
    torch.library.opcheck(op, tuple(inputs.values()))
    views = {name: in_rows(inputs[name], 3, 2) for name in ("x", "weight", "residual")}
    torch.library.opcheck(op, tuple((inputs | views | {"bias": None, "token_rows": None, "clip": True}).values()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_equals_eager(backend, device):
    inputs = made((33, 64, 40), torch.bfloat16, device, 7, "some their own")
    torch.compiler.reset()
    compiled = torch.compile(linear_gated_residual, fullgraph=True, backend=backend)
    assert_bit_equal(compiled(**inputs), linear_gated_residual(**inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("token_rows", ["the step's", "some their own"])
@pytest.mark.parametrize("k", [3072, 12288])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 13, 64, 300, 1024, 4109])
def test_both_main_loops_agree_at_the_models_shapes(rows, dtype, k, token_rows, device):
    inputs = made((rows, k, 3072), dtype, device, rows // 3, token_rows)
    actual = linear_gated_residual(**inputs)
    assert_right(actual, inputs)
    pointers = launch_linear_gated_residual(**inputs, config=POINTERS)
    assert_right(pointers, inputs)
    assert_bit_equal(linear_gated_residual(**inputs), actual)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS, None], ids=["pointers", "descriptors", "op"])
def test_a_captured_graph_replays_every_step(config, device):
    launch = functools.partial(launch_linear_gated_residual, config=config) if config else linear_gated_residual
    inputs = made((300, 512, 512), torch.bfloat16, device, 100)
    step_index = inputs["step_index"] = torch.zeros(1, dtype=torch.int32, device=device)
    launch(**inputs)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch(**inputs)
    for step in range(CONDITIONS):
        step_index.fill_(step)
        graph.replay()
        assert_bit_equal(out, launch(**inputs))
