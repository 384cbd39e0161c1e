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


SURE = 1.0  # a threshold at which cache-dit leaves out the second block after its warm-up


@pytest.fixture(autouse=True)
def quiet():
    """cache-dit tells at length what it does."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    yield
    logging.disable(before)


@pytest.fixture(autouse=True)
def classes_as_they_were(field):
    """cache-dit writes into the class of a pipeline; a test that fails in between leaves nothing of it behind."""
    stock = TEXT_TO_IMAGE, IMAGE_TO_IMAGE
    classes = [*stock, *(type(qwen_fast.enable(field.pipe(cls))) for cls in stock)]
    kept = {cls: vars(cls).get("__call__") for cls in classes}
    yield
    for cls, call in kept.items():
        for name in {"_original_call", "_is_cached"} & vars(cls).keys():
            delattr(cls, name)
        if call is not None:
            cls.__call__ = call
        elif "__call__" in vars(cls):
            del cls.__call__


def cached(pipe, threshold=SURE):
    """cache-dit's DBCache: the first block is always computed, the others where it moved by more than `threshold`."""
    configuration = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=1
    )
    cache_dit.enable_cache(pipe, cache_config=configuration)


def counted(pipe):
    """Lists the calls of the transformer's blocks by their index, inside whatever a cache puts around them."""
    calls = []
    for index, block in enumerate(pipe.transformer.transformer_blocks):
        block.register_forward_hook(lambda module, args, output, index=index: calls.append(index))
    return calls


def with_cache_dit(field, order, threshold=SURE, cls=TEXT_TO_IMAGE, count=False, **options):
    """A picture with cache-dit, one after it is off, and the calls of each block; `order` None is without qwen_fast."""
    pipe = field.pipe(cls)
    if order == "enable, cache":
        qwen_fast.enable(pipe, **options)
    calls = counted(pipe) if count else []
    cached(pipe, threshold)
    if order == "cache, enable":
        qwen_fast.enable(pipe, **options)
    latents = draw(pipe, **guided(cls, **STEPS))
    found = [calls.count(index) for index in range(BLOCKS)]
    if order is not None:
        assert qwen_fast.report(pipe).enabled
    if order == "cache, enable":
        qwen_fast.disable(pipe)
    cache_dit.disable_cache(pipe)
    again = draw(pipe, **guided(cls, **STEPS))
    assert type(qwen_fast.disable(pipe)) is cls
    return latents, again, found


BOTH_ORDERS = pytest.mark.parametrize("order", ["enable, cache", "cache, enable"])


@pytest.mark.parametrize(("cls", "threshold"), [(TEXT_TO_IMAGE, 0.0), (TEXT_TO_IMAGE, SURE), (IMAGE_TO_IMAGE, SURE)])
@BOTH_ORDERS
def test_cache_dit(field, order, cls, threshold):
    """The picture of stock with cache-dit, as many calls of each block, and stock's plain picture once it is off."""
    expected, plain, theirs = with_cache_dit(field, None, threshold, cls, count=True)
    if threshold:
        assert (expected - plain).abs().max() > 1e-3 and theirs[1] < theirs[0]
    latents, again, calls = with_cache_dit(field, order, threshold, cls, count=True)
    assert_same(latents, expected)
    assert_same(again, plain)
    assert calls == theirs


@BOTH_ORDERS
def test_cache_dit_calls_as_many_fused_blocks_as_without_it_but_for_cached_ones(field, order):
    """Two forwards a step: the first block in each, the second where it is not sure; two of the warm-up."""
    pipe = qwen_fast.enable(field.pipe())
    without = counted(pipe)
    draw(pipe, **guided(**STEPS))
    assert [without.count(index) for index in range(BLOCKS)] == [16, 16]
    assert with_cache_dit(field, order, 0.0, count=True)[2] == [16, 16]
    assert with_cache_dit(field, order, SURE, count=True)[2] == [16, 2]


@BOTH_ORDERS
def test_cache_dit_runs_over_fused_blocks(field, order):
    """The blocks that it calls are ours, and nothing falls back to stock."""
    pipe = field.pipe()
    if order == "cache, enable":
        cached(pipe)
    qwen_fast.enable(pipe)
    if order == "enable, cache":
        cached(pipe)
    draw(pipe, **guided(**STEPS))
    report = qwen_fast.report(pipe)
    assert report.calls and not report.fallbacks, str(report)
    ours = type(qwen_fast.enable(field.pipe()).transformer.transformer_blocks[0])
    assert sum(type(module) is ours for module in pipe.transformer.modules()) == BLOCKS
    assert type(pipe.transformer) is type(qwen_fast.enable(field.pipe()).transformer)


@BOTH_ORDERS
def test_cache_dit_with_modulation_in_layers(field, order):
    latents, _, _ = with_cache_dit(field, order, modulation="layers")
    assert_same(latents, with_cache_dit(field, None)[0])


@BOTH_ORDERS
def test_cache_dit_on_the_transformer_alone(field, order):
    """`enable_cache` of the model instead of the pipeline; each forward is a step to it, so there is one a step."""
    pictures = []
    for enabled in (False, True):
        pipe = field.pipe()
        if enabled and order == "enable, cache":
            qwen_fast.enable(pipe)
        cached(pipe.transformer)
        if enabled and order == "cache, enable":
            qwen_fast.enable(pipe)
        pictures.append(draw(pipe, **guided(**STEPS, negative_prompt=None)))
    assert_same(pictures[1], pictures[0])
    plain = draw(field.pipe(), **guided(**STEPS, negative_prompt=None))
    assert (pictures[0] - plain).abs().max() > 1e-3


def test_other_options_while_cached(field):
    expected, _, _ = with_cache_dit(field, None)
    pipe = qwen_fast.enable(field.pipe())
    cached(pipe)
    assert_same(draw(pipe, **guided(**STEPS)), expected)
    qwen_fast.enable(pipe, modulation="layers")
    assert_same(draw(pipe, **guided(**STEPS)), expected)


@BOTH_ORDERS
def test_switched_off_in_the_other_order(field, order):
    """What was put on first goes first; afterwards it is stock's plain pipeline, and others can be enabled and cached."""
    expected, plain, _ = with_cache_dit(field, None)
    pipe = field.pipe()
    if order == "enable, cache":
        qwen_fast.enable(pipe)
        cached(pipe)
        qwen_fast.disable(pipe)
        cache_dit.disable_cache(pipe)
    else:
        cached(pipe)
        qwen_fast.enable(pipe)
        cache_dit.disable_cache(pipe)
        qwen_fast.disable(pipe)
    assert type(pipe) is TEXT_TO_IMAGE
    assert_same(draw(pipe, **guided(**STEPS)), plain, 0.0)
    assert_same(draw(qwen_fast.enable(field.pipe()), **guided(**STEPS)), plain)
    assert_same(with_cache_dit(field, "enable, cache")[0], expected)


@BOTH_ORDERS
def test_strict_cache_dit_does_not_raise(field, order):
    assert_same(with_cache_dit(field, order, strict=True)[0], with_cache_dit(field, None)[0])


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
    "FirstBlockCache": of_diffusers(lambda: diffusers.FirstBlockCacheConfig(threshold=1.0)),
    "PyramidAttentionBroadcast": of_diffusers(
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
