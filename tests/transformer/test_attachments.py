"""What diffusers' users attach to a transformer keeps working: caches, attention backends, casting, processors, compile."""

import copy

import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0

import qwen_fast
from benchmarks.shared.stock import assert_same_latents, draw, in_fp32, stock
from support.pipelines import GUIDED, SMALL, assert_same_picture

ARGUMENTS = GUIDED | {"prompt": "a red circle", "num_inference_steps": 6}
BATCH = ARGUMENTS | {"prompt": ["a red circle", "two green squares on a hill"]}


@pytest.fixture
def pair(checkpoint):
    return stock(checkpoint), qwen_fast.enable(stock(checkpoint))


@pytest.fixture(autouse=True)
def global_backend():
    """`set_attention_backend` sets diffusers' backend for the whole process too."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


def calls(pipe) -> dict:
    return qwen_fast.report(pipe).calls


@pytest.mark.parametrize("modulation", ["auto", "layers"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_first_block_cache(pair, threshold, modulation):
    """Blocks are called as modules, each fused within its boundaries; then the cache goes and rows are packed again."""
    qwen_fast.enable(pair[1], modulation=modulation)
    for pipe in pair:
        pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=threshold))
    for arguments in (ARGUMENTS, BATCH):
        for pipe in pair:
            pipe.transformer._reset_stateful_cache()
        assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert calls(pair[1])["transformer"] == 24 and not qwen_fast.report(pair[1]).fallbacks
    for pipe in pair:
        pipe.transformer.disable_cache()
    assert_same_latents(draw(pair[1], **ARGUMENTS), draw(pair[0], **ARGUMENTS))
    assert calls(pair[1])["packed transformer"] == 6


def test_first_block_cache_enabled_before(checkpoint):
    pipe = stock(checkpoint)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.3))
    expected = draw(pipe, **ARGUMENTS)
    pipe.transformer._reset_stateful_cache()
    assert_same_latents(draw(qwen_fast.enable(pipe), **ARGUMENTS), expected)
    assert not qwen_fast.report(pipe).fallbacks
    pipe.transformer._reset_stateful_cache()
    assert torch.equal(draw(qwen_fast.disable(pipe), **ARGUMENTS), expected)


def test_a_cache_inside_the_blocks_gets_stocks_attention_and_the_rest_stays_fused(pair):
    for pipe in pair:
        config = diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda pipe=pipe: pipe.current_timestep,
        )
        pipe.transformer.enable_cache(config)
    arguments = SMALL | {"prompt": "a red circle", "num_inference_steps": 6}
    assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    report = qwen_fast.report(pair[1])
    assert report.calls["transformer"] == 6 and not report.fallbacks


@pytest.mark.parametrize("arguments", [ARGUMENTS, BATCH], ids=["one prompt", "two prompts"])
def test_attention_backend_of_the_model(pair, arguments):
    for pipe in pair:
        pipe.transformer.set_attention_backend("_native_math")
    assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert not qwen_fast.report(pair[1]).fallbacks


def test_the_backend_that_the_user_chose_is_the_one_that_runs(pair, monkeypatch):
    from qwen_fast.transformer import attention

    used = []
    dispatch = attention.dispatch_attention_fn
    monkeypatch.setattr(
        attention,
        "dispatch_attention_fn",
        lambda *a, backend=None, **k: used.append(backend) or dispatch(*a, backend=backend, **k),
    )
    draw(pair[1], **ARGUMENTS)
    assert not used
    pair[1].transformer.set_attention_backend("_native_math")
    draw(pair[1], **ARGUMENTS)
    assert {backend.value for backend in used} == {"_native_math"}
    pair[1].transformer.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend("native")
    used.clear()
    draw(pair[1], **ARGUMENTS)
    assert not used
    with attention_backend("_native_math"):
        draw(pair[1], **ARGUMENTS)
    assert {backend.value for backend in used} == {"_native_math"}


@pytest.mark.parametrize("before", [True, False])
def test_layerwise_casting(checkpoint, before):
    pair = stock(checkpoint, torch.bfloat16), stock(checkpoint, torch.bfloat16)
    for change in (cast, qwen_fast.enable) if before else (qwen_fast.enable, cast):
        change(pair[1])
    cast(pair[0])
    expected, actual = draw(pair[0], **ARGUMENTS), draw(pair[1], **ARGUMENTS)
    assert qwen_fast.report(pair[1]).calls["packed transformer"] == 6 and not qwen_fast.report(pair[1]).fallbacks
    stored = pair[0].transformer.state_dict()
    assert sum(weight.dtype == torch.float8_e4m3fn for weight in stored.values()) > 20
    exact = stock(checkpoint, torch.bfloat16)
    exact.transformer.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in stored.items()})
    assert_same_latents(actual, expected, in_fp32(exact, 7, torch.bfloat16, **ARGUMENTS))


def cast(pipe) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


class SameProcessor(QwenDoubleStreamAttnProcessor2_0):
    """A user's: it does what diffusers' does."""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def with_a_forward_of_its_own(block) -> None:
    stocks = block.forward
    block.forward = lambda *args, **kwargs: stocks(*args, **kwargs)


INSIDE = {
    "a processor": lambda block: block.attn.set_processor(SameProcessor()),
    "a hook on the attention": lambda block: block.attn.register_forward_hook(lambda module, inputs, outputs: outputs),
    "a hook on the block": lambda block: block.register_forward_hook(lambda module, inputs, outputs: outputs),
    "a forward": with_a_forward_of_its_own,
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("what", INSIDE)
def test_what_is_called_inside_a_block_masks_the_padding_of_a_short_prompt(checkpoint, what, order):
    """How stock tells its attention of the mask differs between the versions of diffusers."""
    pair = stock(checkpoint), stock(checkpoint)
    if order == "after":
        qwen_fast.enable(pair[1])
    for pipe in pair:
        for block in pipe.transformer.transformer_blocks:
            INSIDE[what](block)
    qwen_fast.enable(pair[1])
    arguments = BATCH | {"num_inference_steps": 2}
    assert_same_latents(draw(pair[1], **arguments), draw(pair[0], **arguments))
    assert calls(pair[1])["transformer"] == 4 and qwen_fast.report(pair[1]).fallbacks


class OwnProcessor(QwenDoubleStreamAttnProcessor2_0):
    """A user's: it turns attention off."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        image, text = super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)
        return 0 * image, 0 * text


