"""The playground: what it is over HTTP, and in a headless Chromium where there is one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import chromium_options, why_not
from served import Served, served
from starlette.applications import Starlette
from starlette.routing import Mount
from tiny import tiny_qwen2

KEY = "a-key-of-the-tests"
PROMPT = "What is the capital of France?"
ANSWERS = ["The capital of France is Paris.", "I do not know.", "Good."]

needs_browser = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("page") / "rm")


@pytest.fixture(scope="module")
def rm(folder: Path) -> Iterator[Served]:
    with served(folder) as running:
        yield running


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[Served]:
    """With a key, and below a prefix, as Serve mounts it."""
    with served(folder, api_key=KEY, wrap=below_a_prefix) as running:
        yield running


def below_a_prefix(app: Any) -> Starlette:
    return Starlette(routes=[Mount("/models/rm", app=app)])


# ---- over HTTP


def test_the_page_is_one_file_that_asks_nobody_else(rm: Served) -> None:
    reply = httpx.get(f"{rm.url}/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert "://" not in reply.text.replace('createElementNS("http://www.w3.org/2000/svg"', "")
    assert not re.search(r"""\b(src|href)=|@import|url\(|style=|\son\w+=""", reply.text)
    assert "innerHTML" not in reply.text
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"


def test_the_page_is_open_and_what_it_shows_is_not(locked: Served) -> None:
    url = f"{locked.url}/models/rm/"
    assert httpx.get(url).status_code == 200
    assert httpx.get(f"{url}stats").status_code == 401
    headers = {"authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{url}stats", headers=headers).json()["rewards"] == {"count": 0}


def test_the_stats_hold_the_last_rewards_and_no_text(rm: Served) -> None:
    before = httpx.get(f"{rm.url}/stats").json()
    rewards = rm.scorer.score_responses(PROMPT, ANSWERS)
    rm.post("/v1/reward", {"prompt": PROMPT, "responses": ANSWERS})
    reply = httpx.get(f"{rm.url}/stats")
    stats = reply.json()
    assert stats["sequences"] == before["sequences"] + 3
    assert stats["rewards"]["count"] == before["rewards"]["count"] + 3
    assert stats["rewards"]["low"] <= min(rewards) + 1e-5
    assert stats["rewards"]["high"] >= max(rewards) - 1e-5
    assert sum(stats["rewards"]["counts"]) == stats["rewards"]["count"]
    assert "Paris" not in reply.text


# ---- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**chromium_options())
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Any]:
    """A tab in which nothing may go wrong."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    troubles: list[str] = []
    asked: list[str] = []
    page.on("console", lambda m: troubles.append(m.text) if m.type in ("error", "warning") else 0)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.troubles, page.asked = troubles, asked
    yield page
    context.close()
    hosts = {url.split("/")[2] for url in asked}
    assert len(hosts) == 1, f"asked {hosts}"
    # What a browser says of a status that the page handles itself.
    assert [t for t in troubles if "Failed to load resource" not in t] == []


def fill(tab: Any, answers: list[str]) -> None:
    tab.get_by_label("Prompt").fill(PROMPT)
    while tab.get_by_role("textbox", name=re.compile("^Response")).count() < len(answers):
        tab.get_by_role("button", name="Add a response").click()
    for place, text in enumerate(answers, 1):
        tab.get_by_label(f"Response {place}", exact=True).fill(text)


def shown(tab: Any) -> list[tuple[float, float, int]]:
    """Reward, probability to win and tokens of each response."""
    tab.get_by_text("has the highest reward").wait_for()
    found = []
    for item in tab.locator("#results > li").all():
        more = re.match(r"wins ([\d.]+) %, (\d+) tokens", item.locator(".more").inner_text())
        assert more is not None
        reward = float(item.locator(".reward").inner_text())
        found.append((reward, float(more[1]) / 100, int(more[2])))
    return found


@needs_browser
def test_rewards_bars_and_probabilities_are_those_of_the_model(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    fill(tab, ANSWERS)
    tab.get_by_role("button", name="Score").click()
    rows = shown(tab)
    rewards = rm.scorer.score_responses(PROMPT, ANSWERS)
    weights = [math.exp(reward) for reward in rewards]
    for row, reward, weight, answer in zip(rows, rewards, weights, ANSWERS, strict=True):
        assert row[0] == pytest.approx(reward, abs=1e-4)
        assert row[1] == pytest.approx(weight / sum(weights), abs=1e-3)
        assert row[2] == len(rm.scorer.encode_response(PROMPT, answer))
    best = rewards.index(max(rewards))
    assert "best" in tab.locator("#results > li").nth(best).inner_text()
    widths = [bar.bounding_box()["width"] for bar in tab.locator(".fill").all()]
    assert widths[best] == max(widths)
    assert widths == pytest.approx([widths[best] * r / rewards[best] for r in rewards], rel=0.05)
    assert tab.get_by_text("What is served").count() == 1
    tab.get_by_text("What is served").click()
    assert rm.scorer.info["revision"] in tab.locator("#about").inner_text()
    tab.locator("#histogram rect").first.wait_for(state="attached")


@needs_browser
def test_two_responses_are_scored_with_the_keyboard_alone(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    press = tab.keyboard.press
    press("Tab")
    tab.keyboard.type(PROMPT)
    press("Tab")  # the system message, closed
    press("Tab")
    tab.keyboard.press("Tab")  # past the button that removes the first response
    for place, answer in enumerate(ANSWERS[:2]):
        name = tab.evaluate("document.activeElement.id")
        while name != f"response-{place}":
            press("Tab")
            name = tab.evaluate("document.activeElement.id")
        tab.keyboard.type(answer)
    press("Control+Enter")
    rewards = rm.scorer.score_responses(PROMPT, ANSWERS[:2])
    rows = shown(tab)
    assert [row[0] for row in rows] == pytest.approx(rewards, abs=1e-4)
    assert rows[0][1] == pytest.approx(1 / (1 + math.exp(rewards[1] - rewards[0])), abs=1e-3)
    assert tab.locator("#said[aria-live=polite]").inner_text().startswith("Response ")


@needs_browser
def test_a_link_brings_the_texts_back_and_the_server_never_sees_them(rm: Served, tab: Any) -> None:
    odd = ['<img src=x onerror="document.title=1">', "Ünïcode 🙂 & <b>bold</b>"]
    tab.goto(rm.url)
    fill(tab, odd)
    tab.get_by_text("System message").first.click()
    tab.get_by_role("textbox", name="System message").fill("Be brief.")
    tab.get_by_role("button", name="Copy a link").click()
    tab.locator("#linked:not(:empty)").wait_for()
    link = tab.url
    assert "#" in link
    other = tab.context.new_page()
    other.goto(link)
    other.get_by_role("button", name="Score").click()
    rows = shown(other)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
    expected = rm.scorer.score_responses(system, odd)
    assert [row[0] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert other.locator("#results img").count() == 0
    assert other.title() == "raywards"
    assert other.locator("#results > li").first.locator(".text").inner_text() == odd[0]
    assert not any("#" in url for url in tab.asked if "stats" in url)


@needs_browser
def test_a_key_is_asked_for_and_kept_out_of_the_link(locked: Served, tab: Any) -> None:
    tab.goto(f"{locked.url}/models/rm/")
    tab.get_by_label("API key").fill("wrong")
    tab.get_by_role("button", name="Use this key").click()
    tab.get_by_label("API key").wait_for()
    tab.get_by_label("API key").fill(KEY)
    tab.get_by_role("button", name="Use this key").click()
    fill(tab, ANSWERS[:2])
    tab.get_by_role("button", name="Score").click()
    assert len(shown(tab)) == 2
    assert tab.locator("#unlock").is_hidden()
    tab.get_by_role("button", name="Copy a link").click()
    tab.locator("#linked:not(:empty)").wait_for()
    assert KEY not in tab.url
    assert all(url.startswith(f"{locked.url}/models/rm") for url in tab.asked)


@needs_browser
def test_what_the_server_refuses_is_shown_in_its_words(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    fill(tab, ["word " * 2000, "Good."])
    tab.get_by_role("button", name="Score").click()
    told = tab.get_by_role("alert")
    told.filter(has_text="max_length").wait_for()
    assert "responses[0]" in told.inner_text()
    assert tab.get_by_role("button", name="Score").is_enabled()
    tab.get_by_label("Response 1", exact=True).fill("Paris.")
    tab.get_by_role("button", name="Score").click()
    assert len(shown(tab)) == 2
    assert tab.locator("#error").inner_text() == ""


@needs_browser
@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_nothing_is_wider_than_the_screen(rm: Served, tab: Any, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 800})
    tab.goto(rm.url)
    fill(tab, ["x" * 400, *ANSWERS[1:]])
    tab.get_by_role("button", name="Score").click()
    shown(tab)
    tab.get_by_text("What is served").click()
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(rm: Served, chromium: Any, scheme: str) -> None:
    context = chromium.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(rm.url)
    names = ("ground", "card", "ink", "soft", "accent", "on-accent", "best", "bad", "well")
    style = "getComputedStyle(document.documentElement)"
    colours = {n: page.evaluate(f"{style}.getPropertyValue('--{n}').trim()") for n in names}
    context.close()
    pairs = [("ink", "card"), ("ink", "well"), ("ink", "ground"), ("soft", "card"),
             ("soft", "ground"), ("accent", "card"), ("on-accent", "accent"), ("best", "card"),
             ("bad", "card")]  # fmt: skip
    for above, below in pairs:
        assert contrast(colours[above], colours[below]) >= 4.5, (scheme, above, below)


def contrast(first: str, second: str) -> float:
    """Of WCAG 2.2, from two colours as #rrggbb."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
