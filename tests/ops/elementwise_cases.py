"""What the tests of the operators on modulated token rows share: arguments, layouts, and the tests that all pass."""

import importlib
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from benchmarks.shared.budget import assert_bit_equal, assert_within_budget
from support.canaries import Canaries, between_canaries

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CONDITIONS, STEP = 5, 2

# Tokens, channels, text tokens: none, some and all text, tails of a tile in either stream, odd and real widths.
SHAPES = [(1, 64, 0), (1, 64, 1), (37, 64, 19), (21, 7, 5), (5, 1, 2), (9, 512, 9), (3, 3072, 1), (2, 5120, 0)]

# Which row a token takes: the step's, or one of its own.
TOKEN_ROWS = {
    "all their own": lambda rows: torch.arange(rows) % CONDITIONS,
    "some their own": lambda rows: torch.where(torch.arange(rows) % 3 == 1, -1, torch.arange(rows) * 7 % CONDITIONS),
    "none": lambda rows: torch.full((rows,), -1),
    "samples": lambda rows: torch.arange(rows) * 3 // rows,
    "condition images": lambda rows: torch.where(torch.arange(rows) < rows * 2 // 3, -1, 0),
}

both = pytest.mark.parametrize("implementation", [pytest.param("launch", marks=pytest.mark.triton), "op"])


@dataclass
class RowOp:
    """One operator on modulated token rows, and the names of its tensors."""

    name: str
    tokens: tuple[str, ...]
    tables: tuple[str, ...]

    @property
    def module(self) -> types.ModuleType:
        return importlib.import_module(f"qwen_fast_kernels.{self.name}")

    @property
    def op(self) -> Callable:
        return getattr(self.module, self.name)

    @property
    def reference(self) -> Callable:
        return getattr(self.module, f"{self.name}_reference")

    def launch(self, **inputs):
        first = inputs[self.tokens[0]]
        major, minor = torch.cuda.get_device_capability(first.device) if first.is_cuda else (9, 0)
        config = self.module.default_config(10 * major + minor, first.shape[1], first.element_size())
        return between_canaries(getattr(self.module, f"launch_{self.name}"), config=config)(**inputs)

    def inputs(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        token_rows: str | None = None,
        table_dtype: torch.dtype | None = None,
        streams: int = 2,
    ) -> dict:
        """Arguments by name. The tables are views of one `[T, layers, streams, 6, C]`, and no row of it is near another."""
        rows, channels, txt_rows = shape
        generator = torch.Generator().manual_seed(rows * channels + txt_rows)
        made = {name: torch.randn(rows, channels, generator=generator).to(dtype) for name in self.tokens}
        every = torch.randn(CONDITIONS, 3, streams, 6, channels, generator=generator).to(table_dtype or dtype)
        every = every.to(device)
        made |= {name: every[:, 1, :, place] for place, name in enumerate(self.tables, start=2)}
        made |= {"step_index": torch.tensor([STEP], dtype=torch.int32), "txt_rows": txt_rows}
        if token_rows is not None:
            made["token_rows"] = TOKEN_ROWS[token_rows](rows).to(torch.int32)
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in made.items()}

    def check(self, actual, inputs: dict) -> None:
        """Within the budget around the float64 reference."""
        double = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        references, oracles = self.reference(**inputs), self.reference(**double)
        for out, reference, oracle in zip(*map(each, (actual, references, oracles)), strict=True):
            assert out.is_contiguous()
            assert_within_budget(out, reference, oracle)


