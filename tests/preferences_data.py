"""Preference rows that a tiny model can learn, for tests that train."""

from __future__ import annotations

import random
from typing import Any


def conversation_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of uneven length; the chosen answer says "good", the rejected one "bad"."""
    dice = random.Random(seed)
    rows = []
    for number in range(count):
        ask = {"role": "user", "content": f"say {number} " + "please " * dice.randint(0, 6)}
        sides = {
            side: [ask, {"role": "assistant", "content": f"{word} " * dice.randint(1, 9)}]
            for side, word in (("chosen", "good"), ("rejected", "bad"))
        }
        rows.append(sides)
    return rows
