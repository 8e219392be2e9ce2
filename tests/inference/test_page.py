"""The chat page in a real browser, without a window, over a server on this machine.

Chromium is found where the system has it; without one, these tests are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from doge_lm.inference.api import ChatRequest
from doge_lm.inference.slots import Slots
from tests.inference.serving import Serving, serving
from tests.small_model import make_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(
        make_model(tmp_path_factory.mktemp("models") / "small"), slots=1, context=512, api_key="secret"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Browser, server: Serving) -> Iterator[Page]:
    """The page, opened, with the key; a fault of its script, or anything from elsewhere, fails the test."""
    context = browser.new_context(locale="en-US", viewport={"width": 360, "height": 640})  # of a phone
    found = context.new_page()
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
    found.on("request", lambda request: faults.append(request.url) if not ours(request.url, server) else None)
    found.goto(server.url)
    expect(found.locator("#settings")).to_have_attribute("open", "")  # for the key is missing
    found.fill("#api_key", "secret")
    yield found
    context.close()
    assert not faults


def ours(url: str, server: Serving) -> bool:
    return url.startswith(f"{server.url}/")


def sent_by(page: Page) -> list[dict[str, Any]]:
    """The bodies that the page will send, each of which must be of the API's form."""
    bodies: list[dict[str, Any]] = []

    def take(request: Any) -> None:
        if request.method == "POST":
            bodies.append(request.post_data_json)
            ChatRequest.model_validate(bodies[-1])

    page.on("request", take)
    return bodies


def fake_answer(page: Page, *texts: str) -> None:
    """Let the server's answer be these texts, as events."""
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}]} for text in texts]
    events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=events + "data: [DONE]\n\n"),
    )


def test_a_conversation(page: Page, server: Serving) -> None:
    """Two turns with a system prompt and settings, each answer as the API gives it."""
    bodies = sent_by(page)
    page.fill("#system", "Be kind.")
    page.fill("#temperature", "0")
    page.fill("#repetition_penalty", "1")
    page.fill("#max_tokens", "20")
    page.fill("#seed", "5")
    messages = [{"role": "system", "content": "Be kind."}]
    for number, text in enumerate(["Hello\nyou", "And 你?"]):
        page.fill("#input", text)
        if number == 0:
            page.click("#send")
        else:
            page.press("#input", "Enter")
        expect(page.locator(".user")).to_have_count(number + 1)
        expect(page.locator("#send")).to_be_visible(timeout=60_000)
        messages.append({"role": "user", "content": text})
        options = {"temperature": 0, "repetition_penalty": 1, "top_p": 0.95, "max_tokens": 20, "seed": 5}
        assert bodies[-1] == {"model": server.model, "messages": messages, "stream": True, **options}
        reply = server.ask(
            "POST", "/v1/chat/completions", {**bodies[-1], "stream": False}, {"authorization": "Bearer secret"}
        )
        answer = reply.json["choices"][0]["message"]["content"]
        assert page.locator(".assistant").nth(number).evaluate("element => element.textContent") == answer
        messages.append({"role": "assistant", "content": answer})
    expect(page.locator(".note").last).to_have_text("cut off at the most tokens")
    page.click("#new")
    expect(page.locator(".message")).to_have_count(0)


_STOPS_AT_THE_FIRST_WORD = """() => new MutationObserver((_, observer) => {
    if (document.querySelector(".assistant")?.textContent.trim()) {
        observer.disconnect();
        document.getElementById("stop").click();
    }
}).observe(document.body, {childList: true, subtree: true, characterData: true})"""


def test_the_stop_button_ends_an_answer(page: Page, server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Slots.step

    def slow(*args: Any, **kwargs: Any) -> Any:  # else so small a model is done before the browser is told
        time.sleep(0.05)
        return step(*args, **kwargs)

    monkeypatch.setattr(Slots, "step", slow)
    server.headers["authorization"] = "Bearer secret"
    page.fill("#max_tokens", "450")
    page.fill("#input", "Hello")
    # From within the page, at its first word: the whole answer takes a small model less time than a browser's driver.
    page.evaluate(_STOPS_AT_THE_FIRST_WORD)
    page.click("#send")
    expect(page.locator(".note")).to_have_text("stopped", timeout=60_000)
    server.wait_until_idle()
    assert server.metric("doge_lm_written_tokens_total") < 450


def test_what_is_written_is_never_html(page: Page) -> None:
    evil = [
        "<img src=x onerror=document.title='caught'>",
        "<script>document.title='caught'</script>",
        "<b>b</b> & &lt;",
    ]
    fake_answer(page, *evil)
    page.fill("#system", evil[0])
    page.fill("#input", evil[0] + evil[1])
    page.click("#send")
    expect(page.locator(".assistant")).to_have_text("".join(evil))
    expect(page.locator(".user")).to_have_text(evil[0] + evil[1])
    assert page.locator("main img, main script, main b").count() == 0
    assert page.title() == "doge-lm"


def test_a_script_in_the_page_would_not_run(browser: Browser, server: Serving) -> None:
    """Were one there after all, the policy would not let it."""
    page = browser.new_page()
    page.goto(server.url)
    add = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    assert page.evaluate(f"() => {{ {add}; return window.ran }}") is None
    page.close()


def test_errors_are_shown_and_the_question_is_kept(page: Page) -> None:
    page.fill("#api_key", "wrong")
    page.fill("#input", "Hello")
    page.click("#send")
    expect(page.locator(".fault")).to_contain_text("the API key is missing or wrong")
    expect(page.locator("#input")).to_have_value("Hello")
    expect(page.locator(".user")).to_have_count(0)
    page.fill("#api_key", "secret")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "3")
    page.click("#send")
    expect(page.locator(".assistant")).to_have_count(1)
    expect(page.locator("#send")).to_be_visible(timeout=60_000)
    page.fill("#max_tokens", "100000")
    page.fill("#input", "More")
    page.click("#send")
    expect(page.locator(".fault").last).to_contain_text("max_tokens is 100000")


def test_an_answer_that_breaks_off_is_an_error(page: Page) -> None:
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body='data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
        ),
    )
    page.fill("#input", "Hello")
    page.click("#send")
    expect(page.locator(".fault")).to_have_text("Error: the answer broke off")
    expect(page.locator(".assistant")).to_have_text("half")


def test_it_speaks_chinese_and_english(browser: Browser, server: Serving) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(server.url)
    expect(page.locator("#send")).to_have_text("发送")
    page.click("#language")
    expect(page.locator("#send")).to_have_text("Send")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    context.close()


def test_both_languages_have_every_text() -> None:
    script = (Path(__file__).parents[2] / "src/doge_lm/inference/page/chat.js").read_text(encoding="utf-8")
    english, chinese = re.findall(r"^  (?:en|zh): \{(.*?)^  \},", script, flags=re.MULTILINE | re.DOTALL)
    keys = [re.findall(r'(\w+): "[^"]*"', part) for part in (english, chinese)]
    assert keys[0]
    assert sorted(keys[0]) == sorted(keys[1])


def test_it_fits_a_phone(page: Page) -> None:
    """Nothing is wider than the screen, with a long word too, and the field to write in is on it."""
    fake_answer(page, "x" * 3000)
    page.click("summary")
    page.fill("#input", "y" * 500)
    page.click("#send")
    expect(page.locator(".assistant")).to_contain_text("xxx")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#input").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 640