def each(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def in_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same rows elsewhere: `tokens` of a wider tensor, behind an odd offset, or between other rows."""
    rows, channels = tensor.shape
    if layout == "offset":
        return torch.cat([tensor.new_zeros(3), tensor.flatten()])[3:].view(rows, channels)
    if layout == "strided":
        return torch.cat([tensor + 1, tensor, tensor + 2], dim=1)[:, channels : 2 * channels]
    assert layout == "odd stride"
    return torch.cat([tensor, tensor[:, :1] + 1], dim=1)[:, :channels]


def last_element(tensor: torch.Tensor) -> int:
    """Its address, where `Tensor.data_ptr` gives that of the first."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + extent * tensor.element_size()


class RowOpTests:
    """Inherited by the tests of each operator, which set `row_op`."""

    row_op: RowOp

    @pytest.fixture
    def accesses(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[torch.Tensor]]:
        """The addresses that interpreted kernels load and store, without those that their masks leave out."""
        if torch.cuda.is_available():
            pytest.skip("natively compute-sanitizer takes its place")
        from triton.runtime.interpreter import InterpreterBuilder

        found = {"loads": [], "stores": []}
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def recorded_load(self, pointers, mask, *rest):
            found["loads"].append(torch.from_numpy(pointers.data[mask.data].astype("int64")))
            return load(self, pointers, mask, *rest)

        def recorded_store(self, pointers, value, mask, *rest):
            found["stores"].append(torch.from_numpy(pointers.data[mask.data].astype("int64")))
            return store(self, pointers, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recorded_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", recorded_store)
        return found

    @both
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_error_against_float64_is_within_budget(self, implementation, shape, dtype, device):
        inputs = self.row_op.inputs(shape, dtype, device)
        self.row_op.check(getattr(self.row_op, implementation)(**inputs), inputs)

    @both
    @pytest.mark.parametrize("token_rows", TOKEN_ROWS)
    @pytest.mark.parametrize("shape", [(53, 64, 20), (17, 64, 0), (6, 3072, 2)], ids=str)
    def test_each_token_takes_its_row(self, implementation, shape, token_rows, device):
        inputs = self.row_op.inputs(shape, torch.bfloat16, device, token_rows)
        self.row_op.check(getattr(self.row_op, implementation)(**inputs), inputs)

    @both
    @pytest.mark.parametrize("txt_rows", [0, 19, 37])
    def test_one_stream_serves_both(self, implementation, txt_rows, device):
        inputs = self.row_op.inputs((37, 64, txt_rows), torch.bfloat16, device, streams=1)
        self.row_op.check(getattr(self.row_op, implementation)(**inputs), inputs)
        two = self.row_op.inputs((37, 64, txt_rows), torch.bfloat16, device)  # one table of two streams among others
        inputs[self.row_op.tables[-1]] = two[self.row_op.tables[-1]]
        self.row_op.check(getattr(self.row_op, implementation)(**inputs), inputs)

    @both
    @pytest.mark.parametrize(
        "dtype, table_dtype",
        [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)],
        ids=str,
    )
    def test_tables_of_another_dtype(self, implementation, dtype, table_dtype, device):
        inputs = self.row_op.inputs((37, 64, 19), dtype, device, table_dtype=table_dtype)
        self.row_op.check(getattr(self.row_op, implementation)(**inputs), inputs)

    @both
    @pytest.mark.parametrize("layout", ["offset", "strided", "odd stride"])
    def test_layouts(self, implementation, layout, device):
        for dtype, txt_rows in [(torch.bfloat16, 19), (torch.float32, 0)]:
            inputs = self.row_op.inputs((37, 64, txt_rows), dtype, device)
            expected = getattr(self.row_op, implementation)(**inputs)
            for names in [(self.row_op.tokens[0],), (self.row_op.tokens[-1],), self.row_op.tokens]:
                odd = inputs | {name: in_layout(inputs[name], layout) for name in names}
                self.assert_same(getattr(self.row_op, implementation)(**odd), expected)

    @both
    def test_rows_that_share_memory_and_tables_of_every_stride(self, implementation, device):
        inputs = self.row_op.inputs((37, 64, 19), torch.bfloat16, device)
        expected = getattr(self.row_op, implementation)(**inputs)
        tables = {name: inputs[name].contiguous() for name in self.row_op.tables}
        self.assert_same(getattr(self.row_op, implementation)(**inputs | tables), expected)
        tables = {name: in_layout(table.reshape(-1, 64), "offset").view(table.shape) for name, table in tables.items()}
        self.assert_same(getattr(self.row_op, implementation)(**inputs | tables), expected)
        streams_first = {name: table.transpose(0, 1).contiguous().transpose(0, 1) for name, table in tables.items()}
        self.assert_same(getattr(self.row_op, implementation)(**inputs | streams_first), expected)
        shared = {name: inputs[name][:1].expand(37, 64) for name in self.row_op.tokens}
        self.row_op.check(getattr(self.row_op, implementation)(**inputs | shared), inputs | shared)

    @staticmethod
    def assert_same(actual, expected) -> None:
        for one, other in zip(each(actual), each(expected), strict=True):
            assert one.is_contiguous()
            assert_bit_equal(one, other)

    @both
    def test_every_step_and_both_index_dtypes(self, implementation, device):
        inputs = self.row_op.inputs((3, 64, 1), torch.float32, device)
        for step, dtype in itertools.product((0, CONDITIONS - 1), (torch.int32, torch.int64)):
            inputs["step_index"] = torch.tensor([step], dtype=dtype, device=device)
            self.row_op.check(getattr(self.row_op, implementation)(**inputs), inputs)

    @both
    @pytest.mark.parametrize("channels", [7, 3072])
    def test_no_tokens(self, implementation, channels, device):
        for token_rows in (None, "none"):
            inputs = self.row_op.inputs((0, channels, 0), torch.bfloat16, device, token_rows)
            for out in each(getattr(self.row_op, implementation)(**inputs)):
                assert out.shape == (0, channels) and out.dtype == torch.bfloat16

    @both
    def test_inputs_stay_and_the_outputs_are_new(self, implementation, device):
        inputs = self.row_op.inputs((37, 64, 19), torch.bfloat16, device, "some their own")
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        outputs = each(getattr(self.row_op, implementation)(**inputs))
        assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))
        storages = [tensor.untyped_storage().data_ptr() for tensor in (*tensors, *outputs)]
        assert len({*storages[len(tensors) :]} - {*storages[: len(tensors)]}) == len(outputs)
        self.assert_same(getattr(self.row_op, implementation)(**inputs), outputs)

    @pytest.mark.triton
    def test_a_row_outside_the_tables_gives_nan_and_is_not_read(self, device):
        """The tables are the middle rows of larger ones: a read outside them would give ordinary numbers."""
        inputs = self.row_op.inputs((37, 64, 19), torch.bfloat16, device)
        whole = inputs | {name: inputs[name][1:-1] for name in self.row_op.tables}
        for step in (-1, CONDITIONS - 2):
            outside = whole | {"step_index": torch.tensor([step], dtype=torch.int32, device=device)}
            assert all(out.isnan().all() for out in each(self.row_op.launch(**outside)))
        token_rows = torch.full((37,), -1, dtype=torch.int32, device=device)
        token_rows[[3, 30]] = torch.tensor([CONDITIONS - 2, 2**30], dtype=torch.int32, device=device)
        expected = each(self.row_op.launch(**whole))
        for out, without in zip(each(self.row_op.launch(**whole, token_rows=token_rows)), expected, strict=True):
            assert out[[3, 30]].isnan().all()
            rest = (token_rows < 0).nonzero()[:, 0]
            assert_bit_equal(out[rest], without[rest])

    def test_the_op_on_the_cpu_refuses_a_row_outside_the_tables(self):
        inputs = self.row_op.inputs((4, 64, 2), torch.float32, torch.device("cpu"))
        for step in (-1, CONDITIONS):
            with pytest.raises(ValueError, match=f"step_index: {step} "):
                self.row_op.op(**inputs | {"step_index": torch.tensor([step])})
        with pytest.raises(ValueError, match=f"token_rows: {CONDITIONS} "):
            self.row_op.op(**inputs, token_rows=torch.tensor([0, -1, CONDITIONS, 1], dtype=torch.int32))

    @pytest.mark.triton
    @pytest.mark.parametrize("shape", [(37, 64, 19), (21, 7, 5), (3, 5120, 1), (1, 1, 0)], ids=str)
    def test_nothing_outside_the_buffers_is_touched(self, shape, device):
        """Inputs between NaN too: what is read outside them shows in the output, what is written in the canaries."""
        inputs = self.row_op.inputs(shape, torch.bfloat16, device)
        canaries = Canaries()
        guarded = inputs | {name: canaries.copy(inputs[name]) for name in self.row_op.tokens + self.row_op.tables}
        outputs = self.row_op.launch(**guarded)
        canaries.check()
        self.assert_same(outputs, self.row_op.launch(**inputs))

    @pytest.mark.triton
    @pytest.mark.parametrize("token_rows", [None, "some their own"])
    @pytest.mark.parametrize("shape", [(37, 64, 19), (21, 7, 5), (3, 5120, 1), (1, 1, 0)], ids=str)
    def test_loads_stay_in_the_inputs_and_stores_are_made_once(self, shape, token_rows, accesses, device):
        """By address: later masks hide what a load read, and later programs what one stored in their place."""
        inputs = self.row_op.inputs(shape, torch.bfloat16, device, token_rows)
        tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
        outputs = each(self.row_op.launch(**inputs))
        first, last = (
            torch.tensor([address(tensor) for tensor in tensors]) for address in (torch.Tensor.data_ptr, last_element)
        )
        loads, stores = (torch.cat(accesses[kind]) for kind in ("loads", "stores"))
        assert len(loads) and ((loads[:, None] >= first) & (loads[:, None] <= last)).any(dim=1).all()
        assert len(stores) == len(stores.unique()) == sum(out.numel() for out in outputs)

    @pytest.mark.triton
    def test_offsets_beyond_32_bits(self, one_far_program, monkeypatch, device):
        """One program whose token, and whose table rows, lie more than 2^31 elements behind the start of each tensor."""
        op, channels = self.row_op, 3072
        row = 2**31 // channels + 1
        inputs = op.inputs((1, channels, 0), torch.bfloat16, device)
        expected = each(op.launch(**inputs))
        outputs, numel = len(expected), (row + 1) * channels
        far = one_far_program(row, numel, torch.bfloat16, len(op.tokens) + len(op.tables) + outputs)
        far_outputs = [far.pop().view(row + 1, channels) for _ in range(outputs)]
        for name in op.tokens:
            tensor, inputs[name] = inputs[name], far.pop().view(row + 1, channels)
            inputs[name][row] = tensor[0]
        for name in op.tables:
            # The last of two table rows, 2^31 elements behind the first.
            table, inputs[name] = inputs[name], far.pop().as_strided((2, 1, channels), (2**31, channels, 1))
            inputs[name][1, 0] = table[STEP, 0]
        inputs["step_index"] = torch.tensor([1], dtype=torch.int32)
        monkeypatch.setattr(op.module, "row_grid", lambda *_: (1,))
        monkeypatch.setattr(torch, "empty", lambda *_, **__: far_outputs.pop(0))
        config = op.module.default_config(90, channels, 2)
        actual = each(getattr(op.module, f"launch_{op.name}")(**inputs, config=config))
        for out, single in zip(actual, expected, strict=True):
            assert_bit_equal(out[row:], single)

    def test_opcheck(self, device):
        overload = getattr(torch.ops.qwen_fast, self.row_op.name).default
        torch.library.opcheck(overload, (), self.row_op.inputs((13, 7, 5), torch.bfloat16, device))
        inputs = self.row_op.inputs((13, 7, 5), torch.float32, device, "some their own")
        first = self.row_op.tokens[0]
        torch.library.opcheck(overload, (), inputs | {first: in_layout(inputs[first], "strided")})

    @pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
    def test_compiled_equals_eager(self, backend, device):
        torch.compiler.reset()
        compiled = torch.compile(self.row_op.op, fullgraph=True, backend=backend)
        for token_rows in (None, "some their own"):
            for txt_rows in (7, 0, 9):
                inputs = self.row_op.inputs((20, 64, txt_rows), torch.bfloat16, device, token_rows)
                self.assert_same(compiled(**inputs), self.row_op.op(**inputs))

    @pytest.mark.gpu
    def test_a_captured_graph_replays_every_step(self, device):
        inputs = self.row_op.inputs((4352, 3072, 256), torch.bfloat16, device, "condition images")
        self.row_op.op(**inputs)  # compiles outside the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = each(self.row_op.op(**inputs))
        for step in range(CONDITIONS):
            inputs["step_index"].fill_(step)
            graph.replay()
            self.assert_same(outputs, self.row_op.op(**inputs))

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", [(4352, 3072, 256), (128, 3072, 128), (1040, 512, 16)], ids=str)
    def test_real_sizes(self, shape, dtype, device):
        for token_rows in (None, "condition images"):
            inputs = self.row_op.inputs(shape, dtype, device, token_rows)
            self.row_op.check(self.row_op.op(**inputs), inputs)

    @pytest.mark.gpu
    def test_more_than_2_to_the_31_elements(self, device):
        rows = 2**31 // 3072 + 20
        inputs = self.row_op.inputs((20, 3072, 0), torch.bfloat16, device)
        expected = each(self.row_op.op(**inputs))
        for name in self.row_op.tokens:
            tensor, inputs[name] = inputs[name], torch.zeros(rows, 3072, dtype=torch.bfloat16, device=device)
            inputs[name][-20:] = tensor
        for out, last in zip(each(self.row_op.op(**inputs)), expected, strict=True):
            assert_bit_equal(out[-20:], last)


