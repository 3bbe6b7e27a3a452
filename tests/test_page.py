"""The playground: what it is over HTTP, and in a headless Chromium where there is one."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import chromium_options, why_not
from served import Served, served
from starlette.applications import Starlette
from starlette.routing import Mount
from tiny import tiny_qwen2

from raywards.serve.dialects import ScoredItem, ScoringRequest, ScoringResult
from raywards.serve.traffic import Traffic

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
    text = reply.text.replace('<link rel="icon" href="data:image/svg+xml,', "")
    assert len(text) < len(reply.text)
    assert not re.search(r"""\b(src|href)=|@import|url\(|style=|\son\w+=""", text)
    assert "innerHTML" not in reply.text
    policy = reply.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "; img-src data:; connect-src 'self'; " in policy
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
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
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
    assert tab.locator("#about").get_by_title(rm.scorer.info["revision"]).is_visible()
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
    rows = shown(other)  # without a click
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
    told = tab.locator("#unlock").get_by_role("alert")
    told.filter(has_text="does not accept this key").wait_for()
    assert tab.evaluate("document.activeElement.id") == "key"
    tab.wait_for_timeout(2500)
    assert "does not accept" in told.inner_text(), "what is polled meanwhile wiped it away"
    assert tab.locator("#unlock").get_by_label("API key").input_value() == "wrong"
    tab.get_by_label("API key").fill(KEY)
    tab.get_by_role("button", name="Use this key").click()
    fill(tab, ANSWERS[:2])
    tab.get_by_role("button", name="Score").click()
    assert len(shown(tab)) == 2
    assert tab.locator("#unlock").is_hidden()
    assert tab.locator("#model").inner_text() == "rm"
    tab.get_by_role("button", name="Copy a link").click()
    tab.locator("#linked:not(:empty)").wait_for()
    assert KEY not in tab.url
    assert all(url.startswith(f"{locked.url}/models/rm") for url in tab.asked)


@needs_browser
def test_what_the_server_refuses_is_shown_in_its_words(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    fill(tab, ANSWERS[:2])
    tab.get_by_role("button", name="Score").click()
    assert len(shown(tab)) == 2
    fill(tab, ["word " * 2000, "Good."])
    tab.get_by_role("button", name="Score").click()
    told = tab.get_by_role("alert")
    told.filter(has_text="max_length").wait_for()
    assert tab.locator("#results > li").count() == 0, "old results stand beside the error"
    assert tab.get_by_text("Scored by").count() == 0
    assert told.inner_text().startswith("Response 1: ")
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
    names = ("ground", "card", "ink", "soft", "accent", "on-accent", "best", "bad", "well",
             "edge", "bar")  # fmt: skip
    style = "getComputedStyle(document.documentElement)"
    colours = {n: page.evaluate(f"{style}.getPropertyValue('--{n}').trim()") for n in names}
    edges = (
        "[...document.querySelectorAll('button, input, textarea')].map(shown => getComputedStyle"
    )
    borders = page.evaluate(f"{edges}(shown).borderColor)")
    context.close()
    pairs = [("ink", "card"), ("ink", "well"), ("ink", "ground"), ("soft", "card"),
             ("soft", "ground"), ("accent", "card"), ("on-accent", "accent"), ("best", "card"),
             ("bad", "card")]  # fmt: skip
    for above, below in pairs:
        assert contrast(colours[above], colours[below]) >= 4.5, (scheme, above, below)
    # What one must see to know that it is there: WCAG 2.2, 1.4.11.
    pairs = [("edge", "card"), ("edge", "well"), ("accent", "ground"), ("bar", "card"),
             ("bar", "well"), ("best", "well")]  # fmt: skip
    for above, below in pairs:
        assert contrast(colours[above], colours[below]) >= 3, (scheme, above, below)
    assert len(borders) >= 10
    assert {as_hex(border) for border in borders} <= {colours["edge"], colours["accent"]}


def as_hex(colour: str) -> str:
    """Of `rgb(1, 2, 3)`."""
    return "#" + "".join(f"{int(part):02x}" for part in re.findall(r"\d+", colour)[:3])


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


# ---- keys, screens and readers


@needs_browser
def test_the_focus_stays_and_one_request_at_a_time_is_sent(rm: Served, tab: Any) -> None:
    held: list[Any] = []
    tab.route("**/v1/reward", lambda route: held.append(route))
    tab.goto(rm.url)
    fill(tab, ANSWERS[:2])
    button = tab.get_by_role("button", name="Score")
    button.focus()
    tab.keyboard.press("Enter")
    tab.locator("#score[aria-disabled=true]").wait_for()
    tab.keyboard.press("Enter")
    tab.keyboard.press("Control+Enter")
    assert tab.evaluate("document.activeElement.id") == "score"
    assert tab.get_by_text("Scoring").is_visible()
    held[0].continue_()
    assert len(shown(tab)) == 2
    assert len(held) == 1
    assert tab.evaluate("document.activeElement.id") == "score"
    assert button.is_enabled()


@needs_browser
def test_who_removes_a_response_stands_at_the_one_that_took_its_place(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    fill(tab, ANSWERS)
    tab.get_by_role("button", name="Remove response 2").press("Enter")
    assert tab.evaluate("document.activeElement.id") == "response-1"
    assert tab.get_by_label("Response 2", exact=True).input_value() == ANSWERS[2]
    tab.get_by_role("button", name="Remove response 2").press("Enter")
    assert tab.evaluate("document.activeElement.id") == "response-0"


@needs_browser
@pytest.mark.parametrize("width", [320, 375, 768, 1200])
def test_each_result_uses_the_width_that_it_has(rm: Served, tab: Any, width: int) -> None:
    tab.set_viewport_size({"width": width, "height": 800})
    tab.goto(rm.url)
    fill(tab, ANSWERS)
    tab.get_by_role("button", name="Score").click()
    shown(tab)
    for item in tab.locator("#results > li").all():
        name, reward, text = (
            item.locator(part).bounding_box() for part in (".name", ".reward", ".text")
        )
        assert name["height"] < 30, "the heading is broken"
        assert abs(name["y"] - reward["y"]) < 5
        assert text["width"] >= 190
        if width <= 480:
            assert text["width"] > 0.95 * item.bounding_box()["width"]


@needs_browser
def test_bars_are_seen_where_the_system_chooses_the_colours(rm: Served, chromium: Any) -> None:
    context = chromium.new_context(forced_colors="active", reduced_motion="reduce")
    page = context.new_page()
    page.goto(rm.url)
    fill(page, ANSWERS)
    page.get_by_role("button", name="Score").click()
    shown(page)
    for bar, behind in ((".fill", ".track"), ("#histogram rect", "#histogram")):
        own, other = (
            page.locator(place).first.evaluate(
                "(shown) => { const style = getComputedStyle(shown);"
                "return shown.matches('rect') ? style.fill : style.backgroundColor; }"
            )
            for place in (bar, behind)
        )
        assert contrast(as_hex(own), as_hex(other)) >= 3, (bar, own, other)
    context.close()


@needs_browser
@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_on_a_phone_the_results_come_into_view(rm: Served, chromium: Any, motion: str) -> None:
    size = {"width": 360, "height": 640}
    context = chromium.new_context(viewport=size, reduced_motion=motion)
    page = context.new_page()
    page.add_init_script(
        "const old = Element.prototype.scrollIntoView; window.scrolls = [];"
        "Element.prototype.scrollIntoView = function (how) {"
        "  scrolls.push(how); old.call(this, how); }"
    )
    page.goto(rm.url)
    fill(page, ANSWERS)
    page.get_by_role("button", name="Score").click()
    shown(page)
    page.wait_for_function(
        "document.querySelector('#results').getBoundingClientRect().top < innerHeight - 150"
    )
    behavior = "auto" if motion == "reduce" else "smooth"
    asked = page.evaluate("scrolls")
    assert {"block": "nearest", "behavior": behavior} in asked
    context.close()


@needs_browser
def test_fingers_have_room(rm: Served, tab: Any, chromium: Any) -> None:
    context = chromium.new_context(
        viewport={"width": 375, "height": 812}, has_touch=True, is_mobile=True
    )
    phone = context.new_page()
    for page, least in ((tab, 24), (phone, 44)):
        page.goto(rm.url)
        for button in page.locator("#ask").get_by_role("button").all():
            box = button.bounding_box()
            assert min(box["width"], box["height"]) >= least, button.inner_text()
    assert tab.get_by_text("Ctrl + Enter").is_visible()
    assert phone.get_by_text("Ctrl + Enter").is_hidden()
    context.close()


@needs_browser
def test_the_icon_is_in_the_page_and_the_policy_lets_it_be_shown(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    width = tab.evaluate(
        "new Promise((done, failed) => { const icon = new Image(); icon.onerror = failed;"
        "icon.onload = () => done(icon.naturalWidth);"
        "icon.src = document.querySelector('link[rel=icon]').href; })"
    )
    assert width > 0


@needs_browser
def test_results_are_a_list_to_a_reader(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    # WebKit takes the role from a list without bullets.
    assert tab.locator("#results").get_attribute("role") == "list"
    assert "list-style: none" in tab.content()


# ---- what is shown


@needs_browser
def test_who_is_equal_is_not_called_best(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    worst, best, _ = sorted(zip(rm.scorer.score_responses(PROMPT, ANSWERS), ANSWERS, strict=True))
    fill(tab, [best[1], worst[1], best[1]])
    tab.get_by_role("button", name="Score").click()
    tab.get_by_text("2 responses are equal").wait_for()
    assert [tag.inner_text() for tag in tab.locator("#results .tag").all()] == ["equal", "equal"]
    assert tab.locator("#results > li").nth(1).locator(".tag").count() == 0
    assert tab.locator(".best").count() == 0


@needs_browser
def test_a_response_alone_wins_against_nobody(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    tab.get_by_role("button", name="Remove response 2").click()
    fill(tab, ANSWERS[:1])
    tab.get_by_role("button", name="Score").click()
    tab.get_by_text("The reward is").wait_for()
    text = tab.locator("#results").inner_text()
    assert "wins" not in text
    assert "best" not in text


@needs_browser
def test_the_answering_model_and_its_revision_are_shown(rm: Served, tab: Any) -> None:
    tab.goto(rm.url)
    fill(tab, ANSWERS[:2])
    tab.get_by_role("button", name="Score").click()
    revision = rm.scorer.info["revision"]
    told = tab.get_by_text("Scored by")
    told.wait_for()
    assert told.inner_text() == f"Scored by rm, revision {short(revision)}."
    assert told.get_attribute("title") == revision
    # A new version: the page asks again what is served.
    new = "sha256:" + "ab" * 32
    rm.scorer.info["revision"] = new
    try:
        tab.get_by_role("button", name="Score").click()
        tab.locator("#answered").filter(has_text="abababababab").wait_for()
        tab.get_by_text("What is served").click()
        tab.locator("#about").get_by_title(new).wait_for()
        # A canary answers in its place.
        rm.service.traffic = Traffic(canary=Other(), canary_share=1.0)
        tab.get_by_role("button", name="Score").click()
        told.filter(has_text="Scored by other").wait_for()
        assert "in place of rm" in told.inner_text()
    finally:
        rm.scorer.info["revision"] = revision
        rm.service.traffic = Traffic()


class Other:
    """Another model: its rewards are a hundred and one."""

    async def score(self, request: ScoringRequest) -> ScoringResult:
        items = [ScoredItem(101.0, 3) for _ in request.items]
        return ScoringResult(items, "other", "sha256:" + "cd" * 32, 0.0, 0.0, 0.0, 1)

    async def stream(self, request: ScoringRequest) -> AsyncGenerator[tuple[int, ScoredItem], None]:
        for position, item in enumerate((await self.score(request)).items):
            yield position, item


@needs_browser
def test_a_link_waits_for_the_key_and_for_texts(locked: Served, tab: Any) -> None:
    tab.goto(f"{locked.url}/models/rm/")
    tab.get_by_label("API key").fill(KEY)
    tab.get_by_role("button", name="Use this key").click()
    tab.locator("#unlock").wait_for(state="hidden")
    scored = [url for url in tab.asked if url.endswith("reward")]
    assert scored == []
    fill(tab, ANSWERS[:2])
    tab.get_by_role("button", name="Copy a link").click()
    tab.locator("#linked:not(:empty)").wait_for()
    link = tab.url
    tab.reload()  # the tab has the key
    assert len(shown(tab)) == 2
    other = tab.context.new_page()  # this one has not
    asked: list[str] = []
    other.on("request", lambda request: asked.append(request.url))
    other.goto(link)
    other.get_by_label("API key").wait_for()
    assert other.get_by_label("Response 1", exact=True).input_value() == ANSWERS[0]
    assert not any(url.endswith("reward") for url in asked)


@needs_browser
def test_what_is_served_is_told_in_rows(rm: Served, tab: Any) -> None:
    digest = "sha256:" + "ef" * 32
    adapter = {"model": "adapters/polite", "revision": digest, "bound": 0.5, "training": None}
    training = {f"entry_{n}": n for n in range(20)} | {"sources": {"chats": 12345}}

    def with_more(route: Any) -> None:
        info = route.fetch().json()
        more = {"bound": 0.0123, "adapters": {"polite": adapter}, "training": training}
        route.fulfill(json=info | more)

    rm.service.traffic = Traffic(others={"safety": Other()})
    try:
        tab.route("**/info", with_more)
        tab.goto(rm.url)
        tab.get_by_text("What is served").click()
        about = tab.locator("#about")
        about.get_by_text("Qwen2ForSequenceClassification").wait_for()
        text = about.inner_text()
        for word in ("{", "[", '"', "undefined", "null"):
            assert word not in text.replace("<|im_end|>", "")
        rendering = rm.scorer.info["rendering"]
        for full in (rendering["fingerprint"], rm.scorer.info["revision"], digest):
            assert full not in text
            assert about.get_by_title(full).inner_text() == f"{short(full)}…"
        assert row(about, "max_body_bytes") == "16,777,216"
        assert row(about, "Rewards agree within").startswith("0.0123")
        assert row(about, "Other models") == "safety"
        assert row(about, "Folder") == "adapters/polite"
        assert about.get_by_text("12,345").is_hidden()
        about.get_by_text("21 entries").click()
        assert about.get_by_text("12,345").is_visible()
    finally:
        rm.service.traffic = Traffic()


def row(about: Any, name: str) -> str:
    found = about.get_by_role("term").filter(has_text=re.compile(f"^{name}$")).first
    text: str = found.locator("xpath=following-sibling::dd").inner_text()
    return text


def short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


@needs_browser
def test_the_live_figures_are_those_of_the_stats(folder: Path, tab: Any) -> None:
    with served(folder) as rm:
        tab.goto(rm.url)
        figures = tab.locator("#total").filter(has_text="0")
        figures.wait_for()
        assert tab.get_by_text("There are no rewards yet").is_visible()
        assert tab.locator("#histogram").is_hidden()
        rm.post("/v1/reward", {"prompt": PROMPT, "responses": ANSWERS})
        tab.locator("#total").filter(has_text="3").wait_for()
        assert float(tab.locator("#rate").inner_text()) > 0
        assert tab.get_by_text("There are no rewards yet").is_hidden()
        rewards = rm.http.get("/stats").json()["rewards"]
        assert heights(tab) == scaled(rewards["counts"])
        assert tab.locator("#low").inner_text() == f"{rewards['low']:.2f}"
        assert tab.locator("#high").inner_text() == f"{rewards['high']:.2f}"
        told = tab.locator("#histogram-text").inner_text()
        mean, std = rewards["mean"], rewards["std"]
        assert told == f"3 rewards, mean {mean:.3f}, standard deviation {std:.3f}."
        assert tab.locator("#replica").inner_text() == ""

        def with_a_queue(route: Any) -> None:
            route.fulfill(json=route.fetch().json() | {"queued_sequences": 1234})

        tab.route("**/stats", with_a_queue)
        tab.locator("#waiting").filter(has_text="1,234").wait_for()
        tab.unroute("**/stats")
        tab.locator("#waiting").filter(has_text=re.compile("^0$")).wait_for()


def heights(tab: Any) -> list[float]:
    bars = tab.locator("#histogram rect").all()
    return [pytest.approx(float(bar.get_attribute("height")), abs=1e-3) for bar in bars]


def scaled(counts: list[int]) -> list[float]:
    return [38 * count / max(counts) for count in counts]


@needs_browser
def test_the_figures_of_replicas_that_answer_in_turn_are_added(folder: Path, tab: Any) -> None:
    with served(folder) as one, served(folder) as two:
        both, turns, shown_totals = (one, two), [], set()
        one.post("/v1/reward", {"prompt": PROMPT, "responses": ANSWERS})
        two.post("/v1/reward", {"prompt": "Hi", "responses": ["Good.", "A longer one."]})

        def in_turn(route: Any) -> None:
            turns.append(both[len(turns) % 2])
            route.fulfill(response=route.fetch(url=f"{turns[-1].url}/stats"))

        tab.route("**/stats", in_turn)
        tab.clock.install()
        tab.goto(one.url)
        for _ in range(6):
            poll_once(tab)
            if len(turns) > 2:
                shown_totals.add(tab.locator("#total").inner_text())
        assert shown_totals == {"5"}, "it jumps between the replicas"
        assert tab.locator("#rate").inner_text() == "0.0"
        one.post("/v1/reward", {"prompt": PROMPT, "responses": ANSWERS})
        for _ in range(2):
            poll_once(tab)
        assert tab.locator("#total").inner_text() == "8"
        assert float(tab.locator("#rate").inner_text()) == pytest.approx(3 / 4, abs=0.1)
        assert "2 replicas together" in tab.locator("#replica").inner_text()
        rewards = [each.http.get("/stats").json()["rewards"] for each in both]
        known = [*one.scorer.score_responses(PROMPT, ANSWERS)] * 2
        known += two.scorer.score_responses("Hi", ["Good.", "A longer one."])
        told = tab.locator("#histogram-text").inner_text()
        numbers = [float(number) for number in re.findall(r"-?\d+\.?\d*", told.rstrip("."))]
        expected = [8, statistics.fmean(known), statistics.pstdev(known)]
        assert numbers == pytest.approx(expected, abs=1e-3)
        assert tab.locator("#low").inner_text() == f"{min(r['low'] for r in rewards):.2f}"
        assert tab.locator("#high").inner_text() == f"{max(r['high'] for r in rewards):.2f}"
        # A replica that is gone is counted no more.
        both = (one, one)
        for _ in range(45):
            poll_once(tab)
        assert tab.locator("#total").inner_text() == "6"


def poll_once(tab: Any) -> None:
    """Under a clock that the test holds."""
    with tab.expect_response("**/stats"):
        tab.clock.run_for(2000)
    tab.wait_for_timeout(50)
