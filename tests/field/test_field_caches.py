"""Step caches: cache-dit and those of diffusers, over the fused blocks; they are known and do not raise under strict=True."""

import logging

import cache_dit
import diffusers
import pytest
import torch

import qwen_fast
from support.field import GUIDED, IMAGE_TO_IMAGE, TEXT_TO_IMAGE, assert_same, compare, draw, guided

STEPS = {"num_inference_steps": 8}
BLOCKS = 2


@pytest.fixture(autouse=True)
def quiet():
    """cache-dit tells at length what it does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


def cached(pipe, threshold):
    """cache-dit's DBCache: the first block is always computed, the others where it moved by more than `threshold`."""
    configuration = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=1
    )
    cache_dit.enable_cache(pipe, cache_config=configuration)


def counted(pipe):
    """Counts the calls of the transformer's blocks, inside whatever a cache puts around them; see `calls_of`."""
    calls = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    return calls


def with_cache_dit(field, order, threshold, cls=TEXT_TO_IMAGE, **options):
    """A picture with cache-dit, and the calls of each of the two blocks; `order` "stock" is without qwen_fast."""
    pipe = field.pipe(cls)
    if order == "enable, cache":
        qwen_fast.enable(pipe, **options)
    calls = counted(pipe)
    cached(pipe, threshold)
    try:
        if order == "cache, enable":
            qwen_fast.enable(pipe, **options)
        latents = draw(pipe, **guided(cls, **STEPS))
        if order != "stock":
            assert qwen_fast.report(pipe).enabled
    finally:
        cache_dit.disable_cache(pipe)
    again = draw(pipe, **guided(cls, **STEPS))
    if order != "stock":
        assert type(qwen_fast.disable(pipe)) is cls
    return latents, again, [calls.count(index) for index in range(BLOCKS)]


@pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE], ids=["text", "img2img"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
@pytest.mark.parametrize("order", ["enable, cache", "cache, enable"])
def test_cache_dit(field, order, threshold, cls):
    """The picture of stock with cache-dit, as many calls of each block, and stock's plain picture once it is off."""
    latents, again, calls = with_cache_dit(field, order, threshold, cls)
    expected, plain, theirs = with_cache_dit(field, "stock", threshold, cls)
    assert_same(latents, expected)
    assert_same(again, plain)
    assert calls == theirs
    if threshold:
        assert (expected - plain).abs().max() > 1e-3 and theirs[1] < theirs[0]


def test_cache_dit_leaves_out_fused_blocks_only_where_it_is_sure(field):
    """Fused calls of blocks: as many as without cache-dit but for those it left out, two forwards a step."""
    calls = {}
    for threshold in (None, 0.0, 0.3):
        pipe = qwen_fast.enable(field.pipe())
        counts = counted(pipe)
        if threshold is not None:
            cached(pipe, threshold)
        try:
            draw(pipe, **guided(**STEPS))
        finally:
            if threshold is not None:
                cache_dit.disable_cache(pipe)
        calls[threshold] = [counts.count(index) for index in range(BLOCKS)]
    assert calls[None] == calls[0.0] == [16, 16]
    assert calls[0.3][0] == 16 and 2 <= calls[0.3][1] < 16


def test_cache_dit_runs_over_fused_blocks(field, monkeypatch):
    """A block within a cache is still ours: its own operators run, which `report` counts."""
    pipe = qwen_fast.enable(field.pipe())
    blocks = list(pipe.transformer.transformer_blocks)
    kinds = {type(block) for block in blocks}
    cached(pipe, 0.3)
    try:
        draw(pipe, **guided(**STEPS))
        assert {type(block) for block in blocks} == kinds
        assert type(blocks[0]) is type(qwen_fast.enable(field.pipe()).transformer.transformer_blocks[0])
        report = qwen_fast.report(pipe)
        assert not report.fallbacks and report.calls.get("transformer", 0) > 0, str(report)
    finally:
        cache_dit.disable_cache(pipe)


@pytest.mark.parametrize("order", ["enable, cache", "cache, enable"])
def test_cache_dit_with_layers(field, order):
    latents, _, _ = with_cache_dit(field, order, 0.3, modulation="layers")
    expected, _, _ = with_cache_dit(field, "stock", 0.3)
    assert_same(latents, expected)


@pytest.mark.parametrize("order", ["enable, cache", "cache, enable"])
def test_cache_dit_on_the_transformer_alone(field, order):
    """`enable_cache` of the model instead of the pipeline, as trainers call it."""
    pictures = []
    for enabled in (False, True):
        pipe = field.pipe()
        if enabled and order == "enable, cache":
            qwen_fast.enable(pipe)
        cached(pipe.transformer, 0.3)
        try:
            if enabled and order == "cache, enable":
                qwen_fast.enable(pipe)
            # Without a pipeline around it cache-dit takes each forward for a step: one a step then.
            pictures.append(draw(pipe, **guided(**STEPS, negative_prompt=None)))
        finally:
            cache_dit.disable_cache(pipe.transformer)
    assert_same(pictures[1], pictures[0])


def test_enable_again_and_disable_while_cached(field):
    """Options change and acceleration goes under a cache that stays."""
    pipe = qwen_fast.enable(field.pipe())
    cached(pipe, 0.3)
    try:
        expected, _, _ = with_cache_dit(field, "stock", 0.3)
        assert_same(draw(pipe, **guided(**STEPS)), expected)
        qwen_fast.enable(pipe, modulation="layers")
        assert_same(draw(pipe, **guided(**STEPS)), expected)
        qwen_fast.disable(pipe)
        assert_same(draw(pipe, **guided(**STEPS)), expected)
    finally:
        cache_dit.disable_cache(pipe)


def test_strict_cache_dit_does_not_raise(field):
    for order in ("enable, cache", "cache, enable"):
        latents, _, _ = with_cache_dit(field, order, 0.3, strict=True)
        assert latents.isfinite().all()


# diffusers' own


def of_diffusers(configuration):
    return lambda run: run.transformer.enable_cache(configuration())


CACHES = {
    "MagCache": of_diffusers(
        lambda: diffusers.MagCacheConfig(
            threshold=0.5, max_skip_steps=3, retention_ratio=0.2, num_inference_steps=8, mag_ratios=torch.ones(8)
        )
    ),
    "TaylorSeer in fp32": of_diffusers(
        lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32
        )
    ),
    "TaylorSeer": of_diffusers(
        lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1)
    ),
    "FirstBlockCache": of_diffusers(lambda: diffusers.FirstBlockCacheConfig(threshold=0.3)),
    "FasterCache": of_diffusers(
        lambda: diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 900),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        )
    ),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers(field, name, order):
    """TaylorSeer keeps its factors in bf16 unless it is told otherwise: a last bit moves them by 2^-9."""
    compare(field, CACHES[name], order, tolerance=5e-4 if name == "TaylorSeer" else 2e-6, **STEPS)


def test_a_cache_switched_off_again(field):
    def act(run):
        CACHES["MagCache"](run)
        first = draw(run.pipe, **guided(**STEPS))
        run.transformer.disable_cache()
        return [first, draw(run.pipe, **guided(**STEPS))]

    compare(field, None, act=act, moves=False)


@pytest.mark.parametrize("name", ["FirstBlockCache", "MagCache"])
def test_strict_a_cache_of_diffusers_does_not_raise(field, name):
    compare(field, CACHES[name], "after", options={"strict": True}, **STEPS)


def test_a_call_without_a_cache_is_as_before(field):
    """The helper's own check: eight steps without a cache are the same on both."""
    assert_same(draw(qwen_fast.enable(field.pipe()), **GUIDED | STEPS), draw(field.pipe(), **GUIDED | STEPS))
