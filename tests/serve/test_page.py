"""The page of the server, in a real browser."""

import contextlib
import json
import os
import re
import shutil

import pytest
from playwright.sync_api import Error, expect, sync_playwright
from tiny_chat_model import service_of
from web import served

from ttt.serve.http.limits import RateLimits
from ttt.serve.http.metrics import Metrics
from ttt.serve.keys import Keys, NoKeys, add_key

expect.set_options(timeout=30_000)
REFUSED = re.compile("Failed to load resource: the server responded with a status of (400|401|404|429)")


# Not for the session: while Playwright runs, no other test of this process could start an event loop.
@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = "Chromium is not installed (Debian: apt-get install chromium)"
        (pytest.fail if os.environ.get("TTT_REQUIRE_BROWSER") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def page_of(model, store, keys, limits=None):
    """The address of the page of a server of the tiny model."""
    metrics = Metrics()
    with served(service_of(model, store, observer=metrics), keys, limits, metrics=metrics) as url:
        yield f"{url}/"


@contextlib.contextmanager
def opened(browser, address, **options):
    """The page; at the end nothing may have left the server, and nothing unforeseen be on the console."""
    context = browser.new_context(accept_downloads=True, **options)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if line.type in ("error", "warning") else None)
    try:
        page.goto(address)
        yield page
    finally:
        context.close()
    assert [url for url in requests if not url.startswith((address, "data:", f"blob:{address}"))] == []
    # A browser writes a line about each answer with such a status, whatever the page makes of it.
    assert [text for text in complaints if not REFUSED.match(text)] == []


@pytest.fixture
def address(model, tmp_path):
    with page_of(model, tmp_path / "store", NoKeys("ada")) as found:
        yield found


def test_the_page_cannot_be_framed_nor_outlive_the_server_in_a_cache(browser, address):
    with opened(browser, address) as page:
        answer = page.request.get(address)
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        for name in ("", "page/page.js", "page/page.css"):
            headers = page.request.get(address + name).headers
            assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-cache", "nosniff")


def say(page, text):
    page.get_by_label("Your message").fill(text)
    page.get_by_label("Your message").press("Enter")


def learnt(page, updates):
    expect(page.locator("#updates")).to_have_text(str(updates))
    expect(page.locator("#learning")).to_have_text("Learnt.")


def test_who_writes_before_the_page_knows_the_model_is_answered(browser, address):
    with opened(browser, address) as page:
        held, go_on = [], []
        page.route("**/v1/status", lambda route: route.continue_() if go_on else held.append(route))
        page.reload()
        say(page, "My dog is called Biscuit.")
        expect(page.locator(".turn")).to_have_count(2)
        go_on.append(True)
        for route in held:
            with contextlib.suppress(Error):  # the page before the reload does not wait any more
                route.continue_()
        learnt(page, 1)


def answer_with(page, *events):
    """The server answers the next chats with ``events``."""

    def fulfil(route):
        route.fulfill(content_type="text/event-stream", body="".join(f"data: {event}\n\n" for event in events))

    page.route("**/v1/chat/completions", fulfil)


def chunk(text):
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


END = json.dumps({"choices": [], "ttt": {"updates": 0, "version": 0, "learning": "off"}})


def test_a_turn_is_answered_and_what_was_learnt_appears_and_can_be_rolled_back_and_forgotten(browser, address):
    with opened(browser, address) as page:
        expect(page.get_by_text("Nothing was learnt yet. Say something, and it appears here.")).to_be_visible()
        expect(page.get_by_role("button", name="Study")).to_be_disabled()
        say(page, "my dog is Biscuit")
        expect(page.locator(".turn.user .words")).to_have_text("my dog is Biscuit")
        expect(page.locator(".turn.assistant .words")).not_to_be_empty()
        learnt(page, 1)
        expect(page.locator("#taught .said")).to_have_text(["my dog is Biscuit"])
        assert all(
            re.fullmatch(r"[<\d. ]+ %", text)
            for text in page.locator("#taught .measure > :last-child").all_inner_texts()
        )
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".turn")).to_have_count(0)
        say(page, "and my cat is Crumb")
        learnt(page, 2)
        expect(page.locator("#taught .said")).to_have_text(["and my cat is Crumb", "my dog is Biscuit"])
        expect(page.locator("#versions li b")).to_have_text(["Version 2", "Version 1"])

        with page.expect_download() as download:
            page.get_by_role("button", name="Export").click()
        assert download.value.suggested_filename == "ada-adapter.zip"
        page.get_by_role("button", name="Study").click()
        expect(page.locator("#learning")).to_contain_text("Studied 2 messages", timeout=60_000)
        expect(page.locator("#taught .studied")).to_have_count(2)

        back = page.get_by_role("button", name="Roll back to version 1")
        back.click()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#learning")).to_contain_text("Studied")
        back.click()
        page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
        expect(page.locator("#versions li").first).to_contain_text("the same as version 1")
        expect(page.locator("#learning")).to_have_text("Back at version 1.")

        page.get_by_role("button", name="Forget everything").click()
        page.get_by_role("dialog").get_by_role("button", name="Forget everything").click()
        expect(page.locator("#data-note")).to_have_text("Everything was forgotten.")
        expect(page.locator("#taught-empty")).to_be_visible()
        expect(page.locator("#versions li")).to_have_count(0)
        expect(page.get_by_role("button", name="Forget everything")).to_be_disabled()