def bad_arguments(row_op: RowOp) -> dict[str, tuple[str, object, str]]:
    """Case -> argument, value and message, beside fp32 tokens `[4, 64]` and tables `[5, 2, 64]`."""
    meta, first = torch.device("meta"), row_op.tokens[0]
    cases = {
        f"{first} of integers": (first, torch.zeros(4, 64, dtype=torch.int32), f"{first}: dtype torch.int32"),
        f"{first} of rank 3": (first, torch.zeros(1, 4, 64), rf"{first}: shape \(1, 4, 64\)"),
        f"{first} without channels": (first, torch.zeros(4, 0), rf"{first}: shape \(4, 0\)"),
        "more text than tokens": ("txt_rows", 5, r"txt_rows: 5 is outside \[0, 4\]"),
        "negative text": ("txt_rows", -1, "txt_rows: -1 "),
        "two indices": ("step_index", torch.tensor([0, 1]), r"step_index: got \(2,\)"),
        "fp32 index": ("step_index", torch.tensor([0.0]), "step_index: .*torch.float32"),
        "index elsewhere": ("step_index", torch.zeros(1, dtype=torch.int32, device=meta), "step_index: on meta"),
        "int64 token_rows": ("token_rows", torch.zeros(4, dtype=torch.int64), "token_rows: .*torch.int64"),
        "too few token_rows": ("token_rows", torch.zeros(3, dtype=torch.int32), r"token_rows: got \(3,\)"),
        "strided token_rows": ("token_rows", torch.zeros(8, dtype=torch.int32)[::2], "token_rows: .*contiguous"),
        "token_rows elsewhere": ("token_rows", torch.zeros(4, dtype=torch.int32, device=meta), "token_rows: on meta"),
    }
    for name in row_op.tokens:
        cases[f"transposed {name}"] = (name, torch.zeros(64, 4).T, f"{name}: stride 4 between channels")
    for name in row_op.tokens[1:]:
        cases[f"{name} of another shape"] = (name, torch.zeros(1, 64), rf"{name}: got \(1, 64\)")
        cases[f"{name} of another dtype"] = (name, torch.zeros(4, 64).half(), f"{name}: got .*torch.float16")
        cases[f"{name} elsewhere"] = (name, torch.zeros(4, 64, device=meta), f"{name}: on meta")
    for name in row_op.tables:
        cases |= {
            f"{name} matrix": (name, torch.zeros(5, 64), rf"{name}: shape \(5, 64\)"),
            f"{name} of three streams": (name, torch.zeros(5, 3, 64), rf"{name}: shape \(5, 3, 64\)"),
            f"{name} of other channels": (name, torch.zeros(5, 2, 32), rf"{name}: shape \(5, 2, 32\)"),
            f"empty {name}": (name, torch.zeros(0, 2, 64), rf"{name}: shape \(0, 2, 64\)"),
            f"{name} of integers": (name, torch.zeros(5, 2, 64, dtype=torch.int32), f"{name}: dtype torch.int32"),
            f"fp8 {name}": (name, torch.zeros(5, 2, 64).to(torch.float8_e4m3fn), f"{name}: dtype torch.float8"),
            f"{name} with apart channels": (name, torch.zeros(5, 64, 2).mT, f"{name}: stride 2 between channels"),
            f"{name} elsewhere": (name, torch.zeros(5, 2, 64, device=meta), f"{name}: on meta"),
        }
    for name in row_op.tables[1:]:
        cases[f"{name} of other conditions"] = (name, torch.zeros(4, 2, 64), f"{name}: 4 table rows")
    return cases
