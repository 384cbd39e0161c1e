"""Lists of sizes that do not fit, and calls that cannot carry them: named before any work, and nothing is left patched."""

import inspect

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig

import qwen_fast
from benchmarks.shared.stock import stock
from support.snapshots import snapshot

PROMPTS = ["a red circle", "two green squares"]
CALL = {"prompt": PROMPTS, "height": [64, 96], "width": [96, 48], "num_inference_steps": 2, "output_type": "latent"}
CALL |= {"negative_prompt": "x", "true_cfg_scale": 3.0}
NOISE = torch.zeros(1, 24, 64)


@pytest.fixture(scope="module")
def shared(checkpoint):
    return qwen_fast.enable(stock(checkpoint))


@pytest.fixture
def fast(checkpoint):
    return qwen_fast.enable(stock(checkpoint))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": [64]}, "`height` is a list of 1 for 2 prompts; one for each prompt is needed, or a number for all"),
        ({"width": [64, 64, 64]}, "`width` is a list of 3 for 2 prompts"),
        ({"width": []}, "`width` is a list of 0 for 2 prompts"),
        ({"prompt": "a red circle"}, "`height` is a list of 2 for 1 prompts"),
        ({"height": [64, True]}, "`height` holds True; whole numbers of pixels"),
        ({"height": [64, -96]}, "`height` holds -96; one patch is 16 pixels"),
        ({"height": [64, 8]}, "`height` holds 8; one patch is 16 pixels, so use multiples of 16"),
        ({"height": [64, 96.0]}, "`height` holds 96.0; whole numbers"),
        ({"height": [64, None]}, "`height` holds None; whole numbers"),
        ({"height": [64, "96"]}, "`height` holds '96'; whole numbers"),
        ({"height": [[64, 96], [64, 96]]}, r"`height` holds \[64, 96\]; whole numbers"),
        ({"width": True}, "`width` holds True; whole numbers"),
        ({"width": 0}, "`width` holds 0; one patch"),
        ({"generator": [torch.Generator()] * 3}, "`generator` is a list of 3 for 2 pictures"),
        ({"generator": [torch.Generator()] * 2, "num_images_per_prompt": 2}, "`generator` is a list of 2 for 4 pictures"),
        ({"negative_prompt": ["a", "b", "c"]}, "`negative_prompt` holds 3 prompts for 2"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"sigmas": [0.1, 0.9]}, "`sigmas` ascends"),
        ({"latents": NOISE}, "`latents` is a Tensor for pictures of several sizes; a list of 2"),
        ({"latents": [NOISE]}, "`latents` is a list of 1 for pictures of several sizes; a list of 2"),
        ({"latents": [NOISE, NOISE]}, r"`latents\[1\]` is \(1, 24, 64\); \(18, 64\) is needed"),
        ({"latents": [NOISE, 3]}, r"`latents\[1\]` is 3; \(18, 64\) is needed"),
        ({"max_sequence_length": 2000}, "`max_sequence_length` cannot be greater than 1024"),
        (
            {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
            "`callback_on_step_end_tensor_inputs` names 'prompt_embeds', but with lists of sizes",
        ),
        ({"attention_kwargs": {"ip": 1}}, "which this call cannot take: attention_kwargs ip. Call the pipeline once for each"),
    ],
    ids=lambda a: "-".join(a) if isinstance(a, dict) else "",
)
def test_what_does_not_fit_is_named_before_any_work(shared, monkeypatch, arguments, message):
    before = snapshot(shared)
    monkeypatch.setattr(shared.text_encoder, "forward", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        shared(**CALL | arguments)
    monkeypatch.undo()
    assert snapshot(shared) == before and not shared.fast_state.fallbacks


def test_pictures_that_may_not_depend_on_their_batch_are_drawn_alone(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint), batch_invariant=True)
    with pytest.raises(ValueError, match="cannot take: batch_invariant=True, for which each picture is drawn as if alone"):
        pipe(**CALL)


def hooked(pipe, monkeypatch):
    pipe.transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)


def cached(pipe, monkeypatch):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def another_scheduler(pipe, monkeypatch):
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)


def wrapped_step(pipe, monkeypatch):
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: step(*args, **kwargs)