def test_nothing_is_learnt_with_the_switch_off_and_users_are_apart(browser, address):
    with opened(browser, address) as page:
        page.get_by_label("Learn from what I say").click()
        say(page, "not to be kept")
        expect(page.locator(".turn.assistant .words")).not_to_be_empty()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.locator("#taught-empty")).to_be_visible()
        page.get_by_label("Learn from what I say").click()
        page.get_by_label("User", exact=True).fill("bob")
        page.get_by_role("button", name="Switch").click()
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.locator("#who")).to_contain_text("bob")
        say(page, "I am Bob")
        learnt(page, 1)
        page.get_by_label("User", exact=True).fill("no such/user")
        page.get_by_role("button", name="Switch").click()
        expect(page.locator("#you-error")).to_contain_text("This did not work")


def test_a_server_with_keys_asks_for_one_and_keeps_it_in_the_tab(browser, model, tmp_path):
    key = add_key(tmp_path / "keys.json", "ada")
    with (
        page_of(model, tmp_path / "store", Keys(tmp_path / "keys.json")) as address,
        opened(browser, address) as page,
    ):
        expect(page.get_by_label("API key")).to_be_visible()
        expect(page.locator("#you-error")).to_be_hidden()
        page.get_by_label("API key").fill("wrong")
        page.get_by_role("button", name="Use this key").click()
        expect(page.locator("#you-error")).to_contain_text("does not accept this key")
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        expect(page.locator("#who")).to_contain_text("ada")
        expect(page.locator("#user-form")).to_be_hidden()
        say(page, "I am Ada")
        learnt(page, 1)
        page.reload()
        expect(page.locator("#updates")).to_have_text("1")
        stored = page.context.storage_state()
        assert key not in json.dumps(stored)  # neither a cookie nor in localStorage
        page.get_by_role("button", name="Use another key").click()
        expect(page.get_by_label("API key")).to_be_visible()
        expect(page.locator("#taught li")).to_have_count(0)


def test_html_stays_text(browser, address):
    html = "<img src=x onerror='document.title=1'><b>bold</b><script>document.title=1</script>"
    with opened(browser, address) as page:
        say(page, html)
        learnt(page, 1)
        expect(page.locator("#taught .said")).to_have_text(html)
        answer_with(page, chunk(html[:9]), chunk(html[9:]), END, "[DONE]")
        say(page, "hello")
        expect(page.locator(".turn.assistant .words").last).to_have_text(html)
        assert page.locator("main img, main b:not(#versions b), main script").count() == 0
        assert page.title().startswith("ttt")


def test_errors_are_told_in_words_and_the_message_is_not_lost(browser, model, tmp_path):
    with (
        page_of(model, tmp_path / "store", NoKeys("ada"), RateLimits(3, 0)) as address,
        opened(browser, address) as page,
    ):
        expect(page.locator("#who")).to_contain_text("ada")
        for _ in range(3):
            page.reload()
        say(page, "hello")
        expect(page.locator("#turns .error")).to_contain_text(re.compile(r"Try again in \d+ s"))
        expect(page.get_by_label("Your message")).to_have_value("hello")
        expect(page.locator(".turn")).to_have_count(0)
        status = {"model": "tiny", "user": "ada", "online": 0, "users": []}  # which the limit refused, too
        page.route("**/v1/status", lambda route: route.fulfill(json=status))
        answer_with(page, chunk("half"), json.dumps({"error": {"message": "the server failed: E", "code": None}}))
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.get_by_label("Your message").press("Enter")
        expect(page.locator("#turns .error")).to_contain_text("the server failed: E")
        expect(page.locator(".turn.assistant .words")).to_have_text("half")


def test_an_answer_can_be_stopped_and_shift_enter_starts_a_line(browser, address):
    with opened(browser, address) as page:
        page.route("**/v1/chat/completions", lambda route: None)  # no answer ever comes
        page.get_by_label("Your message").fill("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        expect(page.get_by_label("Your message")).to_have_value("one\ntwo")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        expect(page.get_by_label("Your message")).to_have_value("one\ntwo")
        expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_it_fits(browser, address, width, scheme):
    with opened(browser, address, viewport={"width": width, "height": 800}, color_scheme=scheme) as page:
        say(page, "a" * 200)
        learnt(page, 1)
        chat, panel = page.locator(".chat").bounding_box(), page.locator("aside").bounding_box()
        for box in (chat, panel):
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
        assert (panel["x"] >= chat["x"] + chat["width"]) == (width == 1200)
        assert (panel["y"] >= chat["y"] + chat["height"]) == (width == 400)
        for part in ("#send", "#learn", "#text"):
            box = page.locator(part).bounding_box()
            assert box["x"] >= chat["x"]
            assert box["x"] + box["width"] <= chat["x"] + chat["width"]
