"""The service, through HTTP: pictures, progress, batches, refusals, and that it lives on."""

import io
import json
import sys
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import qwen_fast
from benchmarks.shared.stock import stock

pytest.importorskip("fastapi", reason="fastapi is not installed")
try:
    from fastapi.testclient import TestClient
except RuntimeError as error:  # starlette's, where neither httpx2 nor httpx is there
    pytest.skip(str(error), allow_module_level=True)

SERVICE = Path(__file__).parents[2] / "examples" / "service"
SMALL = {"width": 64, "height": 64, "steps": 2}


@pytest.fixture(scope="module")
def pipe(checkpoint):
    return qwen_fast.enable(stock(checkpoint))


@pytest.fixture
def app(pipe, monkeypatch):
    monkeypatch.syspath_prepend(str(SERVICE))
    import app as module

    monkeypatch.setattr(module, "QUIET", 0.2)
    yield module
    for name in ("app", "worker"):
        sys.modules.pop(name, None)


@pytest.fixture
def client(app, pipe):
    made = app.make_app(pipe, defaults=SMALL, limits=app.Limits(pixels=256 * 256, steps=10, letters=100, waiting=3, batch=2))
    with TestClient(made) as client:
        yield client


def alone(pipe, prompt="a cat", seed=0, **settings) -> np.ndarray:
    call = {"negative_prompt": " ", "true_cfg_scale": 4.0, "width": 64, "height": 64, "num_inference_steps": 2} | settings
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0], int)


def opened(answer) -> np.ndarray:
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png", answer.text
    return np.asarray(PIL.Image.open(io.BytesIO(answer.content)), int)


def events(client, number) -> list[tuple[str, dict]]:
    with client.stream("GET", f"/jobs/{number}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = "".join(answer.iter_text())
    pairs = (block.split("\n") for block in text.strip().split("\n\n") if block.startswith("event:"))
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def test_a_picture_is_what_its_settings_draw(client, pipe):
    answer = client.post("/pictures", json={"prompt": "a cat", "seed": 3, "width": 96, "steps": 3, "cfg": 2.5})
    expected = alone(pipe, seed=3, width=96, num_inference_steps=3, true_cfg_scale=2.5)
    assert np.abs(opened(answer) - expected).max() <= 1
    assert float(answer.headers["x-seconds"]) > 0 and answer.headers["x-batch"] == "1"


def test_progress_and_a_comparison_with_stock(client):
    number = client.post("/jobs", json={"prompt": "a cat", "compare": True}).json()["id"]
    told = events(client, number)
    assert [(name, data.get("who"), data.get("step")) for name, data in told[:-1]] == [
        *(("progress", "ours", step) for step in (1, 2)),
        *(("progress", "stock", step) for step in (1, 2)),
    ]
    name, outcome = told[-1]
    assert name == "done" and outcome["largest_difference"] <= 1 and outcome["stock_seconds"] > 0
    ours, theirs, apart = (opened(client.get(f"/jobs/{number}/{name}.png")) for name in ("ours", "stock", "difference"))
    assert np.abs(ours - theirs).max() == outcome["largest_difference"] and apart.max() <= 16
    assert [name for name, _ in events(client, number)] == ["done"], "who comes late hears the end"


def test_waiting_requests_are_drawn_as_a_batch(client, app, pipe):
    """While the first is held back three more come: two of one kind go together, the third alone."""
    worker, called, entered, held = client.app.state.worker, [], threading.Event(), threading.Event()
    call = worker._call

    def counted(pipe, batch, **others):
        called.append([job.prompt for job in batch])
        entered.set()
        assert held.wait(20)
        return call(pipe, batch, **others)

    worker._call = counted
    numbers = [client.post("/jobs", json={"prompt": "first"}).json()["id"]]
    assert entered.wait(20)
    for prompt, size in (("a", 64), ("b", 96), ("c", 64)):
        numbers.append(client.post("/jobs", json={"prompt": prompt, "width": size, "seed": 5}).json()["id"])
    assert "qwen_fast_waiting 3" in client.get("/metrics").text
    full = client.post("/jobs", json={"prompt": "d"})
    assert full.status_code == 503 and "3 requests are waiting" in full.json()["error"] and full.headers["retry-after"]
    held.set()
    outcomes = [events(client, number)[-1][1] for number in numbers]
    assert called == [["first"], ["a", "c"], ["b"]] and [one["batch"] for one in outcomes] == [1, 2, 1, 2]
    for prompt, number, size in (("a", numbers[1], 64), ("b", numbers[2], 96)):
        drawn = opened(client.get(f"/jobs/{number}/ours.png"))
        assert np.abs(drawn - alone(pipe, prompt, 5, width=size)).max() <= 1
    assert 'outcome="batches"} 3' in client.get("/metrics").text


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"prompt": " "}, 400, "`prompt` is empty"),
        ({}, 422, "`prompt`: Field required"),
        ({"prompt": "a", "width": 100}, 400, "`width` is 100; one patch is 16 pixels, so use a multiple of 16."),
        ({"prompt": "a", "width": 512, "height": 512}, 413, "at most 65536 pixels"),
        ({"prompt": "a", "steps": 11}, 413, "`steps` is 11; at most 10"),
        ({"prompt": "a" * 101}, 413, "`prompt` has 101 letters"),
        ({"prompt": "a", "seed": -1}, 400, "`seed` is -1"),
        ({"prompt": "a", "cfg": -1}, 400, "`cfg` is -1"),
        ({"prompt": "a", "width": "64"}, 422, "`width`: Input should be a valid integer"),
        ({"prompt": "a", "sampler": "heun"}, 422, "`sampler`: Extra inputs are not permitted"),
        ({"prompt": "a", "steps": 0}, 400, "`num_inference_steps` is 0"),  # the library's own words
    ],
)
def test_a_bad_request_is_told_why(client, body, status, sentence):
    answer = client.post("/pictures", json=body)
    assert answer.status_code == status and sentence in answer.json()["error"]
    opened(client.post("/pictures", json={"prompt": "a cat", "cfg": 4}))


