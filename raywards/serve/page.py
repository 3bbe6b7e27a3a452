"""The playground at `GET /`: one HTML file, and the headers that keep it to itself."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

# Everything on the page is in the file; it asks this server alone, and nobody may frame it.
_POLICY = (
    "default-src 'none'; script-src {script}; style-src {style}; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def page() -> str:
    """The HTML."""
    return files("raywards.serve").joinpath("page.html").read_text(encoding="utf-8")


@cache
def page_headers() -> dict[str, str]:
    """Scripts and styles are those of the file, by their digests, and no others."""
    digests = {
        tag: " ".join(map(_digest, re.findall(rf"<{tag}>(.*?)</{tag}>", page(), re.DOTALL)))
        for tag in ("script", "style")
    }
    return {
        "content-security-policy": _POLICY.format(**digests),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
