"""Where Chromium is, for the tests of the page."""

from __future__ import annotations

import importlib.util
import shutil
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_options() -> dict[str, Any]:
    """How playwright starts it: the system's, or else playwright's own."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    options: dict[str, Any] = {"args": ["--no-sandbox"]}
    return {**options, "executable_path": found} if found else options


def why_not() -> str | None:
    """What lacks here, and how to have it; None where a browser can be started."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: pip install -e '.[dev]'"
    if any(map(shutil.which, _NAMES)):
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        if shutil.which(playwright.chromium.executable_path):
            return None
    return "no Chromium: playwright install chromium, or apt install chromium"
