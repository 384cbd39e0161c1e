"""The service as a process: clients that leave, and its end."""

import signal
import threading
import time

import httpx
import pytest
from service import running

PROMPT = "a green circle on a white background"


@pytest.fixture
def service(tmp_path):
    with running(tmp_path) as service:
        yield service


def wait_for(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def test_pictures_whose_clients_have_left_are_given_up(service):
    """One is being drawn and one waits; then the next client is served at once."""

    def waiting(count: int) -> bool:
        return f"qwen_fast_waiting {count}\n" in httpx.get(f"{service.url}/metrics").text

    def leave(steps: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            body = {"prompt": PROMPT, "width": 1024, "height": 1024, "steps": steps}  # minutes on two cores
            httpx.post(f"{service.url}/pictures", json=body, timeout=2)

    clients = [threading.Thread(target=leave, args=(steps,)) for steps in (99, 100)]
    for client in clients:
        client.start()
    wait_for(lambda: waiting(1))
    for client in clients:
        client.join()
    answer = httpx.post(f"{service.url}/pictures", json={"prompt": PROMPT}, timeout=60)
    assert answer.status_code == 200
    assert (service.count("given up"), service.count("drawn")) == (2, 1)


@pytest.mark.parametrize(("signalled", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)], ids=["TERM", "INT"])
def test_a_stop_finishes_the_picture_at_hand_and_tells_those_who_wait(service, signalled, code):
    answers, body = [], {"prompt": PROMPT, "width": 256, "height": 256}

    def ask() -> None:
        answers.append(httpx.post(f"{service.url}/pictures", json=body, timeout=120))

    first = httpx.post(f"{service.url}/jobs", json=body | {"steps": 100}).json()["id"]
    with httpx.stream("GET", f"{service.url}/jobs/{first}/events", timeout=120) as events:
        lines = events.iter_lines()
        next(line for line in lines if line == "event: progress")
        asking = threading.Thread(target=ask)
        asking.start()
        wait_for(lambda: "qwen_fast_waiting 1\n" in httpx.get(f"{service.url}/metrics").text)
        service.process.send_signal(signalled)
        assert "event: done" in list(lines)
    asking.join()
    assert answers[0].status_code == 503 and "shutting down" in answers[0].json()["error"]
    assert service.process.wait(30) == code
    assert "Traceback" not in service.log.read_text()
