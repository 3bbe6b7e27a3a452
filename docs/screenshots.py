"""The pictures in playground.md: `python docs/screenshots.py MODEL_FOLDER`.

Needs playwright, and a Chromium: the system's, or `playwright install chromium`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from browser import chromium_options  # noqa: E402
from served import served  # noqa: E402

PROMPT = "My sourdough comes out dense. What should I change first?"
RESPONSES = [
    "Most often the starter is not active enough. Feed it twice a day at room temperature until "
    "it doubles within six hours, and only then bake with it.",
    "Bread is dense sometimes. Try again.",
    "Use twice the salt, and bake it colder.",
]
SIZES = {
    "desktop": {"width": 1200, "height": 1000},
    "phone": {"width": 375, "height": 812},
}


def main(folder: str) -> None:
    with served(Path(folder)) as rm, sync_playwright() as playwright:
        for n in range(60):
            talks = [f"{PROMPT[: 20 + n % 30]}", RESPONSES[n % 3][: 10 + 2 * n]]
            rm.post("/v1/reward", {"prompt": talks[0], "responses": [talks[1]]})
        browser = playwright.chromium.launch(**chromium_options())
        for name, size in SIZES.items():
            page = browser.new_page(viewport=size, color_scheme="light")
            page.goto(rm.url)
            fill(page)
            file = HERE / f"playground_{name}.png"
            page.screenshot(path=str(file), full_page=True)
            print(file)
        browser.close()


def fill(page: Page) -> None:
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Add a response").click()
    for place, text in enumerate(RESPONSES, 1):
        page.get_by_label(f"Response {place}", exact=True).fill(text)
    page.get_by_role("button", name="Score").click()
    page.get_by_text("has the highest reward").wait_for()
    page.wait_for_timeout(2500)  # until the figures have come


if __name__ == "__main__":
    main(sys.argv[1])
