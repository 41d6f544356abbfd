"""Quick tests first, the whole stack last: a mistake shows in seconds, not after the minute that the stack takes."""

from __future__ import annotations

from pathlib import Path

import pytest

E2E = Path(__file__).parent / "e2e"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (E2E in item.path.parents, item.get_closest_marker("slow") is not None))