def test_it_outlives_errors_and_a_bad_one_does_not_spoil_its_neighbours(client, app):
    worker = client.app.state.worker
    call = worker._call

    def faulty(pipe, batch, **others):
        if any(job.prompt == "bad" for job in batch):
            raise RuntimeError("CUDA error")
        return call(pipe, batch, **others)

    worker._call = faulty
    answer = client.post("/pictures", json={"prompt": "bad"})
    assert answer.status_code == 500 and answer.json() == {"error": "CUDA error"}
    jobs = [app.Job("good", **SMALL), app.Job("bad", **SMALL)]
    worker._draw(jobs)
    assert [job.status for job in jobs] == [200, 500] and jobs[0].pictures
    worker._draw = lambda batch: 1 / 0
    assert client.post("/pictures", json={"prompt": "x"}).status_code == 500
    del worker._draw
    opened(client.post("/pictures", json={"prompt": "a cat"}))
    assert client.get("/health").text == "ok"


@pytest.mark.parametrize("compare", [False, True], ids=["alone", "beside-stock"])
@pytest.mark.parametrize("heard", [2, 7])
def test_steps_that_nobody_waits_for_are_left_out(client, app, compare, heard):
    """The client hears some steps, ours or, from the sixth on, stock's, and leaves."""
    steps = []

    class Events:
        def put(self, event: dict) -> None:
            steps.append((event.get("who"), event.get("step")))
            job.left = len(steps) >= heard

    worker = client.app.state.worker
    job = app.Job("a cat", **SMALL | {"steps": 5}, compare=compare, events=Events())
    worker._draw([job])
    ours, stock = ([step for who, step in steps if who == name] for name in ("ours", "stock"))
    if heard == 2:
        assert ours == [1, 2] and stock == [1] * compare
    else:
        assert ours == [1, 2, 3, 4, 5] and stock == [1, 2] * compare
    given_up = heard == 2 or compare
    assert (job.status, bool(job.pictures)) == ((499, False) if given_up else (200, True))
    assert worker.counts["given up"] == given_up


def test_of_a_batch_only_those_are_drawn_whose_clients_are_there(client, app):
    left, stays = app.Job("a", **SMALL, left=True), app.Job("b", **SMALL)
    worker = client.app.state.worker
    worker._draw([left, stays])
    assert (left.status, left.pictures) == (499, {}) and stays.status == 200 and stays.outcome["batch"] == 1


def test_no_number_is_no_guidance(client):
    answer = client.post("/pictures", content='{"prompt": "a", "cfg": NaN}', headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422) and "cfg" in answer.json()["error"]


def test_the_page_and_what_is_not_there(client):
    page = client.get("/")
    assert page.status_code == 200 and "EventSource" in page.text and "stock diffusers" in page.text
    assert client.get("/defaults").json() == SMALL
    assert client.get("/jobs/99/events").status_code == 404 and "no job 99" in client.get("/jobs/99/ours.png").json()["error"]


def test_stopping_answers_those_who_wait(app, pipe):
    worker = app.Worker(pipe)
    job = app.Job("a cat", **SMALL)
    worker.submit(job)
    worker._stopping = True
    worker.start()
    worker.stop()
    assert job.status == 503 and not worker.alive