@pytest.mark.parametrize("modulation", ["auto", "layers"])
def test_a_custom_processor_is_used(checkpoint, modulation):
    pair = stock(checkpoint), qwen_fast.enable(stock(checkpoint), modulation=modulation)
    plain = draw(pair[0], **ARGUMENTS)
    for pipe in pair:
        pipe.transformer.transformer_blocks[1].attn.set_processor(OwnProcessor())
    expected = draw(pair[0], **ARGUMENTS)
    assert (expected - plain).abs().max() > 1e-2 * plain.abs().max()
    assert_same_latents(draw(pair[1], **ARGUMENTS), expected)
    report = qwen_fast.report(pair[1])
    # The other block stays fused, cond and uncond go apart.
    assert report.calls["transformer"] == 12
    assert report.fallbacks == {"attention processor OwnProcessor": 1}


def test_two_pipelines_share_a_transformer_and_one_is_enabled(checkpoint):
    pipe = stock(checkpoint)
    twin = diffusers.QwenImagePipeline(**pipe.components)
    twin.set_progress_bar_config(disable=True)
    expected = draw(pipe, **ARGUMENTS)
    qwen_fast.enable(pipe)
    assert torch.equal(draw(twin, **ARGUMENTS), expected), "a pipeline that was not enabled changed"
    assert_same_latents(draw(pipe, **ARGUMENTS), expected)
    qwen_fast.enable(twin)
    assert_same_latents(draw(qwen_fast.disable(pipe) and twin, **ARGUMENTS), expected)
    assert torch.equal(draw(pipe, **ARGUMENTS), expected)
    qwen_fast.disable(twin)
    assert type(pipe.transformer) is diffusers.QwenImageTransformer2DModel


def test_a_transformer_put_in_after_enable_is_noticed(pair, checkpoint):
    first, second = pair[1].transformer, stock(checkpoint).transformer
    with torch.no_grad():
        second.proj_out.weight.mul_(0.5)
    pair[0].transformer, pair[1].transformer = copy.deepcopy(second), second
    assert_same_latents(draw(pair[1], **ARGUMENTS), draw(pair[0], **ARGUMENTS))
    assert type(first) is diffusers.QwenImageTransformer2DModel and not qwen_fast.report(pair[1]).fallbacks
    qwen_fast.disable(pair[1])
    assert type(second) is diffusers.QwenImageTransformer2DModel


def test_a_transformer_of_another_class_runs_on_stock_and_is_named(pair):
    class Custom(diffusers.QwenImageTransformer2DModel):
        pass

    for pipe in pair:
        pipe.transformer = copy.deepcopy(pair[0].transformer)
        pipe.transformer.__class__ = Custom
    assert torch.equal(draw(pair[1], **ARGUMENTS), draw(pair[0], **ARGUMENTS))
    assert any("Custom" in reason for reason in qwen_fast.report(pair[1]).fallbacks)


@pytest.mark.parametrize("cls", ["QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"])
def test_the_table_follows_the_scheduler_of_stocks_loop(checkpoint, cls):
    from support.snapshots import EDITING

    cls = getattr(diffusers, cls)
    pipe = stock(checkpoint, cls=cls)
    arguments = ARGUMENTS | EDITING[cls]
    for _ in range(2):
        assert_same_picture(pipe, qwen_fast.enable(stock(checkpoint, cls=cls)), **arguments)
    fast = qwen_fast.enable(stock(checkpoint, cls=cls))
    for _ in range(3):
        draw(fast, **arguments)
    assert not qwen_fast.report(fast).fallbacks and fast.fast_state.no_table is None


def test_a_callback_may_run_another_pipeline_on_the_same_transformer(checkpoint):
    pipe = stock(checkpoint)
    other = diffusers.QwenImagePipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    inner = SMALL | {"prompt": "two green squares"}
    expected, seen = draw(other, **inner), []

    def callback(pipe, step, timestep, tensors):
        seen.append(draw(other, **inner))
        return {}

    draw(qwen_fast.enable(pipe), callback_on_step_end=callback, **ARGUMENTS)
    assert len(seen) == 6 and all(torch.equal(latents, expected) for latents in seen)
