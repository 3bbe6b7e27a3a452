"""The pictures in playground.md: `python docs/screenshots.py [FOLDER]`.

They are of a tiny model that is taught, on the spot, what to think of the few texts that it is
asked about. With a FOLDER, pictures of more widths go there, in light and dark, to look at.

Needs playwright, and a Chromium: the system's, or `playwright install chromium`.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from playwright.sync_api import Page, sync_playwright
from transformers import AutoModelForSequenceClassification

from raywards.scorer import Scorer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from browser import chromium_options  # noqa: E402
from served import Served, served  # noqa: E402
from tiny import tiny_qwen2  # noqa: E402

PROMPT = "My sourdough comes out dense. What should I change first?"
RESPONSES = {
    "Most often the starter is not active enough. Feed it twice a day at room temperature until "
    "it doubles within six hours, and only then bake with it.": 2.3,
    "Bread is dense sometimes. Try again.": 0.4,
    "Use twice the salt, and bake it colder.": -1.1,
}
NUM_OTHERS = 96
STEPS = 100
SIZES = {
    "desktop": {"width": 1200, "height": 700},
    "phone": {"width": 375, "height": 812},
}
WIDTHS = (320, 360, 768, 1440)


def main(folder: Path | None) -> None:
    others = _others()
    texts = [*((PROMPT, text, reward) for text, reward in RESPONSES.items()), *others]
    with (
        tempfile.TemporaryDirectory() as room,
        served(_taught(Path(room) / "helpful", texts), name="helpful") as rm,
        sync_playwright() as playwright,
    ):
        for prompt, response, _ in others:
            rm.post("/v1/reward", {"prompt": prompt, "responses": [response]})
        browser = playwright.chromium.launch(**chromium_options())
        for name, size in SIZES.items():
            is_phone = name == "phone"
            page = browser.new_page(viewport=size, has_touch=is_phone, is_mobile=is_phone)
            _score(page, rm, others)
            _take(page, HERE / f"playground_{name}.png")
        for width, scheme in product(WIDTHS if folder else (), ("light", "dark")):
            is_phone, size = width < 480, {"width": width, "height": 700}
            page = browser.new_page(
                viewport=size, color_scheme=scheme, has_touch=is_phone, is_mobile=is_phone
            )
            _score(page, rm, others)
            page.get_by_text("What is served").click()
            assert folder is not None
            _take(page, folder / f"{width}_{scheme}.png")
        browser.close()


def _others() -> list[tuple[str, str, float]]:
    """What was scored before: prompts, responses, rewards."""
    draw = random.Random(0)
    words = " ".join(RESPONSES).split()
    return [
        (PROMPT, " ".join(draw.choices(words, k=8)), draw.gauss(0.6, 1.0))
        for _ in range(NUM_OTHERS)
    ]


def _taught(folder: Path, texts: Sequence[tuple[str, str, float]]) -> Path:
    """A tiny model with these rewards, about."""
    torch.set_num_threads(1)  # so small a model gains nothing from more
    scorer = Scorer.from_pretrained(tiny_qwen2(folder), device="cpu")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    encoded = [(scorer.encode_response(prompt, text), reward) for prompt, text, reward in texts]
    for _ in range(STEPS):
        for start in range(0, len(encoded), 32):
            part = encoded[start : start + 32]
            longest = max(len(ids) for ids, _ in part)
            ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in part])
            mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r, _ in part])
            rewards = model(input_ids=ids, attention_mask=mask).logits[:, 0]
            wanted = torch.tensor([reward for _, reward in part])
            torch.nn.functional.mse_loss(rewards, wanted).backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def _score(page: Page, rm: Served, others: Sequence[tuple[str, str, float]]) -> None:
    page.goto(rm.url)
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_role("button", name="Add a response").click()
    for place, text in enumerate(RESPONSES, 1):
        page.get_by_label(f"Response {place}", exact=True).fill(text)
    page.get_by_role("button", name="Score").click()
    page.get_by_text("has the highest reward").wait_for()
    for n in range(25):  # until the figures have come, and of a server that has something to do
        some = random.Random(n).sample(others, 12)
        rm.post("/v1/reward", {"prompt": PROMPT, "responses": [text for _, text, _ in some]})
        page.wait_for_timeout(100)


def _take(page: Page, file: Path) -> None:
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    height = page.evaluate("document.documentElement.scrollHeight")
    assert page.viewport_size is not None
    # Not `full_page`: for that, Chromium takes the finger for a mouse.
    page.set_viewport_size({"width": page.viewport_size["width"], "height": height})
    page.wait_for_timeout(200)
    page.screenshot(path=str(file))
    page.close()
    print(file)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
