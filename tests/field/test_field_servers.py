"""Servers: threads on one pipeline, a copy for each request, tokenizers behind a lock."""

import copy
import threading

import pytest

import qwen_fast
from support.field import IMAGE_TO_IMAGE, ORDERS, TEXT_TO_IMAGE, assert_same, compare, distance, draw, guided

PROMPTS = ["a red circle", "two green squares on a hill", "a dog"]


def together(work):
    """What `work(index)` gave in three threads, or the error that it ended with."""
    results = {}

    def one(index):
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=one, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def request(pipe, index, cls=TEXT_TO_IMAGE):
    return draw(pipe, seed=index, **guided(cls, prompt=PROMPTS[index]))


@pytest.fixture(scope="module")
def alone(field):
    """Stock's pictures of the three requests, one after the other."""
    return {cls: [request(field.pipe(cls), index, cls) for index in range(3)] for cls in (TEXT_TO_IMAGE, IMAGE_TO_IMAGE)}


@pytest.mark.parametrize("cls", [TEXT_TO_IMAGE, IMAGE_TO_IMAGE], ids=["text", "img2img"])
def test_after_threads_on_one_pipeline_it_draws_as_before(field, alone, cls):
    """Stock's scheduler is not made for threads: what they draw together is nobody's promise, what comes after is."""
    pipe = qwen_fast.enable(field.pipe(cls))
    together(lambda index: request(pipe, index, cls))
    for index in range(3):
        assert_same(request(pipe, index, cls), alone[cls][index])
    assert type(qwen_fast.disable(pipe)) is cls


def test_a_copy_for_each_request(field, alone):
    """`copy.copy` of the pipeline with a scheduler of its own, as server examples do it; the parts are shared."""
    base = qwen_fast.enable(field.pipe())

    def work(index):
        pipe = copy.copy(base)
        pipe.scheduler = copy.deepcopy(base.scheduler)
        return request(pipe, index)

    results = together(work)
    for index in range(3):
        assert not isinstance(results[index], Exception), results[index]
        assert_same(results[index], alone[TEXT_TO_IMAGE][index])


def test_from_pipe_for_each_request(field, alone):
    """`from_pipe` with a scheduler of its own."""
    base = qwen_fast.enable(field.pipe())
    for index in range(3):
        pipe = TEXT_TO_IMAGE.from_pipe(base, scheduler=copy.deepcopy(base.scheduler))
        pipe.set_progress_bar_config(disable=True)
        assert_same(request(pipe, index), alone[TEXT_TO_IMAGE][index])


def test_threads_on_pipelines_that_share_their_parts(field, alone):
    """Each thread has a pipeline and a scheduler of its own, enabled; the models are the same objects."""
    base = field.pipe()
    pipes = []
    for _ in range(3):
        pipe = TEXT_TO_IMAGE(**base.components | {"scheduler": copy.deepcopy(base.scheduler)})
        pipe.set_progress_bar_config(disable=True)
        pipes.append(qwen_fast.enable(pipe))
    results = together(lambda index: request(pipes[index], index))
    for index in range(3):
        assert not isinstance(results[index], Exception), results[index]
        assert_same(results[index], alone[TEXT_TO_IMAGE][index])


def test_a_stock_and_an_enabled_pipeline_in_two_threads(field, alone):
    stock = field.pipe()
    pipes = [stock, qwen_fast.enable(field.pipe()), field.pipe()]
    results = together(lambda index: request(pipes[index], index))
    assert max(distance(results[index], alone[TEXT_TO_IMAGE][index]) for index in range(3)) <= 2e-6


class Locked:
    """A tokenizer behind a lock, without `len`."""

    def __init__(self, tokenizer):
        self._tokenizer, self._lock = tokenizer, threading.Lock()

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def __call__(self, *args, **kwargs):
        with self._lock:
            return self._tokenizer(*args, **kwargs)


def locked(run):
    object.__setattr__(run.pipe, "tokenizer", Locked(run.pipe.tokenizer))


def watched(run):
    """A tokenizer that notes what it is asked."""

    class Watched(Locked):
        def __call__(self, *args, **kwargs):
            run.note("tokenizer", *args, **kwargs)
            return super().__call__(*args, **kwargs)

    object.__setattr__(run.pipe, "tokenizer", Watched(run.pipe.tokenizer))


def a_function(run):
    """No object at all."""
    tokenizer = run.pipe.tokenizer
    object.__setattr__(run.pipe, "tokenizer", lambda *args, **kwargs: tokenizer(*args, **kwargs))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("situation", [locked, watched, a_function])
def test_a_tokenizer_of_ones_own(field, situation, order):
    compare(field, situation, order, moves=False)
