"""The family on the emulated device: the CPU's pictures, and no wait from the second step on but where stock waits."""

import pytest

import qwen_fast
from support.emulated_cuda import StepsBar, notes
from support.family import MEMBERS, small_references

# diffusers' inpainting looks each step's timestep up and adds noise to the picture anew.
WAITS = ("pipeline_qwenimage_edit_inpaint.py", "scheduling_flow_match_euler_discrete.py")
ALLOWED = "qwen_fast/denoise/watch.py", "qwen_fast/denoise/graph.py"


@pytest.mark.triton
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("name", ["edit", "edit plus 2511", "edit inpaint", "layered", "controlnet"])
def test_the_cpus_picture_without_a_wait(checkpoint, emulated_cuda, name, cuda_graph):
    member, seen = MEMBERS[name], emulated_cuda.notes
    with small_references():
        expected = member.draw(qwen_fast.enable(member.pipe(checkpoint)))
        pipe = qwen_fast.enable(member.pipe(checkpoint).to("cuda"), cuda_graph=cuda_graph)
        pipe.progress_bar = StepsBar(seen)
        for _ in range(3):
            seen.clear()
            seen.phase = "before"
            images = member.draw(pipe)
            assert images.device.type == "cuda"
            assert (images.cpu() - expected).abs().max() <= 2e-5 * expected.abs().max()
            wrong = notes.MIXED, notes.ILLEGAL, notes.RACE, notes.FIRST
            assert not seen.of(*wrong), seen.counted(*wrong)
            kinds = (notes.SYNC, notes.TO_DEVICE, notes.TO_HOST, notes.QUERY)
            later = [note for note in seen.of(*kinds, phase="step") if note.phase != "step 0"]
            allowed = (*ALLOWED, *(WAITS if "inpaint" in name else ()))
            assert not [str(note) for note in later if not any(part in note.where for part in allowed)]
    assert not qwen_fast.report(pipe).fallbacks
    assert (pipe.fast_state.graph is None) is (cuda_graph and name != "controlnet"), pipe.fast_state.graph
