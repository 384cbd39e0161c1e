"""Which attention "auto" takes: the fastest measured one, the same in every process, and never a kernel that is wrong."""

import itertools
from unittest.mock import Mock

import pytest
import torch

from qwen_fast.common import proofs
from qwen_fast.transformer import attention
from qwen_fast.transformer.layout import build_layout
from qwen_fast_kernels._kept import Kept

CPU = torch.device("cpu")
SHAPE = (CPU, torch.float32, 2, 16)


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a call by name, in place of the time that passes; "flash" is there on a CPU too."""
    seconds, now = {"flash": 1.0, "triton": 1.0}, [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(attention.time, "perf_counter", lambda: now[0])

    def counted(name, function):
        def call(*args, **kwargs):
            now[0] += seconds[name]
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(attention, "joint_attention", counted("triton", attention.joint_attention))
    monkeypatch.setattr(attention, "_scaled_dot_product", counted("flash", attention._scaled_dot_product))
    monkeypatch.setattr(attention, "MEASURED", {})
    attention.fastest.cache_clear()
    yield seconds
    attention.fastest.cache_clear()


@pytest.mark.parametrize(("flash", "triton", "fastest"), [(1.0, 1.0, "flash"), (1.02, 1.0, "flash"), (1.04, 1.0, "triton")])
def test_within_three_per_cent_an_order_decides(clock, flash, triton, fastest):
    clock |= {"flash": flash, "triton": triton}
    found = attention._measured(*SHAPE, (64,))
    assert found["fastest"] == fastest and found["ms"] == {"flash": 1e3 * flash, "triton": 1e3 * triton}
    assert "cudnn" in found["refused"]  # torch has none for a CPU


def test_two_sequences_are_two_calls_of_torchs_and_one_of_ours(clock):
    found = attention._measured(*SHAPE, (64, 40))
    assert found["ms"] == {"flash": 2e3, "triton": 1e3} and found["fastest"] == "triton"


def test_a_choice_is_kept_for_other_processes(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "kept", lambda device: Kept(device, tmp_path))
    clock["triton"] = 0.5
    first = attention.fastest(*SHAPE, True, 256)
    assert first["fastest"] == "triton"
    attention.fastest.cache_clear()  # as another process begins
    clock["triton"] = 50.0
    assert attention.fastest(*SHAPE, True, 256) == first
    assert attention.fastest(*SHAPE, False, 256)["fastest"] == "flash"  # another kind is measured
    (line, _) = attention.described()
    assert line == "attention of two sequences of 256 tokens, 2 x 16, torch.float32 on cpu: triton (" + line.split("(", 1)[1]


def test_a_kernel_that_is_wrong_is_no_candidate(clock, monkeypatch):
    monkeypatch.setattr(proofs, "attention_is_right", lambda *_: False)
    clock["triton"] = 0.1
    found = attention._measured(*SHAPE, (64,))
    assert found["fastest"] == "flash" and found["refused"]["triton"] == "wrong on this GPU"


def test_too_little_memory_to_measure_is_no_failure_and_is_not_kept(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(proofs, "kept", lambda device: Kept(device, tmp_path))
    short = torch.OutOfMemoryError("CUDA out of memory.")
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_scaled_dot_product", Mock(side_effect=short))
        found = attention.fastest(*SHAPE, True, 256)
    assert found["fastest"] == "triton" and found["refused"] == {"all": "too little memory to measure"}
    attention.fastest.cache_clear()
    clock["triton"] = 50.0
    assert attention.fastest(*SHAPE, True, 256)["fastest"] == "flash"


def test_where_nothing_runs_the_reasons_are_said(clock, monkeypatch):
    monkeypatch.setattr(proofs, "attention_is_right", lambda *_: False)
    monkeypatch.setattr(attention, "_TRIED", ("cudnn", "triton"))
    with pytest.raises(RuntimeError, match="no attention runs on cpu in torch.float32: .*wrong on this GPU"):
        attention._measured(*SHAPE, (64,))


class Rope(torch.nn.Module):
    def forward(self, shapes, max_txt_seq_len, device):
        image = sum(f * h * w for (entry,) in [shapes] for f, h, w in entry)
        return tuple(torch.ones(rows, 8, dtype=torch.complex64, device=device) for rows in (image, max_txt_seq_len))


@pytest.mark.parametrize("texts", [(5,), (5, 3), (0, 7, 4), (1, 2, 3, 4), (6, 6)])
def test_rows_of_attention_are_a_permutation_with_each_sequence_in_one_piece(texts):
    """Against the definition: which tokens are whose."""
    images = tuple(4 + 2 * n for n in range(len(texts)))
    layout = build_layout(Rope(), [((1, 2, size // 2),) for size in images], texts, CPU)
    assert sorted(layout.places.tolist()) == list(range(sum(texts) + sum(images)))
    places = layout.places.tolist()
    starts = [0, *itertools.accumulate(texts)], [sum(texts), *itertools.accumulate(images, initial=sum(texts))][1:]
    for n, (first, end) in enumerate(layout.spans.tolist()):
        text = range(starts[0][n], starts[0][n] + texts[n])
        image = range(starts[1][n], starts[1][n] + images[n])
        assert sorted(places[row] for row in (*text, *image)) == list(range(first, end))
        assert layout.pieces[n] == slice(first, end)
    joint = torch.arange(layout.rows, dtype=torch.float32)[:, None]
    attended = torch.empty_like(joint)
    attended[layout.places.long()] = joint
    for one in ([attended], [attended[own] for own in layout.pieces]):
        assert torch.equal(layout.text_of(one), joint[: layout.txt_rows])
        image = torch.empty(layout.img_rows, 1)
        for own, piece, rows in layout.images_of(one):
            image[own] = piece[rows]
        assert torch.equal(image, joint[layout.txt_rows :])
    pairs = -(-len(texts) // 2)
    assert len(layout.images) == pairs  # one product for the images of a pair


@pytest.mark.parametrize("lengths", [(5, 3), (0, 2), (2, 0)])
def test_padding_lies_outside_the_spans_and_texts_beside_their_images(lengths):
    layout = build_layout(Rope(), [((1, 2, 2),)] * 2, (5, 4), CPU)
    spans = layout.spans_of(lengths).tolist()
    for n, (first, end) in enumerate(spans):
        start = layout.text_start(n, lengths[n])
        text = layout.places[start : start + lengths[n]].tolist()
        image = layout.places[layout.txt_rows + 4 * n : layout.txt_rows + 4 * n + 4].tolist()
        assert sorted(text + image) == list(range(first, end))
