"""The service's page in Chromium, used as a person would."""

import io
import re
from urllib.parse import urlsplit

import browser
import httpx
import numpy as np
import PIL.Image
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from service import running

from qwen_fast.demo.judge import judge

GREEN, BLUE = "a green circle on a white background", "a blue cross on a yellow background"
PATIENCE = 60_000  # milliseconds, on a busy machine
expect.set_options(PATIENCE)
# What a person can see at each change of the page, however short.
WATCH = """() => {
  window.seen = [];
  const look = () => seen.push({ bar: document.getElementById("bar").value, step: document.getElementById("step").textContent,
    said: document.getElementById("said").textContent, disabled: document.querySelector("button").disabled });
  new MutationObserver(look).observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
}"""


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with running(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser.program(), args=browser.FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(chromium):
    """Opens the page in a window of its own; in the end no page has spoken to another host or complained without a reason."""
    opened, complaints, allowed = [], [], []

    def open_page(service, allow: str = "nothing", **window) -> Page:
        page = chromium.new_context(**window).new_page()
        page.set_default_timeout(PATIENCE)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
        opened.append(page)
        allowed.append(allow)
        page.goto(service.url)
        expect(page.get_by_label("steps")).not_to_have_value("")
        return page

    yield open_page
    for page in opened:
        assert {urlsplit(one.url).hostname for one in page.asked if not one.url.startswith("data:")} == {"127.0.0.1"}
        page.context.close()
    assert [text for text in complaints if not re.search("|".join(allowed), text)] == []


def press(page: Page) -> None:
    page.get_by_role("button", name="Draw").click()


def opened(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.asarray(PIL.Image.open(io.BytesIO(answer.content)), int)


def pictures(page: Page, count: int = 3) -> list[np.ndarray]:
    """The pictures that are shown, once all are there, as the page's own addresses give them."""
    images = page.locator("figure img")
    expect(images).to_have_count(count)
    expect(page.get_by_role("button", name="Draw")).to_be_enabled()
    page.wait_for_function("[...document.images].every(image => image.complete)")
    sizes = images.evaluate_all("all => all.map(image => [image.naturalWidth, image.naturalHeight])")
    asked = [int(page.get_by_label(name).input_value()) for name in ("width", "height")]
    assert sizes == [asked] * count
    urls = images.evaluate_all("all => all.map(image => image.src)")
    return [opened(httpx.get(url)) for url in urls]


def right(picture: np.ndarray, prompt: str) -> bool:
    return judge(picture.astype(np.uint8), prompt).everything


def streams(page: Page) -> int:
    return len([request for request in page.asked if request.resource_type == "eventsource"])


def test_a_picture_with_stock_beside_it(service, visit):
    page = visit(service)
    shown = {name: page.get_by_label(name, exact=True).input_value() for name in ("prompt", "width", "height", "steps", "seed")}
    assert shown == {"prompt": GREEN, "width": "64", "height": "64", "steps": "20", "seed": "0"}
    assert page.get_by_label("with stock diffusers beside it").is_checked()
    page.evaluate(WATCH)
    press(page)
    ours, stock, difference = pictures(page)

    seen = page.evaluate("seen")
    bars = [one["bar"] for one in seen]
    assert bars == sorted(bars) and bars[-1] == 1
    steps = list(dict.fromkeys(one["step"] for one in seen if one["disabled"] and "step" in one["step"]))
    assert steps == [f"{who}, step {step} of 20" for who in ("qwen_fast", "stock diffusers") for step in range(1, 21)]
    half = next(one["bar"] for one in seen if one["step"] == "qwen_fast, step 20 of 20" and one["bar"] >= 0.5)
    assert half == 0.5 and not any(one["said"] for one in seen)
    assert not [one for one in seen if one["step"] and not one["disabled"] and one["bar"] < 1], "the button waits for the end"
    expect(page.get_by_role("progressbar")).to_be_hidden()

    captions = page.locator("figcaption").all_inner_texts()
    apart = np.abs(ours - stock)
    said = rf"qwen_fast, [\d.]+ s\nstock diffusers, [\d.]+ s\n16 x difference, at most {apart.max()} of 255"
    assert re.fullmatch(said, "\n".join(captions)) and apart.max() <= 1
    assert np.array_equal(difference, 16 * apart) and right(ours, GREEN) and right(stock, GREEN)
    page.wait_for_timeout(1500)  # a stream that is not closed would be asked for again
    assert streams(page) == 1


def test_by_keyboard_alone(service, visit):
    """From the prompt through the fields, each by its label; Enter draws, a second one meanwhile does nothing."""
    page = visit(service)
    page.get_by_label("prompt", exact=True).focus()
    typed = [BLUE, "a red square", "96", "80", "19", "3.5", "7"]
    for text in typed:
        page.keyboard.press("Control+A")
        page.keyboard.type(text)
        page.keyboard.press("Tab")
    page.keyboard.press("Space")  # the tick: without stock
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Draw")).to_be_disabled()
    page.keyboard.press("Enter")
    (ours,) = pictures(page, 1)
    assert page.locator("#settings").inner_text() == "96 x 80, 19 steps, guidance 3.5, seed 7"
    (sent,) = [request.post_data_json for request in page.asked if request.method == "POST"]
    names = ["prompt", "negative_prompt", "width", "height", "steps", "cfg", "seed"]
    assert sent == dict(zip(names, [*typed[:2], 96, 80, 19, 3.5, 7], strict=True)) | {"compare": False}
    assert np.abs(ours - opened(httpx.post(f"{service.url}/pictures", json=sent, timeout=60))).max() <= 1


def test_bad_fields_are_told_and_leave_the_pictures_there(service, visit):
    page = visit(service, allow="status of 4(00|13)")
    page.get_by_label("with stock").uncheck()
    press(page)
    pictures(page, 1)
    before = len(page.asked)
    page.get_by_label("width").fill("100")
    press(page)
    assert page.get_by_label("width").evaluate("field => field.validity.stepMismatch && document.activeElement === field")
    page.get_by_label("width").fill("")
    press(page)
    assert len(page.asked) == before, "the browser has sent nothing"

    page.evaluate("form.noValidate = true")
    for name, bad, good, sentence in (
        ("width", "100", "64", "`width` is 100; one patch is 16 pixels, so use a multiple of 16."),
        ("prompt", " ", GREEN, "`prompt` is empty; say what to draw."),
        ("steps", "101", "20", "`steps` is 101; at most 100 are taken here."),
        ("steps", "0", "20", "`num_inference_steps` is 0"),  # found by the library, when its turn has come
    ):
        page.get_by_label(name, exact=True).fill(bad)
        press(page)
        expect(page.get_by_role("alert")).to_contain_text(sentence)
        expect(page.get_by_role("button", name="Draw")).to_be_enabled()
        expect(page.locator("figure")).to_have_count(0 if bad == "0" else 1)
        page.get_by_label(name, exact=True).fill(good)
    press(page)
    pictures(page, 1)
    expect(page.get_by_role("alert")).to_be_empty()


def test_two_pages_at_once_get_their_own_pictures(service, visit):
    pages = [visit(service), visit(service)]
    for prompts in ((GREEN, BLUE), (BLUE, GREEN)):  # the second time in the place of the first
        for page, prompt in zip(pages, prompts, strict=True):
            page.get_by_label("prompt", exact=True).fill(prompt)
            press(page)
        for page, prompt in zip(pages, prompts, strict=True):
            ours, stock, _ = pictures(page)
            assert right(ours, prompt) and right(stock, prompt) and page.locator("h2").inner_text() == prompt


def test_a_prompt_is_text_and_fits_a_telephone(service, visit):
    page = visit(service, allow="status of 422", viewport={"width": 360, "height": 740})
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    prompt = f"<img src=x onerror=alert(1)><b>bold</b> {'w' * 200}"
    page.get_by_label("prompt", exact=True).fill(prompt)
    page.get_by_label("steps").fill("1")
    press(page)
    pictures(page)
    assert page.evaluate(fits)
    assert page.locator("h2").inner_text() == prompt and page.locator("b").count() == 0
    page.get_by_label("seed").fill("9" * 40)
    press(page)
    expect(page.get_by_role("alert")).not_to_be_empty()
    assert page.evaluate(fits)


def test_a_page_loaded_again_goes_on_with_its_picture(service, visit):
    page = visit(service)
    drawn = service.count("drawn")
    page.get_by_label("prompt", exact=True).fill(BLUE)
    page.get_by_label("steps").fill("100")
    press(page)
    expect(page.locator("#step")).to_contain_text("qwen_fast, step")
    page.reload()
    expect(page.get_by_role("button", name="Draw")).to_be_disabled()
    expect(page.locator("#step")).to_contain_text("step")
    ours, *_ = pictures(page)
    assert right(ours, BLUE) and page.locator("h2").inner_text() == BLUE
    assert page.get_by_label("steps").input_value() == "100" and service.count("drawn") == drawn + 1
    page.reload()
    expect(page.get_by_label("steps")).not_to_have_value("")
    assert page.get_by_role("button", name="Draw").is_enabled() and streams(page) == 2


def test_a_connection_that_is_lost_for_a_moment(service, visit):
    page = visit(service, allow="net::ERR_CONNECTION_RESET")
    page.route("**/events", lambda route: route.abort("connectionreset"), times=1)
    page.evaluate(WATCH)
    press(page)
    pictures(page)
    assert "the connection was lost; trying again" in page.evaluate("seen.map(one => one.said)")
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_service_that_goes_and_comes_back(tmp_path, visit):
    with running(tmp_path) as service:
        page = visit(service, allow="net::ERR_")
        page.get_by_label("steps").fill("100")
        press(page)
        expect(page.locator("#step")).to_contain_text("step")
        service.kill()
        alert, button = page.get_by_role("alert"), page.get_by_role("button", name="Draw")
        expect(alert).to_contain_text("the connection was lost and the service does not answer")
        expect(button).to_be_enabled()
        asked = streams(page)
        press(page)
        expect(alert).to_contain_text("the service does not answer: ")
        expect(button).to_be_enabled()
        page.wait_for_timeout(1500)
        assert streams(page) == asked, "it asks no more"
        service.start()
        page.get_by_label("steps").fill("20")
        press(page)
        ours, *_ = pictures(page)
        assert right(ours, GREEN)
        expect(alert).to_be_empty()
