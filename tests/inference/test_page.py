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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Serving]:
    with serving(place, slots=1, context=512, api_key="secret") as found:
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


def say(page: Page, message: str) -> None:
    """Send a message, and wait for the end of its answer."""
    page.fill("#input", message)
    page.click("#send")
    expect(page.locator("#send")).to_be_visible(timeout=60_000)


def test_a_long_conversation_goes_on_without_its_beginning(browser: Browser, place: Path) -> None:
    """As in `doge-lm chat`; also where the server allows less than the page would ask for."""
    with serving(place, slots=1, context=96, max_tokens=30) as small:
        context = browser.new_context(locale="zh-CN")
        page = context.new_page()
        page.goto(small.url)
        expect(page.locator("#max_tokens")).to_have_attribute("placeholder", "30")
        bodies = sent_by(page)
        for number in range(5):
            say(page, f"{number} words of a question")
            expect(page.locator(".assistant")).to_have_count(number + 1)
        expect(page.locator(".fault")).to_have_count(0)
        notes = [text for text in page.locator(".note").all_text_contents() if "省去" in text]
        assert notes
        left_out = int(notes[-1].partition("：")[2])
        whole = [{"role": "user", "content": "0 words of a question"}]
        assert bodies[0]["messages"] == whole
        assert bodies[0]["max_tokens"] == 30
        assert len(bodies[-1]["messages"]) == 2 * (4 - left_out) + 1
        assert bodies[-1]["messages"][0]["content"] == f"{left_out} words of a question"
        # What does not fit alone is an error, with a hint; what was said before is kept.
        say(page, "word " * 200)
        expect(page.locator(".fault")).to_contain_text("错误：请缩短消息或系统提示")
        expect(page.locator(".user")).to_have_count(5)
        say(page, "again")
        expect(page.locator(".assistant")).to_have_count(6)
        context.close()


def test_the_model_is_looked_up_again_when_it_has_another_name(page: Page, server: Serving) -> None:
    """As after the server was started again with another one."""
    page.evaluate("() => findModel()")
    page.evaluate(
        "() => { model = {...model, id: 'another'}; document.getElementById('model').textContent = 'another' }"
    )
    page.fill("#max_tokens", "3")
    say(page, "Hello")
    expect(page.locator(".fault")).to_have_count(0)
    expect(page.locator(".assistant")).to_have_count(1)
    expect(page.locator("#model")).to_have_text(server.model)


def test_a_question_that_is_stopped_before_a_word_is_not_kept(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Slots.read

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.5)
        return read(*args, **kwargs)

    monkeypatch.setattr(Slots, "read", slow)
    page.fill("#input", "Hello")
    page.evaluate("() => { document.getElementById('send').click(); document.getElementById('stop').click() }")
    expect(page.locator(".note")).to_have_text("stopped before a word was said; the question is not kept")
    expect(page.locator(".user, .assistant")).to_have_count(0)
    expect(page.locator("#input")).to_have_value("Hello")
    assert page.evaluate("() => history.length") == 0


def test_enter_that_ends_composing_sends_nothing(page: Page) -> None:
    """In Safari, where it comes after the composing and is told by its code alone."""
    fake_answer(page, "Hi")
    page.fill("#input", "你好")
    event = "new KeyboardEvent('keydown', {key: 'Enter', keyCode: code})"
    press = f"code => document.getElementById('input').dispatchEvent({event})"
    page.evaluate(press, 229)
    expect(page.locator(".user")).to_have_count(0)
    page.evaluate(press, 13)
    expect(page.locator(".user")).to_have_count(1)


def test_an_error_has_a_hint_in_the_language_of_the_page(browser: Browser, server: Serving) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    page.goto(server.url)
    say(page, "Hello")
    expect(page.locator(".fault").last).to_contain_text("错误：请在“设置”中填写 API 密钥 (the API key")
    page.fill("#api_key", "secret")
    page.fill("#temperature", "9")
    say(page, "Hello")
    expect(page.locator(".fault").last).to_contain_text("错误：请在“设置”中修改：温度")
    context.close()


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
