"""What makes many short runs of TRL cheap."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> Iterator[None]:
    """accelerate collects garbage in every `train()`: among all that pytest and torch hold, that
    takes longer than six steps of a tiny model. What is there already is set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