def sampled(pipe, monkeypatch):
    pipe.scheduler.register_to_config(stochastic_sampling=True)


def own_processor(pipe, monkeypatch):
    class Processor(type(pipe.transformer.transformer_blocks[0].attn.processor)):
        pass

    pipe.transformer.transformer_blocks[0].attn.processor = Processor()


def own_call(pipe, monkeypatch):
    call = diffusers.QwenImagePipeline.__call__

    def mine(self, *args, **kwargs):
        return call(self, *args, **kwargs)

    mine.__signature__ = inspect.signature(call)
    monkeypatch.setattr(diffusers.QwenImagePipeline, "__call__", mine)


def distilled(pipe, monkeypatch):
    pipe.transformer.register_to_config(guidance_embeds=True)


def no_gpu_for_it(pipe, monkeypatch):
    monkeypatch.setattr("qwen_fast.pipelines.call.unsupported_reason", lambda device: "Tesla T4 is sm_75")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "a forward hook"),
        (cached, "a step cache"),
        (another_scheduler, "scheduler is a FlowMatchHeunDiscreteScheduler"),
        (wrapped_step, "step: not diffusers' own"),
        (sampled, "stochastic_sampling"),
        (own_processor, "attention processor Processor"),
        (own_call, "`__call__` is not diffusers' own"),
        (distilled, "guidance embeddings"),
        (no_gpu_for_it, "Tesla T4 is sm_75"),
    ],
)
def test_what_would_run_on_stock_is_refused_by_name(fast, monkeypatch, change, message):
    encoder = fast.text_encoder
    change(fast, monkeypatch)
    monkeypatch.setattr(encoder, "forward", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=f"which this call cannot take: .*{message}.*Call the pipeline once for each size"):
        fast(**CALL)
    assert not fast.fast_state.fallbacks and not fast.fast_state.calls


def test_autocast_and_gradients_are_refused(fast):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast on cpu"):
        fast(**CALL)
    with torch.enable_grad(), pytest.raises(ValueError, match="gradients are asked for"):
        type(fast).__call__.__wrapped__(fast, **CALL)


def test_other_pipelines_draw_one_size_a_call(checkpoint):
    pipe = qwen_fast.enable(stock(checkpoint, cls=diffusers.QwenImageImg2ImgPipeline))
    with pytest.raises(
        ValueError, match="but a QwenImageImg2ImgPipeline draws one size a call; a QwenImagePipeline takes lists"
    ):
        pipe(image=torch.zeros(2, 3, 64, 64), **CALL)


def test_a_missing_part_is_named(fast):
    fast.vae = None
    assert len(fast(**CALL).images) == 2
    with pytest.raises(AttributeError, match="`pipe.vae` is None"):
        fast(**CALL | {"output_type": "pil"})


def test_warnings_are_stocks(fast, caplog):
    """Of sizes that are rounded, once for each; of a scale without a negative prompt."""
    images = fast(**CALL | {"height": [64, 90], "negative_prompt": None, "guidance_scale": 2.0}).images
    assert [tuple(one.shape) for one in images] == [(24, 64), (15, 64)]
    assert caplog.text.count("have to be divisible by 16 but are 90 and 48") == 1 and "are 64" not in caplog.text
    assert "no guidance: `true_cfg_scale` is 3.0 and no negative prompt is given" in caplog.text
    assert "`guidance_scale` is ignored" in caplog.text


def test_functions_that_somebody_replaced_are_called_as_in_stock(checkpoint, monkeypatch):
    module = diffusers.pipelines.qwenimage.pipeline_qwenimage
    shift = module.calculate_shift
    monkeypatch.setattr(module, "calculate_shift", lambda *args: shift(*args) + 0.3)
    pipe, fast = stock(checkpoint), qwen_fast.enable(stock(checkpoint))
    generators = [torch.Generator().manual_seed(n) for n in range(2)]
    actual = fast(**CALL, generator=generators).images
    for n, one in enumerate(actual):
        own = CALL | {name: CALL[name][n] for name in ("prompt", "height", "width")}
        expected = pipe(**own, generator=torch.Generator().manual_seed(n)).images[0]
        assert (one - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert any("calculate_shift" in reason for reason in fast.fast_state.fallbacks)
